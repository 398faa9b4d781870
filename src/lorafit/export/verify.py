"""Is what was exported the same model there? Log-probabilities of next tokens, here and in the program it is for.

Two kinds of difference: that of the base alone, which is what the other program's own arithmetic does (llama.cpp rounds
activations to 8 bits for every quantised format), and that with the adapter. The second may be no larger than the
format explains, and the adapter's effect, with minus without, must be the same in both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import console
from lorafit.adapter.attach import enable_adapter
from lorafit.errors import AdapterError
from lorafit.export.probes import Probe, log_probabilities

TOP = 100  # likeliest tokens that are compared after each beginning
# Largest difference of a log-probability that another program's arithmetic on weights of a format explains. Measured
# on tiny models and SmolLM2 (docs/export.md): activations in fp32, in 16 bits, or in 8.
FLOORS = {"F32": 0.005, "F16": 0.05, "BF16": 0.05, "Q8_0": 0.2}
QUANTISED = 1.0
EPSILON = {"F16": 2.0**-11, "BF16": 2.0**-8}  # a rounded weight's largest error beside it
OURS = "this is a fault of lorafit, please report it"
MERGED = 0.25  # share of the adapter's effect that a merged file may differ by, where its floor is exceeded
SECONDS = 600  # for llama.cpp to answer

Answers = list[list[tuple[int, float]]]
"""For each beginning the likeliest tokens and their log-probabilities."""


def floor(format: str) -> float:
    """The largest difference that a format of weights explains."""
    return FLOORS.get(format, QUANTISED)


@dataclass(frozen=True)
class Gap:
    """Differences between two sets of log-probabilities."""

    largest: float
    rms: float

    @classmethod
    def of(cls, differences: Tensor) -> Gap:
        """From the differences themselves."""
        return cls(float(differences.abs().max()), float(differences.square().mean().sqrt()))


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; differences are of natural log-probabilities."""

    program: str
    beginnings: int
    floor: float
    adapted: Gap
    """With the adapter, or of the merged model."""
    base: Gap | None = None
    """Of the base alone."""
    effect: Gap | None = None
    """Of with minus without."""
    size: Gap | None = None
    """The effect itself, here."""

    def facts(self) -> dict[str, Any]:
        """For people and JSON."""
        found: dict[str, Any] = {
            "program": self.program,
            "beginnings": self.beginnings,
            "largest_difference": self.adapted.largest,
            "floor": self.floor,
        }
        if self.base is not None and self.effect is not None and self.size is not None:
            found |= {
                "base_alone": self.base.largest,
                "base_alone_rms": self.base.rms,
                "effect": self.size.largest,
                "effect_rms": self.size.rms,
                "effect_difference": self.effect.largest,
                "effect_difference_rms": self.effect.rms,
            }
        return found

    def check(self, place: str) -> Verdict:
        """Raise AdapterError when the two are not the same model within the floor."""
        there, known = self.program, self.floor
        if self.base is None and self.size is not None and self.adapted.rms <= MERGED * self.size.rms:
            return self
        if self.base is not None:
            if self.base.largest > 4 * self.floor and self.base.rms > self.floor:  # unlikely tokens alone may be far
                what = f"the base alone differs by {self.base.largest:.3g} in {there}; {self.floor:g} is expected"
                raise AdapterError(place, what, "that program does not read this model as lorafit does")
            known = max(known, 2 * self.base.largest)
        if not self.adapted.largest <= known:
            what = f"log-probabilities in {there} differ by {self.adapted.largest:.3g}, more than {known:.3g}"
            raise AdapterError(place, what, f"nothing was kept; {OURS}")
        if self.base is not None and self.effect is not None and self.size is not None:
            gap, size = self.effect.rms, self.size.rms
            if gap > max(0.5 * size, 2 * self.base.rms):
                what = f"the adapter's effect in {there} is another one: it differs by {gap:.3g} of {size:.3g}"
                raise AdapterError(place, what, f"nothing was kept; {OURS}")
        return self


@dataclass(frozen=True)
class Ours:
    """Our model's log-probabilities after each beginning, (beginnings, V): of the base, and with the adapter."""

    plain: Tensor
    adapted: Tensor


def ours(model: Any, found: Sequence[Probe], place: str) -> Ours:
    """Both sides here. Raises AdapterError when the adapter changes nothing."""
    adapted = log_probabilities(model, found)
    enable_adapter(model, False)
    plain = log_probabilities(model, found)
    enable_adapter(model, True)
    if torch.equal(plain, adapted):
        raise AdapterError(place, "changes no log-probability at all", "train it first")
    return Ours(plain, adapted)


def against_llama(
    mine: Ours, found: Sequence[Probe], *, place: str, format: str, model: Path, adapter: Path
) -> Verdict | None:
    """llama.cpp with this base and adapter; None where xllamacpp is not installed.

    format: of the weights in `model`. Raises AdapterError.
    """
    if find_spec("xllamacpp") is None:
        return None
    plain, adapted = ask_llama(model, adapter, found, place)
    effects = _effects(plain, adapted, mine)
    if not effects[:, 0].any():
        raise AdapterError(place, "the adapter has no effect in llama.cpp", OURS)
    return Verdict(
        "llama.cpp",
        len(mine.adapted),
        floor(format),
        _gap(adapted, mine.adapted),
        _gap(plain, mine.plain),
        Gap.of(effects[:, 0] - effects[:, 1]),
        Gap.of(effects[:, 1]),
    ).check(place)


def merged_against_llama(
    mine: Ours, merged_PV: Tensor, found: Sequence[Probe], *, place: str, format: str, model: Path
) -> Verdict | None:
    """llama.cpp with a merged file against what is read in that file here; None where xllamacpp is not installed.

    merged_PV: log-probabilities of that file here. The difference is to be within the floor, or a quarter of what the
    adapter does: a file without the adapter, or with its rows in another order, differs by about all of that.
    """
    if find_spec("xllamacpp") is None:
        return None
    (answers,) = ask_llama(model, None, found, place)
    effect = Gap.of(mine.adapted - mine.plain)
    return Verdict("llama.cpp", len(merged_PV), floor(format), _gap(answers, merged_PV), size=effect).check(place)


def ask_llama(model: Path, adapter: Path | None, found: Sequence[Probe], place: str, top: int = TOP) -> list[Answers]:
    """What llama.cpp expects after each beginning, of the base and, if there is an adapter, with it.

    Raises AdapterError, with the last line that llama.cpp said, when it does not load the files.
    """
    job = {
        "file": str(model.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "prefixes": [prefix for probe in found for prefix in probe.prefixes],
        "plain": found[0].plain,
        "top": top,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "lorafit.export.llama_child"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job) + "\n", capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise AdapterError(place, f"llama.cpp did not answer in {SECONDS} s", "verify on a quieter machine") from None
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer ")]
    if done.returncode or len(answers) != (2 if adapter else 1):
        said = [line.strip() for line in done.stderr.splitlines() if "rror" in line or "fail" in line]
        what = f"llama.cpp does not load it: {said[-1] if said else f'exit code {done.returncode}'}"
        raise AdapterError(place, what[:400], OURS)
    return answers


def _gap(answers: Answers, logs_PV: Tensor) -> Gap:
    """Theirs minus ours over the tokens that they name."""
    differences = [
        torch.tensor([value for _, value in answer]) - row[torch.tensor([int(token) for token, _ in answer])]
        for answer, row in zip(answers, logs_PV, strict=True)
    ]
    return Gap.of(torch.cat(differences))


def _effects(plain: Answers, adapted: Answers, mine: Ours) -> Tensor:
    """(n, 2): with minus without, theirs and ours, over the tokens that they name both times."""
    rows = []
    for number, (before, after) in enumerate(zip(plain, adapted, strict=True)):
        known = {int(token): value for token, value in before}
        for token, value in after:
            if int(token) in known:
                here = mine.adapted[number, int(token)] - mine.plain[number, int(token)]
                rows.append((value - known[int(token)], float(here)))
    return torch.tensor(rows)


def against_model(mine: Ours, found: Sequence[Probe], model: Any, program: str, limit: float, place: str) -> Verdict:
    """Another model of the merged or adapted weights, here: `model(input_ids=...)`. Raises AdapterError."""
    theirs = log_probabilities(model, found)
    return Verdict(program, len(theirs), limit, Gap.of(theirs - mine.adapted)).check(place)


def rounding_facts(
    mine: Ours, merged_PV: Tensor, kind: str, place: str, steps: Callable[[], float]
) -> dict[str, float]:
    """What rounding a merged model to `kind` did to its log-probabilities; merged_PV: those of its files, read here.

    In F32 nothing is rounded, and more than the floor is an AdapterError. In 16 bits, more than the floor and half of
    what the adapter does is one too, unless `steps`, a weight's largest error in steps of the format, is at most 1: by
    rounding alone a mixture may send a token to another expert. In fewer bits it is a warning.
    """
    lost, effect = Gap.of(merged_PV - mine.adapted), Gap.of(mine.adapted - mine.plain)
    if kind == "F32":
        Verdict("lorafit", len(merged_PV), floor(kind), lost).check(place)
    elif kind in EPSILON and not lost.rms <= max(floor(kind), 0.5 * effect.rms) and not steps() <= 1:
        what = f"log-probabilities of the merged model differ by {lost.rms:.3g} (root mean square)"
        raise AdapterError(place, f"{what}, and the adapter's effect is {effect.rms:.3g}", f"nothing was kept; {OURS}")
    if kind != "F32" and lost.rms > 0.5 * effect.rms:
        what = f"rounding to {kind} moves log-probabilities by {lost.rms:.3f} (root mean square)"
        console.warn(f"{what}, and the adapter by {effect.rms:.3f}: a finer --dtype keeps more of it")
    return {
        "rounding_difference": lost.largest,
        "rounding_difference_rms": lost.rms,
        "effect_rms": effect.rms,
    }


def rounding_steps(wanted: Iterable[tuple[Tensor, Tensor]], kind: str) -> float:
    """The largest error of a 16-bit weight in steps of its format, of pairs (exact, stored): 1 at most if it is rounded
    and nothing else."""
    smallest = 2.0**-25 if kind == "F16" else 0.0  # below its normal numbers
    return max(
        float(((stored.float() - exact).abs() / (exact.abs() * EPSILON[kind] + smallest).clamp(min=1e-38)).max())
        for exact, stored in wanted
    )


def say_missing(program: str, package: str) -> None:
    """The exported files could not be loaded in the program that they are for."""
    console.warn(f"not tried in {program}: {package} is not installed (pip install 'lorafit[verify]')")
