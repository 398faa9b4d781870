"""DoRA against its formula, on every kind of base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafit.adapter.attach import attach, put_adapter
from lorafit.adapter.variants.dora import DoraLinear, row_squares
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import quantise

BASES = {
    "torch": lambda w, b: _linear(w, b),
    "dense": lambda w, b: FrozenLinear(DenseWeight(w), b),
    "nf4": lambda w, b: FrozenLinear(quantise(w, "nf4"), b),
    "int8": lambda w, b: FrozenLinear(quantise(w, "int8"), b),
}


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def layer_on(base: str, learnt: bool = True, **options) -> DoraLinear:
    """A layer of 128 inputs and 24 outputs with a bias, its adapter and magnitude moved from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(BASES[base](torch.randn(24, 128), torch.randn(24)))
    attach(model, rank=4, alpha=6, use_dora=True, **options)
    if learnt:
        with torch.no_grad():
            model[0].adapter.B.normal_(std=0.3)
            model[0].magnitude.mul_(torch.rand(24) + 0.5)
    return model[0]


def matrix(layer: DoraLinear) -> torch.Tensor:
    base = layer.base
    return base.weight.dense() if isinstance(base, FrozenLinear) else base.weight.detach()


def twin(layer: DoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The paper's equation 5, the whole matrix written out, its length a constant."""
    whole = matrix(layer) + layer.adapter.scale * layer.adapter.B @ layer.adapter.A
    rows = whole * (layer.magnitude / torch.linalg.vector_norm(whole, dim=1).detach())[:, None]
    return x @ rows.T + layer.base.bias


@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_the_papers(base):
    """y and the gradients of x, A, B and m equal those of m (W + s B A) / |W + s B A| written out, within 1e-5."""
    layer = layer_on(base)
    parameters = [layer.adapter.A, layer.adapter.B, layer.magnitude]
    results = []
    for forward in (layer, lambda x: twin(layer, x)):
        torch.manual_seed(1)
        x = torch.randn(2, 7, 128, requires_grad=True)
        y = forward(x)
        results.append([y.detach(), *torch.autograd.grad((y * torch.randn(24)).sum(), [x, *parameters])])
    for ours, papers in zip(*results, strict=True):
        assert (ours - papers).norm() <= 1e-5 * papers.norm()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(base, dtype):
    """X15: m starts as the rows' lengths, so that the gain is exactly 1, in fp32 and in bf16. (torch's own bf16 layer
    adds its bias before it rounds, and differs by that rounding.)"""
    torch.manual_seed(0)
    model = nn.Sequential(BASES[base](torch.randn(24, 128), torch.randn(24)))
    attach(model if base != "torch" else model.to(dtype), rank=4, use_dora=True)
    layer = model[0]
    x = torch.randn(5, 128, dtype=dtype)
    if base == "torch" and dtype == torch.bfloat16:
        assert torch.allclose(layer(x), layer.base(x), rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.gain(), torch.ones(24))


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_length_is_that_of_the_whole_matrix(init):
    """From |w|^2, W A^T and A A^T, without the sum, to 1e-5, also where the update is ten times W."""
    layer = layer_on("nf4", init=init)
    for size in (0.0, 0.01, 1.0, 10.0):
        with torch.no_grad():
            layer.adapter.B.normal_(std=size) if size else layer.adapter.B.zero_()
        A, B = layer.adapter.factors()
        wanted = (matrix(layer) + layer.adapter.scale * B @ A).norm(dim=1)
        assert torch.allclose(layer.length(), wanted, rtol=1e-5)
    assert torch.allclose(row_squares(layer.base), matrix(layer).square().sum(1), rtol=1e-6)


def test_the_length_follows_a_fused_optimizer_step():
    """In training, and after it, the length is of the newest A and B, though a fused step leaves no version behind."""
    layer, x = layer_on("dense"), torch.randn(3, 128)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer.eval()
        assert torch.allclose(layer(x), twin(layer, x), atol=1e-4)  # keeps the length
        layer.train()
        layer(x).square().sum().backward()
        optimizer.step()
    assert torch.allclose(layer(x), twin(layer, x), atol=1e-4)


def test_a_disabled_adapter_gives_the_base():
    """`enabled` False gives the base's bits."""
    layer, x = layer_on("dense"), torch.randn(3, 128)
    assert not torch.equal(layer(x), layer.base(x))
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


def test_put_adapter_wraps_with_dora():
    """The hook that loading uses gives the same kind of layer."""
    model = nn.Sequential(nn.Linear(8, 8))
    put_adapter(model, "0", 2, 4.0, use_dora=True)
    assert isinstance(model[0], DoraLinear)
