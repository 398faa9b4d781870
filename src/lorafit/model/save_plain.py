"""A trained model as a plain Hugging Face folder, which transformers and lorafit load: weights, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.formats.folders import commit
from lorafit.formats.safetensors import SINGLE, write_safetensors
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.model.tokenizer import as_transformers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json",
               "video_preprocessor_config.json")  # fmt: skip
STALE = ("torch_dtype", "quantization_config")
OUTSIDE = ("dtype", "tie_word_embeddings")  # what a multimodal configuration says for all of it
TEMPLATE = "chat_template.jinja"


def save_plain(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    source: Path,
    template: str | None,
    texts: Mapping[str, str],
) -> None:
    """Write `tensors`, but for buffers of one dtype, under the model's own names, as `folder`, complete or absent.

    source: the file or folder that the model came from; a folder's configuration and tokenizer are taken over as they
    are. template: the chat template that goes along, None for none. texts: other files of the folder. An older folder
    is replaced. Raises ConfigError when the disk refuses.
    """
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    def write(path: Path) -> None:
        write_config(path, model, tokenizer, source, {"dtype": dtype})
        write_safetensors(path / SINGLE, tensors)
        write_tokenizer(path, tokenizer, source, template)
        for name, text in texts.items():
            (path / name).write_text(text, encoding="utf-8")

    commit(folder, write, manifest=False)


def write_config(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    source: Path,
    changes: Mapping[str, Any],
    part_of: str = "",
) -> None:
    """config.json with `changes` and no quantisation, and what a source that is a folder has beside it.

    part_of: the multimodal model, by model_type, whose configuration is kept; the changes go into its text part.
    """
    config = _configuration(source, part_of or model.config.model_type)
    if not config:  # a GGUF file, or the text part of a multimodal model
        config = {**model.config.to_dict(), "architectures": [type(model).__name__], "use_cache": True}
    if part_of:
        text = {**config.get("text_config", {}), **changes}
        config["text_config"] = {key: value for key, value in text.items() if key not in STALE}
        changes = {key: value for key, value in changes.items() if key in OUTSIDE}
    _write_json(folder / "config.json", {**config, **changes})
    for name in OTHER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "generation_config.json").exists():
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.end_ids) or None}
        known = {key: value for key, value in ends.items() if value is not None}
        _write_json(folder / "generation_config.json", known)


def _configuration(source: Path, model_type: str) -> dict[str, Any]:
    """The folder's own, without what is no longer true; empty where it is of another model."""
    file = source / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("model_type") != model_type:
        return {}
    return {key: value for key, value in found.items() if key not in STALE}


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, source: Path, template: str | None) -> None:
    """The tokenizer's files as the source has them, with the tokens added since, or made of a GGUF file's, and the
    template beside them."""
    if (source / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if tokenizer.added:
            _add_tokens(folder / "tokenizer.json", tokenizer)
    else:
        made = as_transformers(tokenizer)
        backend = tokenizer.backend  # the very one that `made` has
        if tokenizer.add_bos and tokenizer.bos_token is not None:
            pair = (tokenizer.bos_token, int(tokenizer.bos_id or 0))
            backend.post_processor = processors.TemplateProcessing(single=f"{pair[0]} $A", special_tokens=[pair])
        made.save_pretrained(folder)
        backend.post_processor = None  # ours adds no token by itself
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = {key: value for key, value in config.items() if key != "chat_template"}  # the file beside it counts
    if "added_tokens_decoder" in own:
        added = {str(tokenizer.backend.token_to_id(token)): _described(token) for token in tokenizer.added}
        own["added_tokens_decoder"] = {**own["added_tokens_decoder"], **added}
    if own != config:
        _write_json(file, own)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _add_tokens(file: Path, tokenizer: TextTokenizer) -> None:
    """Into a tokenizer.json the tokens that the tokenizer was given, with their ids."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [
        *content.get("added_tokens", ()),
        *({"id": tokenizer.backend.token_to_id(token), **_described(token)} for token in tokenizer.added),
    ]
    _write_json(file, content)


def _described(token: str) -> dict[str, Any]:
    """A token as TextTokenizer.add makes it: no control token, found in the text as it is written."""
    return {"content": token, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
