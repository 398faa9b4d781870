"""The tensors of a model that is not here: their names and shapes, from its configuration alone, without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.model.architectures import text_config
from lorafit.model.load import empty
from lorafit.model.sources import MODEL_TYPES


@dataclass(frozen=True)
class Described:
    """A text model of which nothing but the configuration is here; place: of it, for errors."""

    place: str
    config: dict[str, Any]
    part_of: str = ""


def shapes_of(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(fields of the text model's configuration, its tensors' shapes by name).

    Raises ModelError, at `place`, as training does: for an architecture that is not known, naming the nearest, and for
    a configuration that transformers cannot build.
    """
    model = empty(Described(place, text_config(dict(config), place, MODEL_TYPES)), torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return model.config.to_dict(), shapes
