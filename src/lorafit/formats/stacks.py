"""Stacks of experts in files: transformers has one 3-D parameter where files have several tensors.

    file                                                    parameter
    mlp.experts.7.gate_proj.weight, ....up_proj.weight      mlp.experts.gate_up_proj (E, 2 I, H): gate, then up
    mlp.experts.7.down_proj.weight                          mlp.experts.down_proj (E, H, I)
    blk.3.ffn_gate_exps.weight, blk.3.ffn_up_exps.weight    the same, from two tall tensors; gpt-oss alternates

Mixtral calls them w1, w3 and w2 of `block_sparse_moe`, Granite `input_linear` and `output_linear`. Source: published
checkpoints, and the conversions that transformers 5 applies to them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.errors import ModelError

EXPERT = re.compile(r"(?P<path>.+\.experts)\.(?P<expert>\d{1,5})\.(?P<matrix>[a-z0-9_]+)\.weight")
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names, and everybody else's
FUSED = ("gate_proj", "up_proj")
RENAMED = {
    "mixtral": {".block_sparse_moe.": ".mlp."},
    "granitemoe": {
        ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
        ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
        ".block_sparse_moe.router.layer.weight": ".block_sparse_moe.router.weight",
    },
}


@dataclass(frozen=True)
class Part:
    """Some output features of every expert of a stack."""

    names: tuple[str, ...]
    """The file's tensors: one for all experts, or one for each."""
    columns: slice
    """The output features that they give."""


@dataclass(frozen=True)
class Stack:
    """How one 3-D parameter lies in a file: `shape` is (E, O, I), whatever order the parameter has."""

    shape: tuple[int, int, int]
    parts: tuple[Part, ...]


def renamed(name: str, model_type: str) -> str:
    """The parameter's name for a tensor's that the family's published files call otherwise."""
    for old, new in RENAMED.get(model_type, {}).items():
        if old in name:
            return name.replace(old, new)
    return name


def of_matrices(shapes: Mapping[str, tuple[int, ...]], model_type: str, place: str) -> dict[str, Stack]:
    """The stacks that a folder's tensors for single experts make, by their parameter's name.

    Raises ModelError for an expert that lacks a matrix, or one whose shape is not the others'.
    """
    found: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in shapes:
        match = EXPERT.fullmatch(name)
        if match:
            matrix = MATRICES.get(match["matrix"], match["matrix"])
            found[renamed(f"{match['path']}.", model_type)[:-1]][matrix][int(match["expert"])] = name
    stacks = {}
    for path, matrices in found.items():
        if set(matrices) != {*FUSED, "down_proj"}:
            raise ModelError(f"{place}: {path}", f"has {', '.join(sorted(matrices))}, not gate, up and down")
        experts = len(matrices["down_proj"])
        for matrix, by_expert in matrices.items():
            _check(place, f"{path}.{matrix}", by_expert, shapes, max(experts, *(len(m) for m in matrices.values())))
        gate, up, down = ([matrices[matrix][e] for e in range(experts)] for matrix in (*FUSED, "down_proj"))
        stacks[f"{path}.gate_up_proj"] = stack([gate, up], shapes, experts)
        stacks[f"{path}.down_proj"] = stack([down], shapes, experts)
    return stacks


def _check(place: str, what: str, by_expert: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]], n: int) -> None:
    missing = next((expert for expert in range(n) if expert not in by_expert), None)
    if missing is not None:
        raise ModelError(f"{place}: {what}", f"of expert {missing} of {n} is missing", "the folder is incomplete")
    of = {shapes[name] for name in by_expert.values()}
    if len(of) > 1 or any(len(shape) != 2 for shape in of):
        raise ModelError(f"{place}: {what}", f"has shapes {sorted(map(list, of))} for its experts, not one matrix's")


def stack(
    parts: list[list[str]], shapes: Mapping[str, tuple[int, ...]], experts: int, interleaved: bool = False
) -> Stack:
    """A stack of one or two parts (gate and up), each of one tall tensor or of a matrix for each expert."""
    rows, columns = shapes[parts[0][0]][-2:]
    total = rows * len(parts)
    places = [
        slice(index, None, len(parts)) if interleaved else slice(index * rows, (index + 1) * rows)
        for index in range(len(parts))
    ]
    shape = (experts, total, columns)
    return Stack(shape, tuple(Part(tuple(names), place) for names, place in zip(parts, places, strict=True)))
