"""Base and adapter as one GGUF file: every matrix in one format, all metadata, tokenizer and chat template along.

Formats are those that gguf-py can write: F32, F16, BF16, Q8_0, Q4_0. Vectors and routers stay F32. With Q4_0 the
embedding and the head are Q8_0, as they suffer most. A matrix whose rows do not divide into blocks becomes F16.
Tensors that the adapter leaves alone and that have their format already are copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit import console
from lorafit.adapter.merge import EMBEDDING, HEAD, Change, grown
from lorafit.errors import ModelError
from lorafit.export.gguf_metadata import Metadata, model_metadata, rope_factors, tokenizer_metadata, with_tokens
from lorafit.export.merge import Rounding
from lorafit.export.opened import Opened
from lorafit.export.placement import Placement, placement
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_pieces import Piece
from lorafit.formats.gguf_write import fits, rounded, write_gguf
from lorafit.formats.names import ROPE_FACTORS
from lorafit.kernels import ops
from lorafit.model.head import decoder_of

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers of whole files
CONVOLUTION = "ssm_conv1d.weight"  # (C, K) in the file, always F32
WINDOWLESS = ("phi3",)  # llama.cpp reads the window and says that it is disabled
TOP = ("token_embd.weight", "output.weight")
DROPPED = (
    "quantize.",
    "general.file_type",
    "general.quantization_version",
    "split.",
    "general.alignment",
)  # of the base's metadata


@dataclass(frozen=True)
class MergedFile:
    """What is written: where each tensor comes from."""

    opened: Opened
    where: Placement
    kind: str
    changes: Mapping[str, Change]
    rounding: Rounding

    def write(self, path: Path) -> None:
        """Write the file and read its configuration back. Raises ModelError for what GGUF cannot say."""
        base = read_gguf(self.opened.path) if self.opened.path.is_file() else None
        by_tensor = {piece.entry.tensor: (name, piece) for name, found in self.where.pieces.items() for piece in found}
        extra = None if base else self._rope_factors()
        self._check_names()
        rows = {piece.entry.tensor: count for name, count in grown(self.opened.model).items()
                for piece in self.where.pieces.get(name, [])}  # fmt: skip
        plan: dict[str, tuple[tuple[int, ...], str]] = {}
        for tensor in dict.fromkeys((*(base.tensors if base else ()), *by_tensor)):
            shape = base.tensors[tensor].shape if base and tensor in base.tensors else by_tensor[tensor][1].entry.shape
            shape = (shape[0], shape[2]) if tensor.endswith(CONVOLUTION) and len(shape) == 3 else shape
            shape = (rows.get(tensor, shape[0]), *shape[1:])
            plan[tensor] = (shape, self._format(tensor, shape))
        if extra is not None:
            plan[ROPE_FACTORS] = (extra.shape, "F32")

        def load(tensor: str) -> np.ndarray:
            if tensor == ROPE_FACTORS and extra is not None:
                return extra
            kind = plan[tensor][1]
            name, piece = by_tensor.get(tensor, ("", None))
            if base is not None and (
                piece is None or (name not in self.changes and base.tensors[tensor].type.name == kind)
            ):
                return _bytes(base, tensor, kind)
            assert piece is not None, f"{tensor} is no part of a parameter"
            values, update = (None if one is None else piece.cut(one) for one in self._values(name))
            assert values is not None, "every parameter has values"
            if update is not None:
                values = values + update
                self.rounding.note(values, torch.from_numpy(rounded(values.numpy(), kind)), update)
            return piece.entry.to_file(values).numpy()

        write_gguf(path, self.where.architecture, self._metadata(base), plan, load)
        if base is None:
            self._check_config(path)

    def _values(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(a parameter of the base, what the adapter adds to it or None), fp32, its outputs before its inputs."""
        own = EMBEDDING if name == HEAD and name not in self.opened.source.shapes else name
        values, change = self.opened.load(own).float(), self.changes.get(name)
        rows = grown(self.opened.model).get(name, len(values))
        values = F.pad(values, (0, 0, 0, rows - len(values))) if rows > len(values) else values
        update = None if change is None else change(values)
        stack = self.opened.stack(name)
        if stack is None or not stack.transposed:
            return values, update
        return values.mT, None if update is None else update.mT

    def _format(self, tensor: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or "ffn_gate_inp" in tensor or tensor.endswith(CONVOLUTION) or not tensor.endswith("weight"):
            return "F32"
        kind = "Q8_0" if self.kind == "Q4_0" and tensor in TOP else self.kind
        return kind if fits(shape, kind) else "F16"

    def _metadata(self, base: GgufFile | None) -> Metadata:
        template = self.opened.template
        if base is not None:
            kept = {key: value for key, value in base.metadata.items() if not key.startswith(DROPPED)}
            found: Metadata = {key: (value, base.types[key]) for key, value in kept.items()}
            found |= with_tokens(found, self.opened.tokenizer)
        else:
            rows = grown(self.opened.model).get(EMBEDDING, self.opened.source.shapes[EMBEDDING][0])
            config = {**self.opened.source.config, **self._config(), "vocab_size": rows}
            found = model_metadata(self.where.architecture, config, self.opened.path.name)
            found |= tokenizer_metadata(self.opened.tokenizer, rows, template, self.where.architecture)
        found["general.file_type"] = (FILE_TYPES[self.kind], "uint32")
        if self.kind.startswith("Q"):
            found["general.quantization_version"] = (2, "uint32")
        found["tokenizer.chat_template"] = (template, "string")
        return found

    def _check_names(self) -> None:
        """Raise ModelError for a tensor that the file would leave out."""
        source = self.opened.source
        for name in source.shapes:
            if name not in self.where.pieces and not source.ignorable(name):
                what = f"has no place in GGUF's {self.where.architecture} files"
                raise ModelError(f"{source.place}: {name}", what, "export to peft, or merge to a folder")

    def _config(self) -> dict[str, Any]:
        """The model's configuration with every default, and rotary scaling as transformers 5 names it."""
        found: dict[str, Any] = self.opened.model.config.to_dict()
        return found

    def _rope_factors(self) -> np.ndarray | None:
        config = self._config()
        rotary = getattr(decoder_of(self.opened.model), "rotary_emb", None)
        frequencies = getattr(rotary, "inv_freq", getattr(rotary, "full_attention_inv_freq", None))
        return None if frequencies is None else rope_factors(config, frequencies.numpy())

    def _check_config(self, path: Path) -> None:
        """The written file must describe the model that it was made of."""
        remedy = "export to peft, or merge to a folder"
        ours = self._config()
        ours["tie_word_embeddings"] = HEAD not in self.where.pieces
        sizes = {"vocab_size": EMBEDDING, "vocab_size_per_layer_input": "model.embed_tokens_per_layer.weight"}
        more = grown(self.opened.model)
        ours |= {key: more[name] for key, name in sizes.items() if name in more}
        try:
            theirs = hf_config(read_gguf(path))
        except ModelError as error:
            what = f"cannot be said in a GGUF file of {self.where.architecture}: {error.place.rpartition(': ')[2]}"
            raise ModelError(str(self.opened.path), f"{what} {error.what}", remedy) from None
        window = ours.get("sliding_window") if ours.get("use_sliding_window", True) else None
        if window and ("sliding_window" not in theirs or self.where.architecture in WINDOWLESS):
            console.warn(
                f"llama.cpp's {self.where.architecture} has no sliding window: beyond {window} tokens it differs"
            )
        for key, value in theirs.items():
            if key.endswith("token_id") or key == "model_type" or key not in ours or value is None:
                continue
            if not _same(value, ours[key]):
                what = f"is {ours[key]}, and GGUF's {self.where.architecture} files can only say {value}"
                raise ModelError(f"{self.opened.path}: {key}", what[:300], remedy)


def _same(theirs: Any, ours: Any) -> bool:
    """Whether a value of the configuration survived; numbers as far as fp32 goes."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(_same(value, ours[key]) for key, value in theirs.items() if ours.get(key) is not None)
    if isinstance(theirs, float) or isinstance(ours, float):
        return ours is None or abs(theirs - ours) <= 1e-5 * abs(theirs)
    return bool(theirs == ours) or ours is None


def _bytes(base: GgufFile, tensor: str, kind: str) -> np.ndarray:
    """A tensor of the base as it lies in its file, or its values where the format changes."""
    found = base.tensors[tensor]
    if found.type.name == kind:
        return np.ascontiguousarray(found.data).reshape(-1)
    stored = ops.Stored(found.type.name, found.shape[-1], torch.from_dlpack(found.data))
    return ops.values(stored).view(found.shape).numpy()


def merged_file(opened: Opened, kind: str, changes: Mapping[str, Change], rounding: Rounding) -> MergedFile:
    """Ready to be written. Raises ModelError for a model type that has no GGUF architecture here."""
    where = placement(opened.path, opened.source)
    if HEAD in changes and HEAD not in where.pieces:  # a head that was the embedding goes its own way from here
        entry = replace(where.pieces[EMBEDDING][0].entry, tensor=TOP[1])
        where = replace(where, pieces={**where.pieces, HEAD: [Piece(entry)]})
    return MergedFile(opened, where, kind, changes, rounding)
