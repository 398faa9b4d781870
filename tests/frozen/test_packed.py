"""The laws of lorafit.frozen.packed: a packed weight is the matrix of its values, bit for bit, in its own bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from builders.stored_weights import FORMATS, random_weight
from lorafit.frozen import weight as weight_module
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import FEW, PackedWeight, quantise
from lorafit.kernels import ops
from lorafit.kernels.scratch import scratch

ROWS, COLUMNS = 24, 512
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=FORMATS)
def packed(request) -> PackedWeight:
    """A weight in each format, its rows in another order than they are stored in."""
    return PackedWeight(random_weight(request.param, ROWS, COLUMNS, ordered=True))


def test_it_says_what_it_is_and_takes_no_more_than_its_bytes(packed):
    """Features, format, bytes; nothing of it can be trained."""
    stored = packed.stored
    assert (packed.out_features, packed.in_features) == (ROWS, COLUMNS)
    assert packed.format == packed.source_format == stored.format
    parts = [part for part in (stored.data, stored.scales, stored.nested, stored.order) if part is not None]
    assert packed.nbytes == sum(part.nbytes for part in parts)
    assert packed.data.data_ptr() == stored.data.data_ptr()
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_gradients_have_the_dense_twins_bits(packed, dtype):
    """y, the gradient of x and embedded rows equal those of the unpacked matrix in the dtype, in every bit."""
    dense = DenseWeight(packed.dense(dtype))
    ours, twin = (torch.randn(3, FEW, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in "ab")
    grad = torch.randn(3, FEW, ROWS).to(dtype)
    results = []
    for x, weight in ((ours, packed), (twin, dense)):
        y = FrozenLinear(weight)(x.requires_grad_())
        y.backward(grad)
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ids = torch.tensor([[3, 0, ROWS - 1], [7, 7, 1]])
    assert torch.equal(packed.embed(ids, dtype), dense.embed(ids, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, FEW])
def test_few_tokens_are_multiplied_without_unpacking(packed, dtype, tokens, monkeypatch):
    """The scratch buffer is not asked for; y is the exact product within the dtype's rounding (sums are in fp32)."""
    monkeypatch.setattr(weight_module, "scratch", None)
    x = torch.randn(1, tokens, COLUMNS).to(dtype)
    y = packed(x)
    assert (y.shape, y.dtype) == ((1, tokens, ROWS), dtype)
    exact = x.double() @ packed.dense().double().T
    size = x.double().abs() @ packed.dense().double().abs().T  # what rounding errors are relative to
    assert ((y - exact).abs() <= (2**-8 if dtype == torch.bfloat16 else COLUMNS * 2**-24) * size + 1e-30).all()


def test_nothing_is_saved_and_one_buffer_serves_all():
    """Neither W nor x is kept for the backward pass, and the buffer is one block of rows of the largest weight."""
    saved: list[torch.Tensor] = []
    layers = [FrozenLinear(PackedWeight(random_weight("Q4_K", rows, 512))) for rows in (512, 8, 512)]
    x = torch.randn(20, 512, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layers[2](layers[0](x * 1))
        layers[1](y).sum().backward()
    assert not [tensor for tensor in saved if tensor.numel() > 1]
    cpu = torch.device("cpu")
    assert scratch(1, 1, torch.float32, cpu).untyped_storage().nbytes() >= 512 * 512 * 4
    assert scratch(2, 3, torch.float32, cpu).data_ptr() == scratch(500, 7, torch.bfloat16, cpu).data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_weights_go_in_blocks_of_rows(packed, dtype, monkeypatch):
    """Seven rows at a time, so the buffer stays small however large the matrix is: y and the gradient are the exact
    products within two roundings to the dtype, the block's and the sum's (bf16 has 8 bits: 2^-8 each)."""
    monkeypatch.setattr(weight_module, "BLOCK_WEIGHTS", 7 * COLUMNS)
    assert list(packed.blocks()) == [(0, 7), (7, 14), (14, 21), (21, ROWS)]
    x, grad = torch.randn(20, COLUMNS).to(dtype), torch.randn(20, ROWS).to(dtype)
    matrix = packed.dense(dtype).double()
    for ours, a, b in ((packed(x), x.double(), matrix.T), (packed.backward_input(grad), grad.double(), matrix)):
        error = (2**-7 if dtype == torch.bfloat16 else COLUMNS * 2**-24) * (a.abs() @ b.abs())
        assert ((ours - a @ b).abs() <= error + 1e-30).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_a_part_is_those_rows_over_the_same_memory(format_):
    """Slices of rows, as of one expert of a 3-D tensor or one shard, have the whole's values; NF4's scales are found
    by their place in the whole, across a boundary of second-level blocks too. A slice of a slice as well."""
    whole = PackedWeight(random_weight(format_, 96, 512))
    values = whole.dense()
    for start, stop in ((0, 96), (5, 60), (31, 96), (95, 96), (4, 4)):
        part = whole.part(start, stop)
        assert torch.equal(part.dense(), values[start:stop])
        assert stop == start or whole.data.data_ptr() <= part.data.data_ptr() < whole.data.data_ptr() + whole.nbytes
    assert torch.equal(whole.part(10, 90).part(7, 50).dense(), values[17:60])
    experts = values.view(4, 24, 512)
    for expert in range(4):
        x = torch.randn(20, 512)
        assert torch.equal(whole.part(24 * expert, 24 * expert + 24)(x), x @ experts[expert].T)
    ordered = PackedWeight(random_weight(format_, 96, 512, ordered=True))
    assert torch.equal(ordered.part(10, 40).dense(), ordered.dense()[10:40])


def test_nf4_takes_4_127_bits_per_weight():
    """Counted on the bytes that lie in memory: 4 + 8/64 + 32/(64 x 256) (claim X4)."""
    weight = quantise(torch.randn(512, 2048), "nf4")
    bits = 8 * weight.nbytes / (512 * 2048)
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert (weight.format, weight.source_format) == ("NF4", "NF4")


def test_int8_takes_a_byte_and_a_scale_per_row():
    """And its values are within half a step of the matrix."""
    matrix = torch.randn(64, 100)
    weight = quantise(matrix, "int8")
    assert weight.nbytes == 64 * 100 + 64 * 4
    assert ((weight.dense() - matrix).abs() <= matrix.abs().amax(1, keepdim=True) / 127 * 0.501).all()


def test_rows_that_are_no_whole_blocks_are_not_quantised():
    """NF4 has blocks of 64; int8 none."""
    assert quantise(torch.randn(4, 96), "nf4") is None
    assert quantise(torch.randn(4, 96), "int8") is not None


@pytest.mark.parametrize("format_", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(format_, bad):
    """One such weight anywhere, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.randn(8, 128).to(dtype)
        matrix[5, 99] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantise(matrix, format_)


def test_a_copy_reads_its_own_memory(packed):
    """Copied or pickled after it was used, a weight does not point to the first one's bytes; nor after it was moved."""
    x, rows = torch.randn(1, COLUMNS), packed.dense()
    copies = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
    for one in copies:
        one.data.zero_()
    assert torch.equal(packed.dense(), rows)
    assert not torch.equal(copies[0].dense(), rows)
    assert torch.equal(copies[0](x), copies[1](x))
    packed.data.data = torch.zeros_like(packed.data)
    packed.to("cpu")
    assert torch.equal(packed.dense(), copies[0].dense())


@pytest.mark.parametrize("format_", FORMATS)
def test_the_stored_tensors_come_back(format_):
    """`stored` is what the weight was made of, also after the model was cast to another dtype."""
    made = random_weight(format_, 6, 256, ordered=True)
    back = PackedWeight(made).to(torch.bfloat16).stored
    assert torch.equal(ops.values(back), ops.values(made))
    assert (back.format, back.columns, back.offset) == (made.format, made.columns, made.offset)
