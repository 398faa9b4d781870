"""PiSSA: A and B start as the largest singular part of W, and what is left of W is frozen.

    y = x (W - s B0 A0)^T + s x A^T B^T = x W^T + s x (B A - B0 A0)^T          s B0 A0: W's best of rank r

Nothing is taken out of W: it may be packed, mapped or in 4 bits and stays as it is, with no rounding of a remainder.
The update is computed from differences,

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

which are exactly 0 at the start, so that no output changes, and stay exact in bf16, where B A and B0 A0 would each be
rounded to more than they differ by. The same line is a plain LoRA of rank 2r, [A; A - A0] and [B - B0, B0]: that is
what is saved, and any program loads it on the plain base. PEFT's own conversion (save_pretrained's
`path_initial_model_for_weight_conversion`) has the same product, rank and alpha, as [A; A0] and [B, -B0].

Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948, section 3 and appendix C (conversion); the form by differences is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.lora import LoraAdapter
from lorafit.adapter.variants.svd import leading_pair


class PissaAdapter(LoraAdapter):
    """An adapter with the start that it is measured from: A0 (r, I) and B0 (O, r), fp32, never trained."""

    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: PlacedDropout,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, use_rslora)
        self.register_buffer("A0", torch.zeros_like(self.A))
        self.register_buffer("B0", torch.zeros_like(self.B))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if not torch.is_grad_enabled():  # with the bits of the plain LoRA that is saved
            A, B = self.factors()
            return ((x @ A.to(x.dtype).T) @ B.to(x.dtype).T) * self.scale
        h = x @ self.A.to(x.dtype).T
        moved = x @ (self.A - self.A0).to(x.dtype).T
        return (h @ (self.B - self.B0).to(x.dtype).T + moved @ self.B0.to(x.dtype).T) * self.scale

    @torch.no_grad()
    def start_from(self, matrix_OI: Tensor, generator: torch.Generator, exact: bool = False) -> None:
        """A = A0, B = B0, with s B0 A0 the best approximation of matrix_OI (O, I), fp32; exact: however large it is."""
        A, B = leading_pair(matrix_OI / self.scale, self.rank, generator, exact)
        for tensor, value in ((self.A, A), (self.A0, A), (self.B, B), (self.B0, B)):
            tensor.copy_(value)

    @property
    def width(self) -> int:
        return 2 * self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)

    def fold(self, low_TR: Tensor) -> Tensor:
        return low_TR[:, : self.rank] + low_TR[:, self.rank :]
