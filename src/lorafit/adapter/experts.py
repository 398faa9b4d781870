"""LoRA on a stack of experts: each expert's frozen matrix has an A and a B of its own.

    y = x W_e^T + (alpha / r) * x A_e^T B_e^T        A (E, r, I), random    B (E, O, r), zero at the start

Only the experts that tokens were sent to are computed: whoever routes hands over one expert's tokens at a time, and no
expert's update B_e A_e is ever made. Forward and backward are by hand, as in adapter/group.py, but thin products are in
fp32: for an expert's few tokens bf16 is no faster, and would have too many sizes (kernels/product.py).

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, expert by expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.lora import Adapted, LoraAdapter, pair, scaling
from lorafit.errors import ConfigError
from lorafit.frozen.stack import FrozenStack

ROUTERS = ("gate", "router", "shared_expert_gate")  # what stands beside a module's experts and chooses among them


class ExpertAdapter(nn.Module):
    """A and B of every expert, fp32. It has no forward pass of its own: `ExpertGroup` computes it."""

    def __init__(
        self, experts: int, in_features: int, out_features: int, rank: int, alpha: float, use_rslora: bool = False
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.use_rslora = rank, float(alpha), use_rslora
        self.scale = scaling(rank, alpha, use_rslora)
        self.A = nn.Parameter(torch.empty(experts, rank, in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(experts, out_features, rank, dtype=torch.float32))
        self.dropout = PlacedDropout()  # always 0: see `refuse`

    def start(self, generator: torch.Generator) -> None:
        """A to its random start, B to zero: the update is exactly 0."""
        bound = 1 / math.sqrt(self.A.shape[2])
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)

    @property
    def width(self) -> int:
        """R, the rank of `factors`."""
        return self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (E, r, I) and B (E, O, r)."""
        return self.A, self.B


class LoraStack(Adapted):
    """A stack of frozen matrices and the adapter beside it."""

    base: FrozenStack

    def __init__(self, base: FrozenStack, adapter: ExpertAdapter) -> None:
        super().__init__(base)
        self.adapter = adapter
        self.in_features, self.out_features = base.in_features, base.out_features

    def parts(self) -> dict[str, nn.Parameter]:
        return pair(self.adapter)


class LoraRouter(Adapted):
    """A module that routes by its `weight`, computed with W + (alpha / r) B A instead, rounded to W's dtype once."""

    def __init__(self, base: nn.Module, adapter: LoraAdapter) -> None:
        super().__init__(base)
        self.adapter = adapter

    def parts(self) -> dict[str, nn.Parameter]:
        return pair(self.adapter)

    def forward(self, *arguments: Tensor) -> object:
        if not self.enabled:
            return self.base(*arguments)
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        changed = weight.float() + self.adapter.B @ self.adapter.A * self.adapter.scale
        return functional_call(self.base, {"weight": changed.to(weight.dtype)}, arguments)


class ExpertGroup:
    """One stack with its adapter, if it has one, for one forward and backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        base = layer.base if isinstance(layer, LoraStack) else layer
        assert isinstance(base, FrozenStack), "experts are frozen stacks"
        self.base: FrozenStack = base
        self.adapter = layer.adapter if isinstance(layer, LoraStack) and layer.enabled else None
        self.trained = base.trained  # looked up once: a stack may have some weights for each expert
        self.grads: list[Tensor] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B, if there are any, and the stack's own, where they are trained."""
        own = [] if self.adapter is None else [self.adapter.A, self.adapter.B]
        return own + self.trained

    @property
    def rank(self) -> int:
        """r; 0 without an adapter."""
        return 0 if self.adapter is None else self.adapter.rank

    def forward(self, expert: int, x_NI: Tensor, y_NO: Tensor, h_NR: Tensor) -> None:
        """Writes y in x's dtype and h = s x A_e^T in fp32."""
        self.base.product(expert, x_NI, y_NO)
        if self.adapter is not None:
            torch.mm(x_NI.float(), self.adapter.A[expert].T, out=h_NR).mul_(self.adapter.scale)
            y_NO += h_NR @ self.adapter.B[expert].T

    def backward_input(self, expert: int, grad_NO: Tensor) -> tuple[Tensor, Tensor]:
        """(dx (N, I) in dy's dtype, s dh (N, r) in fp32) from dy."""
        dx_NI = self.base.backward_input(expert, grad_NO)
        if self.adapter is None:
            return dx_NI, grad_NO.new_empty(len(grad_NO), 0)
        dh_NR = torch.mm(grad_NO.float(), self.adapter.B[expert]).mul_(self.adapter.scale)
        return dx_NI.add_(dh_NR @ self.adapter.A[expert]), dh_NR

    def add_grads(self, expert: int, grad_NO: Tensor, dh_NR: Tensor, x_NI: Tensor, h_NR: Tensor) -> None:
        """What this expert's tokens give to the gradients of `parameters`, kept in `grads`; an expert without tokens
        keeps zeros."""
        if not self.grads:
            self.grads = [torch.zeros_like(parameter) for parameter in self.parameters]
        if self.adapter is not None:
            torch.mm(dh_NR.T, x_NI.float(), out=self.grads[0][expert])
            torch.mm(grad_NO.float().T, h_NR, out=self.grads[1][expert])
        if self.trained:
            of = {id(parameter): grad for parameter, grad in zip(self.parameters, self.grads, strict=True)}
            for weight, start, stop, columns in self.base.pieces(expert):
                of[id(weight.master)][start:stop] = grad_NO[:, columns].T @ x_NI
            if self.base.bias is not None:
                of[id(self.base.bias)][expert] = grad_NO.sum(0)


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every stack of experts by its path, adapted or not."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, (FrozenStack, LoraStack)):
            found[path] = module
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def routers(model: nn.Module) -> list[str]:
    """Paths of the modules that choose among experts: by name, beside a module that is called `experts`."""
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" in children:
            for name in ROUTERS:
                if name in children:
                    inside = ".proj" if hasattr(children[name], "proj") else ""  # of Gemma 4's, which scales first
                    found.append(f"{path}.{name}{inside}".lstrip("."))
    return found


def put_on_experts(base: FrozenStack, rank: int, alpha: float, use_rslora: bool = False) -> LoraStack:
    """The stack with an adapter on it, whose A has no values yet."""
    return LoraStack(base, ExpertAdapter(base.experts, base.in_features, base.out_features, rank, alpha, use_rslora))


def refuse(model: nn.Module, paths: Iterable[str], option: str, value: object) -> None:
    """Raise ConfigError when one of `paths` is of experts or routes to them, where this option cannot be honoured.

    PEFT has no dropout, no DoRA and no bias there, and would not read such an adapter.
    """
    stacks, choosing = expert_layers(model), routers(model)
    hit = next((path for path in paths if path in stacks or path in choosing), None)
    if hit is not None:
        where, name = ("experts", "experts") if hit in stacks else ("what routes to experts", hit.rsplit(".", 1)[-1])
        what = f"{value} cannot be put on {where}, such as {hit}"
        raise ConfigError(option, what, f"leave it out, or leave `{name}` out of --targets")
