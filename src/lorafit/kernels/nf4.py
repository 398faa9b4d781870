"""NF4 with double quantisation, and 8-bit rows, in plain torch: the slow, obvious twins of the native kernels.

    weight  ~ NF4_CODE[4-bit code] * scale       one scale for each block of 64 neighbours in a row
    scale   ~ DYNAMIC_CODE[8-bit code] * nested + offset      one nested scale for each 256 scales, row after row

That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight. Bits and bytes are those of bitsandbytes 0.50 on CPU. Rows do
not depend on each other, so that a caller short of memory can pass some at a time. Sources: Dettmers et al. 2023
(QLoRA), sections 2 and 3; the 8-bit map is that of Dettmers et al. 2022 (8-bit Optimizers), section 1.3.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share a nested scale

# fmt: off
NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32)
# fmt: on


def _dynamic_code() -> Tensor:
    """Seven decades below 1; the decade 10^(i - 6) holds 2^i levels of each sign, the middles of equal steps."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        decade = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += [*decade, *(-level for level in decade)]
    return torch.tensor(sorted(levels), dtype=torch.float32)


DYNAMIC_CODE = _dynamic_code()


def quantise_nf4(matrix_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 (O, I/2), byte = even element << 4 | odd element, and scales fp32 (O, I/64), the blocks' absmax.

    matrix_OI: any float dtype, I a multiple of 64. Every byte is bitsandbytes', blocks of zeros and of subnormals
    among them. Raises ValueError for NaN and infinity.
    """
    rows, width = matrix_OI.shape
    assert width % BLOCK == 0, f"rows of {width} are no whole blocks of {BLOCK}"
    blocks = matrix_OI.float().reshape(rows, -1, BLOCK)
    absmax = _finite(blocks.abs().amax(-1))
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[..., None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, _middles(NF4_CODE), out_int32=True).to(torch.uint8).view(rows, -1)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def quantise_scales(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Scales again in 8 bits: codes uint8 of the same shape, nested scales fp32 (ceil(n / 256),), and the offset.

    absmax: fp32, all n scales of a matrix. Codes are those of bitsandbytes on CPU, which looks the level up in a table
    of 65,536 equal steps; its CUDA kernel takes the nearest level, which for some 0.2 % of the scales is the next one.
    Both are read alike. The offset is `absmax.mean()`, whose last bit torch makes depend on the number of threads
    where n is over 32,768. Raises ValueError where scales are not finite, or too large for their mean to be.
    """
    flat = absmax.reshape(-1)
    offset = _finite(flat.mean())
    blocks = torch.nn.functional.pad(flat - offset, (0, -len(flat) % NESTED)).view(-1, NESTED)
    nested = _finite(blocks.abs().amax(1))
    # 1 / nested is infinite below 3e-39: then 0 * infinity is the lowest level, as it is in bitsandbytes
    scaled = (blocks * (1.0 / nested)[:, None]).clamp(-1, 1).nan_to_num(-1.0)
    bins = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    return _table()[bins].view(-1)[: len(flat)].view(absmax.shape), nested, offset.item()


def unpack_scales(codes: Tensor, nested: Tensor, offset: float, first: int = 0) -> Tensor:
    """fp32 scales, of the shape of codes: DYNAMIC_CODE[code] * nested + offset, never fused.

    codes: uint8, all scales of a matrix or some rows of them; first: the flat index, in the matrix, of the first one.
    nested: fp32, those of the whole matrix. Bits are bitsandbytes'.
    """
    block = (first + torch.arange(codes.numel())) // NESTED
    return (DYNAMIC_CODE[codes.reshape(-1).int()] * nested[block] + offset).view(codes.shape)


def unpack_nf4(codes: Tensor, absmax: Tensor) -> Tensor:
    """fp32 (O, I) = NF4_CODE[code] * scale from codes uint8 (O, I/2) and scales fp32 (O, I/64); bitsandbytes' bits."""
    pairs = torch.cartesian_prod(NF4_CODE, NF4_CODE)[codes.int()]  # the two values of each byte
    return pairs.view(*absmax.shape, BLOCK).mul_(absmax[..., None]).flatten(1)


def quantise_int8(matrix_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (O, I) in [-127, 127] and scales fp32 (O,): scale = absmax(row) / 127, code = w / scale, half to even.

    matrix_OI: any float dtype. A row of zeros has scale 0 and codes 0. Raises ValueError for NaN and infinity.
    Source: ours, the common symmetric rule.
    """
    matrix_OI = matrix_OI.float()
    scales = _finite(matrix_OI.abs().amax(1)) / 127
    codes = (matrix_OI / scales.where(scales > 0, 1.0)[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def unpack_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 (O, I) = code * scale from codes int8 (O, I) and scales fp32 (O,)."""
    return codes.float().mul_(scales[:, None])


def _finite(values: Tensor) -> Tensor:
    """The values, unless one of them is not finite; a largest value tells of all that it was taken from."""
    if not bool(values.isfinite().all()):
        raise ValueError("holds NaN or infinity, or numbers too large for fp32")
    return values


def _middles(code: Tensor) -> Tensor:
    """Where the nearest level changes; what lies on a middle goes down."""
    return (code[:-1] + code[1:]) / 2


@cache
def _table() -> Tensor:
    """The level's code, uint8, for each of 65,536 equal steps from -1 to 1."""
    return torch.bucketize(-1 + 2 * torch.arange(65536, dtype=torch.float32) / 65535, _middles(DYNAMIC_CODE)).byte()
