"""Mixture-of-experts blocks, computed expert by expert: only those that tokens were sent to, one product each.

    tokens sorted by expert; for each expert e that has some, with its tokens x (N, H) and their scores s (N,):
        u = x Wgateup_e^T       a = gate(u)       y = a Wdown_e^T       out[tokens] += s y

Llama 4 multiplies x by s instead of y. Kept for the backward pass are u and the adapters' low-rank products: x is
gathered again, a computed again, and s's gradient is <grad Wdown_e, a>, so that no y is kept. transformers' own
experts modules are replaced, instance by instance, by `Experts`; Llama 4's block, whose forward pass sends all tokens
through all experts, by `RoutedBlock`. Nothing of the library is patched.

Source: ours. The blocks are those of transformers' models: Shazeer et al. 2017, arXiv:1701.06538; gpt-oss's gate is
clamped and interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorafit.adapter.experts import ExpertGroup
from lorafit.errors import ModelError
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.stack import FrozenStack
from lorafit.kernels import layer as parts
from lorafit.kernels.product import rounded

ACTIVATIONS = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}  # transformers' class, and our name


class Gate(Protocol):
    """From u (N, 2 I) to a (N, I)."""

    def forward(self, u_NG: Tensor) -> Tensor: ...

    def backward(self, grad_NI: Tensor, u_NG: Tensor) -> None:
        """u becomes its gradient."""
        ...


@dataclass(frozen=True)
class Halves:
    """a = act(first half) * second half."""

    activation: str

    def forward(self, u_NG: Tensor) -> Tensor:
        gate, up = u_NG.chunk(2, dim=1)
        a = u_NG.new_empty(gate.shape)
        parts.gate(gate, up, self.activation, a)
        return a

    def backward(self, grad_NI: Tensor, u_NG: Tensor) -> None:
        gate, up = u_NG.chunk(2, dim=1)
        parts.gate_backward(grad_NI.contiguous(), gate, up, self.activation)


@dataclass(frozen=True)
class Clamped:
    """gpt-oss: gate and up interleaved and clamped, a = (up + 1) * gate * sigmoid(alpha * gate), in fp32."""

    alpha: float
    limit: float

    def forward(self, u_NG: Tensor) -> Tensor:
        gate, up = self._clamped(u_NG)
        return ((up + 1) * gate * torch.sigmoid(self.alpha * gate)).to(u_NG.dtype)

    def backward(self, grad_NI: Tensor, u_NG: Tensor) -> None:
        gate, up = self._clamped(u_NG)
        share, grad = torch.sigmoid(self.alpha * gate), grad_NI.float()
        d_gate = grad * (up + 1) * share * (1 + self.alpha * gate * (1 - share))
        d_up = grad * gate * share
        u_NG[:, ::2] = (d_gate * (u_NG[:, ::2] <= self.limit)).to(u_NG.dtype)
        u_NG[:, 1::2] = (d_up * (u_NG[:, 1::2].abs() <= self.limit)).to(u_NG.dtype)

    def _clamped(self, u_NG: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = u_NG[:, ::2].float(), u_NG[:, 1::2].float()
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Kind:
    """How a class of transformers lays out and computes its experts."""

    gate: Gate
    transposed: bool
    """Parameters are (E, inputs, outputs)."""
    declared: bool
    """The module says so itself."""
    scores_inputs: bool
    """A token's score multiplies what goes in, not what comes out."""


def is_experts(module: nn.Module) -> bool:
    """Whether this module of transformers holds experts as 3-D parameters."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))


def kind_of(module: nn.Module, place: str) -> Kind:
    """How this experts module computes. Raises ModelError for one that does it in a way that we do not know."""
    name = type(module).__name__
    llama4 = name == "Llama4TextExperts"
    declared = getattr(module, "is_transposed", None)
    activation = ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    gate: Gate | None = Halves(activation) if activation else None
    if name == "GptOssExperts":
        gate = Clamped(float(module.alpha), float(module.limit))  # type: ignore[arg-type]
    elif not llama4 and getattr(type(module), "_apply_gate", None).__name__ != "_default_apply_gate":  # type: ignore[union-attr]
        gate = None
    if gate is None or (declared is None and not llama4) or getattr(module, "has_post_expert_norm", False):
        what = f"{name} computes its experts in a way that is not known here"
        raise ModelError(place, what, "use a model of another family")
    return Kind(gate, llama4 or bool(declared), declared is not None, llama4)


def over(module: nn.Module, place: str = "") -> Experts:
    """Ours over the parameters that a module of transformers has, values or none (the meta device): for counting what
    an adapter on a model would have, and for comparing. Raises ModelError as `kind_of`."""
    kind = kind_of(module, place)

    def stack(name: str) -> FrozenStack:
        values, bias = getattr(module, name).detach(), getattr(module, f"{name}_bias", None)
        values = values.transpose(1, 2) if kind.transposed else values
        weight = DenseWeight(values.reshape(-1, values.shape[2]))
        own = None if bias is None else bias.detach()
        return FrozenStack(
            len(values), [([weight], slice(None))], own, transposed=kind.transposed, declared=kind.declared
        )

    return Experts(stack("gate_up_proj"), stack("down_proj"), kind)


class Experts(nn.Module):
    """The experts of one block, frozen, with or without adapters, in place of transformers' module."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.kind = gate_up_proj, down_proj, kind

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), the experts that each token goes to and their scores (T, K) -> (T, H)."""
        groups = ExpertGroup(self.gate_up_proj), ExpertGroup(self.down_proj)
        job = _Job(*groups, self.kind, _sorted(top_k_index), hidden_states)
        if not torch.is_grad_enabled():
            return job.forward(hidden_states, top_k_weights)[0]
        out: Tensor = _ExpertsFunction.apply(hidden_states, top_k_weights, job, *job.parameters)
        return out


class RoutedBlock(nn.Module):
    """Llama 4's block with the same children: each token goes to its own experts, and not to all with a score of 0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self._top_k = int(block.top_k)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, logits_TE = self.router(x)  # type: ignore[operator]
        scores_TK, experts_TK = scores_TE.topk(self._top_k, dim=1)
        out: Tensor = self.shared_expert(x) + self.experts(x, experts_TK, scores_TK)  # type: ignore[operator]
        return out, logits_TE


def _sorted(experts_TK: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, its pairs) for each expert that was chosen; pair p is token p // K and its choice p % K."""
    flat = experts_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    return list(zip(chosen.tolist(), order.split(counts.tolist()), strict=True))


def _gathered(values: Tensor, places: Tensor, rows: int) -> Tensor:
    """The rows of `values` at these places, and zeros up to so many `rows`."""
    out = values.new_empty(rows, values.shape[1])
    torch.index_select(values, 0, places, out=out[: len(places)])
    out[len(places) :] = 0
    return out


class _Kept(NamedTuple):
    """What the backward pass needs, the experts' rows one below the other: u, and the adapters' low-rank products."""

    u: Tensor
    low: Tensor
    low_down: Tensor


class _Job:
    """One forward and backward pass of one block."""

    def __init__(
        self, gate_up: ExpertGroup, down: ExpertGroup, kind: Kind, chosen: list[tuple[int, Tensor]], x_TH: Tensor
    ) -> None:
        self.gate_up, self.down, self.kind, self.chosen = gate_up, down, kind, chosen
        bounds = list(accumulate((rounded(len(pairs), x_TH) for _, pairs in chosen), initial=0))
        self.rows, self.parts = bounds[-1], [slice(*bound) for bound in pairwise(bounds)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.gate_up.parameters + self.down.parameters

    def forward(self, x_TH: Tensor, scores_TK: Tensor) -> tuple[Tensor, _Kept]:
        """(T, H) in x's dtype, summed in fp32, and what is kept."""
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        scores, choices = scores_TK.reshape(-1, 1), scores_TK.shape[1]
        kept = _Kept(
            x_TH.new_empty(self.rows, self.gate_up.base.out_features), *map(self._low, (self.gate_up, self.down))
        )
        for (expert, pairs), part in zip(self.chosen, self.parts, strict=True):
            tokens, mine, rows = pairs // choices, _Kept(*(one[part] for one in kept)), part.stop - part.start
            s = _gathered(scores, pairs, rows)
            self.gate_up.forward(expert, self._inputs(_gathered(x_TH, tokens, rows), s), mine.u, mine.low)
            y = x_TH.new_empty(rows, self.down.base.out_features)
            self.down.forward(expert, self.kind.gate.forward(mine.u), y, mine.low_down)
            y = y.float() if self.kind.scores_inputs else y * s.float()
            out_TH.index_add_(0, tokens, y[: len(tokens)])
        return out_TH.to(x_TH.dtype), kept

    def backward(self, grad_TH: Tensor, x_TH: Tensor, scores_TK: Tensor, kept: _Kept) -> tuple[Tensor, Tensor]:
        """(dx, dscores); the adapters' gradients are left with their groups. Uses up what was kept."""
        dx_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        scores, choices = scores_TK.reshape(-1, 1), scores_TK.shape[1]
        d_scores = torch.zeros(len(scores), dtype=torch.float32, device=x_TH.device)
        for (expert, pairs), part in zip(self.chosen, self.parts, strict=True):
            tokens, mine, rows = pairs // choices, _Kept(*(one[part] for one in kept)), part.stop - part.start
            s = _gathered(scores, pairs, rows).float()
            x, grad = _gathered(x_TH, tokens, rows), _gathered(grad_TH, tokens, rows)
            a = self.kind.gate.forward(mine.u)
            weigh = 1.0 if self.kind.scores_inputs else s
            da, dh = self.down.backward_input(expert, grad)  # of y before its score
            if not self.kind.scores_inputs:
                d_scores[pairs] = ((da.float() * a).sum(1) + self._of_bias(expert, grad))[: len(pairs)]
            self.down.add_grads(expert, (grad * weigh).to(grad.dtype), dh * weigh, a, mine.low_down)
            self.kind.gate.backward((da * weigh).to(da.dtype), mine.u)
            dx, dh = self.gate_up.backward_input(expert, mine.u)
            self.gate_up.add_grads(expert, mine.u, dh, self._inputs(x, s), mine.low)
            if self.kind.scores_inputs:
                d_scores[pairs] = (dx.float() * x).sum(1)[: len(pairs)]
                dx = dx * s
            dx_TH.index_add_(0, tokens, dx[: len(tokens)].float())
        return dx_TH.to(x_TH.dtype), d_scores.view(scores_TK.shape).to(scores_TK.dtype)

    def _low(self, group: ExpertGroup) -> Tensor:
        return torch.empty(self.rows, group.rank, device=group.base.device)

    def _inputs(self, x_NH: Tensor, s_N1: Tensor) -> Tensor:
        return (x_NH * s_N1).to(x_NH.dtype) if self.kind.scores_inputs else x_NH

    def _of_bias(self, expert: int, grad_NH: Tensor) -> Tensor | float:
        """The part of a score's gradient that comes from down's bias, which the score multiplies too."""
        bias = self.down.base.bias
        return 0.0 if bias is None else (grad_NH.float() * bias[expert]).sum(1)


class _ExpertsFunction(torch.autograd.Function):
    """`_Job` under autograd: apply(x (T, H), scores (T, K), job, *job.parameters) -> (T, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, job: _Job, *parameters: Tensor) -> Tensor:
        out, kept = job.forward(x, scores)
        ctx.save_for_backward(
            x, scores, *kept
        )  # through autograd, which lets go of them where a layer is computed twice
        ctx.job, ctx.used = job, False
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError("activations are used up by one backward pass; run the forward pass again")
        ctx.used = True
        x, scores, *kept = ctx.saved_tensors
        dx, d_scores = ctx.job.backward(grad.contiguous(), x, scores, _Kept(*kept))
        grads: list[Tensor | None] = []
        for group in (ctx.job.gate_up, ctx.job.down):
            grads += group.grads or [None] * len(group.parameters)
        return (dx, d_scores, None, *grads)
