"""The CUDA operators without a GPU: in Triton's interpreter, on bitsandbytes' CPU kernels, and as machine code.

Run with `make proof-triton`. The interpreter runs the very functions that a GPU would; whether a GPU gives the same
bits is left open, but for what the machine code says: no product and sum in one instruction, nothing flushed to zero.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import numpy as np
import pytest
import torch
from torch import Tensor

from builders.stored_weights import FORMATS, random_weight
from lorafit.errors import ConfigError
from lorafit.kernels import BLOCK_TYPES, cuda, native, nf4, ops, triton_unpack
from lorafit.kernels.ops import Stored

DTYPES = (torch.float32, torch.bfloat16)
ROWS, WIDTH = 7, 1280  # a whole tile of columns and some; 20 NF4 scales a row, so that nested blocks begin within rows
# Zeros of both signs, the smallest and largest subnormal, the smallest normal, one, the largest, infinity.
SCALES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00], "<u2").view(np.uint8)


@pytest.fixture(autouse=True)
def _plain_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators do on CPU tensors is then plain torch."""
    monkeypatch.setattr(native, "library", lambda: None)


def odd_weight(format_: str) -> Stored:
    """A weight in whose rows each of SCALES stands somewhere, if it has half-float scales, or each exponent."""
    stored = random_weight(format_, ROWS, WIDTH)
    if format_ in BLOCK_TYPES:
        blocks = stored.data.view(-1, BLOCK_TYPES[format_].bytes)
        for i, at in enumerate(BLOCK_TYPES[format_].halves):
            odd = torch.from_numpy(SCALES).view(-1, 2).roll(i, 0)
            blocks[3 : 3 + len(odd), at : at + 2] = odd
        for at in BLOCK_TYPES[format_].exponents:
            blocks[:256, at] = torch.arange(len(blocks[:256])).byte()  # of ROWS * WIDTH / 32 = 280 blocks
    return stored


def on_cuda(stored: Stored, start: int, rows: int, dtype: torch.dtype) -> Tensor:
    """What the CUDA operator writes, among what it must leave alone."""
    out = torch.full((rows + 2, stored.columns), 3.0, dtype=dtype)
    cuda.unpack(*ops._arguments(stored), start, out[1:-1])
    assert (out[0] == 3).all()
    assert (out[-1] == 3).all()
    return out[1:-1]


def assert_same_bits(ours: Tensor, twin: Tensor) -> None:
    """-0 is not 0; any NaN is NaN."""
    assert ours.dtype == twin.dtype
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[ours.dtype]
    same = (ours.view(integer) == twin.view(integer)) | (ours.isnan() & twin.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} values differ"


def test_the_kernels_run_in_the_interpreter() -> None:
    """Here kernels are interpreted, and both operators are there for CUDA tensors."""
    assert type(triton_unpack._unpack).__name__ == "InterpretedFunction"
    for name in ("unpack", "matvec"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorafit::{name}", "CUDA")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_unpack_has_the_twins_bits(format_: str, dtype: torch.dtype) -> None:
    """All rows, rows from the middle, one row and none, stored or in an order; rounded once, to nearest even."""
    stored = odd_weight(format_)
    for order in (None, torch.randperm(ROWS), torch.tensor([2, 2, 0, 6, 5], dtype=torch.int32)):
        ordered = replace(stored, order=order)
        twin = ops.values(ordered).to(dtype)
        for start, rows in ((0, len(twin)), (1, 3), (len(twin) - 1, 1), (2, 0)):
            assert_same_bits(on_cuda(ordered, start, rows, dtype), twin[start : start + rows])


@pytest.mark.parametrize("format_", [*BLOCK_TYPES, ops.INT8])
def test_any_address_is_good(format_: str) -> None:
    """A weight that begins at an odd byte has the same values, in rows of one block as well."""
    stored = random_weight(format_, 3, 256)
    moved = torch.cat([stored.data.new_zeros(1), stored.data.flatten()])[1:].view(stored.data.shape)
    assert moved.data_ptr() % 2 == 1
    assert_same_bits(on_cuda(replace(stored, data=moved), 0, 3, torch.float32), ops.values(stored))


@pytest.mark.parametrize("format_", ["F16", "BF16"])
def test_every_16_bit_float_is_exact(format_: str) -> None:
    """All 65536 patterns."""
    stored = Stored(
        format_, 32768, torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(2, -1).view(torch.uint8)
    )
    for dtype in DTYPES:
        assert_same_bits(on_cuda(stored, 0, 2, dtype), ops.values(stored).to(dtype))


def test_bf16_is_rounded_to_nearest_even() -> None:
    """Each bf16 with the fp32 next to it, on either side of the middle to the next one and on it."""
    upper, lower = torch.arange(65536)[:, None] << 16, torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    values = (upper | lower).to(torch.uint32).view(torch.float32).view(8, -1)
    stored = Stored("F32", values.shape[1], values.view(torch.uint8))
    assert_same_bits(on_cuda(stored, 0, 8, torch.bfloat16), values.bfloat16())


def test_a_row_that_is_not_there() -> None:
    """Past the end raises; a number in an order, which only the GPU sees, gives NaN and reads nothing outside."""
    stored = random_weight("Q4_K", ROWS, 256)
    for start in (-1, ROWS - 1):
        with pytest.raises(IndexError, match=f"outside of the weight's {ROWS}"):
            on_cuda(stored, start, 2, torch.float32)
    for dtype in DTYPES:
        found = on_cuda(replace(stored, order=torch.tensor([-1, 3, ROWS, 1 << 40])), 0, 4, dtype)
        assert found.isnan().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [slice(0, 5), slice(3, 50), slice(13, 14), slice(49, 50)])
def test_nf4_rows_from_a_larger_matrix(part: slice, dtype: torch.dtype) -> None:
    """Rows cut out of a matrix, whatever nested block they begin in, plain and double scales, in an order or not."""
    whole = random_weight(ops.NF4, 50, 192)
    cut = replace(whole, data=whole.data[part], scales=whole.scales[part], first_row=part.start)
    absmax = nf4.unpack_scales(whole.scales, whole.nested, whole.offset)
    plain = replace(cut, scales=absmax[part], nested=None, offset=0.0)
    twin = ops.values(whole).to(dtype)[part]
    for stored in (cut, plain):
        assert_same_bits(on_cuda(stored, 0, len(twin), dtype), twin)
        order = torch.randperm(len(twin))
        assert_same_bits(on_cuda(replace(stored, order=order), 0, len(twin), dtype), twin[order])


def test_nf4_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of any size give the same values."""
    stored = random_weight(ops.NF4, ROWS, 192, ordered=True)
    monkeypatch.setattr(cuda, "PIECE", 400)
    assert_same_bits(on_cuda(stored, 1, 6, torch.float32), ops.values(stored)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_matvec_is_the_product_of_unpacked_rows(
    format_: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x W^T in x's dtype, with W in pieces of two rows and the last one of one."""
    stored = random_weight(format_, ROWS, 256, ordered=True)
    monkeypatch.setattr(cuda, "PIECE", 512)
    x = torch.randn(3, 256).to(dtype)
    found = cuda.matvec(x, *ops._arguments(stored))
    assert found.dtype == dtype
    # the products of a row are summed in another order
    torch.testing.assert_close(
        found, x @ ops.values(stored, dtype).T, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4
    )


@pytest.mark.parametrize(("format_", "package"), [("NF4", "bitsandbytes"), ("Q4_0", "triton")])
def test_a_missing_package_is_named(format_: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install."""
    for name in ("bitsandbytes.functional", "lorafit.kernels.triton_unpack"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("lorafit.kernels.triton_unpack")
    with pytest.raises(
        ConfigError, match=rf"{format_} weights on a GPU need {package}: .* pip install 'lorafit\[cuda\]'"
    ):
        on_cuda(random_weight(format_, 1, 64), 0, 1, torch.float32)


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorafit.kernels.triton_unpack import FORMATS, OPTIONS, TILE, _unpack

def compiled(architecture, name, scales, order, out, options):
    value, *sizes = FORMATS[name]
    types = ("*u8", scales, order, out, "i64", "i32", "i32", "i32", *["constexpr"] * 4)
    constants = dict(zip(("VALUE", "ELEMENTS", "BYTES", "TILE"), (value, *sizes, TILE)))
    signature = dict(zip(_unpack.arg_names, types))
    constants |= {name: None for name in ("scales", "order") if signature[name] == "constexpr"}
    made = triton.compile(ASTSource(_unpack, signature, constants), GPUTarget("cuda", architecture, 32), options)
    return made.asm["ptx"] + made.asm["sass"]

assert "FFMA" in compiled(90, "Q4_1", "constexpr", "constexpr", "*fp32", OPTIONS | {"enable_fp_fusion": True})
for name in FORMATS:
    scales = "*fp32" if name == "INT8" else "constexpr"
    for architecture, order, out in (
        (80, "*i64", "*bf16"),
        (90, "constexpr", "*fp32"),
        (100, "*i64", "*fp32"),
        (120, "*i64", "*bf16"),
    ):
        code = compiled(architecture, name, scales, order, out, OPTIONS)
        assert name in ("F32", "F16", "BF16") or "FMUL" in code, (architecture, name)
        # HFMA2 is how these processors set a register; Triton 3.6 fuses on the last of them whatever it is told
        assert not re.findall(r"\\bfma\\.|\\bF\\w*FMA|ftz|FTZ", code), (architecture, name)
"""


def test_machine_code_never_fuses(tmp_path) -> None:
    """Compiled for A100, H100, B200 and RTX 50, all multiply and add apart; where fusing is allowed, they do not."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
