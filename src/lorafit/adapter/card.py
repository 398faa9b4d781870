"""The model card of an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def model_card(method: str, config: Mapping[str, Any], about: Mapping[str, Any], new: Sequence[str]) -> str:
    """README.md: what the adapter is, what it was trained on, what it gained; new: the tokens that it adds."""
    base = config["base_model_name_or_path"] or "the base model"
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# LoRA adapter for {Path(base).name}",
        "",
    ]
    lines += [f"LoRA: {method}; trained with lorafit.", ""]
    if new:
        how = "`tokenizer.add_tokens([...])`, `model.resize_token_embeddings(len(tokenizer))`"
        lines += [f"Adds the tokens {', '.join(new)} after the tokenizer's own. For PEFT first {how}.", ""]
    figures = about.get("figures") or {}
    if figures:
        lines += ["| figure | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in figures.items()), ""]
    lines += [
        "Load it with PEFT's `PeftModel.from_pretrained(base, folder)` or `lorafit generate BASE --adapter folder`."
    ]
    return "\n".join(lines) + "\n"
