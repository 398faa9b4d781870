"""The element-wise kernels on every processor path against their plain twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafit.kernels import layer, native, plain

PATHS = [*native.paths(), None]  # None: the plain twins, through the same functions
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest value: sums' order; one rounding to 8 bits
SIZES = (3, 15, 16, 33, 640)  # whole vectors of each path, and none


@pytest.fixture(params=[(path, dtype) for path in PATHS for dtype in DTYPES], ids=str)
def dtype(request, monkeypatch):
    """Each path with each dtype."""
    path, dtype = request.param
    if path is None:
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        native.use(path)
    torch.manual_seed(0)
    yield dtype
    monkeypatch.undo()
    if native.paths():
        native.use(native.paths()[0])


def same(found: Tensor, wanted: Tensor) -> bool:
    wanted = wanted.float()
    return bool((found.float() - wanted).abs().max() <= TOLERANCE[found.dtype] * wanted.abs().max().clamp_min(1e-3))


@pytest.mark.parametrize("n", SIZES)
def test_norm_and_what_is_added_before_it(n, dtype):
    """norm(x + by * delta), forward and backward, with and without delta and a gradient to add to."""
    x, delta, grad, onto = torch.randn(4, 5, n).to(dtype).unbind()
    weight = torch.rand(n) + 0.5
    for more, by in ((None, 1.0), (delta, 1.0), (delta, 0.25)):
        kept, out = x if more is None else torch.empty_like(x), torch.empty_like(x)
        scale = layer.norm(x, weight, 1e-5, out, more, by, None if more is None else kept)
        summed = x if more is None else (x.float() + by * delta.float()).to(dtype)
        assert torch.equal(kept, summed)
        assert same(out, plain.norm(summed, weight, 1e-5))
        (wanted,) = plain.gradients(lambda v: plain.norm(v, weight, 1e-5), grad, summed)
        assert same(layer.norm_backward(grad.clone(), kept, weight, scale), wanted)
        assert same(layer.norm_backward(grad.clone(), kept, weight, scale, onto), wanted + onto)


@pytest.mark.parametrize("half", [1, 4, 20, 32, 128])
@pytest.mark.parametrize(("normed", "rotated"), [(True, True), (True, False), (False, True)])
def test_heads_normed_and_rotated(half, normed, rotated, dtype):
    """Forward, in place and not, and backward, of heads inside wider rows."""
    row, grad_row = torch.randn(2, 6, 3 * 2 * half + 7).to(dtype).unbind()
    x, grad = (r[:, 7:].unflatten(1, (3, 2 * half)) for r in (row, grad_row))
    weight = torch.rand(2 * half) + 0.5 if normed else None
    angles = torch.rand(6, half) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotated else (None, None)
    wanted = plain.heads(x, weight, 1e-6, cos, sin)
    (wanted_grad,) = plain.gradients(lambda v: plain.heads(v, weight, 1e-6, cos, sin), grad, x)
    out, margin = torch.empty(x.shape, dtype=dtype), grad_row[:, :7].clone()
    layer.heads(x, weight, 1e-6, cos, sin, out)
    assert same(out, wanted)
    layer.heads_backward(grad, x, weight, 1e-6, cos, sin)
    assert same(grad, wanted_grad)
    assert torch.equal(grad_row[:, :7], margin)
    layer.heads(x, weight, 1e-6, cos, sin, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("activation", layer.ACTIVATIONS)
def test_gate(n, activation, dtype):
    """act(gate) * up, and backward in place, which gives the output anew; large values saturate as they should."""
    row, grad = (torch.randn(5, 2 * n + 3) * 3).to(dtype), torch.randn(5, n).to(dtype)
    row[0, 0], row[1, 0] = 200.0, -200.0
    gate, up = row[:, :n], row[:, n : 2 * n]
    wanted = plain.gate(gate, up, activation)
    d_gate, d_up = plain.gradients(lambda g, u: plain.gate(g, u, activation), grad, gate, up)
    out = torch.empty(5, n, dtype=dtype)
    layer.gate(gate, up, activation, out)
    assert same(out, wanted)
    layer.gate_backward(grad, gate, up, activation)
    assert same(gate, d_gate)
    assert same(up, d_up)
    assert torch.equal(grad, out) or same(grad, wanted)


@pytest.mark.parametrize("n", [1, 7, 16, 333])
@pytest.mark.parametrize(("multiplier", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 300.0)])
def test_entropy(n, multiplier, softcap, dtype):
    """Losses and their gradients, with every multiplier and cap; unwanted gradients leave the logits as they are."""
    logits, targets = (torch.randn(6, n) * 3).to(dtype), torch.randint(n, (6,))
    before = logits.clone()
    wanted = plain.entropy(logits, targets, multiplier, softcap)
    (grads,) = plain.gradients(lambda z: plain.entropy(z, targets, multiplier, softcap), torch.ones(6), logits)
    assert torch.allclose(layer.entropy(logits, targets, multiplier, softcap, False), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits, before)
    assert torch.allclose(layer.entropy(logits, targets, multiplier, softcap, True), wanted, atol=1e-5, rtol=1e-5)
    assert same(logits, grads) or n == 1  # of one token the gradient is 0, and rounding all there is


def test_nan_passes_through(dtype):
    """No kernel turns NaN into a number."""
    bad = torch.randn(3, 40).to(dtype)
    bad[1, 3] = torch.nan
    weight, ones = torch.ones(40), torch.ones(3, 40, dtype=dtype)
    out = torch.empty_like(bad)
    layer.norm(bad, weight, 1e-5, out)
    assert out[1].isnan().all()
    layer.gate(bad, ones, "silu", out)
    assert out[1, 3].isnan()
    layer.gate(ones, bad, "gelu_tanh", out)
    assert out[1, 3].isnan()
    assert layer.entropy(bad.clone(), torch.zeros(3, dtype=torch.int64), 1.0, None, True)[1].isnan()


def test_a_target_outside_of_the_vocabulary_is_refused(dtype):
    """With an IndexError, on every path."""
    with pytest.raises((IndexError, RuntimeError)):
        layer.entropy(torch.zeros(1, 4, dtype=dtype), torch.tensor([4]), 1.0, None, False)
