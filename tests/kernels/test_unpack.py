"""The laws of lorafit.kernels.unpack: gguf-py's bits, for every block type and every odd block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from lorafit.kernels import BLOCK_TYPES
from lorafit.kernels import unpack as module
from lorafit.kernels.unpack import unpack

PACKED = [block.name for block in BLOCK_TYPES.values() if block.elements > 1]  # the others are floats
# Zeros of both signs, the smallest and largest subnormal, the smallest normal, one, the largest.
SCALES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF], "<u2")
EXPONENTS = np.array([0, 1, 2, 3, 127, 251, 252], np.uint8)  # 2^-128 and 2^-127 are subnormal; 12 2^124 is finite


def reference(data: np.ndarray, name: str) -> np.ndarray:
    """gguf-py's values of packed rows."""
    numpy_type = {"F32": "<f4", "F16": "<f2"}.get(name, np.uint8)  # gguf-py wants these two typed
    return quants.dequantize(data.view(numpy_type), GGMLQuantizationType[name])


def random_rows(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Packed rows of random bytes whose scales are finite: random ones, and those of SCALES."""
    generator = np.random.default_rng(seed)
    block = BLOCK_TYPES[name]
    data = generator.integers(0, 256, (rows * blocks, block.bytes), dtype=np.uint8)
    for at in block.halves:
        halves = generator.standard_normal(len(data)).astype("<f2").view("<u2")
        odd = generator.random(len(data)) < 0.3
        halves[odd] = generator.choice(SCALES, int(odd.sum()))
        data[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    for at in block.exponents:
        data[:, at] = generator.choice(np.append(EXPONENTS, np.arange(110, 140, dtype=np.uint8)), len(data))
    if name not in PACKED:
        floats = generator.standard_normal(len(data)).astype(np.float32).view("<u4")
        floats = {"F32": floats, "F16": floats.view("<f4").astype("<f2"), "BF16": (floats >> 16).astype("<u2")}[name]
        data = floats.view(np.uint8)
    return data.reshape(rows, -1)


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """fp32 values as integers, so that -0 is not 0."""
    return np.asarray(values).view(np.uint32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 1), (7, 5), (64, 2)])
def test_bits_equal_gguf_py(name: str, rows: int, blocks: int) -> None:
    """Every value has the bits of gguf-py's dequantize, whatever the rows and the scales."""
    data = random_rows(name, rows, blocks)
    ours = unpack(torch.from_numpy(data), name)
    assert ours.dtype == torch.float32
    assert ours.shape == (rows, blocks * BLOCK_TYPES[name].elements)
    np.testing.assert_array_equal(bits(ours), bits(reference(data, name)))


@pytest.mark.parametrize("name", PACKED)
def test_a_block_is_finite_if_its_scales_are(name: str) -> None:
    """Whatever the other bytes, values are finite while `halves` are and `exponents` are below 253; a NaN in one of the
    first is in every value."""
    data = random_rows(name, 64, 2)
    assert unpack(torch.from_numpy(data), name).isfinite().all()
    for at in BLOCK_TYPES[name].halves:
        broken = data.copy().reshape(-1, BLOCK_TYPES[name].bytes)
        broken[:, at : at + 2] = np.array([0x7E00], "<u2").view(np.uint8)
        assert unpack(torch.from_numpy(broken), name).isnan().all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zero_blocks_are_zero(name: str) -> None:
    """A block of zero bytes is one of zeros, with gguf-py's signs."""
    data = np.zeros((3, 2 * BLOCK_TYPES[name].bytes), np.uint8)
    ours = unpack(torch.from_numpy(data), name)
    assert not ours.any()
    np.testing.assert_array_equal(bits(ours), bits(reference(data, name)))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantised_weights_come_back(name: str) -> None:
    """What gguf-py quantises unpacks to its own values, which are near the weights."""
    weight = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    data = quants.quantize(weight, GGMLQuantizationType[name])
    ours = unpack(torch.from_numpy(data), name)
    np.testing.assert_array_equal(bits(ours), bits(reference(data, name)))
    assert np.abs(ours.numpy() - weight).max() < 0.5


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are the same when the rows are cut into pieces of one block."""
    data = torch.from_numpy(random_rows(name, 5, 3))
    whole = unpack(data, name)
    monkeypatch.setattr(module, "CHUNK", BLOCK_TYPES[name].elements)
    np.testing.assert_array_equal(bits(unpack(data, name)), bits(whole))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_row_orders_are_exact_on_packed_rows(name: str) -> None:
    """Permuting packed rows and permuting values are the same."""
    data, order = torch.from_numpy(random_rows(name, 9, 2)), torch.randperm(9)
    np.testing.assert_array_equal(bits(unpack(data[order], name)), bits(unpack(data, name)[order]))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float_is_exact(name: str) -> None:
    """All 65536 patterns that are no NaN unpack to gguf-py's bits, subnormals and infinities too."""
    patterns = np.arange(1 << 16, dtype="<u2")
    exponent, fraction = {"F16": (0x7C00, 0x03FF), "BF16": (0x7F80, 0x007F)}[name]
    patterns = patterns[((patterns & exponent) != exponent) | ((patterns & fraction) == 0)]
    data = patterns.view(np.uint8).reshape(2, -1)
    np.testing.assert_array_equal(bits(unpack(torch.from_numpy(data), name)), bits(reference(data, name)))


def test_every_code_of_mxfp4_at_every_exponent() -> None:
    """All 256 exponents with all 16 codes in either half of a byte: gguf-py's bits, infinities of 253 to 255 too; and
    what they are: E2M1's eight magnitudes with a sign times 2^(e - 127)."""
    nibbles = np.concatenate([np.arange(16), np.arange(16)[::-1] << 4]).astype(np.uint8)
    data = np.empty((256, 2, 17), np.uint8)
    data[:, :, 0], data[:, :, 1:] = np.arange(256)[:, None], nibbles.reshape(2, 16)
    data = data.reshape(256, -1)
    ours = unpack(torch.from_numpy(data), "MXFP4")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bits(ours), bits(reference(data, "MXFP4")))
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        low = np.concatenate([magnitudes, -magnitudes]) * 2.0 ** (np.arange(256.0)[:, None] - 127)
        zeros = np.zeros_like(low)
        wanted = np.concatenate([low, zeros, zeros, low[:, ::-1]], 1).astype(np.float32)
    np.testing.assert_array_equal(ours.numpy(), wanted)


def test_sizes_are_those_of_ggml() -> None:
    """Elements, bytes and numbers of the block types are gguf-py's."""
    for block in BLOCK_TYPES.values():
        kind = GGMLQuantizationType[block.name]
        assert (block.code, block.elements, block.bytes) == (kind.value, *GGML_QUANT_SIZES[kind])
