"""The tensors of a model that is not here: their names and shapes, from its configuration alone, without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lorafit.errors import ModelError

OTHER_TOWERS = ("vision", "audio", "multi_modal_projector", "embed_vision", "embed_audio")


def shapes_of(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(fields of the text model's configuration, its tensors' shapes by name); towers for images are left out.

    Raises ModelError, at `place`, for a configuration that transformers cannot build.
    """
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        whole = AutoConfig.for_model(**fields)
        text = whole.get_text_config()
        with torch.device("meta"):
            model = _build(whole, text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError) as error:
        what = f"{config.get('model_type')!r} is nothing that can be built: {type(error).__name__}: {error}"
        raise ModelError(place, what[:300], "give another model, or upgrade transformers") from error
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not any(tower in name for tower in OTHER_TOWERS)
    }
    return text.to_dict(), shapes


def _build(whole: Any, text: Any) -> PreTrainedModel:
    if type(text) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16)
    if type(whole) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(whole, dtype=torch.bfloat16)
    return AutoModelForImageTextToText.from_config(whole, dtype=torch.bfloat16)
