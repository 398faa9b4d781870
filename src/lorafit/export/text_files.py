"""The files beside the weights of a Hugging Face folder: configuration, tokenizer, chat template, generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import processors

from lorafit.adapter.file import TEMPLATE_FILE
from lorafit.export.opened import Opened
from lorafit.model.tokenizer import as_transformers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write_config(opened: Opened, folder: Path, dtype: str, tied: bool) -> None:
    """config.json, with the dtype of the weights beside it and no quantisation, and generation_config.json."""
    file = opened.path / "config.json"
    if file.is_file():
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
    else:
        config = {**opened.model.config.to_dict(), "use_cache": True}
        config["architectures"] = [type(opened.model).__name__]
    config["dtype"] = NAMES[dtype]
    if opened.model.config.tie_word_embeddings and not tied:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    for name in OTHER_FILES:
        if (opened.path / name).is_file():
            shutil.copyfile(opened.path / name, folder / name)
    if not (folder / "generation_config.json").exists():
        tokenizer = opened.tokenizer
        ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.end_ids)}
        _write_json(folder / "generation_config.json", {key: value for key, value in ends.items() if value is not None})


def write_tokenizer(opened: Opened, folder: Path) -> None:
    """The tokenizer's files as the base has them, or made from a GGUF file's; the trained chat template beside them."""
    if (opened.path / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (opened.path / name).is_file():
                shutil.copyfile(opened.path / name, folder / name)
    else:
        tokenizer = opened.tokenizer
        made = as_transformers(tokenizer)
        if tokenizer.add_bos:
            pair = (str(tokenizer.bos_token), int(tokenizer.bos_id or 0))
            backend: Any = made.backend_tokenizer
            backend.post_processor = processors.TemplateProcessing(single=f"{pair[0]} $A", special_tokens=[pair])
        made.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.pop("chat_template", None) is not None:
        _write_json(file, config)  # the file beside it is the one that counts
    (folder / TEMPLATE_FILE).write_text(opened.template, encoding="utf-8")


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
