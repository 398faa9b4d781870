"""The size of an adapter's file, to the byte, before there is one (of experts' adapters but for their names)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from lorafit.adapter.peft_config import renamed
from lorafit.model.architectures import WRAPPERS
from lorafit.planning.memory import Use, ranks_of, whole
from lorafit.planning.outline import Outline

PREFIX = "base_model.model."


def adapter_bytes(model: Outline, use: Use) -> int:
    """Of adapter_model.safetensors: a header with each tensor's name, dtype, shape and place as JSON, and fp32
    numbers. 0 with --method full."""
    if use.full:
        return 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    paths = WRAPPERS[model.part_of].paths if model.part_of else ()
    tensors = ((renamed(name, paths), shape, copies) for name, shape, copies in _tensors(model, use))
    for name, shape, copies in sorted(tensors):
        size = 4 * copies * math.prod(shape)
        header[PREFIX + name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    size = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-size // 8) * 8 + at


def _tensors(model: Outline, use: Use) -> Iterator[tuple[str, list[int], int]]:
    """(name, shape, how many of these) as adapter/file.py writes them."""
    ranks = ranks_of(model, use.targets, use.rank, use.pattern)
    for m in model.adapted(use.targets):
        rank = ranks[m.path] * (2 if use.pissa else 1)  # as the plain LoRA that it is saved as
        if m.path == model.embedding.path:
            yield f"{m.path}.lora_embedding_A", [rank, m.rows], m.experts
            yield f"{m.path}.lora_embedding_B", [m.columns, rank], m.experts
            continue
        yield f"{m.path}.lora_A.weight", [rank, m.columns], m.experts
        yield f"{m.path}.lora_B.weight", [m.rows, rank], m.experts
        if use.dora:
            yield f"{m.path}.lora_magnitude_vector", [m.rows], 1
    for path, count in model.biases.items():
        if use.bias == "all" or (use.bias == "lora_only" and path in ranks):
            yield f"{path}{'.base_layer' if path in ranks else ''}.bias", [count], 1
    trained = {m.path: m for m in whole(model, use)}
    if trained and model.head is None:  # of a tied pair both names have a tensor
        trained["lm_head"] = model.embedding
    for path, m in trained.items():
        yield f"{path}.weight", [m.rows, m.columns], 1
    if use.rows:
        for m in model.tables:
            yield f"{m.path}.token_adapter.trainable_tokens_delta", [use.rows, m.columns], 1
