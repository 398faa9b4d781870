"""A base model as its file has it, and adapters put on it one at a time: what every export starts from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import console
from lorafit.adapter.attach import detach
from lorafit.adapter.combine import LowRank
from lorafit.adapter.file import TEMPLATE_FILE, load_adapter, tokens_of
from lorafit.adapter.merge import Change, changes, low_rank
from lorafit.config import Resolved, TrainConfig
from lorafit.errors import AdapterError, ConfigError
from lorafit.formats.template import PLAIN_TEMPLATE
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.inputs import NO_TEMPLATE, read_template
from lorafit.model.load import Base, build, head_of
from lorafit.model.sources import WeightSource, open_source
from lorafit.settings import settle_for_machine

EXACT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # formats that a plain folder can keep, and our names for them


@dataclass(frozen=True)
class Part:
    """One adapter, taken off its base again."""

    folder: Path
    changes: dict[str, Change]
    """What it adds to each tensor of the base."""
    low_rank: dict[str, LowRank]
    """Its factors by layer."""

    @property
    def more(self) -> list[str]:
        """The tensors that it changes by more than a low-rank update."""
        named = self.low_rank.keys() | {f"{layer}.weight" for layer in self.low_rank}
        return sorted(self.changes.keys() - named)

    def refuse_more(self) -> None:
        """Raise AdapterError when it is more than low-rank updates, which are all that other layouts hold."""
        if self.more:
            what = f"changes {self.more[0]} in a way that is no low-rank update of a linear layer"
            raise AdapterError(str(self.folder), what, "export it to peft, gguf-merged or ollama, or merge it")


@dataclass(frozen=True)
class Opened:
    """A base model whose weights stay where they are in its file, products in fp32, and its adapters."""

    path: Path
    source: WeightSource
    base: Base
    parts: list[Part]

    @property
    def model(self) -> Any:
        """The model itself; the last adapter is on it."""
        return self.base.model

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer, with the chat template that the adapter was trained with."""
        return self.base.tokenizer

    @property
    def template(self) -> str:
        """The chat template's source; of a model without one the plain template, as training used it."""
        own = self.tokenizer.chat_template
        if own is not None:
            return own
        return PLAIN_TEMPLATE if self.tokenizer.add_bos else PLAIN_TEMPLATE.removeprefix("{{- bos_token }}\n")

    def load(self, name: str) -> Tensor:
        """A tensor of the base; experts that the file has in several tensors as transformers' one."""
        stack = self.stack(name)
        return self.source.load(name) if stack is None else stack.dense()

    def shape(self, name: str) -> tuple[int, ...]:
        """What `load` gives."""
        stack = self.stack(name)
        if stack is None:
            return self.source.shapes[name]
        sides = (stack.out_features, stack.in_features)
        return (stack.experts, *(sides[::-1] if stack.transposed else sides))

    def stack(self, name: str) -> Any:
        """The frozen experts of this name; None for any other tensor."""
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return None
        base = getattr(layer, "base", layer)
        return base if hasattr(base, "experts") else None

    def beside(self, path: Path) -> Opened:
        """Another file or folder of the same model, opened in the same way, without adapters."""
        source = open_source(path)
        model = build(source, "packed", torch.float32)
        return Opened(path, source, Base(model, head_of(model), self.tokenizer), [])

    @property
    def format(self) -> str:
        """The format that most of the file's bytes are in, such as Q4_1 or BF16."""
        sizes = self.source.bytes_by_format()
        return max(sizes, key=sizes.__getitem__)


def open_model(
    model: str,
    adapters: Sequence[str],
    template: str | None = None,
    threads: int | None = None,
    *,
    grows: bool = False,
) -> Opened:
    """The base at `model` with the last of `adapters` on it; each is read strictly, and its chat template compared.

    template: file of the chat template to use. threads: as `--threads`. grows: whether an adapter, if it is the only
    one, may add tokens; the tokenizer has them then. Raises ModelError, AdapterError, ConfigError.
    """
    path, folders = Path(model), [Path(adapter) for adapter in adapters]
    added: tuple[str, ...] = ()
    for folder in folders:
        if not folder.exists():
            raise ConfigError(str(folder), "does not exist", "give an adapter's folder")
        added = tokens_of(folder)
        if added and not (grows and len(folders) == 1):
            what = f"adds {len(added)} tokens, for which there is no room beside another adapter or in A and B alone"
            raise AdapterError(str(folder), what, "merge it alone, or export it to peft, gguf-merged or ollama")
    source = open_source(path)
    settled = settle_for_machine(Resolved(TrainConfig(threads=threads)), source.quantised).config
    torch.set_num_threads(int(settled.threads or 1))
    tokenizer = source.tokenizer(_template(folders, template))
    tokenizer.add(added)
    if not tokenizer.has_template:
        console.warn(NO_TEMPLATE)
    base = build(source, "packed", torch.float32)
    base.new_tokens = tokenizer.added  # type: ignore[assignment]
    parts = []
    for folder in folders:
        detach(base)
        for note in load_adapter(base, folder):
            console.say(f"{folder}: {note}")
        _check_template(folder, tokenizer)  # after the base: another model's template is the lesser fault
        parts.append(Part(folder, changes(base), low_rank(base)))
        _refuse_nothing(parts[-1])
    return Opened(path, source, Base(base, head_of(base), tokenizer), parts)


def _refuse_nothing(part: Part) -> None:
    """Raise AdapterError for an adapter that changes nothing: there is nothing to export."""
    plain = len(part.changes) == len(part.low_rank)
    if plain and not any(bool(update.B.any()) and bool(update.A.any()) for update in part.low_rank.values()):
        raise AdapterError(str(part.folder), "changes nothing: every B is zero", "train it first")


def about(folder: Path) -> dict[str, Any]:
    """lorafit.json of an adapter; empty where it has none."""
    file = folder / "lorafit.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # load_adapter has checked it


def _template(folders: Sequence[Path], given: str | None) -> str | None:
    """The chat template's source: the file given, else the first that comes with an adapter, else the model's own."""
    beside = (str(folder / TEMPLATE_FILE) for folder in folders if (folder / TEMPLATE_FILE).is_file())
    return read_template(given or next(beside, None))


def _check_template(folder: Path, tokenizer: TextTokenizer) -> None:
    """Raise AdapterError when an adapter was trained with another chat template than will be written."""
    file = folder / "lorafit.json"
    if not file.is_file():
        return
    try:
        trained = json.loads(file.read_text(encoding="utf-8")).get("template")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(str(file), f"does not read: {error}", "save the adapter again") from None
    if trained is not None and trained != tokenizer.template_fingerprint():
        raise AdapterError(str(folder), "was trained with another chat template than the model has",
                           "give the file that training used with --template")  # fmt: skip
