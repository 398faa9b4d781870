"""DoRA: the adapted weight's rows keep their direction from W + s B A and get a trained length of their own.

    y = g * (x W^T + s dropout(x) A^T B^T) + bias,    g = m / |W + s B A|,    m (O,), a length for each output

m starts as |W|, so g is exactly 1 and nothing changes. The length |W + s B A| is followed but gets no gradient: the
paper's cheaper form, which needs no activations of its own. It is computed without the sum W + s B A, from

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T          w, b: a row of W, of B

where |w|^2 never changes and W A^T is a product with r rows, for any format of W. Dropout acts on the adapter's input
alone (PEFT drops the base's too).

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 4.1 and 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.lora import LoraAdapter, LoraLinear, product
from lorafit.frozen.linear import FrozenLinear


class DoraLinear(LoraLinear):
    """A linear layer, its adapter and its `magnitude` (O,) fp32."""

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
        """|W + s B A| (O,) fp32; out of training, computed anew only where A or B has changed."""
        versions = self.adapter.A._version, self.adapter.B._version
        if self.training or self._length is None or self._length[0] != versions:
            A, B = self.adapter.factors()
            s = self.adapter.scale
            if self._squares is None:
                self._squares = row_squares(self.base)
            crossed = 2 * s * (_crossed(self.base, A) * B).sum(1)
            squares = self._squares + crossed + s * s * ((B @ (A @ A.T)) * B).sum(1)
            self._length = versions, squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return self._length[1]


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


class _Gain(torch.autograd.Function):
    """y (..., O) in any dtype times g (O,) in fp32, in y's dtype and without a copy of y in fp32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(y, gain)
        return torch.mul(y, gain, out=torch.empty_like(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, gain = ctx.saved_tensors
        of_gain = (grad * y).flatten(0, -2).sum(0, dtype=torch.float32)
        return torch.mul(grad, gain, out=torch.empty_like(grad)), of_gain
