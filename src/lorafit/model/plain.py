"""A model as transformers itself computes it, filled with a source's values: what other libraries' adapters go on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorafit.model.load import fill_buffers
from lorafit.model.sources import WeightSource


def plain_model(source: WeightSource) -> PreTrainedModel:
    """transformers' own model in fp32 with plain linear layers, eval mode; in memory as a whole."""
    config = AutoConfig.for_model(**source.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    fill_buffers(model)
    state = {name: source.load(name).float() for name in model.state_dict() if name in source.shapes}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"tensors without values: {left}"
    return model.eval()
