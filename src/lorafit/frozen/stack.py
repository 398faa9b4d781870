"""Frozen matrices of the same shape, one for each expert, in any format: W (E, O, I), of which few are read at a time.

A format that packs rows holds all experts as one tall matrix (E O, I), and expert e is its rows e O to (e + 1) O: a
slice of a mapped file stays a slice. Where a file has a matrix for each expert, they stay E weights. Either way the
output features may come from several tensors, such as `gate` and `up`, side by side or interleaved:

    gate_up of expert e:    [gate rows of e; up rows of e]    or    (gate 0, up 0, gate 1, up 1, ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lorafit.frozen.weight import FrozenWeight


class FrozenStack(nn.Module):
    """y = x W_e^T + bias_e for the expert e that is asked for, with everything frozen.

    parts: (weights, columns), weights being one (E O', I) for all experts or one (O', I) for each, columns the O'
    output features that they give. transposed: whether transformers' own parameter is (E, I, O); declared: whether its
    module says so (Llama 4's does not, and PEFT then takes inputs for outputs).
    """

    def __init__(
        self,
        experts: int,
        parts: Sequence[tuple[Sequence[FrozenWeight], slice]],
        bias_EO: Tensor | None = None,
        *,
        transposed: bool = False,
        declared: bool = True,
    ) -> None:
        super().__init__()
        self.experts, self.transposed, self.declared = experts, transposed, declared
        self.weights = nn.ModuleList(weight for weights, _ in parts for weight in weights)
        self.bias = None if bias_EO is None else nn.Parameter(bias_EO, requires_grad=False)
        self.in_features = parts[0][0][0].in_features
        self._parts: list[tuple[int, int, bool, slice]] = []  # first weight, rows of an expert, tall or not, columns
        first = 0
        for weights, columns in parts:
            tall = len(weights) == 1
            assert tall or len(weights) == experts, "a part has one weight, or one for each expert"
            rows = weights[0].out_features // (experts if tall else 1)
            self._parts.append((first, rows, tall, columns))
            first += len(weights)
        self.out_features = sum(rows for _, rows, _, _ in self._parts)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._weight(0).device

    @property
    def format(self) -> str:
        """How its first weight is stored."""
        return self._weight(0).format

    @property
    def source_format(self) -> str:
        """How the file had it."""
        return self._weight(0).source_format

    def product(self, expert: int, x_NI: Tensor, y_NO: Tensor) -> None:
        """Writes y = x W_e^T + bias_e, in x's dtype."""
        for weight, start, stop, columns in self.pieces(expert):
            y_NO[:, columns] = weight.product(x_NI, start, stop)
        if self.bias is not None:
            y_NO += self.bias[expert]

    def backward_input(self, expert: int, grad_NO: Tensor) -> Tensor:
        """grad W_e (N, I) in grad's dtype."""
        parts = [weight.backward_input(grad_NO[:, columns], start, stop)
                 for weight, start, stop, columns in self.pieces(expert)]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.float32).to(grad_NO.dtype)

    def matrix(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_e (O, I), unpacked; for export and tests, never in a step."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        for weight, start, stop, columns in self.pieces(expert):
            out[columns] = weight.block(start, stop, dtype)
        return out

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All experts as transformers' parameter has them, (E, O, I) or (E, I, O); for export and tests."""
        whole = torch.stack([self.matrix(expert, dtype) for expert in range(self.experts)])
        return whole.transpose(1, 2).contiguous() if self.transposed else whole

    def row(self, index: int) -> Tensor:
        """Row `index` of (E O, I), fp32."""
        expert, feature = divmod(index, self.out_features)
        for weight, start, stop, columns in self.pieces(expert):
            features = range(self.out_features)[columns]
            if feature in features:
                place = start + features.index(feature)
                assert place < stop, "a part has as many rows as columns"
                out = torch.empty(1, self.in_features, device=self.device)
                return weight.rows(place, place + 1, out)[0]
        raise AssertionError(f"no part gives output feature {feature}")

    def pieces(self, expert: int) -> Iterator[tuple[FrozenWeight, int, int, slice]]:
        """(weight, first row, last row, columns) of this expert's parts."""
        for first, rows, tall, columns in self._parts:
            start = expert * rows if tall else 0
            yield self._weight(first if tall else first + expert), start, start + rows, columns

    @property
    def trained(self) -> list[nn.Parameter]:
        """Its own parameters, where they are trained (--method full)."""
        found = [*(self._weight(index).master for index in range(len(self.weights))), self.bias]
        return [parameter for parameter in found if parameter is not None and parameter.requires_grad]

    def _weight(self, index: int) -> FrozenWeight:
        weight = self.weights[index]
        assert isinstance(weight, FrozenWeight), "a stack holds frozen weights only"
        return weight
