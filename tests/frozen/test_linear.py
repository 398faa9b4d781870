"""The laws of lorafit.frozen.linear: torch's numbers and gradients, without torch's memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7)], ids=str)
def test_output_and_gradient_are_torchs(shape, dtype, with_bias):
    """In the weight's own dtype, y and the gradient of x equal F.linear's: bit for bit without a bias, within one
    rounding of the sum with one."""
    torch.manual_seed(0)
    weight, bias = torch.randn(9, 7).to(dtype), torch.randn(9).to(dtype) if with_bias else None
    ours, theirs = (torch.linspace(-2, 2, math.prod(shape)).view(shape).to(dtype).requires_grad_() for _ in "ab")
    layer = FrozenLinear(DenseWeight(weight), bias)
    y, twin = layer(ours), F.linear(theirs, weight, bias)
    grad = torch.randn(twin.shape).to(dtype)
    y.backward(grad)
    twin.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    if bias is None:
        assert torch.equal(y, twin)
    torch.testing.assert_close(y, twin, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_the_gradient_is_right_in_double_precision():
    """torch's finite differences agree."""
    layer = FrozenLinear(DenseWeight(torch.randn(5, 4)), torch.randn(5))
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))


def test_nothing_is_saved_for_the_backward_pass():
    """Neither x nor W: the memory of a frozen layer does not grow with the tokens. torch's own layer saves one."""
    saved: list[torch.Tensor] = []
    weight, x = torch.randn(9, 7), torch.randn(3, 7, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = FrozenLinear(DenseWeight(weight), torch.randn(9))(x * 1)
        assert len(saved) == 0
        F.linear(x * 1, weight)
        assert len(saved) > 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 7))


def test_weight_and_bias_get_no_gradient():
    """Frozen is frozen, also where the input needs a gradient; without one, no graph is made."""
    layer = FrozenLinear(DenseWeight(torch.randn(9, 7)), torch.randn(9))
    layer(torch.randn(2, 7, requires_grad=True)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    assert not layer(torch.randn(2, 7)).requires_grad


@pytest.mark.parametrize("width", [640, 1152, 2560])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_embeddings_scale_is_rounded_as_gemma_rounds_it(dtype, width):
    """sqrt(width) in the compute dtype, times the row, rounded once: transformers' bits."""
    table = torch.randn(11, width).to(dtype)
    theirs = Gemma3TextScaledWordEmbedding(11, width, 0, embed_scale=width**0.5).to(dtype)
    theirs.weight.data.copy_(table)
    ids = torch.tensor([[3, 0, 10], [7, 7, 1]])
    ours = FrozenEmbedding(DenseWeight(table), dtype, width**0.5)(ids)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs(ids))


def test_an_embedding_comes_in_the_compute_dtype():
    """Rows stored in bf16 are handed on in fp32 where products run in it, unscaled ones bit for bit."""
    table = torch.randn(5, 6).bfloat16()
    out = FrozenEmbedding(DenseWeight(table), torch.float32)(torch.tensor([4, 0]))
    assert out.dtype == torch.float32
    assert torch.equal(out, table[[4, 0]].float())
