"""A LoRA adapter as the GGUF file that llama.cpp puts on a base of the same architecture.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    blk.3.attn_q.weight.lora_a        (r, in)       blk.3.attn_q.weight.lora_b        (out, r), rows in the file's order
    blk.3.ffn_gate_exps.weight.lora_a (E, r, in)    blk.3.ffn_gate_exps.weight.lora_b (E, out, r)

A layer that is one in transformers and two here (experts' gate and up, Qwen3-Next's in_proj_qkvz) is two pairs: they
share A, and each has its rows of B.

llama.cpp multiplies B A by alpha / r, r being each tensor's own rank. Every scale is therefore baked into B, and alpha
is the rank, or 0 where ranks differ, for which llama.cpp multiplies by 1 too: rsLoRA and patterns need no key.
Source: llama.cpp, src/llama-adapter.cpp, src/llama-graph.cpp and its convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.attach import adapted
from lorafit.adapter.combine import LowRank
from lorafit.adapter.merge import put_factors
from lorafit.errors import AdapterError, Faults, LorafitError
from lorafit.export.placement import Placement, placement
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_pieces import Piece
from lorafit.formats.gguf_write import write_gguf
from lorafit.formats.names import placed
from lorafit.kernels import ops
from lorafit.model.sources import open_source

HALVES = (".lora_a", ".lora_b")


def write_gguf_adapter(
    path: Path, where: Placement, updates: Mapping[str, LowRank], model: str, name: str, template: str
) -> None:
    """Write the file at `path`, F32. updates: by layer path; model: for errors. Raises ModelError for a layer that GGUF
    has no name for."""
    ranks = {update.rank for update in updates.values()}
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in updates.items():
        for piece in where.of(layer, model):
            entry, part = piece.entry, piece.rows(B)
            rows, columns = entry.row_order(), entry.column_order()
            tensors[f"{entry.tensor}.lora_a"] = A if columns is None else placed(A, columns, 1)
            tensors[f"{entry.tensor}.lora_b"] = part if rows is None else placed(part, rows, 0)
    metadata = {
        "general.type": ("adapter", "string"),
        "general.name": (name, "string"),
        "adapter.type": ("lora", "string"),
        "adapter.lora.alpha": (float(ranks.pop()) if len(ranks) == 1 else 0.0, "float32"),
        "tokenizer.chat_template": (template, "string"),
    }
    plan = {tensor: (tuple(values.shape), "F32") for tensor, values in tensors.items()}
    write_gguf(path, where.architecture, metadata, plan, lambda tensor: tensors[tensor].contiguous().numpy())


def read_gguf_adapter(path: Path, where: Placement) -> dict[str, LowRank]:
    """The updates in a GGUF adapter, ours or llama.cpp's, by layer path, scales in B.

    Raises AdapterError for a file that is no LoRA adapter of this architecture, or a tensor without its other half.
    """
    gguf = read_gguf(path)
    for key, wanted in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", where.architecture),
    ):
        found = gguf.value(key, str, "")
        if found != wanted:
            raise AdapterError(place(path, key), f"is {found[:40]!r}, not {wanted}", "give a LoRA adapter of this base")
    alpha = gguf.value("adapter.lora.alpha", float)
    bases = {name.removesuffix(half) for name in gguf.tensors for half in HALVES if name.endswith(half)}
    other = next((name for name in gguf.tensors if not name.endswith(HALVES)), None)
    if other is not None:
        raise AdapterError(place(path, other), "is no half of an update", "merge that adapter with its own program")
    names = {piece.entry.tensor: name for name, found in where.pieces.items() for piece in found}
    read: dict[str, LowRank] = {}
    for base in sorted(bases):
        if base not in names:
            raise AdapterError(place(path, base), "names no tensor of this base", "give the base that it was made for")
        A, B = (_values(gguf, f"{base}{half}") for half in HALVES)
        if A.ndim != B.ndim or A.ndim not in (2, 3) or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
            what = f"has halves of shapes {list(A.shape)} and {list(B.shape)}"
            raise AdapterError(place(path, base), what, "convert the adapter again")
        read[base] = LowRank(A, B * (alpha / A.shape[-2]) if alpha else B)
    return {name.removesuffix(".weight"): _joined(read, where.pieces[name], path) for name in
            dict.fromkeys(names[base] for base in read)}  # fmt: skip


def _joined(read: Mapping[str, LowRank], pieces: Sequence[Piece], path: Path) -> LowRank:
    """A layer's update from its tensors': with the A that they share, or of the ranks' sum where they share none."""
    parts = []
    for piece in pieces:
        entry = piece.entry
        if entry.tensor not in read:
            what = f"stands without {entry.tensor.split('.')[-2]}"
            beside = next(other.entry.tensor for other in pieces if other.entry.tensor in read)
            raise AdapterError(place(path, beside), what, "the adapter is incomplete")
        if piece.heads:
            raise AdapterError(place(path, entry.tensor), "is half of a layer, head by head", "merge that adapter")
        (A, B), rows, columns = read[entry.tensor], entry.row_order(), entry.column_order()
        A = A if columns is None else A[:, torch.from_numpy(columns)]
        parts.append(LowRank(A, B if rows is None else B[torch.from_numpy(rows)]))
    if len(parts) == 1:
        return parts[0]
    shared = all(torch.equal(part.A, parts[0].A) for part in parts)
    A = parts[0].A if shared else torch.cat([part.A for part in parts], dim=-2)
    B = A.new_zeros(*A.shape[:-2], sum(part.B.shape[-2] for part in parts), A.shape[-2])
    first = 0
    for piece, part in zip(pieces, parts, strict=True):
        own = slice(0 if shared else first, part.rank if shared else first + part.rank)
        B[..., piece.outputs, own] = part.B
        first += part.rank
    return LowRank(A, B)


def put_gguf_adapter(model: nn.Module, base: Path, file: Path) -> list[str]:
    """Put the adapter in a GGUF file on the plain `model` of the file or folder `base`; notes for the user.

    Raises AdapterError (or Faults) for what does not fit; then the model is as it was.
    """
    if adapted(model):
        raise AdapterError(str(file), "cannot be put on a model that has an adapter", "load it on the plain model")
    updates = read_gguf_adapter(file, placement(base, open_source(base)))
    faults: list[LorafitError] = []
    for path, update in updates.items():
        shape = (*update.A.shape[:-2], update.B.shape[-2], update.A.shape[-1])
        if shape != _shape(model.get_submodule(path)):
            faults.append(AdapterError(f"{file}: {path}", f"is an update of shape {list(shape)}, which does not fit"))
        elif not bool(torch.isfinite(update.A).all() and torch.isfinite(update.B).all()):
            faults.append(AdapterError(f"{file}: {path}", "holds NaN or infinity", "convert the adapter again"))
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    put_factors(model, updates)
    return ["a GGUF adapter has no fingerprint: its base can be checked by names and shapes only"]


def _shape(layer: Any) -> tuple[int, ...]:
    """(O, I) of a linear layer, (E, O, I) of experts; () of what takes no update."""
    if not hasattr(layer, "in_features"):
        return ()
    experts = (layer.experts,) if hasattr(layer, "experts") else ()
    return (*experts, layer.out_features, layer.in_features)


def _values(gguf: GgufFile, name: str) -> Tensor:
    """A tensor's values, fp32. Raises AdapterError when it is missing."""
    if name not in gguf.tensors:
        raise AdapterError(place(gguf.path, name), "is missing", "the adapter is incomplete")
    tensor = gguf.tensors[name]
    stored = ops.Stored(tensor.type.name, tensor.shape[-1], torch.from_dlpack(tensor.data))
    return ops.values(stored).view(tensor.shape)
