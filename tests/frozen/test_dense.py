"""The laws of lorafit.frozen.dense: a frozen weight does what a plain matrix does, in every dtype and odd size."""

from __future__ import annotations

import pytest
import torch

from lorafit.frozen.dense import DenseWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 1), (3, 7), (16, 33), (65, 5)]


@pytest.fixture(params=DTYPES)
def stored(request) -> str:
    """How the weight is stored."""
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request) -> torch.dtype:
    """What products run in."""
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def matrix(request, stored) -> torch.Tensor:
    """The plain matrix."""
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0)).to(DTYPES[stored])


def test_it_says_what_it_is(matrix, stored):
    """Features, format and bytes; the file's format is the stored one unless told."""
    weight = DenseWeight(matrix)
    assert (weight.out_features, weight.in_features) == matrix.shape
    assert weight.format == stored
    assert weight.source_format == stored.upper()
    assert DenseWeight(matrix, "Q4_0").source_format == "Q4_0"
    assert weight.nbytes == matrix.numel() * (4 if stored == "fp32" else 2)


def test_products_are_the_matrixs(matrix, dtype):
    """forward is x W^T and backward_input is g W, in the input's dtype, for inputs of any number of dimensions."""
    weight = DenseWeight(matrix)
    for shape in ((), (4,), (2, 3)):
        x, grad = torch.randn(*shape, matrix.shape[1]).to(dtype), torch.randn(*shape, matrix.shape[0]).to(dtype)
        forward, backward = weight(x), weight.backward_input(grad)
        assert forward.dtype == backward.dtype == dtype
        near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
        torch.testing.assert_close(forward.double(), x.double() @ matrix.double().T, **near)
        torch.testing.assert_close(backward.double(), grad.double() @ matrix.double(), **near)


def test_rows_are_the_matrixs(matrix, dtype):
    """Any block of rows, written into the buffer that is given, in its dtype; an empty one too."""
    weight, rows = DenseWeight(matrix), matrix.shape[0]
    for start, stop in {(0, rows), (0, 1), (rows - 1, rows), (rows // 2, rows), (0, 0)}:
        out = torch.full((stop - start, matrix.shape[1]), torch.nan, dtype=dtype)
        assert weight.rows(start, stop, out) is out
        assert torch.equal(out, matrix[start:stop].to(dtype))
    assert torch.equal(weight.dense(dtype), matrix.to(dtype))


def test_embedding_takes_rows(matrix, dtype):
    """Rows by id, in the order and shape of the ids and in the dtype asked for, repeated ones too."""
    weight = DenseWeight(matrix)
    for shape in ((), (5,), (2, 3)):
        ids = torch.randint(matrix.shape[0], shape)
        assert torch.equal(weight.embed(ids, dtype), matrix[ids].to(dtype))


def test_the_matrix_is_shared_and_never_trained(matrix):
    """It lies where it was, so that a mapped file stays one, and no optimizer can be given it by mistake."""
    weight = DenseWeight(matrix)
    assert weight.matrix.data_ptr() == matrix.data_ptr()
    assert not any(parameter.requires_grad for parameter in weight.parameters())
