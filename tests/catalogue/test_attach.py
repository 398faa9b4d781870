"""Every published configuration, attached to without memory: the counts that its adapter will have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from builders.published import published, text_of
from lorafit import catalogue
from lorafit.adapter.attach import HEADS, adapted_layers, attach, linear_layers
from lorafit.model.architectures import TEXT

DENSE = [name for name in catalogue.names() if text_of(name)["model_type"] in TEXT]
NAMES = [name for name in DENSE if not text_of(name).get("enable_moe_block")]
RANK = 2


def products(config: Any) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of the linear layers of one decoder layer by its kind, written down from the families' papers and
    published code: attention, and the dense MLP."""
    width, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or width // heads
    kind, inner = config.model_type, config.intermediate_size
    mlp = [(width, inner), (width, inner), (inner, width)]
    attention = [(width, heads * dim), (width, keys * dim), (width, keys * dim), (heads * dim, width)]
    if kind == "phi3":
        return {"full": [(width, (heads + 2 * keys) * dim), (heads * dim, width), (width, 2 * inner), (inner, width)]}
    if kind == "qwen3_5_text":
        gated = [(width, 2 * heads * dim), *attention[1:]]  # queries, and a gate for each
        key = config.linear_num_key_heads * config.linear_key_head_dim
        value = config.linear_num_value_heads * config.linear_value_head_dim
        states = config.linear_num_value_heads
        linear = [(width, 2 * key + value), (width, value), (width, states), (width, states), (value, width)]
        return {"full_attention": gated + mlp, "linear_attention": linear + mlp}
    return {"full": attention + mlp}


def of_gemma4(config: Any) -> list[tuple[int, int]]:
    """Gemma 4's, layer by layer: in large ones the values of full attention are its keys; in small ones the last layers
    take the keys and values of earlier ones, may have MLPs of twice the width, and each gets a share of what the
    embeddings per layer and one product give."""
    width, heads, per = config.hidden_size, config.num_attention_heads, config.hidden_size_per_layer_input
    own = config.num_hidden_layers - config.num_kv_shared_layers
    found = [(width, per * config.num_hidden_layers)] if per else []
    for number, kind in enumerate(config.layer_types):
        full, shares = kind == "full_attention", number >= own
        dim = config.global_head_dim if full else config.head_dim
        once = full and config.attention_k_eq_v
        keys = config.num_global_key_value_heads if once else config.num_key_value_heads
        found += [(width, heads * dim), (heads * dim, width)]
        found += [(width, keys * dim)] * (0 if shares else 1 if once else 2)
        inner = config.intermediate_size * (2 if shares and config.use_double_wide_mlp else 1)
        found += [(width, inner), (width, inner), (inner, width)]
        found += [(width, per), (per, width)] if per else []
    return found


def expected(config: Any) -> list[tuple[int, int]]:
    """(in, out) of every linear layer but the head."""
    if config.model_type == "gemma4_text":
        return of_gemma4(config)
    found = products(config)
    if "full" in found:
        return found["full"] * config.num_hidden_layers
    return [pair for kind in config.layer_types for pair in found[kind]]


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_is_every_product_of_the_text_part(name):
    """On the published shapes: every linear layer of the text part has an adapter and nothing else has, their shapes
    are those of the family's formulas, and there are r (in + out) trainable numbers for each. Nothing is in memory."""
    model = published(name)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    attach(model, rank=RANK)
    layers = dict(adapted_layers(model))
    assert set(layers) == {path for path in linear if path.rsplit(".", 1)[-1] not in HEADS}
    shapes = [(layer.base.in_features, layer.base.out_features) for layer in layers.values()]
    wanted = expected(SimpleNamespace(**text_of(name)))
    assert sorted(shapes) == sorted(wanted)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == RANK * sum(i + o for i, o in wanted)
    assert set(linear_layers(model)) - set(layers) == {"lm_head"}
