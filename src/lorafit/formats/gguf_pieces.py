"""What each tensor of a GGUF file holds of transformers' parameters: the way back from `arrange` and `join`.

    mlp.experts.gate_up_proj (E, 2 I, H)    ffn_gate_exps, ffn_up_exps    halves of the rows, or in turn (gpt-oss)
    linear_attn.in_proj_qkvz                attn_qkv, attn_gate           rows by key head (Qwen3-Next)
    self_attn.kv_b_proj                     attn_k_b, attn_v_b            rows of each head, the first transposed

Rows of a product's weight are its outputs: of an update B A the tensors have rows of B each, and share A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.formats.gguf_experts import Joined
from lorafit.formats.gguf_linear import Gathered
from lorafit.formats.names import Entry

GATE_UP = ("gate_proj", "up_proj")  # of experts; transformers has both in one tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a file, and what of a parameter it holds."""

    entry: Entry
    outputs: slice | Tensor | None = None
    """The parameter's outputs that it holds, in its order; None: all of them."""
    bias: bool = False
    """Outputs are the parameter's last dimension, not the one before."""
    heads: int = 0
    """Heads that the tensor has apart, in front; 0: none."""
    turned: bool = False
    """Rows and columns of each head are exchanged."""

    def cut(self, values: Tensor) -> Tensor:
        """The part of the parameter that the tensor holds, before what `Entry.to_file` does to it."""
        found = values if self.outputs is None else values[..., self.outputs] if self.bias else self.rows(values)
        if self.heads:
            found = found.view(self.heads, -1, found.shape[-1])
        return (found.mT if self.turned else found).contiguous()

    def rows(self, values: Tensor) -> Tensor:
        """Its outputs of (..., outputs, n): of a weight, or of an update's B."""
        return values if self.outputs is None else values[..., self.outputs, :]


def pieces(entries: Mapping[str, Entry | Joined], alternate: bool) -> dict[str, list[Piece]]:
    """The tensors of each parameter, by its name in transformers.

    alternate: gate's and up's rows of experts take turns in transformers' parameter.
    """
    found: dict[str, list[Piece]] = {}
    for name, entry in entries.items():
        module, _, own = name.rpartition(".")
        if isinstance(entry, Gathered):
            places = torch.from_numpy(np.argsort(entry.rows))  # the parameter's row for each of the file's
            own_rows = places.split([part.shape[0] for part in entry.parts])
            found[name] = [Piece(part, rows) for part, rows in zip(entry.parts, own_rows, strict=True)]
        elif isinstance(entry, Joined) and entry.heads:
            found[name] = _of_heads(entry)
        elif isinstance(entry, Joined):
            first, second = _halves(entry.shape[-1], alternate)
            found[name] = [Piece(entry.first, first, bias=True), Piece(entry.second, second, bias=True)]
        elif own == GATE_UP[0] and module.endswith(".experts"):
            first, second = _halves(2 * entry.shape[1], alternate)
            up = entries[f"{module}.{GATE_UP[1]}"]
            assert isinstance(up, Entry), "up is as plain as gate"
            found[f"{module}.gate_up_proj"] = [Piece(entry, first), Piece(up, second)]
        elif not (own == GATE_UP[1] and module.endswith(".experts")):
            found[name] = [Piece(entry)]
    return found


def _halves(outputs: int, alternate: bool) -> tuple[slice, slice]:
    if alternate:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, outputs // 2), slice(outputs // 2, outputs)


def _of_heads(entry: Joined) -> list[Piece]:
    """k_b and v_b of a kv_b whose rows are k's and v's, head by head."""
    rows, width = torch.arange(entry.shape[0]).view(entry.heads, -1), entry.first.shape[2]
    keys, values = rows[:, :width].reshape(-1), rows[:, width:].reshape(-1)
    return [
        Piece(entry.first, keys, heads=entry.heads, turned=True),
        Piece(entry.second, values, heads=entry.heads),
    ]
