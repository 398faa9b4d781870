"""The parts of a layer between its products, and of the loss: native on the CPU, `plain` elsewhere.

Rows are tokens. Values are fp32 or bf16, computed in fp32 and rounded once. Rows of q, k, v, gate and up may be parts
of wider rows: strides are honoured, only the last dimension must be contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.kernels import plain
from lorafit.kernels.registry import TYPES, address, native_for, writes

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def norm(
    x_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    out_TH: Tensor,
    delta_TH: Tensor | None = None,
    by: float = 1.0,
    sum_TH: Tensor | None = None,
) -> Tensor:
    """Writes out = norm(s), where s = x + by * delta is written to `sum`, or is x itself without delta.

    norm(s) = s / sqrt(mean(s^2) + eps) * weight, weight in fp32. Returns that reciprocal root, (T,) fp32.
    """
    scale = x_TH.new_empty(len(x_TH), dtype=torch.float32)
    _norm(x_TH, delta_TH, by, weight_H, eps, sum_TH, out_TH, scale)
    return scale


def norm_backward(
    grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T: Tensor, onto_TH: Tensor | None = None
) -> Tensor:
    """The gradient of norm's input, plus `onto`. Writes over grad and returns it."""
    _norm_backward(grad_TH, x_TH, weight_H, scale_T, onto_TH)
    return grad_TH


def heads(
    x_THD: Tensor, weight_D: Tensor | None, eps: float, cos_TP: Tensor | None, sin_TP: Tensor | None, out_THD: Tensor
) -> None:
    """out = x, normed over D where there is a weight, then rotated in pairs (i, i + D / 2) where there are angles.

    cos, sin: (T, D / 2) fp32. out may be x.
    """
    _heads(x_THD, weight_D, eps, cos_TP, sin_TP, out_THD)


def heads_backward(
    grad_THD: Tensor, x_THD: Tensor, weight_D: Tensor | None, eps: float, cos_TP: Tensor | None, sin_TP: Tensor | None
) -> None:
    """grad, of the output of `heads`, becomes that of x. x is read only with a weight."""
    _heads_backward(grad_THD, x_THD, weight_D, eps, cos_TP, sin_TP)


def gate(gate_TI: Tensor, up_TI: Tensor, activation: str, out_TI: Tensor) -> None:
    """out = act(gate) * up, contiguous. activation: `silu` or `gelu_tanh`."""
    _gate(gate_TI, up_TI, activation, out_TI)


def gate_backward(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    """From the gradient of `gate`'s output: gate and up become their gradients, grad the output itself, anew."""
    _gate_backward(grad_TI, gate_TI, up_TI, activation)


def entropy(logits_NV: Tensor, targets_N: Tensor, multiplier: float, softcap: float | None, wanted: bool) -> Tensor:
    """Losses (N,) fp32 in nats of z = softcap * tanh(multiplier * logits / softcap); if wanted, their gradients are
    written over the logits."""
    losses = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    _entropy(logits_NV, targets_N, multiplier, softcap or 0.0, wanted, losses)
    return losses


@writes(
    "norm(Tensor x, Tensor? delta, float by, Tensor weight, float eps, Tensor(a!)? kept, Tensor(b!) out, "
    "Tensor(c!) scale)"
)
def _norm(
    x: Tensor, delta: Tensor | None, by: float, weight: Tensor, eps: float, kept: Tensor | None, out: Tensor,
    scale: Tensor,
) -> None:  # fmt: skip
    found = native_for(x)
    if found is None:
        value = x
        if delta is not None and kept is not None:
            value = kept.copy_(x.float() + by * delta.float())
        scale.copy_(torch.rsqrt(value.float().square().mean(-1) + eps))
        out.copy_(plain.norm(value, weight, eps))
        return
    _contiguous(x, weight, *(() if delta is None else (delta,)))
    found.lorafit_norm(
        TYPES[x.dtype], x.data_ptr(), address(delta), by, weight.data_ptr(), eps, len(x), x.shape[1], address(kept),
        out.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


@writes("norm_backward(Tensor(a!) grad, Tensor x, Tensor weight, Tensor scale, Tensor? onto)")
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, onto: Tensor | None) -> None:
    found = native_for(x)
    if found is None:
        # the root's eps, back from the scale
        eps = (scale.float() ** -2 - x.float().square().mean(-1))[:, None]
        (d,) = plain.gradients(lambda v: v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight, grad, x)
        grad.copy_(d if onto is None else d + onto)
        return
    _contiguous(grad, x, weight, scale, *(() if onto is None else (onto,)))
    found.lorafit_norm_backward(
        TYPES[x.dtype], grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(), address(onto), len(x),
        x.shape[1], grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


@writes("heads(Tensor x, Tensor? weight, float eps, Tensor? cos, Tensor? sin, Tensor(a!) out)")
def _heads(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, out: Tensor) -> None:
    found = native_for(x)
    if found is None:
        out.copy_(plain.heads(x, weight, eps, cos, sin))
        return
    tokens, count, dim = x.shape
    found.lorafit_heads(
        TYPES[x.dtype], x.data_ptr(), _apart(x), address(weight), eps, address(cos), address(sin), tokens, count,
        dim // 2, out.data_ptr(), _apart(out), torch.get_num_threads(),
    )  # fmt: skip


@writes("heads_backward(Tensor(a!) grad, Tensor x, Tensor? weight, float eps, Tensor? cos, Tensor? sin)")
def _heads_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
) -> None:
    found = native_for(x)
    if found is None:
        grad.copy_(plain.gradients(lambda v: plain.heads(v, weight, eps, cos, sin), grad, x)[0])
        return
    tokens, count, dim = x.shape
    found.lorafit_heads_backward(
        TYPES[x.dtype], grad.data_ptr(), _apart(grad), x.data_ptr(), _apart(x), address(weight), eps, address(cos),
        address(sin), tokens, count, dim // 2, torch.get_num_threads(),
    )  # fmt: skip


@writes("gate(Tensor gate, Tensor up, str activation, Tensor(a!) out)")
def _gate(gate_TI: Tensor, up_TI: Tensor, activation: str, out: Tensor) -> None:
    found = native_for(gate_TI)
    if found is None:
        out.copy_(plain.gate(gate_TI, up_TI, activation))
        return
    apart = _apart(gate_TI)
    assert apart == _apart(up_TI), "gate and up must have the same strides"
    found.lorafit_gate(
        TYPES[out.dtype], ACTIVATIONS[activation], gate_TI.data_ptr(), up_TI.data_ptr(), apart, *out.shape,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


@writes("gate_backward(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up, str activation)")
def _gate_backward(grad: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    found = native_for(grad)
    if found is None:
        d_gate, d_up = plain.gradients(lambda g, u: plain.gate(g, u, activation), grad, gate_TI, up_TI)
        grad.copy_(plain.gate(gate_TI, up_TI, activation))
        gate_TI.copy_(d_gate)
        up_TI.copy_(d_up)
        return
    apart = _apart(gate_TI)
    assert apart == _apart(up_TI), "gate and up must have the same strides"
    _contiguous(grad)
    found.lorafit_gate_backward(
        TYPES[grad.dtype], ACTIVATIONS[activation], grad.data_ptr(), gate_TI.data_ptr(), up_TI.data_ptr(), apart,
        *grad.shape, torch.get_num_threads(),
    )  # fmt: skip


@writes("entropy(Tensor(a!) logits, Tensor targets, float multiplier, float softcap, bool wanted, Tensor(b!) losses)")
def _entropy(logits: Tensor, targets: Tensor, multiplier: float, softcap: float, wanted: bool, losses: Tensor) -> None:
    found = native_for(logits)
    if found is None:
        losses.copy_(plain.entropy(logits, targets, multiplier, softcap))
        if wanted:
            every = torch.ones_like(losses)
            logits.copy_(plain.gradients(lambda z: plain.entropy(z, targets, multiplier, softcap), every, logits)[0])
        return
    _contiguous(logits, targets)
    fault = found.lorafit_entropy(
        TYPES[logits.dtype], logits.data_ptr(), targets.data_ptr(), *logits.shape, multiplier, softcap, wanted,
        losses.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if fault:
        raise IndexError(f"a target is outside of the vocabulary of {logits.shape[1]}")


def _apart(x: Tensor) -> int:
    """Elements from a token to the next; a token's own must be contiguous."""
    inner = x[0] if len(x) else x
    assert inner.is_contiguous(), "a token's values must lie together"
    return x.stride(0)


def _contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), "rows must lie together"
