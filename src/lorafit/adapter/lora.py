"""LoRA: a frozen linear layer plus a trained update of low rank.

    y = x W^T + (alpha / r) * dropout(x) A^T B^T

    x       (..., I)  input               W  (O, I)  frozen, in any format
    A       (r, I)    trained, random      B  (O, r)  trained, zero at the start: a new adapter changes nothing
    alpha/r           scale; fixed, so that r can change without a new learning rate (rsLoRA: alpha / sqrt(r))

Only A and B learn: r * (I + O) numbers instead of I * O. They are kept in fp32 whatever the base's format, since an
update of 1e-5 is lost in a bf16 weight; the products run in x's dtype.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1; A's start
is Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)), as in the paper's code. rsLoRA: Kalajdzievski
2023, arXiv:2312.03732, section 3. Other kinds of adapters are in variants/.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.adapter.dropout import PlacedDropout
from lorafit.frozen.linear import FrozenLinear


class LoraAdapter(nn.Module):
    """x (..., I) -> the update (..., O). It knows nothing of the base: no format, no merged state, no name."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: PlacedDropout,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.use_rslora = rank, float(alpha), use_rslora
        self.scale = scaling(rank, alpha, use_rslora)
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(x) @ self.A.to(x.dtype).T  # (..., r)
        return (h @ self.B.to(x.dtype).T) * self.scale  # (..., O)

    def start(self, generator: torch.Generator) -> None:
        """A to its random start, B to zero: the update is exactly 0."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    @property
    def width(self) -> int:
        """R, the rank of `factors`."""
        return self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """(R, I) and (O, R): the plain LoRA pair whose product, times the scale, is the update. Here A and B."""
        return self.A, self.B

    def fold(self, low_TR: Tensor) -> Tensor:
        """(T, r): the gradient of x A^T, from that of x times the first factor. Here the same."""
        return low_TR


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """What an update is multiplied with: alpha / r, or rsLoRA's alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class Adapted(nn.Module):
    """A layer of the model, `base`, and what is trained beside it. `enabled` False gives the base model's bits."""

    only_base_is_frozen = True  # for fingerprints

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    def parts(self) -> dict[str, nn.Parameter]:
        """What is trained, by the end of its name in PEFT's files."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, the same way."""
        return dict(self.parts())


class BiasLinear(Adapted):
    """A linear layer whose bias is trained: `bias` (O,) fp32, starting as the base's; None where that stays."""

    bias: nn.Parameter | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.bias is None:
            return self.base(x)
        return self.shifted(product(self.base, x))

    def shifted(self, y: Tensor) -> Tensor:
        """y plus the bias, in the dtype that the base's has."""
        own: Tensor | None = self.base.bias  # type: ignore[assignment]
        if own is None:
            return y
        return y + (own if self.bias is None else self.bias.to(own.dtype))

    def train_bias(self) -> None:
        """Take the base's bias over, to be trained."""
        self.bias = nn.Parameter(self.base.bias.detach().float().clone())  # type: ignore[operator]

    @property
    def offset(self) -> Tensor | None:
        """The bias that is added: the trained one, the base's, or none."""
        return self.base.bias if self.bias is None else self.bias  # type: ignore[return-value]

    def parts(self) -> dict[str, nn.Parameter]:
        return {} if self.bias is None else {"bias": self.bias}


class LoraLinear(BiasLinear):
    """A linear layer of any kind and the adapter beside it."""

    def __init__(self, base: nn.Module, adapter: LoraAdapter) -> None:
        super().__init__(base)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x) if self.enabled else self.base(x)

    @torch.no_grad()
    def delta(self, weight_OI: Tensor) -> Tensor:
        """What merging adds to the layer's matrix `weight_OI` (O, I) fp32: s B A, whatever that is."""
        A, B = self.adapter.factors()
        return (B @ A) * self.adapter.scale

    def parts(self) -> dict[str, nn.Parameter]:
        own = pair(self.adapter)
        return own if self.bias is None else {**own, "base_layer.bias": self.bias}

    def tensors(self) -> dict[str, Tensor]:
        A, B = self.adapter.factors()
        return {**super().tensors(), "lora_A.weight": A, "lora_B.weight": B}


def pair(adapter: Any) -> dict[str, nn.Parameter]:
    """A and B by their names in PEFT's files."""
    return {"lora_A.weight": adapter.A, "lora_B.weight": adapter.B}


def product(base: nn.Module, x: Tensor) -> Tensor:
    """x W^T of a linear layer, without its bias."""
    return base.product(x) if isinstance(base, FrozenLinear) else F.linear(x, base.weight)  # type: ignore[arg-type]
