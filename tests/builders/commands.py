"""The product from outside: commands in this process, and the tiny files that they work on."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lorafit
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.processes import write_data
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.cli import main

QUICK = {"rank": 4, "compute": "fp32", "threads": 1, "lr": 0.01, "max_steps": 6, "batch_size": 4, "save_every": 3}


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Outcome:
    """`lorafit ARGUMENTS` in this process; an exception other than SystemExit is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return Outcome(int(stop.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main always exits")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Leaves one core to what runs inside, so that default settings take one thread (see tests/conftest.py)."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class World:
    """A folder with tiny models, data and a finished run, each made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Path:
        """A llama of 48,288 parameters with a chat template, as a Hugging Face folder."""
        return save_folder(tiny_model("llama"), self.folder / "model")

    @cached_property
    def gguf(self) -> Path:
        """The same weights as a GGUF file."""
        return write_tiny_gguf(self.folder / "model.gguf", tiny_model("llama"), "llama", tiny_gguf_metadata())

    @cached_property
    def plain_gguf(self) -> Path:
        """The same without a chat template."""
        return write_tiny_gguf(self.folder / "plain.gguf", tiny_model("llama"), "llama", tiny_gguf_metadata(None))

    @cached_property
    def data(self) -> Path:
        """24 prompt/completion rows."""
        return write_data(self.folder / "data.jsonl")

    @cached_property
    def test(self) -> Path:
        """Ten other rows."""
        rows = [{"prompt": f"How many are {n} ships?", "completion": f"They are {n}."} for n in range(10)]
        return write_rows(self.folder / "test.jsonl", rows)

    @cached_property
    def result(self) -> Any:
        """A finished run of `QUICK` with evaluation on `test`; its folder is `out`."""
        return lorafit.train(model=self.model, data=self.data, eval=self.test, out=self.folder / "out", **QUICK)

    @property
    def out(self) -> Path:
        return self.result.adapter.parent
