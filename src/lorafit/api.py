"""`lorafit.train` from Python: the options' names as keywords."""

from __future__ import annotations

from os import fspath
from typing import Any

from lorafit.config import Resolved, TrainConfig, field_types, from_values
from lorafit.run import Result
from lorafit.run import train as run_train

MANY = ("data", "eval", "targets")


def train(*, overwrite: bool = False, **options: Any) -> Result:
    """Train an adapter. Options are those of `lorafit train`, with underscores: model, data, out, rank, lr, ...

    data, eval and targets take one value or a list; paths may be `pathlib.Path`. Returns a Result: `adapter` is the
    adapter's folder, `report` the figures of report.json. Raises LorafitError's family.
    """
    values = {name: _plain(name, value) for name, value in options.items()}
    given = from_values(values, "lorafit.train")
    origin = {name: "given" for name in field_types() if name in given}
    return run_train(Resolved(TrainConfig(**given), origin), overwrite=overwrite)


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "__fspath__"):
        value = fspath(value)
    if name not in MANY or value is None:
        return value
    parts = [value] if isinstance(value, str) else list(value)
    return [fspath(part) if hasattr(part, "__fspath__") else part for part in parts]
