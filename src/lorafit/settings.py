"""Every setting that was left to us, worked out before step 1 and said with its rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorafit import machine
from lorafit.config import Resolved
from lorafit.data.batch import Tokens
from lorafit.training.loop import Plan
from lorafit.training.optim import auto_lr

SMALL_DATA = 500  # rows
MICRO_BATCHES = (2048, 1024, 512)  # tokens computed at once: more are no faster, fewer make products slow
ACTIVATIONS = 3 * 10**9  # bytes that they may take, however much memory is free


def settle_for_machine(resolved: Resolved, quantised: bool = False) -> Resolved:
    """Compute dtype, the base's storage and threads, from the processor's features and whether the model's file is
    quantised."""
    config = resolved.config
    if config.compute == "auto":
        fast = machine.fast_bf16()
        why = "this processor has fast bf16 products" if fast else "this processor has no fast bf16 products"
        resolved = resolved.settle("compute", "bf16" if fast else "fp32", f"auto: {why}")
    if config.base == "auto" and quantised:
        resolved = resolved.settle("base", "packed", "auto: the model's file is quantised")
    elif config.base == "auto":
        resolved = resolved.settle("base", resolved.config.compute, "auto: as compute")
    if config.threads is None:
        resolved = resolved.settle("threads", machine.cores(), "auto: the cores that this process may use")
    return resolved


def settle_for_data(
    resolved: Resolved, rows: Sequence[Tokens], longest: int, model: dict[str, Any]
) -> tuple[Resolved, Plan]:
    """Batch size, steps, learning rate, evaluations, saves and checkpointing, from the rows and the model's shape.

    rows: the training rows. longest: tokens of the longest row allowed. model: the model's configuration fields.
    A resumed run has them all in run.yaml and none is worked out again.
    """
    config, n = resolved.config, len(rows)
    if config.batch_size is None:
        size = 8 if n < SMALL_DATA else 16
        resolved = resolved.settle("batch_size", size, f"auto: {n} rows are {'under' if size == 8 else 'at least'} 500")
    if config.max_length is None:
        resolved = resolved.settle("max_length", longest, "auto: the longest row, up to the model's context")
    per_epoch = math.ceil(n / int(resolved.config.batch_size or 1))
    if config.epochs is None and config.max_steps is None:
        resolved = resolved.settle("epochs", 1.0, "default")
    config = resolved.config
    wanted = [] if config.epochs is None else [max(1, math.ceil(config.epochs * per_epoch))]
    steps = min(wanted + ([] if config.max_steps is None else [config.max_steps]))
    if config.lr is None:
        lr, rule = auto_lr(str(model["model_type"]), int(model["hidden_size"]), steps)
        resolved = resolved.settle("lr", lr, f"auto: {rule}")
    if config.save_every is None:
        resolved = resolved.settle("save_every", max(1, math.ceil(steps / 10)), "auto: a tenth of the run")
    if config.eval_every is None:
        resolved = resolved.settle("eval_every", resolved.config.save_every, "auto: as save_every")
    if config.checkpointing == "auto" or config.micro_batch_tokens is None:
        resolved = _settle_activations(resolved, max(len(row.ids) for row in rows), model)
    return resolved, Plan(steps, per_epoch, resolved.config.checkpointing == "all")


def _settle_activations(resolved: Resolved, longest: int, model: dict[str, Any]) -> Resolved:
    """The largest packs whose activations fit; where not even the smallest do, large ones with checkpointing.

    longest: tokens of the longest training row, which is a pack at least. A layer computed twice costs half as much
    again, a smaller pack next to nothing.
    """
    config = resolved.config
    room = min(machine.available_memory() // 2, ACTIVATIONS)
    choices = MICRO_BATCHES if config.micro_batch_tokens is None else (config.micro_batch_tokens,)
    sizes = {tokens: activation_bytes(model, max(tokens, longest), config.compute) for tokens in choices}
    fitting = [tokens for tokens, size in sizes.items() if size <= room]
    mode = ("off" if fitting else "all") if config.checkpointing == "auto" else config.checkpointing
    tokens = choices[0] if mode == "all" else fitting[0] if fitting else choices[-1]
    needed, free = sizes[tokens] / 1e9, room / 1e9
    why = f"auto: activations of {tokens} tokens need about {needed:.1f} GB, and may take {free:.1f} GB"
    if config.micro_batch_tokens is None:
        resolved = resolved.settle("micro_batch_tokens", tokens, why)
    return resolved.settle("checkpointing", mode, why) if config.checkpointing == "auto" else resolved


def activation_bytes(model: dict[str, Any], tokens: int, compute: str) -> int:
    """Activations kept for the backward pass of one pack, in bytes: what autograd saves per layer and token.

    About 12 tensors as wide as the hidden state (norms in fp32, q, k, v, attention's output, residuals) and 5 as wide
    as the MLP. Counted on a Llama layer; the prediction that is checked against measurements comes with `plan`.
    """
    width = 12 * int(model["hidden_size"]) + 5 * int(model["intermediate_size"])
    return tokens * int(model["num_hidden_layers"]) * width * (2 if compute == "bf16" else 4)
