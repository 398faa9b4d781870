"""A decoder layer computed by hand, forward and backward, as one autograd function.

    n1 = norm(x)        q, k, v = heads(n1 Wqkv^T)         z = attend(q, k, v) Wo^T          x2 = x + m z
    n2 = norm(x2)       a = act(n2 Wgate^T) * (n2 Wup^T)   d = a Wdown^T                     y = x2 + m d

Every W has its adapter beside it (adapter/group.py); families may norm q and k, rotate them or not, and norm z and d
(Gemma). Kept for the backward pass are x, q, k, v, attention's output, x2, gate and up, and z and d where they are
normed or scaled (DoRA): the norms' outputs and a are computed again, in one pass over memory each. A layer that is
checkpointed keeps x alone and computes the rest again, without the product that the backward pass does not need.

Source: ours. Chen et al. 2016, arXiv:1604.06174, for checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.adapter.group import Group
from lorafit.kernels import layer as parts
from lorafit.kernels.attention import Rules, attend, attend_backward
from lorafit.model.buffers import give, is_taken, take


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm: its weight as it multiplies, fp32 (H,), which gets a gradient where it is trained."""

    weight: Tensor
    eps: float

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad


@dataclass(frozen=True)
class Shape:
    """What a family's decoder layer is, beside its matrices."""

    heads: int
    key_heads: int
    dim: int
    rules: Rules
    activation: str
    residual: float
    """m: what a block's output is multiplied with before it is added."""


@dataclass(frozen=True)
class Norms:
    """Those of one layer; the ones that a family lacks are None."""

    attention: Norm
    mlp: Norm
    q: Norm | None = None
    k: Norm | None = None
    after_attention: Norm | None = None
    after_mlp: Norm | None = None

    @property
    def trained(self) -> list[Norm]:
        """Those that get a gradient, in a fixed order."""
        every = (self.attention, self.mlp, self.q, self.k, self.after_attention, self.after_mlp)
        return [norm for norm in every if norm is not None and norm.trained]


NormGradients = dict[Norm, Tensor]


@dataclass
class AttentionKept:
    """What the backward pass needs of a layer's first half. scale, after_scale: the norms' reciprocal roots; low,
    low_out: h of the adapters; z: o_proj's output, where it is normed or has gains."""

    scale: Tensor
    qkv: Tensor
    low: Tensor
    out: Tensor
    lse: Tensor
    low_out: Tensor
    z: Tensor | None
    after_scale: Tensor | None


@dataclass
class MlpKept:
    """The same of its second half. d: down_proj's output, where it is normed or has gains."""

    scale: Tensor
    gate_up: Tensor
    low: Tensor
    low_down: Tensor
    d: Tensor | None
    after_scale: Tensor | None


@dataclass
class Kept:
    """All that is kept of a layer; None: to be computed again."""

    x: Tensor
    attention: AttentionKept | None
    x2: Tensor | None
    mlp: MlpKept | None

    def forget_all_but(self, *blocks: Tensor) -> None:
        """Outputs of the halves, which are added now, go back to the buffers, unless they are kept."""
        kept = (self.attention and self.attention.z, self.mlp and self.mlp.d)
        give(*(block for block in blocks if not any(block is one for one in kept)))

    def forget_attention(self) -> None:
        """What is kept of the first half goes back to the buffers."""
        if self.attention is not None:
            give(self.attention.qkv, self.attention.out, self.attention.z, self.x2)
        self.attention = self.x2 = None

    def forget_mlp(self) -> None:
        """The same of the second half."""
        if self.mlp is not None:
            give(self.mlp.gate_up, self.mlp.d)
        self.mlp = None


@dataclass(frozen=True)
class Layer:
    """One layer's matrices with their adapters, its norms and shape, and one pack's angles and documents."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norms: Norms
    shape: Shape
    cos: Tensor | None
    sin: Tensor | None
    documents: Sequence[int]
    pooled: bool
    """Whether activations are written into buffers that go round: only where all of them are sure to be used up."""
    chained: bool
    """Whether y and dx are such buffers too: then nobody but the next layer may hold them."""
    turn: Callable[[int], None] | None = None
    """Called with -1 before the way back."""

    @property
    def parameters(self) -> list[Tensor]:
        """The adapters', and the weights and norms that are trained, in the order of `backward`'s gradients."""
        groups = [p for group in (self.qkv, self.o, self.gate_up, self.down) for p in group.parameters]
        return [*groups, *(norm.weight for norm in self.norms.trained)]

    def forward(self, x: Tensor, keeps: bool) -> tuple[Tensor, Kept]:
        """x (T, H) -> y (T, H). keeps: whether more than x is kept."""
        delta, attention = self._attention(x)
        x2, d, mlp = self._mlp(x, delta)
        y = torch.add(x2, d, alpha=self.shape.residual, out=self._take_like(x) if self.chained else torch.empty_like(x))
        kept = Kept(x, attention, x2, mlp)
        kept.forget_all_but(delta, d)
        if not keeps:
            kept.forget_mlp()
            kept.forget_attention()
        return y, kept

    def backward(self, dy: Tensor, kept: Kept, wanted: bool) -> tuple[Tensor | None, list[Tensor]]:
        """(dx if wanted, the gradients of `parameters`) from dy (T, H). Uses up what was kept."""
        of_norms: NormGradients = {}
        if kept.attention is None:
            delta, kept.attention = self._attention(kept.x)
            kept.x2, d, kept.mlp = self._mlp(kept.x, delta, whole=self.norms.after_mlp is not None or self.down.gained)
            kept.forget_all_but(delta, d)
        assert kept.x2 is not None and kept.mlp is not None, "the two halves are kept together"  # noqa: PT018
        dx2, mlp_grads = self._mlp_backward(dy, kept.x2, kept.mlp, of_norms)
        kept.forget_mlp()
        dx, attention_grads = self._attention_backward(dx2, kept.x, kept.attention, wanted, of_norms)
        kept.forget_attention()
        give(dx2, kept.x, dy)
        return dx, attention_grads + mlp_grads + [of_norms[norm] for norm in self.norms.trained]

    def _attention(self, x: Tensor) -> tuple[Tensor, AttentionKept]:
        """x (T, H) -> what is to be added to it, (T, H)."""
        n1, scale = self._norm(self.norms.attention, x)
        qkv = self._take(self.qkv.out_features, x)
        low = self.qkv.forward(n1, qkv)
        give(n1)
        q, k, v = self._turned(qkv)
        out = self._take(self.o.in_features, x)
        lse = attend(q, k, v, self.documents, self.shape.rules, self._heads(out))
        self._give_turned(q, k)
        z = self._take(self.o.out_features, x)
        low_out = self.o.forward(out, z)
        if self.norms.after_attention is None:
            return z, AttentionKept(scale, qkv, low, out, lse, low_out, z if self.o.gained else None, None)
        delta, after_scale = self._norm(self.norms.after_attention, z)
        return delta, AttentionKept(scale, qkv, low, out, lse, low_out, z, after_scale)

    def _mlp(self, x: Tensor, delta: Tensor, whole: bool = True) -> tuple[Tensor, Tensor, MlpKept]:
        """(x2, what is to be added to it, what is kept); with whole=False down's product is left out."""
        n2, x2, norm = self._take_like(x), self._take_like(x), self.norms.mlp
        scale = parts.norm(x, norm.weight, norm.eps, n2, delta, self.shape.residual, x2)
        gate_up = self._take(self.gate_up.out_features, x)
        low = self.gate_up.forward(n2, gate_up)
        give(n2)
        a = self._take(self.down.in_features, x)
        parts.gate(*self._gate_and_up(gate_up), self.shape.activation, a)
        if not whole:
            return x2, a, MlpKept(scale, gate_up, low, self.down.low(a), None, None)
        d = self._take(self.down.out_features, x)
        low_down = self.down.forward(a, d)
        give(a)
        if self.norms.after_mlp is None:
            return x2, d, MlpKept(scale, gate_up, low, low_down, d if self.down.gained else None, None)
        normed, after_scale = self._norm(self.norms.after_mlp, d)
        return x2, normed, MlpKept(scale, gate_up, low, low_down, d, after_scale)

    def _mlp_backward(
        self, dy: Tensor, x2: Tensor, kept: MlpKept, of_norms: NormGradients
    ) -> tuple[Tensor, list[Tensor]]:
        """(dx2, gradients of gate_up and down): gate and up become their gradients."""
        dd = self._of_delta(dy, self.down, self.norms.after_mlp, kept.d, kept.after_scale, of_norms)
        down_vectors = self.down.backward_vectors(dd, kept.d)
        low_d = self.down.backward_low(dd)
        a = self.down.backward_input(dd, low_d, self._take(self.down.in_features, dy))  # da, and then a
        before = self._take_like(kept.gate_up).copy_(kept.gate_up) if self.gate_up.gained else None
        parts.gate_backward(a, *self._gate_and_up(kept.gate_up), self.shape.activation)
        down_grads = self.down.backward_adapters(dd, low_d, a, kept.low_down) + self.down.backward_weights(dd, a)
        give(a, dd if dd is not dy else None)
        vectors = self.gate_up.backward_vectors(kept.gate_up, before)
        give(before)
        low_d = self.gate_up.backward_low(kept.gate_up)
        n2, _ = self._norm(self.norms.mlp, x2)
        grads = self.gate_up.backward_adapters(kept.gate_up, low_d, n2, kept.low)
        grads += self.gate_up.backward_weights(kept.gate_up, n2) + vectors
        dn2 = self.gate_up.backward_input(kept.gate_up, low_d, n2)
        return _norm_backward(self.norms.mlp, dn2, x2, kept.scale, of_norms, onto=dy), grads + down_grads + down_vectors

    def _attention_backward(
        self, dx2: Tensor, x: Tensor, kept: AttentionKept, wanted: bool, of_norms: NormGradients
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(dx if wanted, gradients of qkv and o)."""
        dz = self._of_delta(dx2, self.o, self.norms.after_attention, kept.z, kept.after_scale, of_norms)
        vectors = self.o.backward_vectors(dz, kept.z)
        low_d = self.o.backward_low(dz)
        o_grads = self.o.backward_adapters(dz, low_d, kept.out, kept.low_out) + self.o.backward_weights(dz, kept.out)
        o_grads += vectors
        d_out = None
        if wanted or self.qkv.parameters:
            d_out = self.o.backward_input(dz, low_d, self._take(self.o.in_features, x))
        give(dz if dz is not dx2 else None)
        if d_out is None:
            return None, o_grads
        q, k, v = self._turned(kept.qkv, again=True)
        d_qkv = self._take_like(kept.qkv)
        dq, dk, dv = self._split(d_qkv)
        rules, out = self.shape.rules, self._heads(kept.out)
        attend_backward(self._heads(d_out), q, k, v, out, kept.lse, self.documents, rules, dq, dk, dv)
        self._give_turned(q, k)
        give(d_out)
        raw = self._split(kept.qkv)
        for grad, before, norm in ((dq, raw[0], self.norms.q), (dk, raw[1], self.norms.k)):
            cos, sin = self.cos, self.sin
            if norm is not None and norm.trained:  # its gradient is that of its output, before the rotation
                if cos is not None:
                    parts.heads_backward(grad, before, None, 0.0, cos, sin)
                of_norms[norm], cos, sin = _heads_norm_gradient(grad, before, norm.eps), None, None
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            if norm is not None or cos is not None:
                parts.heads_backward(grad, before, weight, eps, cos, sin)
        self._turn_back(kept.qkv)
        vectors = self.qkv.backward_vectors(d_qkv, kept.qkv)
        low_d = self.qkv.backward_low(d_qkv)
        n1, _ = self._norm(self.norms.attention, x)
        grads = self.qkv.backward_adapters(d_qkv, low_d, n1, kept.low)
        grads += self.qkv.backward_weights(d_qkv, n1) + vectors + o_grads
        dx = None
        if wanted:
            chained = self.chained and is_taken(x)  # the first layer's dx goes to the embedding, which gives none back
            dn1 = self.qkv.backward_input(d_qkv, low_d, self._take_like(x) if chained else torch.empty_like(x))
            dx = _norm_backward(self.norms.attention, dn1, x, kept.scale, of_norms, onto=dx2)
        give(n1, d_qkv)
        return dx, grads

    def _of_delta(
        self,
        dy: Tensor,
        group: Group,
        norm: Norm | None,
        x: Tensor | None,
        scale: Tensor | None,
        of_norms: NormGradients,
    ) -> Tensor:
        """The gradient of a group's output before its norm, from that of what it was added to. dy stays as it is."""
        m = self.shape.residual
        if m == 1.0 and norm is None and not group.gained:
            return dy
        d = torch.mul(dy, m, out=self._take_like(dy))
        if norm is None or x is None or scale is None:
            return d
        return _norm_backward(norm, d, x, scale, of_norms)

    def _take(self, columns: int, x: Tensor) -> Tensor:
        """A buffer with as many rows as x, and its dtype."""
        return take(len(x), columns, x) if self.pooled else x.new_empty(len(x), columns)

    def _take_like(self, x: Tensor) -> Tensor:
        return self._take(x.shape[1], x)

    def _norm(self, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self._take_like(x)
        return out, parts.norm(x, norm.weight, norm.eps, out)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.shape.dim)

    def _gate_and_up(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=1)
        return gate, up

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, heads, dim) views of q, k and v."""
        sizes = [count * self.shape.dim for count in (self.shape.heads, *(self.shape.key_heads,) * 2)]
        q, k, v = (part.unflatten(1, (-1, self.shape.dim)) for part in qkv.split(sizes, dim=1))
        return q, k, v

    def _turned(self, qkv: Tensor, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """q and k normed and rotated, v. In place where nothing is normed, since rotating can be undone: then `again`
        finds it done."""
        q, k, v = self._split(qkv)
        turned = []
        for x, norm in ((q, self.norms.q), (k, self.norms.k)):
            out = x if norm is None else self._heads(self._take(x.shape[1] * x.shape[2], x))
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            if norm is not None or (self.cos is not None and not again):
                parts.heads(x, weight, eps, self.cos, self.sin, out)
            turned.append(out)
        return turned[0], turned[1], v

    def _turn_back(self, qkv: Tensor) -> None:
        """q and k as their products gave them, where they were rotated in place and DoRA asks for them."""
        if self.qkv.gained and self.cos is not None and self.sin is not None:
            size = self.cos.square() + self.sin.square()  # not 1 where the family scales angles (yarn)
            q, k, _ = self._split(qkv)
            for x, norm in ((q, self.norms.q), (k, self.norms.k)):
                if norm is None:
                    parts.heads(x, None, 0.0, self.cos / size, -self.sin / size, x)

    def _give_turned(self, q: Tensor, k: Tensor) -> None:
        for x, norm in ((q, self.norms.q), (k, self.norms.k)):
            give(None if norm is None else x.flatten(1))


def _norm_backward(
    norm: Norm, dy: Tensor, x: Tensor, scale: Tensor, of_norms: NormGradients, onto: Tensor | None = None
) -> Tensor:
    """dx, plus `onto`, written over dy; the gradient of a trained weight goes to `of_norms`."""
    if norm.trained:
        of_norms[norm] = norm_gradient(dy, x, scale)
    return parts.norm_backward(dy, x, norm.weight, scale, onto_TH=onto)


def norm_gradient(dy_TH: Tensor, x_TH: Tensor, scale_T: Tensor) -> Tensor:
    """The gradient of a norm's weight, (H,) fp32: the sum over tokens of dy * x * scale."""
    return (dy_TH.float() * x_TH).mul_(scale_T[:, None]).sum(0)


def _heads_norm_gradient(dy_THD: Tensor, x_THD: Tensor, eps: float) -> Tensor:
    """The same of a norm over each head, (D,)."""
    x = x_THD.float()
    return (dy_THD * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).sum((0, 1))


class LayerFunction(torch.autograd.Function):
    """`Layer` under autograd: apply(x (T, H), layer, keeps, *layer.parameters) -> y (T, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, keeps: bool, *parameters: Tensor) -> Tensor:
        y, kept = layer.forward(x, keeps)
        ctx.layer, ctx.kept = layer, kept
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, kept = ctx.layer, used_up(ctx)
        if layer.turn is not None:
            layer.turn(-1)
        dx, grads = layer.backward(dy.contiguous(), kept, ctx.needs_input_grad[0])
        return (dx, None, None, *grads)


def used_up(ctx: Any) -> Any:
    """What a function kept for its backward pass; a second pass is refused, since the first writes over it."""
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        raise RuntimeError("activations are used up by one backward pass; run the forward pass again")
    return kept
