"""Stacks of experts: any format, any layout, and one expert's rows alone."""

from __future__ import annotations

import pytest
import torch

from builders.stored_weights import FORMATS, random_weight
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.packed import PackedWeight, quantise
from lorafit.frozen.stack import FrozenStack
from lorafit.kernels import ops

EXPERTS, ROWS, COLUMNS = 3, 8, 256


class Counting(DenseWeight):
    """A dense weight that remembers which rows were read."""

    def block(self, start, stop, dtype):
        self.__dict__.setdefault("read", []).append((start, stop))
        return super().block(start, stop, dtype)


def tall(format_: str, seed: int = 0) -> PackedWeight:
    return PackedWeight(random_weight(format_, EXPERTS * ROWS, COLUMNS, seed))


@pytest.mark.parametrize("format_", FORMATS)
def test_an_experts_product_is_that_of_its_own_rows(format_):
    """y = x W_e^T and grad W_e of every expert equal those of the slice of the whole dense matrix, bit for bit at more
    tokens than are multiplied in registers, within rounding at few."""
    weight = tall(format_)
    stack, whole = FrozenStack(EXPERTS, [([weight], slice(None))]), weight.dense().view(EXPERTS, ROWS, COLUMNS)
    for tokens in (1, 20):
        x, grad = torch.randn(tokens, COLUMNS), torch.randn(tokens, ROWS)
        for expert in range(EXPERTS):
            y = torch.empty(tokens, ROWS)
            stack.product(expert, x, y)
            if tokens == 20:
                assert torch.equal(y, x @ whole[expert].T)
            assert torch.allclose(y, x @ whole[expert].T, rtol=1e-5, atol=1e-5 * float(whole.abs().max()) * 16)
            assert torch.equal(stack.backward_input(expert, grad), grad @ whole[expert])
    assert torch.equal(stack.dense(), whole)


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("tall_", [False, True])
def test_two_parts_lie_side_by_side_or_alternate(alternate, tall_):
    """Gate and up from two tensors, or a matrix for each expert: columns of y, rows of W_e and single rows are where
    they belong, and the backward product sums both."""
    gate, up = torch.randn(EXPERTS, ROWS, 16), torch.randn(EXPERTS, ROWS, 16)
    columns = (slice(0, None, 2), slice(1, None, 2)) if alternate else (slice(0, ROWS), slice(ROWS, 2 * ROWS))
    want = torch.empty(EXPERTS, 2 * ROWS, 16)
    want[:, columns[0]], want[:, columns[1]] = gate, up
    parts = [
        ([DenseWeight(m.reshape(-1, 16))] if tall_ else [DenseWeight(one) for one in m], place)
        for m, place in zip((gate, up), columns, strict=True)
    ]
    bias = torch.randn(EXPERTS, 2 * ROWS)
    stack = FrozenStack(EXPERTS, parts, bias)
    x, grad, y = torch.randn(5, 16), torch.randn(5, 2 * ROWS), torch.empty(5, 2 * ROWS)
    for expert in range(EXPERTS):
        stack.product(expert, x, y)
        assert torch.allclose(y, x @ want[expert].T + bias[expert], atol=1e-5)
        assert torch.allclose(stack.backward_input(expert, grad), grad @ want[expert], atol=1e-5)
    assert torch.equal(stack.dense(), want)
    assert torch.equal(torch.stack([stack.row(n) for n in range(EXPERTS * 2 * ROWS)]), want.view(-1, 16))


def test_only_the_experts_that_are_asked_for_are_read():
    """Expert 1's products read rows 8 to 16 and no other."""
    weight = Counting(torch.randn(EXPERTS * ROWS, 4))
    stack = FrozenStack(EXPERTS, [([weight], slice(None))])
    stack.product(1, torch.randn(2, 4), torch.empty(2, ROWS))
    stack.backward_input(1, torch.randn(2, ROWS))
    assert weight.read == [(8, 16), (8, 16)]


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_a_stack_quantised_in_pieces_has_the_bytes_of_the_whole(format_, monkeypatch):
    """Rows go to the quantiser some at a time, so that no fp32 copy of a stack exists; scales of scales too are those
    of the whole matrix."""
    matrix = torch.randn(24, 128)
    whole = quantise(matrix, format_)
    monkeypatch.setattr(ops, "QUANTISED", 5 * 128)
    pieces = quantise(matrix, format_)
    for name in ("data", "scales", "nested"):
        a, b = getattr(whole, name), getattr(pieces, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert whole.offset == pieces.offset
