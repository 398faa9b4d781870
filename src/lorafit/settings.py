"""Every setting that was left to us, worked out before step 1 and said with its rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorafit import machine
from lorafit.config import Resolved
from lorafit.data.batch import Tokens
from lorafit.kernels import native
from lorafit.model import architectures
from lorafit.model.fused import FUSED_TYPES
from lorafit.training.loop import Plan
from lorafit.training.optim import auto_lr

SMALL_DATA = 500  # rows
ACTIVATIONS = 12 * 10**8  # bytes that they may take, however much memory is free
MICRO_BATCHES = {2048: 4 * 10**8, 1024: ACTIVATIONS, 512: ACTIVATIONS}
"""Tokens computed at once, and the activations that so many may need: 2048 are 5 % faster than 1024, 1024 20 % faster
than 512 (SmolLM2, 2 cores), the less the wider the model."""


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
    if config.kernels == "auto":
        resolved = resolved.settle("kernels", native.best(), f"auto: {native.describe()[1]}")
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
        lr, rule = auto_lr(str(model["model_type"]), int(model["hidden_size"]), steps)
        resolved = resolved.settle("lr", lr, f"auto: {rule}")
    if config.save_every is None:
        resolved = resolved.settle("save_every", max(1, math.ceil(steps / 10)), "auto: a tenth of the run")
    if config.eval_every is None:
        resolved = resolved.settle("eval_every", resolved.config.save_every, "auto: as save_every")
    resolved = _settle_activations(resolved, max(len(row.ids) for row in rows), model)
    return resolved, Plan(steps, per_epoch, int(resolved.config.checkpointed_layers or 0))


def _settle_activations(resolved: Resolved, longest: int, model: dict[str, Any]) -> Resolved:
    """The largest packs that are worth the memory of their activations; where not even the smallest fit, layers that
    are computed twice, as many as are needed.

    longest: tokens of the longest training row, which is a pack at least.
    """
    config = resolved.config
    if None not in (config.micro_batch_tokens, config.checkpointed_layers) and config.checkpointing != "auto":
        return resolved  # a resumed run
    layers = int(model["num_hidden_layers"])
    room = min(machine.available_memory() // 2, ACTIVATIONS)
    if config.micro_batch_tokens is None:
        kept = config.checkpointing != "all"
        sizes = {n: activation_bytes(model, max(n, longest), config.compute, kept) for n in MICRO_BATCHES}
        fitting = [tokens for tokens, most in MICRO_BATCHES.items() if sizes[tokens] <= min(most, room)]
        tokens = fitting[0] if fitting else min(MICRO_BATCHES)
        why = f"auto: activations of {tokens} tokens need about {sizes[tokens] / 1e9:.1f} GB"
        resolved = resolved.settle("micro_batch_tokens", tokens, why)
    if config.checkpointed_layers is None:
        count, why = {"off": (0, "as --checkpointing off"), "all": (layers, "as --checkpointing all")}.get(
            config.checkpointing, (-1, "")
        )
        if count < 0:
            tokens = max(int(resolved.config.micro_batch_tokens or 1), longest)
            needed = activation_bytes(model, tokens, config.compute)
            saved = (needed - activation_bytes(model, tokens, config.compute, kept=False)) / layers
            count = min(layers, math.ceil(max(0, needed - room) / saved))
            why = f"auto: activations of {tokens} tokens need {needed / 1e9:.1f} GB, and may take {room / 1e9:.1f} GB"
        resolved = resolved.settle("checkpointed_layers", count, why)
    count = int(resolved.config.checkpointed_layers or 0)
    if config.checkpointing == "auto":
        mode = "off" if count == 0 else "all" if count >= layers else "some"
        resolved = resolved.settle("checkpointing", mode, resolved.origin["checkpointed_layers"])
    return resolved


def mlp_width(model: dict[str, Any]) -> int:
    """Inner features that a token has in one layer: of its own experts and the shared ones, where there are any."""
    dense, chosen = int(model["intermediate_size"]), int(model.get("num_experts_per_tok") or 0)
    if not chosen:
        return dense
    each = int(model.get("moe_intermediate_size") or dense)
    shared = int(model.get("n_shared_experts") or 0) * each + int(model.get("shared_expert_intermediate_size") or 0)
    return chosen * each + shared + (each if model["model_type"] == "llama4_text" else 0)


def activation_bytes(model: dict[str, Any], tokens: int, compute: str, kept: bool = True) -> int:
    """What all layers keep for the backward pass of one pack, in bytes; with kept=False their inputs alone.

    Of each layer (model/layer.py): its input, its middle, q, k, v, attention's output, gate and up, and the outputs
    that a family norms. Layers that we do not compute ourselves keep more, about as much again.
    """
    hidden, heads = int(model["hidden_size"]), int(model["num_attention_heads"])
    dim = int(model.get("head_dim") or hidden // heads)
    query, key = heads * dim, int(model.get("num_key_value_heads") or heads) * dim
    normed = 2 if str(model["model_type"]).startswith("gemma") else 0
    width = (2 + normed) * hidden + 2 * query + 2 * key + 2 * mlp_width(model)
    ours = 1 if model["model_type"] in FUSED_TYPES else 2
    return (
        tokens * int(model["num_hidden_layers"]) * (width * ours if kept else hidden) * (2 if compute == "bf16" else 4)
    )
