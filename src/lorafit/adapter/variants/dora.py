"""DoRA: the adapted weight's rows keep their direction from W + s B A and get a trained length of their own.

    y = g * (x W^T + s dropout(x) A^T B^T) + bias,    g = m / |W + s B A|,    m (O,), a length for each output

m starts as |W|, so g is exactly 1 and nothing changes. The length |W + s B A| is followed but gets no gradient: the
paper's cheaper form, which needs no activations of its own. It is computed without the sum W + s B A, from

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T          w, b: a row of W, of B

where |w|^2 never changes and W A^T is a product with r rows, for any format of W. Dropout acts on the adapter's input
alone (PEFT drops the base's too). With z = x W^T + s dropout(x) A^T B^T the gradients are

    dz = g * dy,    dm = (sum over tokens of dy * z) / |W + s B A| = (sum of dy * (y - bias)) / m

so that our own layers, which keep y, need no z (adapter/group.py).

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.lora import LoraAdapter, LoraLinear, product
from lorafit.frozen.linear import FrozenLinear

ROWS = 128  # of an activation that are in fp32 at a time


class DoraLinear(LoraLinear):
    """A linear layer, its adapter and its `magnitude` (O,) fp32."""

    keeps_length = False  # while A and B are sure to stay as they are

    def __init__(self, base: nn.Module, adapter: LoraAdapter) -> None:
        super().__init__(base, adapter)
        self.magnitude = nn.Parameter(torch.ones(len(adapter.B), dtype=torch.float32))
        self._squares: Tensor | None = None
        self._length: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        y: Tensor = _Gain.apply(product(self.base, x) + self.adapter(x), self.gain())
        return self.shifted(y)

    def parts(self) -> dict[str, nn.Parameter]:
        return {**super().parts(), "lora_magnitude_vector": self.magnitude}

    @torch.no_grad()
    def delta(self, weight_OI: Tensor) -> Tensor:
        """What merging adds to the layer's matrix: (g - 1) W + g s B A."""
        whole = weight_OI + super().delta(weight_OI)
        return whole * (self.magnitude / whole.norm(dim=1))[:, None] - weight_OI

    def train(self, mode: bool = True) -> DoraLinear:
        self._length = None  # of training: an optimizer's fused step does not count as a change
        return super().train(mode)

    def start(self) -> None:
        """m to the rows' lengths, so that nothing changes."""
        with torch.no_grad():
            self.magnitude.copy_(self.length())

    def gain(self) -> Tensor:
        """g (O,) fp32, differentiable in m alone."""
        return self.magnitude / self.length()

    @torch.no_grad()
    def length(self) -> Tensor:
        """|W + s B A| (O,) fp32; computed anew where A or B has changed, and in training, where that is not seen, in
        each pass, or once in `lengths_kept`."""
        versions = self.adapter.A._version, self.adapter.B._version
        fresh = self.training and not self.keeps_length
        if fresh or self._length is None or self._length[0] != versions:
            A, B = self.adapter.factors()
            s = self.adapter.scale
            if self._squares is None:
                self._squares = row_squares(self.base)
            crossed = 2 * s * (_crossed(self.base, A) * B).sum(1)
            squares = self._squares + crossed + s * s * ((B @ (A @ A.T)) * B).sum(1)
            self._length = versions, squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return self._length[1]


@contextmanager
def lengths_kept(model: nn.Module) -> Iterator[None]:
    """For the passes of one optimizer step, between which nothing trained changes: each length is computed once."""
    layers = [module for module in model.modules() if isinstance(module, DoraLinear)]
    for layer in layers:
        layer._length, layer.keeps_length = None, True
    try:
        yield
    finally:
        for layer in layers:
            layer._length, layer.keeps_length = None, False


def row_squares(base: nn.Module) -> Tensor:
    """|w|^2 of each row of a linear layer's W, (O,) fp32; W is unpacked in blocks."""
    if not isinstance(base, FrozenLinear):
        return base.weight.detach().float().square().sum(1)  # type: ignore[operator]
    weight = base.weight
    parts = [weight.block(start, stop, torch.float32).square().sum(1) for start, stop in weight.blocks()]
    return torch.cat(parts)


def _crossed(base: nn.Module, A: Tensor) -> Tensor:
    """W A^T, (O, r) fp32."""
    if isinstance(base, FrozenLinear):
        return base.weight(A).T
    return base.weight.detach().float() @ A.T  # type: ignore[operator]


def multiply(y_TO: Tensor, gain_O: Tensor) -> None:
    """y in any dtype times the gains in fp32, in place and without a copy of y in fp32."""
    for rows in y_TO.split(ROWS):
        torch.mul(rows, gain_O, out=rows)


def multiply_backward(grad_TO: Tensor, y_TO: Tensor, gain_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The sum over tokens of dy * (y - bias), (O,) fp32; dy is multiplied with the gains, in place."""
    total = torch.zeros_like(gain_O)
    for grad, y in zip(grad_TO.split(ROWS), y_TO.split(ROWS), strict=True):
        exact = grad.float()
        total += (exact * (y if bias_O is None else y - bias_O)).sum(0)
        torch.mul(exact, gain_O, out=grad)
    return total


class _Gain(torch.autograd.Function):
    """y (..., O) in any dtype times g (O,) in fp32, in y's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(y, gain)
        out = y.clone(memory_format=torch.contiguous_format)
        multiply(out.view(-1, len(gain)), gain)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, gain = ctx.saved_tensors
        of_y = grad.clone(memory_format=torch.contiguous_format)
        return of_y, multiply_backward(of_y.view(-1, len(gain)), y.reshape(-1, len(gain)), gain)
