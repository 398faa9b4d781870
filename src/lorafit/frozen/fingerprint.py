"""Which weights a model has: architecture, shapes, and values at fixed sampled places.

Two files of the same weights in different formats have different bytes, so a hash cannot say that they belong
together. Values can: sampled from the dequantised tensors, they agree within the formats' rounding. Vectors (norms)
are stored exactly in every format and give a sharp test; matrices a wide one where a quantised format is involved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.frozen.stack import FrozenStack
from lorafit.frozen.weight import FrozenWeight

Frozen = FrozenWeight | FrozenStack | Tensor

TENSORS, VALUES = 8, 24  # sampled matrices, as many vectors, and values of each
SAME = 0.005  # relative difference that bf16 rounding explains (its half step is 0.004)
QUANTISED = 0.2  # relative difference that 4-bit rounding explains (measured: 0.08 for Q4_0, 0.09 for NF4)
ALIKE = {"mistral": "llama"}  # Mistral's models call themselves Llama in a GGUF file
EXACT_FORMATS = ("F32", "F16", "BF16", "FP32", "FP16")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """JSON-ready fingerprint of a model's frozen weights; the adapters on it do not count."""
    tensors = dict(_frozen_tensors(model))
    shapes = {name: list(_shape(tensor)) for name, tensor in tensors.items()}
    chosen = []
    for dimensions in (1, 2, 3):
        names = sorted(name for name, shape in shapes.items() if len(shape) == dimensions)
        chosen += [names[i * len(names) // TENSORS] for i in range(TENSORS)] if len(names) > TENSORS else names
    return {
        "architecture": str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        "shapes": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        "samples": {name: {"format": _format(tensors[name]), "values": _sample(tensors[name])} for name in chosen},
    }


def digest(print_: dict[str, Any]) -> str:
    """One short text for a fingerprint, equal only if every sampled bit is."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:16]


def difference(stored: dict[str, Any], own: dict[str, Any]) -> tuple[bool, str]:
    """(whether the weights are the same, what differs or ""): a text with True means another format of the same.

    Raises KeyError or TypeError when `stored` is no fingerprint.
    """
    if len({ALIKE.get(one["architecture"], one["architecture"]) for one in (stored, own)}) > 1:
        return False, f"it was trained on a {stored['architecture']} model and this is {own['architecture']}"
    if stored["shapes"] != own["shapes"] or stored["samples"].keys() != own["samples"].keys():
        return False, "it was trained on a model with other tensor shapes"
    note = ""
    for name, theirs in stored["samples"].items():
        ours = own["samples"][name]
        gap = _gap(theirs["values"], ours["values"])
        formats = f"{theirs['format']} there, {ours['format']} here"
        lossy = {theirs["format"], ours["format"]} - set(EXACT_FORMATS)
        if not gap <= (QUANTISED if lossy and theirs["format"] != ours["format"] else SAME):  # a NaN is no match
            return False, f"it was trained on other weights: {name} differs by {gap:.1%} ({formats})"
        if theirs["format"] != ours["format"]:
            note = f"same weights in another format ({name}: {formats})"
    return True, note


def _frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Frozen]]:
    """Each weight once, under the first of its names; what belongs to a frozen weight or an adapter is no tensor of
    its own."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, Frozen]]:
        if isinstance(module, (FrozenWeight, FrozenStack)):
            yield path, module
            if isinstance(module, FrozenStack) and module.bias is not None:
                yield f"{path}.bias", module.bias
            return
        beside = getattr(module, "only_base_is_frozen", False)  # an adapted layer
        if not beside:
            own = module.named_parameters(recurse=False)
            yield from ((f"{path}.{part}".lstrip("."), tensor) for part, tensor in own)
        for name, child in module.named_children():
            if name == "base" or not beside:
                yield from walk(child, f"{path}.{name}".lstrip("."))

    seen: set[int] = set()
    for path, tensor in walk(model, ""):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield f"{path}.".replace(".base.", ".")[:-1], tensor


def _shape(tensor: Frozen) -> tuple[int, ...]:
    if isinstance(tensor, FrozenStack):
        return (tensor.experts, tensor.out_features, tensor.in_features)
    return (tensor.out_features, tensor.in_features) if isinstance(tensor, FrozenWeight) else tuple(tensor.shape)


def _format(tensor: Frozen) -> str:
    return "F32" if isinstance(tensor, Tensor) else tensor.source_format


def _sample(tensor: Frozen) -> list[float]:
    """VALUES values at evenly spread places, from one row each of a matrix or of a stack's experts."""
    if isinstance(tensor, FrozenStack):
        rows, columns = tensor.experts * tensor.out_features, tensor.in_features
        found = [tensor.row(i * rows // VALUES)[(i * 7919) % columns].item() for i in range(VALUES)]
    elif isinstance(tensor, FrozenWeight):
        rows, columns = tensor.out_features, tensor.in_features
        buffer = torch.empty(1, columns, device=tensor.device)
        places = [(i * rows // VALUES, (i * 7919) % columns) for i in range(VALUES)]
        found = [tensor.rows(row, row + 1, buffer)[0, column].item() for row, column in places]
    else:
        flat = tensor.detach().flatten()
        found = [flat[i * len(flat) // VALUES].float().item() for i in range(min(VALUES, len(flat)))]
    return [float(f"{value:.6g}") for value in found]


def _gap(theirs: Any, ours: list[float]) -> float:
    """Distance between two samples over the length of ours. Raises TypeError when theirs is no such list of numbers."""
    if not isinstance(theirs, list) or len(theirs) != len(ours) or not all(type(value) is float for value in theirs):
        raise TypeError("values are not what a sample holds")
    return math.dist(theirs, ours) / (math.hypot(*ours) + 1e-12)
