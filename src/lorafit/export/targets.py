"""`lorafit export`: an adapter in the files of another program, loaded there and compared before they are kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit import console
from lorafit.adapter.attach import detach
from lorafit.adapter.combine import LowRank
from lorafit.adapter.file import FILES, TEMPLATE_FILE, load_adapter, save_adapter
from lorafit.adapter.merge import low_rank, put_factors
from lorafit.adapter.peft_experts import fused_only
from lorafit.errors import AdapterError, ConfigError
from lorafit.export.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from lorafit.export.gguf_model import merged_file
from lorafit.export.merge import Exact, Rounding
from lorafit.export.mlx import read_mlx, write_mlx
from lorafit.export.ollama import modelfile
from lorafit.export.opened import EXACT, Opened, about, open_model
from lorafit.export.paths import nothing_left, refuse_existing
from lorafit.export.placement import placement
from lorafit.export.portable import portable
from lorafit.export.probes import Probe, log_probabilities, probes
from lorafit.export.text_files import write_tokenizer
from lorafit.export.verify import (
    OURS,
    Ours,
    Verdict,
    against_llama,
    merged_against_llama,
    ours,
    rounding_facts,
    rounding_steps,
    say_missing,
)
from lorafit.export.verify_peft import against_peft
from lorafit.formats.folders import commit, commit_file

WITH_ROOM = ("peft", "gguf-merged", "ollama")  # targets that have room for new tokens
Ask = Callable[[Path, str], Verdict | None]
"""Compares llama.cpp's answers from a file, whose weights are in the format named; None without llama.cpp."""
MOST = 4_000_000_000  # bytes of a base that is converted to GGUF only to verify an adapter on it


@dataclass(frozen=True)
class Job:
    """One export."""

    opened: Opened
    updates: Mapping[str, LowRank]
    probes: Sequence[Probe]
    mine: Ours
    out: Path
    kind: str

    @property
    def folder(self) -> Path:
        """The adapter's own folder."""
        return self.opened.parts[0].folder


def export(
    model: str,
    adapter: str,
    to: str,
    out: str,
    *,
    kind: str = "auto",
    template: str | None = None,
    threads: int | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Write the adapter for `to` at `out` and say what was compared. kind: of a merged GGUF file's matrices.

    Raises LorafitError's family: for a target that cannot hold the adapter, a no-op adapter, or files that do not do in
    the other program what the adapter does here. Nothing is left at `out` then.
    """
    path = Path(out)
    refuse_existing(path, "--out")
    if kind != "auto" and to not in ("gguf-merged", "ollama"):
        raise ConfigError("--dtype", f"is {kind}, and {to} has fp32 adapters alone", "leave it out")
    opened = open_model(model, [adapter], template, threads, grows=to in WITH_ROOM)
    found = probes(opened.tokenizer, data, int(opened.model.config.max_position_embeddings))
    job = Job(opened, opened.parts[0].low_rank, found, ours(opened.model, found, adapter), path, kind)
    return {"to": to, "out": str(path), **WRITERS[to](job)}


def _peft(job: Job) -> dict[str, Any]:
    """The adapter's own files, with tokenizer and chat template."""
    verdicts: list[Verdict | None] = []

    def write(path: Path) -> None:
        with nothing_left(path):
            for name in FILES:
                if (job.folder / name).is_file():
                    shutil.copyfile(job.folder / name, path / name)
            write_tokenizer(job.opened, path)
            verdicts.append(against_peft(job.opened, job.mine, job.probes, path, str(job.out)))

    commit(job.out, write, manifest=False)
    return _told(job, verdicts[0], "PEFT", "peft")


def _portable(job: Job) -> dict[str, Any]:
    """One rank, one scale, plain names."""
    updates = portable(job.opened, _plain_updates(job))
    kept = {key: value for key, value in about(job.folder).items() if key in ("tokenizer", "template", "data")}
    verdicts: list[Verdict | None] = []

    def write(path: Path) -> None:
        with nothing_left(path):
            model = job.opened.model
            detach(model)
            put_factors(model, dict(updates))
            inner = path / "adapter"
            layout: Any = {} if fused_only(model) else {"experts": "split"}
            save_adapter(model, inner, {**kept, "base_model": str(job.opened.path)}, **layout)
            for file in inner.iterdir():
                file.rename(path / file.name)
            inner.rmdir()
            detach(model)
            load_adapter(model, path)
            _compare(updates, low_rank(model), str(job.out))
            write_tokenizer(job.opened, path)
            verdicts.append(against_peft(job.opened, job.mine, job.probes, path, str(job.out)))

    commit(job.out, write, manifest=False)
    return _told(job, verdicts[0], "PEFT", "peft")


def _gguf(job: Job) -> dict[str, Any]:
    """A GGUF adapter file."""
    verdicts: list[Verdict | None] = []
    commit_file(job.out, lambda path: verdicts.append(_write_gguf(job, path)))
    return _told(job, verdicts[0], "llama.cpp", "xllamacpp")


def _write_gguf(job: Job, path: Path) -> Verdict | None:
    """The adapter's file at `path`, read back, and tried in llama.cpp on the base's file."""
    opened, updates = job.opened, _plain_updates(job)
    where = placement(opened.path, opened.source)
    write_gguf_adapter(path, where, updates, opened.source.place, job.folder.name, opened.template)
    _compare(updates, read_gguf_adapter(path, where), str(job.out))
    return _on_base(job, path)


def _on_base(job: Job, adapter: Path) -> Verdict | None:
    """llama.cpp with base and adapter; a base that is a folder is converted to F32 for it."""

    def ask(model: Path, format: str) -> Verdict | None:
        return against_llama(
            job.mine, job.probes, place=str(job.out), format=format, model=model, adapter=adapter
        )  # fmt: skip

    if job.opened.path.is_file():
        return _or_in_f32(ask, job.opened.path, job.opened.format, job.opened, job.out.parent)
    if _f32_bytes(job.opened) > MOST:
        taken = console.gigabytes(_f32_bytes(job.opened))
        console.warn(f"not tried in llama.cpp: the base as a GGUF file takes {taken}")
        return None
    return _in_f32(ask, job.opened, job.out.parent)


def _or_in_f32(ask: Ask, file: Path, format: str, opened: Opened, beside: Path) -> Verdict | None:
    """llama.cpp with a file, or, where that differs by more than its format's floor, with the file's values in F32, to
    know whether by what llama.cpp rounds: another expert for one token changes everything after it. Raises
    AdapterError."""
    try:
        return ask(file, format)
    except AdapterError as fault:
        if format == "F32" or _f32_bytes(opened) > MOST:
            raise
        verdict = _in_f32(ask, opened, beside)
        assert verdict is not None, "llama.cpp answered before"
        console.warn(f"{fault.what}: by what llama.cpp rounds in {format}, since with the same weights in F32 it is "
                     f"{verdict.adapted.largest:.2g}")  # fmt: skip
        return verdict


def _in_f32(ask: Ask, opened: Opened, beside: Path) -> Verdict | None:
    """llama.cpp with the base, without its adapter, as a file in F32."""
    with tempfile.TemporaryDirectory(dir=beside, prefix=".tmp-base-") as folder:
        file = Path(folder) / "base.gguf"
        merged_file(opened, "F32", {}, Rounding()).write(file)
        return ask(file, "F32")


def _f32_bytes(opened: Opened) -> int:
    return sum(torch.Size(shape).numel() for shape in opened.source.shapes.values()) * 4


def _gguf_merged(job: Job) -> dict[str, Any]:
    """Base and adapter in one GGUF file."""
    told: dict[str, Any] = {}
    commit_file(job.out, lambda path: told.update(_write_merged(job, path)))
    return told


def _write_merged(job: Job, path: Path) -> dict[str, Any]:
    kind, rounding = _merged_kind(job), Rounding()
    merged_file(job.opened, kind, job.opened.parts[0].changes, rounding).write(path)
    return {"dtype": kind, **rounding.facts(), **_merged_verdict(job, path, kind)}


def _merged_kind(job: Job) -> str:
    if job.kind != "auto":
        return job.kind
    return job.opened.format if job.opened.format in EXACT else "Q8_0"


def _merged_verdict(job: Job, path: Path, kind: str) -> dict[str, Any]:
    """What the format took away, by lorafit's own reader; then llama.cpp against what lorafit reads there."""
    merged = job.opened.beside(path)
    own, exact = log_probabilities(merged.model, job.probes), Exact(job.opened, job.opened.parts[0].changes)
    told = rounding_facts(job.mine, own, kind, str(job.out), lambda: rounding_steps(exact.pairs(merged), kind))

    def ask(file: Path, format: str) -> Verdict | None:
        return merged_against_llama(job.mine, own, job.probes, place=str(job.out), format=format, model=file)

    return told | _told(job, _or_in_f32(ask, path, kind, merged, job.out.parent), "llama.cpp", "xllamacpp")


def _ollama(job: Job) -> dict[str, Any]:
    """A folder with Modelfile and adapter, and the base where it is no GGUF file yet; an adapter that is more than A
    and B is merged into it."""
    told: dict[str, Any] = {}

    def write(path: Path) -> None:
        with nothing_left(path):
            base, adapter = str(job.opened.path.resolve()), None
            if job.opened.parts[0].more:
                base = "./model.gguf"
                told.update(_write_merged(job, path / "model.gguf"))
            else:
                adapter = "./adapter.gguf"
                if job.opened.path.is_dir():
                    base = "./base.gguf"
                    merged_file(job.opened, _merged_kind(job), {}, Rounding()).write(path / "base.gguf")
                told.update(_told(job, _write_gguf(job, path / "adapter.gguf"), "llama.cpp", "xllamacpp"))
            text, told["template"] = modelfile(job.opened.tokenizer, base, adapter)
            (path / "Modelfile").write_text(text, encoding="utf-8")
            (path / TEMPLATE_FILE).write_text(job.opened.template, encoding="utf-8")

    commit(job.out, write, manifest=False)
    if not told["template"]:
        console.warn("the chat template has no simple form in Ollama's language: Ollama takes the base's own")
    return told


def _mlx(job: Job) -> dict[str, Any]:
    """mlx-lm's folder, read back."""
    updates = portable(job.opened, _plain_updates(job))

    def write(path: Path) -> None:
        with nothing_left(path):
            layers = int(job.opened.model.config.num_hidden_layers)
            write_mlx(path, updates, layers, str(job.opened.path))
            _compare(updates, read_mlx(path), str(job.out))
            (path / TEMPLATE_FILE).write_text(job.opened.template, encoding="utf-8")

    commit(job.out, write, manifest=False)
    console.say("read back here with every value the same; mlx-lm itself runs on Apple's machines and was not tried")
    return _told(job, None, "", "")


def _plain_updates(job: Job) -> dict[str, LowRank]:
    """The adapter as factors alone. Raises AdapterError when it is more than these."""
    job.opened.parts[0].refuse_more()
    return dict(job.updates)


def _compare(written: Mapping[str, LowRank], read: Mapping[str, LowRank], place: str) -> None:
    """Raise AdapterError unless every layer came back with every value."""
    for layer in written.keys() | read.keys():
        if layer not in written or layer not in read:
            what = f"{layer} is {'missing' if layer in written else 'there too many'} when read back"
            raise AdapterError(place, what, OURS)
        a, b = written[layer], read[layer]
        # experts' gate and up, written with an A each, come back as one update of twice the rank
        same = torch.allclose(a.dense(), b.dense()) if a.rank != b.rank else all(map(torch.equal, a, b))
        if not same:
            what = f"{layer} has other values when read back"
            raise AdapterError(place, what, OURS)


def _told(job: Job, verdict: Verdict | None, program: str, package: str) -> dict[str, Any]:
    ranks = sorted({update.rank for update in job.updates.values()})
    told: dict[str, Any] = {"layers": len(job.updates), "rank": ranks[0] if len(ranks) == 1 else ranks}
    if verdict is None:
        if program:
            say_missing(program, package)
        return told
    return told | verdict.facts()


WRITERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "peft": _peft,
    "portable": _portable,
    "gguf": _gguf,
    "gguf-merged": _gguf_merged,
    "ollama": _ollama,
    "mlx": _mlx,
}
