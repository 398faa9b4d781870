"""Every published mixture, attached to without memory: what adapters on its experts will have."""

from __future__ import annotations

import pytest
import torch

from builders.published import published, text_of
from lorafit import catalogue
from lorafit.adapter.attach import adapted_layers, linear_layers, put_adapter, select
from lorafit.adapter.experts import LoraStack, routers
from lorafit.model.architectures import MOE
from lorafit.model.experts import is_experts, over

RANK = 16
INNER = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gemma4_text")  # whose experts have a width of their own


def is_mixture(config: dict) -> bool:
    return config["model_type"] in MOE or bool(config.get("enable_moe_block"))


NAMES = [name for name in catalogue.names() if is_mixture(text_of(name))]


def facts(config) -> tuple[int, int, int, int]:
    """(layers with experts, experts, hidden width, inner width), from the published numbers alone."""
    kind, layers = config.model_type, config.num_hidden_layers
    if kind in ("deepseek_v3", "mistral4"):
        return (
            layers - config.first_k_dense_replace,
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
    if kind == "llama4_text":
        layers = len([n for n in range(layers) if (n + 1) % config.interleave_moe_layer_step == 0])
    experts = (
        config.num_experts if kind in ("qwen3_next", "qwen3_5_moe_text", "gemma4_text") else config.num_local_experts
    )
    inner = config.moe_intermediate_size if kind in INNER else config.intermediate_size
    return layers, experts, config.hidden_size, inner


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_linear_layers_of_published_shapes(name):
    """On the published shapes every stack is found and adapted, E r (H + 2 I) + E r (I + H) numbers for each layer with
    experts; all-linear has every other product but the head, and no router. Nothing is in memory."""
    model = published(name)
    for path, module in list(model.named_modules()):
        if is_experts(module):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, over(module, name))
    model.requires_grad_(False)
    layers, experts, hidden, inner = facts(model.config)
    linear, chosen = select(model, ["all-linear"]), select(model, ["all-linear", "experts"])
    assert len(chosen) - len(linear) == 2 * layers
    gated = model.config.model_type in ("qwen3_next", "qwen3_5_moe_text")  # its shared expert has a gate of its own
    assert len(routers(model)) == layers * (2 if gated else 1)
    assert set(linear) == set(linear_layers(model)) - {"lm_head"}
    with torch.device("meta"):
        for path in chosen:
            put_adapter(model, path, RANK, 32.0)
    counts = {path: sum(p.numel() for p in layer.adapter.parameters()) for path, layer in adapted_layers(model)}
    stacks = [count for path, count in counts.items() if isinstance(model.get_submodule(path), LoraStack)]
    assert sum(stacks) == layers * experts * RANK * ((hidden + 2 * inner) + (inner + hidden))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_published_mixture_was_seen():
    """DeepSeek-V3, Qwen 3 Next, Gemma 4, two of gpt-oss, Llama 4, Mixtral and Mistral's, three of Qwen 3 and of 3.5."""
    kinds = {text_of(name)["model_type"] for name in NAMES}
    rest = {"deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe", "qwen3_5_moe_text"}
    assert kinds == {"mistral4", "qwen3_next", "gemma4_text", *rest}
    assert len(NAMES) >= 17
