"""Attention of every family against transformers' own: alone, packed, and token by token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from builders.architectures import CONFIGS, GEMMA4, tiny
from lorafit.model import attention
from lorafit.model.architectures import LINEAR_ATTENTION

IDS = torch.arange(37).mul(31).remainder(500).view(1, 37)
BOUNDS = (0, 9, 10, 26, 37)
PACKING = [name for name in CONFIGS if name not in LINEAR_ATTENTION]


def ours(model):
    """The same weights with our attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    maker = AutoModelForImageTextToText if config.model_type == "mistral4" else AutoModelForCausalLM
    other = maker.from_config(config, attn_implementation=attention.register()).float().eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in CONFIGS), ("gemma4_text", GEMMA4["small"])])
def test_a_row_alone_has_transformers_logits(name, changes):
    """Windows, chunks, layers without rotation, narrow values, sinks: one row through our attention gives the logits of
    transformers' eager one, past the window, the chunk and the length from which queries are scaled."""
    model = tiny(name, **changes)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        got = ours(model)(IDS, use_cache=False, documents=(0, IDS.shape[1])).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", PACKING)
def test_packed_rows_have_the_logits_that_they_have_alone(name):
    """Four rows in one sequence, their positions restarting: each as transformers computes it alone."""
    model = tiny(name)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(BOUNDS)])[None]
    with torch.no_grad():
        packed = ours(model)(IDS, position_ids=positions, documents=BOUNDS, use_cache=False).logits[0]
        for start, end in pairwise(BOUNDS):
            want = model(IDS[:, start:end], use_cache=False).logits[0]
            assert (packed[start:end] - want).abs().max() < 1e-5 * want.abs().max()
