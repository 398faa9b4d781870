"""Published models without memory, from the catalogue's configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lorafit import catalogue
from lorafit.model.architectures import WRAPPERS, text_config
from lorafit.model.load import empty
from lorafit.model.sources import MODEL_TYPES


class Published:
    """A published configuration in the place of a model on disk."""

    def __init__(self, name: str) -> None:
        config = catalogue.find(name)
        self.place, kind = name, config["model_type"]
        self.part_of = kind if kind in WRAPPERS else ""
        self.config = {k: v for k, v in text_config(config, name, MODEL_TYPES).items() if k != "architectures"}


def text_of(name: str) -> dict[str, Any]:
    """The configuration of the published model's text part, as the catalogue has it."""
    config = catalogue.find(name)
    found: dict[str, Any] = config.get("text_config", config)
    return found


def published(name: str) -> PreTrainedModel:
    """transformers' model of a published configuration, every tensor on the meta device."""
    return empty(Published(name), torch.bfloat16)  # type: ignore[arg-type]
