"""A model as transformers itself computes it, filled with a source's values: what other libraries' adapters go on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lorafit.model.architectures import IMAGE_TEXT, own_name
from lorafit.model.load import fill_buffers
from lorafit.model.sources import WeightSource


def plain_model(source: WeightSource, load: Callable[[str], Tensor]) -> PreTrainedModel:
    """transformers' own model in fp32 with plain linear layers, eval mode; in memory as a whole. A multimodal one has
    its towers without memory: it computes rows of text.

    load: a tensor of the text model by its name, in transformers' shape.
    """
    config = AutoConfig.for_model(**(source.whole or source.config))
    images = source.part_of or config.model_type in IMAGE_TEXT
    maker: type = AutoModelForImageTextToText if images else AutoModelForCausalLM
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the grouped one wants whole blocks
    with torch.device("meta"):
        model: PreTrainedModel = maker.from_config(config, dtype=torch.float32, **eager)  # type: ignore[attr-defined]
    fill_buffers(model)
    names = {name: own for name in model.state_dict() if (own := own_name(name)) in source.shapes}
    model.load_state_dict({name: load(own).float() for name, own in names.items()}, strict=False, assign=True)
    model.tie_weights()
    tensors = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta and own_name(name) is not None]
    assert not left, f"tensors without values: {left}"
    return model.eval()
