"""The laws of lorafit.kernels.nf4: bitsandbytes' bytes and bits, and what QLoRA claims for NF4."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from lorafit.kernels.nf4 import (
    BLOCK,
    DYNAMIC_CODE,
    NESTED,
    NF4_CODE,
    quantise_int8,
    quantise_nf4,
    quantise_scales,
    unpack_int8,
    unpack_nf4,
    unpack_scales,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 64), (3, 64), (5, 192), (64, 256), (127, 128), (33, 1088), (300, 640)]


def normal(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(values: Tensor) -> Tensor:
    """A tenth of the values, and half of the blocks, are left."""
    values = values * (normal(values.shape, 1) > 1.28)
    return values * (normal((values.numel() // BLOCK, 1), 2) > 0).repeat_interleave(BLOCK, 1).view(values.shape)


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "heavy tails": lambda w: w**5,
    "sparse": sparse,
    "zero": torch.zeros_like,
    "minus zero": lambda w: -torch.zeros_like(w),
    "equal": lambda w: torch.full_like(w, -0.3),
    "rows of all magnitudes": lambda w: w * 10 ** torch.linspace(-44, 30, len(w))[:, None],
    "smallest normals": lambda w: w * 1.2e-38,
    "subnormals": lambda w: w * 1e-40,
    "smallest subnormals": lambda w: w.sign() * 1e-45,
    "largest of fp16": lambda w: w.clamp(-1, 1) * 65504,
    "huge": lambda w: w.clamp(-1, 1) * (3e38 * BLOCK / w.numel()),  # the sum of the scales still fits
    "on the middles": lambda w: (
        torch.cat([NF4_CODE, (NF4_CODE[:-1] + NF4_CODE[1:]) / 2]).repeat(w.numel())[: w.numel()].view(w.shape)
    ),
}


def bits(values: Tensor) -> Tensor:
    """fp32 values as integers, so that -0 is not 0."""
    assert values.dtype == torch.float32
    return values.contiguous().view(-1).view(torch.int32)


def finite(matrix_OI: Tensor) -> Tensor:
    """Ones where fp16 could not hold the value."""
    return matrix_OI.where(matrix_OI.isfinite(), 1.0)


def relative_error(values: Tensor, weights: Tensor) -> float:
    """Squared error as a part of the squared weights."""
    return float((values.double() - weights).square().sum() / weights.double().square().sum())


def unpacked(matrix_OI: Tensor, double: bool = True) -> Tensor:
    """There and back."""
    codes, absmax = quantise_nf4(matrix_OI)
    return unpack_nf4(codes, unpack_scales(*quantise_scales(absmax)) if double else absmax)


def test_the_codes_are_bitsandbytes() -> None:
    """Both maps of levels are bitsandbytes', bit for bit."""
    torch.testing.assert_close(NF4_CODE, reference.get_4bit_type("nf4", device="cpu"), rtol=0, atol=0)
    torch.testing.assert_close(DYNAMIC_CODE, reference.create_dynamic_map(signed=True), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_bits_equal_bitsandbytes(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """Codes, scales, nested scales and offset have bitsandbytes' bytes; what is unpacked has its bits."""
    matrix_OI = finite(MATRICES[kind](normal(shape)).to(dtype))
    codes, absmax = quantise_nf4(matrix_OI)
    packed, plain = reference.quantize_4bit(matrix_OI, quant_type="nf4", blocksize=BLOCK)
    assert codes.dtype == torch.uint8
    assert codes.shape == (shape[0], shape[1] // 2)
    assert absmax.shape == (shape[0], shape[1] // BLOCK)
    assert torch.equal(codes.view(-1, 1), packed)
    assert torch.equal(bits(absmax), bits(plain.absmax))

    scales, nested, offset = quantise_scales(absmax)
    packed, state = reference.quantize_4bit(matrix_OI, quant_type="nf4", blocksize=BLOCK, compress_statistics=True)
    assert scales.dtype == torch.uint8
    assert scales.shape == absmax.shape
    assert torch.equal(scales.view(-1), state.absmax)
    assert torch.equal(bits(nested), bits(state.state2.absmax))
    assert offset == state.offset.item()

    plain.dtype = state.dtype = torch.float32
    again = unpack_scales(scales, nested, offset)
    assert again.shape == absmax.shape
    assert torch.equal(bits(unpack_nf4(codes, absmax)), bits(reference.dequantize_4bit(packed, plain)))
    assert torch.equal(bits(unpack_nf4(codes, again)), bits(reference.dequantize_4bit(packed, state)))


def test_many_scales_equal_bitsandbytes() -> None:
    """A million scales of 40 magnitudes each get bitsandbytes' code: the table has no bin beside its place."""
    absmax = normal((4096, 256)).abs() * 10 ** torch.linspace(-30, 10, 4096)[:, None]
    for rows in absmax.split(64):
        scales, nested, offset = quantise_scales(rows)
        shifted = rows.reshape(-1) - rows.reshape(-1).mean()
        codes, state = reference.quantize_blockwise(shifted, blocksize=NESTED)
        assert torch.equal(scales.view(-1), codes)
        assert torch.equal(bits(nested), bits(state.absmax))
        assert offset == rows.reshape(-1).mean().item()


def test_rows_do_not_depend_on_each_other() -> None:
    """Codes and scales of some rows are those rows of the codes and scales of the whole."""
    weights = normal((20, 192))
    for quantise in (quantise_nf4, quantise_int8):
        for part, whole in zip(quantise(weights[7:15]), quantise(weights), strict=True):
            assert torch.equal(part, whole[7:15])


def test_scales_of_rows_are_slices_of_all_scales() -> None:
    """Rows unpacked by themselves, with the index of their first scale, have the bits of the whole matrix."""
    scales, nested, offset = quantise_scales(quantise_nf4(normal((77, 448)))[1])
    whole = unpack_scales(scales, nested, offset)
    for start, stop in ((0, 1), (1, 40), (36, 37), (70, 77), (5, 5)):
        rows = unpack_scales(scales[start:stop], nested, offset, first=start * scales.shape[1])
        assert torch.equal(bits(rows), bits(whole[start:stop]))


def test_codes_of_cuda_are_read() -> None:
    """Nearest codes, as bitsandbytes' CUDA kernel takes, differ in few places by one level and unpack to its bits."""
    absmax = quantise_nf4(normal((512, 1024)))[1]
    ours, nested, offset = quantise_scales(absmax)
    blocks = (absmax.view(-1) - offset).view(-1, NESTED)
    nearest = ((blocks / nested[:, None])[..., None] - DYNAMIC_CODE).abs().argmin(-1).to(torch.uint8).view(ours.shape)
    apart = (nearest.int() - ours.int()).abs()
    assert apart.max() == 1
    assert 0 < apart.float().mean() < 0.005
    state = reference.QuantState(nested, code=DYNAMIC_CODE, blocksize=NESTED, dtype=torch.float32)
    theirs = reference.dequantize_blockwise(nearest, state) + torch.tensor(offset)
    assert torch.equal(bits(unpack_scales(nearest, nested, offset)), bits(theirs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8, quantise_scales])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_refused(quantise: Callable[[Tensor], object], bad: float, dtype: torch.dtype) -> None:
    """One NaN or infinity anywhere is a ValueError, not a code."""
    matrix_OI = normal((8, 128)).to(dtype)
    matrix_OI[5, 77] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantise(matrix_OI)


def test_numbers_too_large_are_refused() -> None:
    """fp64 beyond fp32, and scales whose mean overflows, are refused too: they would be unpacked to infinity."""
    with pytest.raises(ValueError, match="too large for fp32"):
        quantise_nf4(torch.full((1, 64), 1e39, dtype=torch.float64))
    with pytest.raises(ValueError, match="too large for fp32"):
        quantise_scales(torch.full((2, 2), 3e38))


def test_blocks_must_be_whole() -> None:
    """Rows of 100 weights are the caller's mistake."""
    with pytest.raises(AssertionError, match="rows of 100 are no whole blocks of 64"):
        quantise_nf4(torch.zeros(2, 100))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", MATRICES)
def test_int8_is_the_rule_in_a_loop(kind: str, dtype: torch.dtype) -> None:
    """Each code is round(w / scale), half to even, of scale = absmax / 127; nothing is off by more than half a step."""
    matrix_OI = finite(MATRICES[kind](normal((7, 128))).to(dtype))
    codes, scales = quantise_int8(matrix_OI)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    for row, got, scale in zip(matrix_OI.float(), codes, scales, strict=True):
        assert scale == row.abs().max() / 127
        steps = row / scale if scale > 0 else torch.zeros_like(row)
        assert got.tolist() == [max(-127, min(127, round(step))) for step in steps.tolist()]
    values = unpack_int8(codes, scales)
    assert torch.equal(values, codes.float() * scales[:, None])
    assert torch.all((values - matrix_OI.float()).abs() <= scales[:, None] * 0.5001 + 127 * 1.5e-45)


def test_int8_ends_and_zeros() -> None:
    """The largest weight of a row is 127 or -127; a row of zeros, or too small for a scale, has scale and codes 0."""
    codes, scales = quantise_int8(torch.tensor([[2.0, -4.0], [0.0, -0.0], [1e-45, 0.0], [254.0, 1.0], [254.0, 3.0]]))
    assert codes.tolist() == [[64, -127], [0, 0], [0, 0], [127, 0], [127, 2]]
    assert scales.tolist()[1:] == [0, 0, 2, 2]


def test_the_code_is_that_of_normal_quantiles() -> None:
    """X4: NF4's levels are quantiles of N(0, 1), 7 below zero and 8 above, over the largest, to 2e-7."""
    outermost = 0.9677083
    upper, lower = (torch.special.ndtri(torch.linspace(outermost, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8))
    levels = torch.cat([-lower, torch.zeros(1), upper.flip(0)]) / upper[0]
    assert (levels - NF4_CODE).abs().max() < 2e-7


def test_bits_per_weight() -> None:
    """X4: the tensors of a matrix take 4.5 bits a weight, and 4.127 with double quantisation."""
    weights = normal((1024, 1024))
    codes, absmax = quantise_nf4(weights)
    scales, nested, _ = quantise_scales(absmax)
    assert 8 * (codes.nbytes + absmax.nbytes) / weights.numel() == 4.5
    assert 8 * (codes.nbytes + scales.nbytes + nested.nbytes) / weights.numel() == pytest.approx(4.127, abs=1e-4)


def test_nf4_beats_fp4_and_symmetric_int4() -> None:
    """X5: on 2^20 draws of N(0, 1) NF4's relative squared error is 0.00845, less than FP4's, less than int4's."""
    weights = normal((1024, 1024))
    blocks = weights.view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    levels = torch.cat([-e2m1.flip(0), e2m1[1:]])
    fp4 = levels[torch.bucketize(blocks / largest, (levels[:-1] + levels[1:]) / 2)] * largest
    int4 = (blocks / largest * 7).round() / 7 * largest
    errors = [relative_error(v.view(weights.shape), weights) for v in (unpacked(weights, False), fp4, int4)]
    assert errors == sorted(errors)
    assert errors == pytest.approx([0.00845, 0.01117, 0.01160], rel=0.01)


def test_double_quantisation_is_harmless() -> None:
    """X6: it raises the squared error by less than 1 %."""
    weights = normal((1024, 1024))
    once, twice = (relative_error(unpacked(weights, double), weights) for double in (False, True))
    assert once < twice < 1.01 * once
