"""Trained-looking adapters on tiny models, as folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import lorafit
from lorafit.adapter.attach import adapted
from lorafit.adapter.variants.vocabulary import LoraEmbedding


def write_adapter(
    model_path: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("all-linear",),
    seed: int = 0,
    spread: float = 0.1,
) -> Path:
    """A random adapter on the model at `model_path`, saved in PEFT's layout; spread: of its B, of an
    embedding's of its A."""
    model = lorafit.load(model_path, compute="fp32")
    lorafit.attach(model, rank=rank, alpha=alpha, targets=targets, seed=seed)
    torch.manual_seed(seed)
    for layer in adapted(model).values():
        nn.init.normal_(layer.adapter.A if isinstance(layer, LoraEmbedding) else layer.adapter.B, std=spread)
    about = {
        "base_model": str(model_path),
        "tokenizer": "t",
    }
    lorafit.save_adapter(model, folder, about)
    return folder


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, V), without gradients or a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
