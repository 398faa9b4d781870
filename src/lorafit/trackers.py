"""A run's metrics in other programs' trackers, each through its own library: `--report-to tensorboard,wandb,...`.

metrics.jsonl is always written; a tracker gets the same numbers under the same names, the settings, and at the end the
held-out losses of base and adapter. A resumed run goes on in the tracker's own run, which OUT/trackers.json names.

    tensorboard   event files in OUT/tensorboard
    wandb         OUT/wandb; WANDB_PROJECT, WANDB_MODE=offline and its other variables are obeyed
    mlflow        where MLFLOW_TRACKING_URI says, experiment MLFLOW_EXPERIMENT_NAME or lorafit
    trackio       its own folder, or where TRACKIO_DIR says; project TRACKIO_PROJECT or lorafit
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorafit import console
from lorafit.errors import ConfigError
from lorafit.formats.folders import write_text_atomically

FILES = ("trackers.json", "tensorboard", "wandb")  # that they leave in OUT
Values = Mapping[str, float]


class Tracker(Protocol):
    """One tracker's run. `faults`: what its library raises where it cannot write or reach what it writes to."""

    faults: tuple[type[Exception], ...]

    def log(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for the first tracker whose library is not installed; imports nothing."""
    for name in names:
        if name in KINDS and importlib.util.find_spec(name) is None:
            remedy = f"pip install {name}, or 'lorafit[track]' for all"
            raise ConfigError(f"--report-to {name}", "is not installed", remedy)


class Trackers:
    """All trackers of a run, closed whatever happens. One that fails is said once and left out: a run does not end for
    its tracker."""

    def __init__(self) -> None:
        self._opened: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._opened.items()):
            with self._heard(name, tracker), _quiet():
                tracker.close()

    def begin(self, names: Sequence[str], out: Path, settings: Mapping[str, Any], step: int) -> None:
        """Open the trackers `names` of the run in `out`, which goes on after `step`. Raises ConfigError where one
        cannot begin."""
        kept = out / FILES[0]
        runs: dict[str, str] = json.loads(kept.read_text()) if step and kept.is_file() else {}
        for name in names:
            if name in KINDS:
                self._opened[name] = _opened(name, out, settings, step, runs)
        if runs:
            write_text_atomically(kept, json.dumps(runs) + "\n")

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values = {key: float(value) for key, value in line.items() if key != "step" and value is not None}
        for name, tracker in list(self._opened.items()):
            with self._heard(name, tracker):
                tracker.log(int(line["step"]), values)

    def also(self, report: Callable[[dict[str, object]], None]) -> Callable[[dict[str, object]], None]:
        """`report`, and then the trackers, for each line."""

        def both(line: dict[str, object]) -> None:
            report(line)
            self.log(line)

        return both

    @contextlib.contextmanager
    def _heard(self, name: str, tracker: Tracker) -> Iterator[None]:
        """A tracker's own fault becomes a warning, and it is taken out."""
        try:
            yield
        except tracker.faults as error:
            console.warn(f"{name} failed, and the run goes on without it: {str(error)[:200]}")
            del self._opened[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a library prints goes to standard error: standard output carries only results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _opened(name: str, out: Path, settings: Mapping[str, Any], step: int, runs: dict[str, str]) -> Tracker:
    try:
        with _quiet():
            return KINDS[name](out, settings, step, runs)
    except OSError as error:
        raise ConfigError(f"--report-to {name}", f"cannot begin: {error}", "check where it writes") from None


class TensorBoard:
    """Event files in OUT/tensorboard; what an interrupted run wrote after its checkpoint is dropped by `step`."""

    faults: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, out: Path, settings: Mapping[str, Any], step: int, runs: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            lines = [f"    {key}: {value}" for key, value in settings.items()]
            self._writer.add_text("settings", "\n".join(lines))

    def log(self, step: int, values: Values) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its id is kept so that a resumed run goes on in it."""

    def __init__(self, out: Path, settings: Mapping[str, Any], step: int, runs: dict[str, str]) -> None:
        wandb = importlib.import_module("wandb")
        self.faults: tuple[type[Exception], ...] = (wandb.Error, OSError)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "lorafit"),
                name=os.environ.get("WANDB_NAME", out.name),
                dir=str(out),
                config=dict(settings),
                id=runs.get("wandb"),
                resume="allow" if "wandb" in runs else None,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            remedy = "run `wandb login`, or set WANDB_MODE=offline"
            raise ConfigError("--report-to wandb", f"cannot begin: {error}", remedy) from None
        runs["wandb"] = self._run.id

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, through its client: no state of the library's own is touched."""

    def __init__(self, out: Path, settings: Mapping[str, Any], step: int, runs: dict[str, str]) -> None:
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        fault = importlib.import_module("mlflow.exceptions").MlflowException
        self.faults: tuple[type[Exception], ...] = (fault, OSError)
        try:
            self._client = mlflow.MlflowClient()
            if "mlflow" not in runs:
                runs["mlflow"] = self._begin(out, settings)
        except fault as error:
            remedy = "set MLFLOW_TRACKING_URI to a server or a file that can be written"
            raise ConfigError("--report-to mlflow", f"cannot begin: {error}", remedy) from None
        self._id = runs["mlflow"]

    def _begin(self, out: Path, settings: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lorafit")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=out.name)
        params = [self._entities.Param(key, str(value)[:500]) for key, value in settings.items()]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def log(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        found = [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=found)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of trackio, on this machine unless its variables name another place."""

    faults: tuple[type[Exception], ...] = (OSError, RuntimeError)

    def __init__(self, out: Path, settings: Mapping[str, Any], step: int, runs: dict[str, str]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "lorafit"),
            name=runs.get("trackio"),
            config=dict(settings),
            resume="allow" if "trackio" in runs else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        runs["trackio"] = self._run.name

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()  # the run's own finish would be called once more at exit


KINDS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
"""By the name of the tracker and of its module; jsonl needs none."""
