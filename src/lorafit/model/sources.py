"""Where a model's weights come from: a GGUF file or a Hugging Face folder, behind one face."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import machine
from lorafit.errors import ModelError
from lorafit.formats import bitsandbytes, gguf_config, gguf_experts, gguf_linear, names, place, stacks
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf
from lorafit.formats.safetensors import BYTES, Shards, open_folder
from lorafit.formats.stacks import Stack
from lorafit.formats.tokenizer import TextTokenizer, load_tokenizer
from lorafit.kernels import ops
from lorafit.kernels.ops import Stored
from lorafit.model.architectures import MOE, TEXT, WRAPPERS, own_name, plain, text_config

MODEL_TYPES = TEXT + MOE


class WeightSource(ABC):
    """A model on disk: its configuration, its tensors by Hugging Face name, its tokenizer."""

    place: str
    config: dict[str, Any]
    """Fields of the text model's Hugging Face configuration, `model_type` among them."""
    part_of: str = ""
    """The model_type of the multimodal model whose text part it is."""
    whole: dict[str, Any] | None = None
    """That model's configuration, `config` being its text part."""
    shapes: dict[str, tuple[int, ...]]
    quantised: bool
    """Whether some matrices are stored in fewer than 16 bits."""
    packs: bool
    """Whether matrices can be used as they lie in the file."""
    others: dict[str, tuple[int, ...]]
    """Tensors beside the text part, which `load` and `format` give too: a vision tower's, by the file's names."""
    stacks: dict[str, Stack]
    """The 3-D parameters that the file has in several tensors, or with their rows first; `shapes` has them whole, in
    transformers' shape where the file tells it, else (E, O, I)."""
    mapping: tuple[int, int] | None = None
    """First and last address of the read-only mapping that they are parts of: dropped pages of it come back."""

    def file_name(self, name: str) -> str:
        """What a whole model's file calls this tensor of the text part."""
        return name

    def stored(self, name: str) -> Stored | None:
        """The matrix as it lies in the file, for operators that read it there; None where only `load` can give it."""
        return None

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """The tensor's values in a float dtype."""

    def drop(self, name: str, values: Tensor) -> None:
        """Give back the pages of `values`, what `load(name)` gave, or of what they were made of: they were copied."""
        stored = self.stored(name)
        if stored is not None and self.mapping is not None:
            machine.drop(stored.data.data_ptr(), stored.data.nbytes, [self.mapping])

    def joined(self, name: str) -> Tensor:
        """The same, or the stack of that name, fp32, as (E, O, I)."""
        stack = self.stacks.get(name)
        if stack is None:
            return self.load(name)
        experts, _, columns = stack.shape
        values = torch.empty(stack.shape)
        for part in stack.parts:
            tall = torch.cat([self.load(one).float().reshape(-1, columns) for one in part.names])
            values[:, part.columns] = tall.view(experts, -1, columns)
        return values

    @abstractmethod
    def format(self, name: str) -> str:
        """The tensor's format in the file, such as Q4_1 or BF16; of a stack that of its first part."""

    @abstractmethod
    def tokenizer(self, template: str | None) -> TextTokenizer:
        """The tokenizer; `template` replaces its chat template."""

    def ignorable(self, name: str) -> bool:
        """Whether an extra tensor of this name is known to mean nothing."""
        return name.endswith("rotary_emb.inv_freq")

    @abstractmethod
    def bytes_by_format(self) -> dict[str, int]:
        """Bytes in the file by tensor format."""


def open_source(path: Path) -> WeightSource:
    """The model at `path`. Raises ModelError for what is no model."""
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return GgufSource(path)
    raise ModelError(str(path), "does not exist", "give a .gguf file or a Hugging Face model folder")


class FolderSource(WeightSource):
    """A Hugging Face folder: config.json, safetensors (plain, or NF4 by bitsandbytes), tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.place, self._path = str(path), path
        whole, self.config = read_config(path)
        kind = str(whole["model_type"])
        self.part_of = kind if kind in WRAPPERS else ""
        self._shards: Shards = open_folder(path)
        self._nf4 = bitsandbytes.read_all(self._shards.load, self._shards.shapes, str(path))
        inside = {part for name in self._nf4 for part in bitsandbytes.parts_of(name)}
        shapes = {name: shape for name, shape in self._shards.shapes.items() if name not in inside}
        shapes |= {name: parts.shape for name, parts in self._nf4.items()}
        kind = str(self.config["model_type"])
        self._names = {own: name for name in shapes if (own := own_name(name)) is not None}
        self.others = {name: shape for name, shape in shapes.items() if self.part_of and own_name(name) is None}
        found = {own: shapes[name] for own, name in self._names.items()}
        self.stacks = stacks.of_matrices(found, kind, str(path))
        used = {name for stack in self.stacks.values() for part in stack.parts for name in part.names}
        alone = {name: stacks.renamed(name, kind) for name in found if name not in used}
        self._names |= {own: self._names[name] for name, own in alone.items()}
        self.shapes = {own: found[name] for name, own in alone.items()}
        self.shapes |= {name: stack.shape for name, stack in self.stacks.items()}
        if self.part_of and "tie_word_embeddings" not in self.config:
            self.config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if self.part_of:
            tied = self.config["tie_word_embeddings"]
            self.whole = {**whole, "text_config": self.config, "tie_word_embeddings": tied}
        self.quantised = self.packs = bool(self._nf4)
        for name in shapes.keys() - self._nf4.keys():
            if self._shards.dtypes[name] in ("U8", "I8"):
                raise ModelError(place(path, name), f"has dtype {self._shards.dtypes[name]}, and no bitsandbytes parts")
        _check_sizes(self.config, len(self._shards.shapes), path / "config.json")

    def file_name(self, name: str) -> str:
        if not self.part_of:
            return name
        if name in self._names:
            return self._names[name]
        theirs = self._names["model.embed_tokens.weight"].removesuffix("embed_tokens.weight")
        head = theirs.removesuffix("model.") if theirs.endswith(".model.") else ""  # beside the model, or on top
        return theirs + name.removeprefix("model.") if name.startswith("model.") else head + name

    def stored(self, name: str) -> Stored | None:
        name = self._names.get(name, name)
        if name not in self._nf4:
            return None
        parts = self._nf4[name]
        return Stored(ops.NF4, parts.shape[1], parts.codes, parts.scales, parts.nested, parts.offset)

    def load(self, name: str) -> Tensor:
        stored = self.stored(name)
        return self._shards.load(self._names.get(name, name)) if stored is None else ops.values(stored)

    def drop(self, name: str, values: Tensor) -> None:
        name = self._names.get(name, name)
        if name not in self._nf4:
            self._shards.drop(name, values)

    def format(self, name: str) -> str:
        name = self.stacks[name].parts[0].names[0] if name in self.stacks else name
        name = self._names.get(name, name)
        return ops.NF4 if name in self._nf4 else self._shards.dtypes[name]

    def tokenizer(self, template: str | None) -> TextTokenizer:
        return load_tokenizer(self._path, template)

    def bytes_by_format(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for name, shape in self._shards.shapes.items():
            owner = name.removesuffix(bitsandbytes.suffix_of(name))
            sizes[self.format(owner)] += torch.Size(shape).numel() * BYTES[self._shards.dtypes[name]]
        return dict(sizes)


class GgufSource(WeightSource):
    """A GGUF file, mapped; blocks stay packed, or are unpacked tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._gguf: GgufFile = read_gguf(path)
        self.config = gguf_config.hf_config(self._gguf)
        entries = gguf_linear.arrange(names.entries(self._gguf), self.config, path)
        self._entries = gguf_experts.join(entries, names.family_of(self._gguf).gates_alternate, path)
        self.stacks = gguf_experts.stacks_of(self._gguf, self._entries)
        self.shapes = gguf_experts.shapes_of(self._gguf, self._entries, self.stacks)
        self.packs, self.others = True, {}
        starts = [(tensor.data.ctypes.data, tensor.nbytes) for tensor in self._gguf.tensors.values()]
        self.mapping = min(starts)[0], max(start + size for start, size in starts)
        self.quantised = any(tensor.type.elements > 1 for tensor in self._gguf.tensors.values())

    def stored(self, name: str) -> Stored | None:
        return self._entries[name].matrix(self._gguf)

    def load(self, name: str) -> Tensor:
        return self._entries[name].load(self._gguf)

    def format(self, name: str) -> str:
        name = self.stacks[name].parts[0].names[0] if name in self.stacks else name
        return self._gguf.tensors[self._entries[name].tensor].type.name

    def tokenizer(self, template: str | None) -> TextTokenizer:
        return from_gguf(self._gguf, template)

    def bytes_by_format(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for tensor in self._gguf.tensors.values():
            sizes[tensor.type.name] += tensor.nbytes
        return dict(sizes)


def _check_sizes(config: dict[str, Any], tensors: int, file: Path) -> None:
    """Work and memory follow from these numbers, so they are checked before anything is built from them."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
    for key in (*needed, "max_position_embeddings", *experts):
        if key not in config or (key in experts and config[key] is None):
            continue  # then it has transformers' default, or no experts
        value, most = config[key], tensors if key == "num_hidden_layers" else 1 << 24
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(f"{file}: {key}", f"is {value!r}, not 1 to {most}", "the folder is damaged")


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as data, no code: the model's own configuration, and that of its text part.

    Raises ModelError for what we do not know, naming the nearest known type.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(str(folder), "holds no config.json", "give a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(str(file), f"does not read: {error}", "download it again") from None
    if not isinstance(config, dict):
        raise ModelError(str(file), "holds no object", "download it again")
    text = text_config(config, str(file), MODEL_TYPES)
    _check_quantization(config.get("quantization_config"), f"{file}: quantization_config")
    return plain(config), text


def _check_quantization(found: Any, place: str) -> None:
    """Refuses every quantisation but the one whose tensors are read. Raises ModelError."""
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    kind = found.get("bnb_4bit_quant_type") if isinstance(found, dict) and found.get("load_in_4bit") else None
    if method != "bitsandbytes" or kind != "nf4":
        what = f"is {str(method)[:40]!a}" + (f" {str(kind)[:40]}" if kind else "")
        raise ModelError(place, f"{what}, which is not read", "use bitsandbytes' nf4, a GGUF file or the plain model")
