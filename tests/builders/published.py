"""Published models without memory, from the catalogue's configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lorafit import catalogue
from lorafit.model.architectures import WRAPPERS, text_config
from lorafit.model.load import empty
from lorafit.model.shapes import Described
from lorafit.model.sources import MODEL_TYPES


def text_of(name: str) -> dict[str, Any]:
    """The configuration of the published model's text part, as the catalogue has it."""
    config = catalogue.find(name)
    found: dict[str, Any] = config.get("text_config", config)
    return found


def published(name: str) -> PreTrainedModel:
    """transformers' model of a published configuration, every tensor on the meta device."""
    config = catalogue.find(name)
    kind = config["model_type"] if config["model_type"] in WRAPPERS else ""
    return empty(Described(name, text_config(config, name, MODEL_TYPES), kind), torch.bfloat16)
