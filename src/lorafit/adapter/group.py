"""Frozen linear layers over one input, and the adapters beside them, as one product: forward and backward by hand.

    y = x [W1; W2; ...]^T + h B^T,    h = x (s A)^T,    s = alpha / r, of each layer its own columns of y and h

    dh = dy B,    dx = dy [W1; W2; ...] + dh (s A),    dA = s dh^T x,    dB = dy^T h

A and B are an adapter's `factors`: of PiSSA they have twice the rank, and the gradient of h is folded to A's rows.
With DoRA y's columns are multiplied with gains, dy's before all else, and magnitudes are trained (variants/dora.py).

x is read once for all W and once for all A. Nothing of W is saved, and no gradient of it computed. Whoever calls keeps
x and h. A's rows do not ride in W's product: their own runs at the same rate (205 and 214 GFLOP/s a core, measured),
and a matrix with room for them would be a copy of the base.

Source: ours; the formulas are Hu et al. 2021, arXiv:2106.09685, section 4.1, differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lorafit.adapter.lora import BiasLinear, LoraAdapter, LoraLinear
from lorafit.adapter.variants.dora import DoraLinear, multiply, multiply_backward
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.weight import BLOCK_WEIGHTS, FrozenWeight
from lorafit.kernels.product import product
from lorafit.kernels.scratch import scratch


@dataclass(frozen=True)
class Part:
    """One adapter of a group: its columns of y and of h."""

    adapter: LoraAdapter
    columns: slice
    low: slice
    rows: slice
    """Of A among all A."""


class Group:
    """`layers` (FrozenLinear, or LoraLinear or BiasLinear over one) that all take the same input; for one forward and
    backward pass, between which the adapters do not change."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        bases = [layer.base if isinstance(layer, BiasLinear) else layer for layer in layers]
        self.bases: list[FrozenLinear] = [base for base in bases if isinstance(base, FrozenLinear)]
        assert len(self.bases) == len(layers), "a group has frozen linear layers only"
        self.weights: list[FrozenWeight] = [base.weight for base in self.bases]
        bounds = list(accumulate((weight.out_features for weight in self.weights), initial=0))
        self.columns = [slice(*bound) for bound in pairwise(bounds)]
        self.out_features, self.in_features = bounds[-1], self.weights[0].in_features
        self.biases = [_bias(layer) for layer in layers]
        self.doras = [layer if isinstance(layer, DoraLinear) and layer.enabled else None for layer in layers]
        self._gains = [None if layer is None else layer.gain().detach() for layer in self.doras]
        self.parts: list[Part] = []
        self.rank = trained = 0
        self._cast: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        for layer, columns in zip(layers, self.columns, strict=True):
            if isinstance(layer, LoraLinear) and layer.enabled:
                low = slice(self.rank, self.rank + layer.adapter.width)
                rows = slice(trained, trained + layer.adapter.rank)
                self.parts.append(Part(layer.adapter, columns, low, rows))
                self.rank, trained = low.stop, rows.stop

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter; each W that is trained; of each layer its magnitude and bias, if they are."""
        adapters = [matrix for part in self.parts for matrix in (part.adapter.A, part.adapter.B)]
        matrices = [weight.master for weight in self.weights if _is_trained(weight.master)]
        magnitudes = (None if layer is None else layer.magnitude for layer in self.doras)
        vectors = (vector for pair in zip(magnitudes, self.biases, strict=True) for vector in pair)
        return [*adapters, *matrices, *(vector for vector in vectors if _is_trained(vector))]

    @property
    def gained(self) -> bool:
        """Whether `backward_vectors` needs y."""
        return any(layer is not None for layer in self.doras)

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """Writes y (T, O) and gives h (T, R), R the ranks' sum; both in x's dtype."""
        self._product(x_TI, y_TO)
        h_TR = self.low(x_TI)
        for part, B in zip(self.parts, self._Bs(x_TI.dtype), strict=True):
            y_TO[:, part.columns].addmm_(h_TR[:, part.low], B.T)
        for gain, bias, columns in zip(self._gains, self.biases, self.columns, strict=True):
            if gain is not None:
                multiply(y_TO[:, columns], gain)
            if bias is not None:
                y_TO[:, columns] += bias.to(y_TO.dtype)
        return h_TR

    def backward_vectors(self, grad_TO: Tensor, y_TO: Tensor | None) -> list[Tensor]:
        """dm and db of each magnitude and bias that is trained, fp32; before all other gradients. dy becomes that of
        the products, in place. y: as `forward` wrote it, or None where none is `gained`."""
        grads: list[Tensor] = []
        for layer, gain, bias, columns in zip(self.doras, self._gains, self.biases, self.columns, strict=True):
            if _is_trained(bias):
                db = grad_TO[:, columns].float().sum(0)
            if layer is not None and gain is not None:
                assert y_TO is not None, "kept where a group is gained"
                total = multiply_backward(grad_TO[:, columns], y_TO[:, columns], gain, bias)
                grads.append(torch.where(layer.magnitude == 0, 0.0, total / layer.magnitude))
            grads += [db] if _is_trained(bias) else []
        return grads

    def backward_low(self, grad_TO: Tensor) -> Tensor:
        """dh (T, R) from dy (T, O)."""
        dh_TR = grad_TO.new_empty(len(grad_TO), self.rank)
        for part, B in zip(self.parts, self._Bs(grad_TO.dtype), strict=True):
            product(grad_TO[:, part.columns], B.T, out=dh_TR[:, part.low])
        return dh_TR

    def backward_input(self, grad_TO: Tensor, dh_TR: Tensor, dx_TI: Tensor) -> Tensor:
        """Writes dx (T, I) and returns it."""
        self._transposed_product(grad_TO, dx_TI)
        if self.parts and not self._drops:
            return dx_TI.addmm_(dh_TR, self._scaled_A(dx_TI.dtype))
        for part in self.parts:
            dx_TI += part.adapter.dropout(dh_TR[:, part.low] @ _scaled(part.adapter, dx_TI.dtype))
        return dx_TI

    def backward_adapters(self, grad_TO: Tensor, dh_TR: Tensor, x_TI: Tensor, h_TR: Tensor) -> list[Tensor]:
        """dA and dB of each adapter, in the order of `parameters`, fp32."""
        grads: list[Tensor] = []
        folded = [part.adapter.fold(dh_TR[:, part.low]) for part in self.parts]
        plain = all(part.adapter.width == part.adapter.rank for part in self.parts)
        together = None
        if self.parts and not self._drops:
            together = product((dh_TR if plain else torch.cat(folded, dim=1)).T, x_TI.T)
        for part, dh in zip(self.parts, folded, strict=True):
            dA = product(dh.T, part.adapter.dropout(x_TI).T) if together is None else together[part.rows]
            dB = product(h_TR[:, part.low][:, : part.adapter.rank].T, grad_TO[:, part.columns].T).T
            grads += [dA.float() * part.adapter.scale, dB.float()]
        return grads

    def backward_weights(self, grad_TO: Tensor, x_TI: Tensor) -> list[Tensor]:
        """dW = dy^T x of each W that is trained, in the order of `parameters`, fp32."""
        trained = [columns for one, columns in zip(self.weights, self.columns, strict=True) if _is_trained(one.master)]
        together = product(grad_TO.T, x_TI.T) if trained else None
        return [] if together is None else [together[columns].float() for columns in trained]

    @property
    def _drops(self) -> bool:
        return any(part.adapter.dropout.active for part in self.parts)

    def low(self, x_TI: Tensor) -> Tensor:
        """h (T, R) alone."""
        if not self.parts:
            return x_TI.new_empty(len(x_TI), 0)
        if not self._drops:
            return product(x_TI, self._scaled_A(x_TI.dtype))
        return torch.cat([product(p.adapter.dropout(x_TI), _scaled(p.adapter, x_TI.dtype)) for p in self.parts], dim=1)

    def _scaled_A(self, dtype: torch.dtype) -> Tensor:
        """s A of all adapters, one below the other (R, I), for the forward and the backward pass."""
        if ("A", dtype) not in self._cast:
            self._cast["A", dtype] = [torch.cat([_scaled(part.adapter, dtype) for part in self.parts])]
        return self._cast["A", dtype][0]

    def _Bs(self, dtype: torch.dtype) -> list[Tensor]:
        """B of each adapter, the same."""
        if ("B", dtype) not in self._cast:
            self._cast["B", dtype] = [part.adapter.factors()[1].to(dtype) for part in self.parts]
        return self._cast["B", dtype]

    def _product(self, x_TI: Tensor, y_TO: Tensor) -> None:
        matrix_OI = self._matrix(x_TI.dtype)
        if matrix_OI is not None:
            product(x_TI, matrix_OI, out=y_TO)
            return
        for weight, columns in zip(self.weights, self.columns, strict=True):
            y_TO[:, columns] = weight(x_TI)

    def _transposed_product(self, grad_TO: Tensor, dx_TI: Tensor) -> None:
        matrix_OI = self._matrix(grad_TO.dtype)
        if matrix_OI is not None:
            product(grad_TO, matrix_OI.T, out=dx_TI)
            return
        dx_TI.zero_()
        for weight, columns in zip(self.weights, self.columns, strict=True):
            dx_TI += weight.backward_input(grad_TO[:, columns])

    def _matrix(self, dtype: torch.dtype) -> Tensor | None:
        """[W1; W2; ...] (O, I), to be read at once; None where that is too much to unpack at a time."""
        if len(self.weights) == 1 and self.out_features * self.in_features <= BLOCK_WEIGHTS:
            return self.weights[0].block(0, self.out_features, dtype)
        stacked = _stacked(self.weights, dtype)
        if stacked is not None:
            return stacked
        if self.out_features * self.in_features > BLOCK_WEIGHTS:
            return None
        matrix_OI = scratch(self.out_features, self.in_features, dtype, self.weights[0].device)
        for weight, columns in zip(self.weights, self.columns, strict=True):
            weight.rows(0, weight.out_features, matrix_OI[columns])
        return matrix_OI


def stack(weights: Sequence[FrozenWeight]) -> None:
    """Move dense matrices of one width next to each other in memory, so that a group multiplies them as they lie."""
    if len(weights) > 1 and all(isinstance(weight, DenseWeight) and not weight.mapped for weight in weights):
        dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
        rows = [weight.out_features for weight in dense]
        whole = torch.cat([weight.matrix for weight in dense])
        for weight, part in zip(dense, whole.split(rows), strict=True):
            weight.matrix = nn.Parameter(part, requires_grad=False)


def _stacked(weights: Sequence[FrozenWeight], dtype: torch.dtype) -> Tensor | None:
    """The matrices as one, if they are dense, in this dtype, and lie one behind the other."""
    matrices = [weight.matrix for weight in weights if isinstance(weight, DenseWeight) and weight.matrix.dtype == dtype]
    if len(matrices) < len(weights):
        return None
    first = matrices[0]
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for matrix in matrices:
        if matrix.untyped_storage().data_ptr() != storage or matrix.storage_offset() != place:
            return None
        place += matrix.numel()
    return first.as_strided((sum(len(matrix) for matrix in matrices), first.shape[1]), (first.shape[1], 1))


def _is_trained(tensor: Tensor | None) -> TypeGuard[nn.Parameter]:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _bias(layer: nn.Module) -> Tensor | None:
    """The bias that a layer adds."""
    if isinstance(layer, BiasLinear):
        return layer.offset if layer.enabled else layer.base.bias  # type: ignore[return-value]
    return layer.bias  # type: ignore[return-value]


def _scaled(adapter: LoraAdapter, dtype: torch.dtype) -> Tensor:
    return (adapter.factors()[0] * adapter.scale).to(dtype)
