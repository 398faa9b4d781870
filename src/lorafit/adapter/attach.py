"""Putting adapters on a model: any torch module with linear layers, by walking it once."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lorafit.adapter.dropout import PlacedDropout, Places
from lorafit.adapter.lora import LoraAdapter, LoraLinear
from lorafit.errors import ConfigError
from lorafit.frozen.linear import FrozenLinear

ROLES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}
HEADS = ("lm_head", "output")  # never part of all-linear: the head is tied or large, and rarely worth it


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path, frozen or torch's own; adapted ones count as themselves, without their parts."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, (nn.Linear, FrozenLinear, LoraLinear)):
            found[path] = module
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def select(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the layers that `targets` name, in the model's order.

    A target is `all-linear` (every linear layer but the head), a role (`attention`, `mlp`), a layer's name or path,
    or a glob over either. Raises ConfigError when one matches nothing, naming the layers that exist.
    """
    layers = linear_layers(model)
    chosen: set[str] = set()
    for target in targets:
        patterns = ROLES.get(target, (target,))
        hits = {
            path
            for path in layers
            for pattern in patterns
            if (target == "all-linear" and path.rsplit(".", 1)[-1] not in HEADS)
            or fnmatch.fnmatchcase(path, pattern)
            or fnmatch.fnmatchcase(path.rsplit(".", 1)[-1], pattern)
            or fnmatch.fnmatchcase(path, f"*.{pattern}")
        }
        if not hits:
            names = sorted({path.rsplit(".", 1)[-1] for path in layers})
            raise ConfigError("--targets", f"{target} matches no linear layer", f"this model has {', '.join(names)}")
        chosen |= hits
    return [path for path in layers if path in chosen]


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
    layer = layer.base if isinstance(layer, LoraLinear) else layer
    rows, columns = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    if rank > min(rows, columns):
        what = f"is {rank}, and {path} has {rows} x {columns} weights"
        raise ConfigError("--rank", what, f"give at most {min(rows, columns)}, or --targets without it")


def put_adapter(
    model: nn.Module, path: str, rank: int, alpha: float, dropout: float = 0.0, places: Places | None = None
) -> LoraAdapter:
    """Wrap the layer at `path`; A comes back without values. Raises ConfigError if the layer has an adapter."""
    base = model.get_submodule(path)
    if isinstance(base, LoraLinear):
        raise ConfigError(path, "has an adapter already", "attach once, to the plain model")
    features = base.in_features, base.out_features
    adapter = LoraAdapter(*features, rank, alpha, PlacedDropout(dropout, path, places))  # type: ignore[arg-type]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, LoraLinear(base, adapter))
    return adapter


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, layer) of every adapted layer, in the model's order."""
    return ((path, layer) for path, layer in linear_layers(model).items() if isinstance(layer, LoraLinear))


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
