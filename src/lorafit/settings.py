"""Every setting that was left to us, worked out before step 1 and said with its rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorafit import machine
from lorafit.config import ADAPTER_ONLY, Resolved, TrainConfig
from lorafit.data.batch import Tokens
from lorafit.errors import ConfigError
from lorafit.kernels import native
from lorafit.model import architectures
from lorafit.training.loop import Plan
from lorafit.training.optim import auto_lr

SMALL_DATA = 500  # rows
# Starts that need a lower rate than LoRA's, and what it is divided by. PiSSA: its paper's rate is a tenth; SmolLM2,
# WikiSQL, 6 steps: held out 0.80 without, 0.47 with it. EVA: the same by 1, 3 and 10: 0.495, 0.345, 0.484; LoRA 0.395.
LOWER = {"pissa": (10, "PiSSA"), "eva": (3, "EVA")}


def settle_for_machine(resolved: Resolved, quantised: bool = False) -> Resolved:
    """Compute dtype, the base's storage and threads, from the processor's features and whether the model's file is
    quantised. Raises ConfigError for what `_refuse_adapter_settings` does."""
    _refuse_adapter_settings(resolved)
    config = resolved.config
    if config.compute == "auto":
        fast = machine.fast_bf16()
        why = "this processor has fast bf16 products" if fast else "this processor has no fast bf16 products"
        resolved = resolved.settle("compute", "bf16" if fast else "fp32", f"auto: {why}")
    if config.base == "auto" and config.method == "full":
        resolved = resolved.settle("base", "fp32", "auto: masters, rounded as products take them")
    elif config.base == "auto" and quantised:
        resolved = resolved.settle("base", "packed", "auto: the model's file is quantised")
    elif config.base == "auto":
        resolved = resolved.settle("base", resolved.config.compute, "auto: as compute")
    if config.kernels == "auto":
        resolved = resolved.settle("kernels", native.best(), f"auto: {native.describe()[1]}")
    if config.threads is None:
        resolved = resolved.settle("threads", machine.cores(), "auto: the cores that this process may use")
    return resolved


def _refuse_adapter_settings(resolved: Resolved) -> None:
    """Full fine-tuning has no adapter and no frozen base: settings of one that were given, or that a file changes, are
    refused by name."""
    config, origin = resolved.config, resolved.origin
    if config.method != "full":
        return
    defaults = TrainConfig()
    unfit = [
        name for name in ADAPTER_ONLY if origin.get(name) == "given" or getattr(config, name) != getattr(defaults, name)
    ]
    if config.base not in ("auto", "fp32"):
        unfit.append("base")
    if unfit:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in unfit)
        what = (
            f"trains all weights, in fp32; {named} {'is' if len(unfit) == 1 else 'are'} for adapters on a frozen base"
        )
        raise ConfigError("--method full", what, f"leave {'it' if len(unfit) == 1 else 'them'} out")


def settle_for_data(
    resolved: Resolved, rows: Sequence[Tokens], longest: int, model: dict[str, Any]
) -> tuple[Resolved, Plan]:
    """Batch size, steps, learning rate, evaluations and saves, from the rows and the model's shape; what memory decides
    comes after it (planning/predict.py).

    rows: the training rows. longest: tokens of the longest row allowed. model: the model's configuration fields.
    A resumed run has them all in run.yaml and none is worked out again.
    """
    config, n = resolved.config, len(rows)
    if config.batch_size is None:
        size = 8 if n < SMALL_DATA else 16
        resolved = resolved.settle("batch_size", size, f"auto: {n} rows are {'under' if size == 8 else 'at least'} 500")
    unpackable = architectures.unpackable(model)
    if config.packing == "auto" and unpackable:
        resolved = resolved.settle("packing", "off", f"auto: {unpackable}")
    if config.max_length is None:
        resolved = resolved.settle("max_length", longest, "auto: the longest row, up to the model's context")
    per_epoch = math.ceil(n / int(resolved.config.batch_size or 1))
    if config.epochs is None and config.max_steps is None:
        resolved = resolved.settle("epochs", 1.0, "default")
    config = resolved.config
    wanted = [] if config.epochs is None else [max(1, math.ceil(config.epochs * per_epoch))]
    steps = min(wanted + ([] if config.max_steps is None else [config.max_steps]))
    if config.lr is None:
        lr, rule = auto_lr(str(model["model_type"]), int(model["hidden_size"]), steps, config.method)
        if config.init in LOWER:  # there a step of equal size changes more: A and B are large, or A meets its inputs
            times, name = LOWER[config.init]
            lr, rule = lr / times, f"{rule}, / {times} for {name}"
        resolved = resolved.settle("lr", lr, f"auto: {rule}")
    if config.save_every is None:
        resolved = resolved.settle("save_every", max(1, math.ceil(steps / 10)), "auto: a tenth of the run")
    if config.eval_every is None:
        resolved = resolved.settle("eval_every", resolved.config.save_every, "auto: as save_every")
    return resolved, Plan(steps, per_epoch)
