"""The laws of lorafit.kernels.native: which kernels work, and how they are chosen."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafit.errors import ConfigError
from lorafit.kernels import native

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test loads the library anew, with nothing asked for; what was in use before is in use after."""
    before = native.describe()[0]
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native._library.cache_clear()
    native.use(native.paths()[0])
    yield
    monkeypatch.undo()
    native._library.cache_clear()
    if before != "plain torch":
        native.use(before)


def test_the_best_path_is_taken() -> None:
    """`make test` builds the library; paths come best first, the portable one last, and the first is in use."""
    paths = native.paths()
    assert paths == [path for path in ("avx512_bf16", "avx512", "avx2", "neon", "portable") if path in paths]
    assert paths[-1] == "portable"
    assert native.describe() == (paths[0], f"the best of {', '.join(paths)} that this processor has")


def test_paths_are_what_the_processor_has() -> None:
    """A path is there if and only if Linux names its instructions among the processor's."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {"avx512_bf16": {*avx512, "avx512_bf16"}, "avx512": avx512, "avx2": {"avx2", "fma", "f16c"}}
    needs |= {"neon": {"asimd"}, "portable": set()}
    assert set(native.paths()) == {path for path, needed in needs.items() if needed <= flags}


def test_a_path_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """LORAFIT_NATIVE=path takes that path and is the reason given; =1 asks for nothing else than the best."""
    for asked, got in [*((path, path) for path in native.paths()), ("1", native.paths()[0])]:
        native.use(native.paths()[0])
        monkeypatch.setenv(native.VARIABLE, asked)
        native._library.cache_clear()
        assert native.describe() == (got, f"LORAFIT_NATIVE={asked}")


def test_plain_torch_is_asked_for_by_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """LORAFIT_NATIVE=0 leaves the library out."""
    monkeypatch.setenv(native.VARIABLE, "0")
    native._library.cache_clear()
    assert native.library() is None
    assert native.paths() == []
    assert native.describe() == ("plain torch", "LORAFIT_NATIVE=0")


def test_a_wrong_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name is an error of one line, each time, that gives the names there are."""
    names = ",".join(native.paths())
    monkeypatch.setenv(native.VARIABLE, "sse9")
    native._library.cache_clear()
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            native.library()
        assert "LORAFIT_NATIVE" in str(raised.value)
        assert "'sse9'" in str(raised.value)
        assert f"give 0 or one of {names}" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_without_the_library_plain_torch_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without a compiler there is no file: plain torch, and what to do about it."""
    monkeypatch.setattr(native, "_file", lambda: None)
    native._library.cache_clear()
    assert native.library() is None
    assert native.paths() == []
    kernels, why = native.describe()
    assert kernels == "plain torch"
    assert why == "lorafit was installed without a C++ compiler: install one, then install lorafit again"


def test_threads_are_torchs() -> None:
    """One OpenMP team serves torch and the library."""
    assert native.library() is not None
    assert native.shares_threads()


def test_the_structure_is_that_of_c() -> None:
    """The fields' names and order are those of lorafit.h, the size the one that lorafit.cpp asserts."""
    body = re.search(r"typedef struct \{(.*?)\} lorafit_weight;", (NATIVE / "lorafit.h").read_text(), re.DOTALL)
    assert body
    names = re.findall(r"(\w+)[,;]", re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL))
    assert names == [name for name, _ in native.Weight._fields_]
    size = re.search(r"sizeof\(lorafit_weight\) == (\d+)", (NATIVE / "lorafit.cpp").read_text())
    assert size
    assert ctypes.sizeof(native.Weight) == int(size[1])


def test_a_path_is_taken_for_a_run_and_auto_means_the_best_again() -> None:
    """`use` takes effect at once, the twins too; a path that is not here is refused in one line."""
    for path in [*native.paths(), native.PLAIN]:
        native.use(path)
        assert native.path() == path
        assert (native.library() is None) == (path == native.PLAIN)
        assert native.best() == native.paths()[0]
    absent = next(path for path in ("neon", "avx2") if path not in native.paths())
    with pytest.raises(ConfigError, match=f"^--kernels: {absent}, and this machine has "):
        native.use(absent)
    native.use(native.best())
