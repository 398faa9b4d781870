"""x W^T, by the library that multiplies fastest here.

torch multiplies fp32 with MKL, which holds AVX-512 back on processors that are not Intel's: on a Zen 5, 2 cores,
205-215 GFLOP/s, where oneDNN, which torch brings too, has 430-480 in true fp32 (kept to AVX2, 200 and 230). So there
oneDNN is asked; bf16 products go to it anyway. It writes into memory of its own: copying costs 5 %.

Only the step that is computed by hand multiplies with this (adapter/group.py, training/loss.py, head_update.py). Layers
that stand in for torch's own (frozen/linear.py, experts) keep torch.mm, so that their bits are the original's.

Source: ours, measured.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorafit import machine
from lorafit.kernels import native

FEWEST_ROWS = 8  # below, a product is bound by reading W, and torch's is faster
PIECE = 1 << 22  # numbers that oneDNN's own memory may hold beside `out`: 17 MB


def product(x_TI: Tensor, W_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T (T, O) in x's dtype, written to `out` if given. x and W may be any views; no gradient flows.

    Its bits follow from the values, the kernels and the threads that run.yaml names, and from the processor's vendor.
    """
    if not by_onednn(x_TI, W_OI):
        return torch.mm(x_TI, W_OI.T) if out is None else torch.mm(x_TI, W_OI.T, out=out)
    if out is None:
        return _onednn(x_TI, W_OI)
    rows = max(128, PIECE // len(W_OI))
    for start in range(0, len(x_TI), rows):
        out[start : start + rows] = _onednn(x_TI[start : start + rows], W_OI)
    return out


def rounded(rows: int, x: Tensor) -> int:
    """How many rows a product with `rows` of those of x should have, the rest being zeros.

    oneDNN translates a bf16 product for each number of rows that it has not met, in 0.4 to 0.6 ms: three times what 72
    rows of 1,024 x 1,024 take (measured). Rounded up to 16, 32 ... 128, 160 ... 256, 320 ..., parts of x of any length
    share a dozen sizes, few enough for oneDNN's cache (machine.bound_primitives).
    """
    if x.dtype != torch.bfloat16 or not x.is_cpu or len(x) < FEWEST_ROWS:
        return rows
    step = max(16, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def by_onednn(x: Tensor, W: Tensor) -> bool:
    """Whether `product` asks oneDNN: fp32 on the CPU, a few rows, and a processor where MKL is slower. Matrices that
    are transposed and have gaps are not for it: there it has a reference loop, a thousand times slower."""
    if x.dtype != torch.float32 or len(x) < FEWEST_ROWS or type(x) is not Tensor or not x.is_cpu:
        return False
    lies = (x.stride(1) == 1 or x.T.is_contiguous()) and (W.is_contiguous() or W.T.is_contiguous())
    return lies and onednn_is_faster()


def onednn_is_faster() -> bool:
    """Of fp32 here: an x86 processor that is not Intel's, and native kernels in use (`plain` is torch's own)."""
    return native.path().startswith("avx") and _held_back()


@cache
def _held_back() -> bool:
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return known and machine.vendor() not in ("", "GenuineIntel")


def _onednn(x_TI: Tensor, W_OI: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, W_OI, None, "none", [], "")
    return y
