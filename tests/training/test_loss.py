"""The chunked loss against the whole computation, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorafit.frozen.dense import DenseWeight
from lorafit.model.head import Head
from lorafit.training import loss as loss_module
from lorafit.training.loss import token_losses


def full_losses(hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: Head) -> torch.Tensor:
    """The plain twin: all logits at once, torch's cross-entropy."""
    logits_NV = hidden_NH @ head.weight.dense().T * head.multiplier
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


@pytest.mark.parametrize(("chunk", "block"), [(1, 10), (7, 1), (10**6, 53), (10**6, 17)])
@pytest.mark.parametrize(("multiplier", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_loss_and_gradient_equal_the_full_computation(monkeypatch, chunk, block, multiplier, softcap):
    """Within 1e-5 for the loss and 1e-4 relative for the gradient in fp32, whatever the chunks and
    blocks that it is computed in, softcap and scale."""
    vocabulary, width, n = 53, 16, 29
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk * vocabulary * 4)
    monkeypatch.setattr(loss_module, "BLOCK_WEIGHTS", block * width)
    torch.manual_seed(0)
    head = Head(DenseWeight(torch.randn(vocabulary, width)), multiplier, softcap)
    targets_N, weights_N = torch.randint(vocabulary, (n,)), torch.rand(n)
    hidden = [torch.randn(n, width).requires_grad_() for _ in "ab"]
    hidden[1].data.copy_(hidden[0].data)
    ours, twin = token_losses(hidden[0], targets_N, head), full_losses(hidden[1], targets_N, head)
    assert torch.allclose(ours, twin, atol=1e-5, rtol=0)
    (ours * weights_N).sum().backward()
    (twin * weights_N).sum().backward()
    gap = (hidden[0].grad - hidden[1].grad).norm() / hidden[1].grad.norm()
    assert gap < 1e-4


def test_the_gradient_is_right_in_double_precision():
    """torch's finite differences agree with the gradient that the forward pass prepared."""
    head = Head(DenseWeight(torch.randn(11, 5)), 0.5, 4.0)
    hidden = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([1, 4, 10])
    losses = token_losses(hidden, targets, head)
    losses.sum().backward()
    with torch.no_grad():
        for i, j in ((0, 0), (1, 3), (2, 4)):
            step = torch.zeros_like(hidden)
            step[i, j] = 1e-2
            rise = full_losses(hidden + step, targets, _double(head)).sum()
            fall = full_losses(hidden - step, targets, _double(head)).sum()
            assert abs((rise - fall) / 2e-2 - hidden.grad[i, j]) < 1e-3


def _double(head: Head) -> Head:
    class Double(DenseWeight):
        def dense(self, dtype=torch.float64):
            return self.matrix.double()

    return Head(Double(head.weight.matrix.data), head.multiplier, head.softcap)


def test_no_more_than_a_chunk_of_logits_ever_exists(monkeypatch):
    """No tensor is made with more than a chunk of the logits, or a block of the head's rows."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 40 * 4)
    monkeypatch.setattr(loss_module, "BLOCK_WEIGHTS", 3 * 4)
    sizes, asked = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if t.dim() == 2)
            return result

    class Counting(DenseWeight):
        def block(self, start, stop, dtype):
            asked.append(stop - start)
            return super().block(start, stop, dtype)

    head, hidden_NH = Head(Counting(torch.randn(10, 4))), torch.randn(17, 4)
    with Watch():
        token_losses(hidden_NH, torch.zeros(17, dtype=torch.int64), head)
    assert max(sizes) <= 40
    assert max(asked) <= 3
