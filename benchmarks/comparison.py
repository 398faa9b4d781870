"""One job of one model: its sides, a peer's settings searched, steps taken in turn, the lines of its table."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import alternate, say, spread, watch
from benchmarks.peers import factors
from benchmarks.sides import Side, SideError

BATCH = 8
MB = 1e6
HEAD = ("side", "settings", "real tokens/s", "lorafit / this", "of the roof", "losses, first and last step",
        "largest difference to lorafit", "peak, MB", "user, s", "system, s", "page faults")  # fmt: skip

Settings = Mapping[str, str]
Answers = list[dict[str, Any]]
"""What a side said of each step, see `Gate.answer`."""


def task(name: str, **job: Any) -> Any:
    """The result of one of the tasks of `benchmarks.compare`, done in a process of its own."""
    seen = watch("benchmarks.compare", {"task": name, **job}, limit=1800)
    assert seen.ending == "finished", f"{name} {seen.ending}"
    return seen.result


def words(settings: Settings) -> str:
    return "; ".join(f"{name} {value}" for name, value in settings.items())


class Comparison:
    """asked: the command's options. folder: for what the sides share. weights: the model as the peers load it."""

    def __init__(
        self,
        asked: argparse.Namespace,
        model: Path,
        kind: str,
        data: str,
        folder: str,
        weights: str = "",
        seed: int = 0,
    ) -> None:
        self.asked, self.model, self.kind, self.folder, self.weights = asked, model, kind, folder, weights
        self.options: dict[str, Any] = {"model": str(model), "data": (data,), "batch_size": BATCH, "seed": seed}
        self.options |= {"threads": asked.threads, "compute": asked.compute, "base": asked.compute}
        self.facts: dict[str, Any] = {}
        self.versions: dict[str, dict[str, str]] = {}

    @property
    def ours(self) -> dict[str, Settings]:
        """Our sides that were asked for, with their settings."""
        found = {"lorafit": {"base": self.asked.compute}, "lorafit-packed": {"base": "packed"}}
        return {name: settings for name, settings in found.items() if name in self.asked.sides}

    def prepare(self, steps: int) -> None:
        """Write what all sides train in so many steps."""
        self.facts = task("job", options=self.options, kind=self.kind, folder=self.folder, steps=steps)

    def open(self, name: str, settings: Settings) -> Side:
        """A side that has loaded. Raises SideError."""
        spec: dict[str, Any] = {"side": name, "kind": self.kind, "threads": self.asked.threads, "settings": settings}
        python = sys.executable
        if name.startswith("lorafit"):
            spec["options"] = {**self.options, **settings}
        else:
            spec |= {"folder": self.folder, "model": self.weights, "facts": self.facts}
            python = self.asked.unsloth_python if name.startswith("unsloth") else self.asked.peers_python
        side = Side(spec, python, settings.get("malloc") == "kept", self.asked.limit)
        self.versions[name] = side.versions
        return side

    def search(self, peer: str) -> tuple[Settings, list[list[object]]]:
        """The peer's best settings, found one factor after another, and a line for each that was tried."""
        choices, tried = factors(peer, self.kind, self.facts["compute"]), list[list[object]]()
        best = {factor: values[0] for factor, values in choices.items()}
        if not self.asked.search:
            return best, tried
        rate = self._try(peer, best, tried)
        for factor, values in choices.items():
            for value in values[1:]:
                found = self._try(peer, {**best, factor: value}, tried)
                if found > rate:
                    best, rate = {**best, factor: value}, found
        return best, tried

    def _try(self, peer: str, settings: Settings, tried: list[list[object]]) -> float:
        """Real tokens per second of a few steps after a warm-up; 0 where the settings do not work."""
        say(f"{peer}: {words(settings)}")
        try:
            side = self.open(peer, settings)
            found = [side.step(number) for number in range(self.asked.search + 1)]
            side.end()
        except SideError as error:
            tried.append([peer, words(settings), error, ""])
            return 0.0
        rate = statistics.median(rates_of(found[1:]))
        tried.append([peer, words(settings), f"{rate:,.0f}", f"{found[-1]['peak'] / MB:,.0f}"])
        return rate

    def rounds(self, settings: Mapping[str, Settings]) -> dict[str, Answers | SideError]:
        """These sides, a step of each in turn; of one that does not load, or all if one fails later, the error."""
        sides: dict[str, Side] = {}
        failed: dict[str, Answers | SideError] = {}
        try:
            for name, own in settings.items():
                say(f"{self.model.name} {self.kind}: {name}")
                try:
                    sides[name] = self.open(name, own)
                except SideError as error:
                    failed[name] = error
            times = alternate({name: side.step for name, side in sides.items()}, self.asked.repeats)
        except SideError as error:
            return dict.fromkeys(settings, error)
        finally:
            for side in sides.values():
                side.end()
        return failed | {name: [answer for _, answer in found] for name, found in times.items()}


def rates_of(answers: Answers) -> list[float]:
    """Real tokens per second of each step."""
    return [answer["tokens"] / answer["seconds"] for answer in answers]


def lines(
    found: Mapping[str, Answers | SideError], settings: Mapping[str, Settings], roof: float
) -> list[list[object]]:
    """The table's lines of one `rounds`; roof: tokens per second."""
    answered = {name: answers for name, answers in found.items() if not isinstance(answers, SideError)}
    first = next(iter(answered.values()), [])
    rows: list[list[object]] = []
    for name, answers in found.items():
        if isinstance(answers, SideError):
            rows.append([name, words(settings[name]), answers, *[""] * (len(HEAD) - 3)])
        else:
            rows.append([name, words(settings[name]), *_figures(answers, first, roof)])
            if settings[name].get("rows") == "packing":
                rows[-1][6] = "other rows in a step"
    return rows


def _figures(answers: Answers, first: Answers, roof: float) -> list[object]:
    """All but the first two columns; `first` is what the ratio and the losses are compared with."""
    rates = rates_of(answers)
    ratio = statistics.median(a / b for a, b in zip(rates_of(first), rates, strict=True))
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(answers, first, strict=True))
    user, system, faults = (statistics.median(a[key] for a in answers) for key in ("user", "system", "faults"))
    losses = f"{answers[0]['loss']:.4f}, {answers[-1]['loss']:.4f}"
    speed = [spread(rates), f"{ratio:.2f}", f"{statistics.median(rates) / roof:.0%}"]
    costs = [f"{answers[-1]['peak'] / MB:,.0f}", f"{user:.2f}", f"{system:.2f}", f"{faults:,.0f}"]
    return [*speed, losses, f"{gap:.4f}", *costs]
