"""Putting adapters on a model: any torch module with linear layers, by walking it once."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lorafit.adapter.dropout import PlacedDropout, Places
from lorafit.adapter.experts import (
    ExpertAdapter,
    LoraRouter,
    LoraStack,
    expert_layers,
    put_on_experts,
    refuse,
    routers,
)
from lorafit.adapter.lora import LoraAdapter, LoraLinear
from lorafit.errors import ConfigError
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.stack import FrozenStack

ROLES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}
ADAPTED = (LoraLinear, LoraStack, LoraRouter)
LINEAR = (nn.Linear, FrozenLinear, LoraLinear)
HEADS = ("lm_head", "output")  # never part of all-linear: the head is tied or large, and rarely worth it


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that can have an adapter by its path, in the model's order: linear layers, frozen or torch's own,
    stacks of experts, and what chooses among them. Adapted ones count as themselves, without their parts."""
    found: dict[str, nn.Module] = {}
    choosing = set(routers(model))

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, (*LINEAR, FrozenStack, LoraStack)) or path in choosing:
            found[path] = module
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers among them; one that chooses among experts is none."""
    choosing = set(routers(model))
    found = adaptable_layers(model).items()
    return {path: layer for path, layer in found if isinstance(layer, LINEAR) and path not in choosing}


def select(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the layers that `targets` name, in the model's order; see `choose`."""
    everything, linear = list(adaptable_layers(model)), list(linear_layers(model))
    return choose(everything, targets, linear, list(expert_layers(model)), routers(model))


def choose(
    layers: Sequence[str],
    targets: Sequence[str],
    linear: Sequence[str],
    experts: Sequence[str] = (),
    choosing: Iterable[str] = (),
) -> list[str]:
    """Those of the layers' paths that `targets` name, in their order. linear, experts, choosing: which of them are
    linear layers, stacks of experts, and what routes tokens to experts.

    A target is `all-linear` (every linear layer but the head), a role (`attention`, `mlp`: linear layers; `experts`:
    stacks of experts), a layer's name or path, or a glob over either. What routes tokens to experts must be named: a
    glob that catches it is refused. Raises ConfigError when a target matches nothing, naming the layers that exist.
    """
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            hits = {path for path in linear if _name(path) not in HEADS}
        elif target == "experts":
            hits = set(experts)
        elif target in ROLES:
            hits = {path for path in linear if any(_matches(path, name) for name in ROLES[target])}
        else:
            hits = {path for path in layers if _matches(path, target)}
        if not hits:
            names = sorted({_name(path) for path in layers})
            what = f"{target} matches no {'experts' if target == 'experts' else 'linear layer'}"
            raise ConfigError("--targets", what, f"this model has {', '.join(names)}")
        chosen |= hits
    _refuse_caught_routers(targets, chosen.intersection(choosing))
    return [path for path in layers if path in chosen]


def _refuse_caught_routers(targets: Sequence[str], caught: set[str]) -> None:
    """A glob means layers of a kind; that it catches a router, whose change sends tokens elsewhere, is no wish."""
    globs = [target for target in targets if any(sign in target for sign in "*?[")]
    for path in sorted(caught):
        if not any(_matches(path, target) for target in targets if target not in globs):
            glob = next(target for target in globs if _matches(path, target))
            what = f"{glob} catches {path}, which routes tokens to experts"
            raise ConfigError("--targets", what, f"narrow it, or name {_name(path)} too to adapt the router")


def _name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _matches(path: str, pattern: str) -> bool:
    """Whether a name or glob is of this layer: of its path, of its name, or of its path's end."""
    return any(fnmatch.fnmatchcase(*pair) for pair in ((path, pattern), (_name(path), pattern), (path, f"*.{pattern}")))


def attach(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = ("all-linear",),
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Freeze `model` and put a new adapter on each layer that `targets` name; the same object comes back.

    Works on any torch module. The adapter changes no output until it is trained. Each adapter's start is a function
    of (seed, path) alone. Raises ConfigError when a target matches nothing, a layer has an adapter already, or a rank
    is above its layer's size.
    """
    paths = select(model, [targets] if isinstance(targets, str) else targets)
    if dropout:
        refuse(model, paths, "--dropout", dropout)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = Places()
    for path in paths:
        check_rank(model, path, rank)
    for path in paths:
        put_adapter(model, path, rank, alpha, dropout, places).start(_generator(seed, path))
    model.lora_places = places  # type: ignore[assignment]
    return model


def check_rank(model: nn.Module, path: str, rank: int) -> None:
    """Raises ConfigError for a rank that is more than a change of this layer can have."""
    layer = model.get_submodule(path)
    layer = layer.base if isinstance(layer, ADAPTED) else layer
    rows, columns = features(layer)
    if rank > min(rows, columns):
        what = f"is {rank}, and {path} has {rows} x {columns} weights"
        raise ConfigError("--rank", what, f"give at most {min(rows, columns)}, or --targets without it")


def put_adapter(
    model: nn.Module, path: str, rank: int, alpha: float, dropout: float = 0.0, places: Places | None = None
) -> LoraAdapter | ExpertAdapter:
    """Wrap the layer at `path`; A comes back without values. Raises ConfigError if the layer has an adapter."""
    base = model.get_submodule(path)
    if isinstance(base, ADAPTED):
        raise ConfigError(path, "has an adapter already", "attach once, to the plain model")
    layer: LoraStack | LoraLinear | LoraRouter
    if isinstance(base, FrozenStack):
        layer = put_on_experts(base, rank, alpha)
    elif isinstance(base, LINEAR) and not hasattr(base, "top_k"):  # a router gives more than a product
        outputs, inputs = features(base)
        layer = LoraLinear(base, LoraAdapter(inputs, outputs, rank, alpha, PlacedDropout(dropout, path, places)))
    else:
        outputs, inputs = features(base)
        layer = LoraRouter(base, LoraAdapter(inputs, outputs, rank, alpha, PlacedDropout()))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    return layer.adapter


def features(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a layer that can have an adapter."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    outputs, inputs = layer.weight.shape  # a router of transformers
    return outputs, inputs


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer, in the model's order: each has `base`, `adapter` and `enabled`."""
    return ((path, layer) for path, layer in adaptable_layers(model).items() if isinstance(layer, ADAPTED))


def detach(model: nn.Module) -> None:
    """Take every adapter off; the model is the base again."""
    for path, layer in list(adapted_layers(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)


def enable_adapter(model: nn.Module, enabled: bool) -> None:
    """Switch every adapter on or off; off gives the base model's logits bit for bit."""
    for _, layer in adapted_layers(model):
        layer.enabled = enabled


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
