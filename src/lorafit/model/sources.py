"""Where a model's weights come from: a GGUF file or a Hugging Face folder, behind one face."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.formats import gguf_config, names
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf
from lorafit.formats.safetensors import Shards, open_folder
from lorafit.formats.tokenizer import TextTokenizer, load_tokenizer
from lorafit.kernels.unpack import unpack

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "smollm3")


class WeightSource(ABC):
    """A model on disk: its configuration, its tensors by Hugging Face name, its tokenizer."""

    place: str
    config: dict[str, Any]
    """Fields of the Hugging Face configuration, `model_type` among them."""
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """The tensor's values in a float dtype."""

    @abstractmethod
    def format(self, name: str) -> str:
        """The tensor's format in the file, such as Q4_1 or BF16."""

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
    """A Hugging Face folder: config.json, safetensors, tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.place, self._path = str(path), path
        self.config = read_config(path)
        self._shards: Shards = open_folder(path)
        self.shapes = dict(self._shards.shapes)
        _check_sizes(self.config, len(self.shapes), path / "config.json")

    def load(self, name: str) -> Tensor:
        return self._shards.load(name)

    def format(self, name: str) -> str:
        return self._shards.dtypes[name]

    def tokenizer(self, template: str | None) -> TextTokenizer:
        return load_tokenizer(self._path, template)

    def bytes_by_format(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for name, shape in self._shards.shapes.items():
            sizes[self.format(name)] += torch.Size(shape).numel() * (4 if self.format(name) == "F32" else 2)
        return dict(sizes)


class GgufSource(WeightSource):
    """A GGUF file, mapped; blocks are unpacked tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._gguf: GgufFile = read_gguf(path)
        self.config = gguf_config.hf_config(self._gguf)
        self._entries = names.entries(self._gguf)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def load(self, name: str) -> Tensor:
        return self._entries[name].load(self._gguf, unpack)

    def format(self, name: str) -> str:
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
    for key in (*needed, *(["max_position_embeddings"] if "max_position_embeddings" in config else [])):
        value, most = config.get(key), tensors if key == "num_hidden_layers" else 1 << 24
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(f"{file}: {key}", f"is {value!r}, not 1 to {most}", "the folder is damaged")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as data: known model types only, no code. Raises ModelError, naming the nearest known type."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(str(folder), "holds no config.json", "give a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(str(file), f"does not read: {error}", "download it again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        near = difflib.get_close_matches(str(kind), MODEL_TYPES, 1)
        remedy = f"the nearest supported one is {near[0]}" if near else f"supported: {', '.join(MODEL_TYPES)}"
        raise ModelError(f"{file}: model_type", f"{kind!r} is not supported yet", remedy)
    if config.get("quantization_config"):
        raise ModelError(f"{file}: quantization_config", "quantised folders are not supported yet", "use a GGUF file")
    drop = ("auto_map", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path")
    return {key: value for key, value in config.items() if key not in drop}
