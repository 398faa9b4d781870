"""`lorafit.train` and `lorafit.plan` from Python: the options' names as keywords."""

from __future__ import annotations

from os import fspath
from typing import Any

from lorafit.config import Resolved, TrainConfig, field_types, from_values
from lorafit.errors import ConfigError
from lorafit.forecast import Forecast
from lorafit.forecast import plan as forecast
from lorafit.run import Result
from lorafit.run import train as run_train


def train(*, overwrite: bool = False, **options: Any) -> Result:
    """Train an adapter. Options are those of `lorafit train`, with underscores: model, data, out, rank, lr, ...

    data, eval and targets take one value or a list; paths may be `pathlib.Path`. Returns a Result: `adapter` is the
    adapter's folder, `report` the figures of report.json. Raises LorafitError's family.
    """
    values = {name: _plain(name, value) for name, value in options.items()}
    given = from_values(values, "lorafit.train")
    for name in ("model", "data", "out"):
        if not given.get(name):
            raise ConfigError("lorafit.train", f"{name} is missing", "give model, data and out")
    origin = {name: "given" for name in field_types() if name in given}
    return run_train(Resolved(TrainConfig(**given), origin), overwrite=overwrite)


def plan(*, rows: int | None = None, length: int | None = None, device: str | None = None,
         device_memory: str | None = None, **options: Any) -> Forecast:  # fmt: skip
    """Predict a run of `lorafit train` with these options; no weights are loaded. The figures are attributes.

    rows, length: instead of data, so many rows of so many tokens. device, device_memory: a device that is not here.
    Raises LorafitError's family; where nothing fits, `fits` is False and `why` says by how much.
    """
    given = from_values({name: _plain(name, value) for name, value in options.items()}, "lorafit.plan")
    if not given.get("model"):
        raise ConfigError("lorafit.plan", "model is missing", "give model, and data or rows and length")
    resolved = Resolved(TrainConfig(**given), dict.fromkeys(given, "given"))
    return forecast(resolved, rows=rows, length=length, device=device, device_memory=device_memory)


def _plain(name: str, value: Any) -> Any:
    """The value as a YAML file would hold it: a path as text, one data file as a list of one."""
    if isinstance(value, (list, tuple)):
        return [_plain("", part) for part in value]
    value = fspath(value) if hasattr(value, "__fspath__") else value
    return [value] if name in ("data", "eval") and isinstance(value, str) else value
