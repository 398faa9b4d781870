"""Published models without memory, from the catalogue's configurations."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lorafit import catalogue
from lorafit.model import sources
from lorafit.model.architectures import WRAPPERS, text_config
from lorafit.model.load import empty

KNOWN = sources.MODEL_TYPES + getattr(sources, "MOE_TYPES", ())


class Published:
    """A published configuration in the place of a model on disk."""

    def __init__(self, name: str) -> None:
        config = catalogue.find(name)
        self.place, kind = name, config["model_type"]
        self.part_of = kind if kind in WRAPPERS else ""
        self.config = {k: v for k, v in text_config(config, name, KNOWN).items() if k != "architectures"}


def text_type(name: str) -> str:
    """The model_type of the published model's text part."""
    config = catalogue.find(name)
    return str(config.get("text_config", config)["model_type"])


def published(name: str) -> PreTrainedModel:
    """transformers' model of a published configuration, every tensor on the meta device."""
    return empty(Published(name), torch.bfloat16)  # type: ignore[arg-type]
