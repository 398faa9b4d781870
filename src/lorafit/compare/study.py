"""`lorafit compare`: from a model and data to an answer, top to bottom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lorafit import console
from lorafit.compare import sweep
from lorafit.compare.advice import advice
from lorafit.compare.arms import Arm, Outcome, run_arm, size_of
from lorafit.compare.measure import gaps, measure
from lorafit.compare.page import markdown, page
from lorafit.config import ADAPTER_ONLY, Resolved, TrainConfig, from_values, read_yaml
from lorafit.data.tokens import TokenRow
from lorafit.errors import ConfigError, MemoryLimitError, ResumeError
from lorafit.formats.folders import make_folder, write_text_atomically
from lorafit.inputs import read_rows
from lorafit.job import Input, read_input
from lorafit.kernels import native
from lorafit.model.load import context_of

FILE = "compare.yaml"
METHODS = ("lora", "full")
ALIKE = ("base", "tokenizer", "template", "data", "evaluation")  # of the runs' identities
BUDGET = ("seed", "batch_size", "epochs", "max_steps", "max_length", "trained", "schedule", "warmup", "weight_decay",
          "clip_norm", "eval_fraction", "compute")  # settings that make runs comparable  # fmt: skip


@dataclass(frozen=True)
class Study:
    """What is compared. settings: the training options that were given, by field."""

    model: str
    data: tuple[str, ...]
    methods: tuple[str, ...]
    lr_sweep: bool
    forget_on: str | None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or len(set(self.methods)) < len(self.methods) or not self.methods:
            raise ConfigError("--methods", f"is {','.join(self.methods)}", "give lora, full or lora,full")
        if len(self.methods) == 1 and not self.lr_sweep:
            what = f"is {self.methods[0]} alone, which leaves nothing to compare"
            raise ConfigError("--methods", what, "give two, add --lr-sweep, or use lorafit train")
        if self.settings.get("eval_fraction") == 0 and not self.settings.get("eval"):
            raise ConfigError("--eval-fraction", "is 0, which leaves no rows to compare on", "give --eval")

    def config(self, method: str) -> TrainConfig:
        """The settings of a method's runs, at its rule's learning rate."""
        drop = (*ADAPTER_ONLY, "base") if method == "full" else ()
        kept = {name: value for name, value in self.settings.items() if name not in drop}
        return TrainConfig(model=self.model, data=self.data, method=method, **kept)  # type: ignore[arg-type]


def compare(study: Study, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Run a comparison into `out`, which must be empty or `overwrite`n; compare.json's figures come back."""
    full = out.is_dir() and any(out.iterdir())
    if full and not overwrite:
        begun = f"go on with: lorafit compare --resume {out}, or " if (out / FILE).is_file() else ""
        raise ConfigError("--out", f"{out} is not empty", f"{begun}name another folder, or give --overwrite")
    reads = _read(study)
    if full:  # only now: what is wrong with the new one costs nothing of the old
        _clear(out)
    make_folder(out)
    write_text_atomically(out / FILE, yaml.safe_dump(json.loads(json.dumps(asdict(study))), sort_keys=True))
    return _go(study, reads, out)


def resume(out: Path) -> dict[str, Any]:
    """Go on with the comparison in `out`: what is finished is read, what was begun is resumed."""
    if not (out / FILE).is_file():
        raise ResumeError(str(out), f"holds no {FILE}", "give the folder of a comparison that was started")
    values = read_yaml(out / FILE)
    try:
        settings = from_values(values["settings"], f"{out / FILE}: settings")
        study = Study(
            str(values["model"]), tuple(values["data"]), tuple(values["methods"]), bool(values["lr_sweep"]),
            values["forget_on"], settings,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ResumeError(str(out / FILE), f"does not read: {error!r}", "start a new comparison") from None
    return _go(study, _read(study), out)


@dataclass(frozen=True)
class Reads:
    """Each method's rows and settled settings, and why a method that does not fit in memory has none."""

    fitting: dict[str, Input]
    lacking: dict[str, str]


def _read(study: Study) -> Reads:
    """What is wrong with rows and settings is found here, before anything runs. Raises MemoryLimitError where no method
    fits."""
    fitting: dict[str, Input] = {}
    lacking: dict[str, MemoryLimitError] = {}
    for method in study.methods:
        try:
            fitting[method] = read_input(Resolved(study.config(method)))
        except MemoryLimitError as error:
            lacking[method] = error
    if not fitting:
        raise next(iter(lacking.values()))
    first = next(iter(fitting.values()))
    if not first.evaluation:
        raise ConfigError("--eval-fraction", "holds out no row", "give --eval")
    _forget_rows(study, first)
    return Reads(fitting, {method: str(error) for method, error in lacking.items()})


def _go(study: Study, reads: Reads, out: Path) -> dict[str, Any]:
    """Every run, then the measuring and the telling."""
    best: dict[str, Outcome] = {}
    sweeps: dict[str, Any] = {}
    for method in study.methods:
        if method in reads.lacking:
            why = f"does not fit in memory: {reads.lacking[method]}"
            console.warn(f"{method} {why}")
            best[method] = Outcome(Arm(method), out / method, None, why)
            continue
        if not study.lr_sweep:
            best[method] = run_arm(Arm(method), study.model, study.data, out, study.settings)
            continue

        def run(lr: float, method: str = method) -> Outcome:
            return run_arm(Arm(method, lr), study.model, study.data, out, study.settings)

        rule = float(reads.fitting[method].resolved.config.lr or 0.0)
        best[method], outcomes, inside = sweep.find(rule, run)
        rates = [{"lr": o.arm.lr, "loss": o.loss if o.report else None, "note": o.failure} for o in outcomes]
        sweeps[method] = {"best": best[method].arm.lr, "inside": inside, "rates": rates}
    made = {method: outcome for method, outcome in best.items() if outcome.report is not None}
    if not made:
        raise ConfigError("lorafit compare", "no run gave a result", "; ".join(o.failure for o in best.values()))
    _check_alike([outcome.folder for outcome in made.values()])
    found = _figures(study, next(iter(reads.fitting.values())), best, made, sweeps or None)
    write_text_atomically(out / "compare.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text_atomically(out / "compare.md", markdown(found))
    write_text_atomically(out / "compare.html", page(found))
    console.say(f"compare   {out / 'compare.html'}")
    return found


def _figures(
    study: Study, read: Input, best: dict[str, Outcome], made: dict[str, Outcome], sweeps: dict[str, Any] | None
) -> dict[str, Any]:
    """compare.json."""
    config = read.resolved.config
    torch.set_num_threads(int(config.threads or 1))
    native.use(config.kernels)
    rows = {"": read.evaluation} | ({"forget": _forget_rows(study, read)} if study.forget_on else {})
    console.say(f"measuring on {', '.join(f'{len(some)} rows' for some in rows.values())}")
    losses = measure({method: outcome.folder for method, outcome in made.items()}, study.model, config, rows)
    found: dict[str, Any] = {
        "rows": len(read.evaluation),
        "steps": next(iter(made.values())).report["steps"],  # type: ignore[index]
        "base_loss": losses[""]["base"].loss,
        "methods": {method: _arm(outcome, losses[""].get(method)) for method, outcome in best.items()},
        "differences": gaps(losses[""]),
        "sweep": sweeps,
        "forget": None,
    }
    if study.forget_on:
        told = {who: measured.loss for who, measured in losses["forget"].items()}
        found["forget"] = {"file": study.forget_on, "losses": told, "differences": gaps(losses["forget"])}
    return {**found, "advice": advice(found)}


def _arm(outcome: Outcome, measured: Any) -> dict[str, Any]:
    """One method's figures, from its report and the files that it left."""
    if outcome.report is None:
        return {"run": outcome.folder.name, "failure": outcome.failure}
    made = outcome.folder / ("model" if outcome.arm.method == "full" else "adapter")
    names = ("tokens", "trained_tokens", "seconds", "training_seconds", "tokens_per_second", "peak_memory_bytes",
             "private_memory_bytes", "trainable_parameters")  # fmt: skip
    return {
        "run": outcome.folder.name,
        "loss": measured.loss,
        "lr": read_yaml(outcome.folder / "run.yaml")["lr"],
        **{name: outcome.report[name] for name in names},
        "bytes_on_disk": size_of(made),
    }


def _forget_rows(study: Study, read: Input) -> list[TokenRow]:
    """The text that was not trained."""
    if study.forget_on is None:
        return []
    config = replace(read.resolved.config, max_length=None)
    rows, _ = read_rows((study.forget_on,), read.tokenizer, config, context_of(read.source))
    if not rows.rows:
        raise ConfigError(f"--forget-on: {study.forget_on}", "leaves no row with a trained token", "give another file")
    return rows.rows


def _check_alike(folders: Sequence[Path]) -> None:
    """The runs must have had the same rows, order, steps and evaluation; else what they gave cannot be compared.
    Raises ResumeError with the first difference."""
    runs = [read_yaml(folder / "run.yaml") for folder in folders]
    identities = [run["identity"] for run in runs]
    for other, run in zip(identities[1:], runs[1:], strict=True):
        for key in ALIKE:
            if other[key] != identities[0][key]:
                what = f"has {key} {other[key]}, and {folders[0].name} {identities[0][key]}"
                raise ResumeError(
                    str(folders[runs.index(run)]), what, "the files were changed between runs; start anew"
                )
        for key in BUDGET:
            if run[key] != runs[0][key]:
                what = f"has {key} {run[key]}, and {folders[0].name} {runs[0][key]}"
                raise ResumeError(str(folders[runs.index(run)]), what, "start the comparison anew")


def _clear(out: Path) -> None:
    """Remove an earlier comparison's files, and nothing that lorafit did not write."""
    for path in out.iterdir():
        ours = path.name in (FILE, "compare.json", "compare.md", "compare.html")
        arm = path.is_dir() and not path.is_symlink() and path.name.split("-lr-")[0] in METHODS
        if ours:
            path.unlink()
        elif arm and (path / "run.yaml").is_file():
            shutil.rmtree(path)
