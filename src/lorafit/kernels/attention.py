"""Attention within documents, forward and backward: native on the CPU, `plain` elsewhere.

Tensors are (T, H, D) with a token's heads together, as products write them: they may be parts of wider rows. K heads of
keys are shared by H / K query heads each. Memory grows with the tokens, not with their square.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.kernels import native, plain
from lorafit.kernels.registry import TYPES, address, native_for, writes
from lorafit.kernels.scratch import room

LINE = 64  # bytes of a cache line, where each thread's memory begins


@dataclass(frozen=True)
class Rules:
    """What a family does to its scores: softcap * tanh(scale * q k / softcap), seen through a window, beside sinks."""

    scale: float
    window: int | None = None
    """A token sees itself and the window - 1 before it; None: all before it."""
    softcap: float | None = None
    sinks_H: Tensor | None = None
    """A score for each head, fp32, that takes a share of the softmax and no value."""


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, documents: Sequence[int], rules: Rules, out_THD: Tensor
) -> Tensor:
    """Causal attention within documents, written into out (T, H, D); returns the scores' logsumexp (H, T) fp32.

    documents: (0, end_1, ..., T).
    """
    lse = q_THD.new_empty(q_THD.shape[1], len(q_THD), dtype=torch.float32)
    _attend(q_THD, k_TKD, v_TKD, list(documents), *_numbers(rules), rules.sinks_H, out_THD, lse)
    return lse


def attend_backward(
    grad_THD: Tensor, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, out_THD: Tensor, lse_HT: Tensor,
    documents: Sequence[int], rules: Rules, dq_THD: Tensor, dk_TKD: Tensor, dv_TKD: Tensor,
) -> None:  # fmt: skip
    """The gradients of q, k and v, written into dq, dk and dv, from that of the output of `attend`."""
    _attend_backward(
        grad_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, list(documents), *_numbers(rules), rules.sinks_H, dq_THD,
        dk_TKD, dv_TKD,
    )  # fmt: skip


_RULES = "int[] documents, float scale, int window, float softcap, Tensor? sinks"


@writes(f"attend(Tensor q, Tensor k, Tensor v, {_RULES}, Tensor(a!) out, Tensor(b!) lse)")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, documents: list[int], scale: float, window: int, softcap: float,
    sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    found = native_for(q)
    if found is None:
        result, sums = plain.attention(q, k, v, documents, scale, window or None, softcap or None, sinks)
        out.copy_(result)
        lse.copy_(sums)
        return
    call = _call(q, k, v, documents, scale, window, softcap, sinks, out, lse)
    _take_memory(found, call, backward=False)
    assert found.lorafit_attend(ctypes.byref(call)) == 0, "attention failed"


@writes(
    f"attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_RULES}, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv)"
)
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: list[int], scale: float,
    window: int, softcap: float, sinks: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    found = native_for(q)
    if found is None:
        rules = documents, scale, window or None, softcap or None, sinks
        parts = plain.gradients(lambda a, b, c: plain.attention(a, b, c, *rules)[0], grad, q, k, v)
        for target, part in zip((dq, dk, dv), parts, strict=True):
            target.copy_(part)
        return
    call = _call(q, k, v, documents, scale, window, softcap, sinks, out, lse)
    call.grad_out, call.grad_out_apart = grad.data_ptr(), _apart(grad)
    call.dq, call.dk, call.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    call.dq_apart, call.dk_apart, call.dv_apart = _apart(dq), _apart(dk), _apart(dv)
    tokens, heads, dim = q.shape
    few = call.documents * call.key_heads < 4 * call.threads
    size = heads * tokens * 2 * dim * 4  # of (heads, tokens, 2, dim) in fp32
    partial = room("partial", size, q.device) if few and heads > k.shape[1] else None
    call.partial = address(partial)
    _take_memory(found, call, backward=True)
    assert found.lorafit_attend_backward(ctypes.byref(call)) == 0, "attention failed"


def _numbers(rules: Rules) -> tuple[float, int, float]:
    return rules.scale, rules.window or 0, rules.softcap or 0.0


def _call(
    q: Tensor, k: Tensor, v: Tensor, documents: list[int], scale: float, window: int, softcap: float,
    sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> native.Attention:  # fmt: skip
    tokens, heads, dim = q.shape
    assert documents[0] == 0 and documents[-1] == tokens == len(k), "documents must cover the packed sequence"  # noqa: PT018
    bounds = (ctypes.c_int64 * len(documents))(*documents)
    call = native.Attention(
        type=TYPES[q.dtype], threads=torch.get_num_threads(), tokens=tokens, documents=len(documents) - 1,
        heads=heads, key_heads=k.shape[1], dim=dim, window=window, bounds=ctypes.addressof(bounds), scale=scale,
        softcap=softcap, sinks=address(sinks), q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), q_apart=_apart(q),
        k_apart=_apart(k), v_apart=_apart(v), out=out.data_ptr(), out_apart=_apart(out), lse=lse.data_ptr(),
    )  # fmt: skip
    call.kept = bounds  # alive as long as the call
    return call


def _take_memory(found: ctypes.CDLL, call: native.Attention, backward: bool) -> None:
    """For every thread."""
    call.room = found.lorafit_attention_room(ctypes.byref(call), backward)
    memory = room("attention", call.room * call.threads + LINE, torch.device("cpu"))
    call.memory = -(-memory.data_ptr() // LINE) * LINE


def _apart(x: Tensor) -> int:
    assert x.stride(2) == 1 and x.stride(1) == x.shape[2], "a token's heads must lie together"  # noqa: PT018
    return x.stride(0)
