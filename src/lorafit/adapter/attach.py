"""Putting adapters on a model: any torch module with linear layers, by walking it once."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
from lorafit.adapter.lora import Adapted, BiasLinear, LoraAdapter, LoraLinear
from lorafit.adapter.peft_experts import parameter_paths
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.adapter.variants.eva import start_eva
from lorafit.adapter.variants.loftq import start_loftq
from lorafit.adapter.variants.pissa import PissaAdapter
from lorafit.adapter.variants.vocabulary import LoraEmbedding, matrix_of, shape_of
from lorafit.adapter.vocabulary import train_rows, train_whole
from lorafit.errors import ConfigError
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear
from lorafit.frozen.stack import FrozenStack

ROLES = {
    "attention": (
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj",
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",  # latent: DeepSeek-V3, Mistral Small 4
        "linear_attn.*",  # linear: Qwen 3.5, Qwen3-Next
    ),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}  # fmt: skip
LINEAR = (nn.Linear, FrozenLinear, BiasLinear)
EMBEDDING = (nn.Embedding, FrozenEmbedding)
ADAPTED = (LoraLinear, LoraStack, LoraRouter)
NF4 = "NF4"  # a frozen weight's format
HEADS = ("lm_head", "output")  # never part of all-linear: the head is tied or large, and rarely worth it


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that can have an adapter by its path, in the model's order: linear layers, frozen or torch's own,
    embeddings, stacks of experts, and what chooses among them. Adapted ones count as themselves, without their
    parts."""
    found: dict[str, nn.Module] = {}
    choosing = set(routers(model))

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, (*LINEAR, *EMBEDDING, FrozenStack, Adapted)) or path in choosing:
            found[path] = module
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers among them, but heads trained otherwise; one that chooses among experts is none."""
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
            hits = {path for path in linear if any(fits(path, name) for name in ROLES[target])}
        else:
            hits = {path for path in layers if fits(path, target)}
        if not hits:
            what = f"{target} matches no {'experts' if target == 'experts' else 'linear layer'}"
            raise ConfigError("--targets", what, f"this model has {', '.join(_names(layers))}")
        chosen |= hits
    _refuse_caught_routers(targets, chosen.intersection(choosing))
    return [path for path in layers if path in chosen]


def _refuse_caught_routers(targets: Sequence[str], caught: set[str]) -> None:
    """A glob means layers of a kind; that it catches a router, whose change sends tokens elsewhere, is no wish."""
    globs = [target for target in targets if any(sign in target for sign in "*?[")]
    for path in sorted(caught):
        if not any(fits(path, target) for target in targets if target not in globs):
            glob = next(target for target in globs if fits(path, target))
            what = f"{glob} catches {path}, which routes tokens to experts"
            raise ConfigError("--targets", what, f"narrow it, or name {_name(path)} too to adapt the router")


def fits(path: str, pattern: str) -> bool:
    """Whether a layer's name, path, or the end of its path is what `pattern` says; it may be a glob."""
    return any(fnmatch.fnmatchcase(*pair) for pair in ((path, pattern), (_name(path), pattern), (path, f"*.{pattern}")))


def _name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _names(paths: Iterable[str]) -> list[str]:
    return sorted({_name(path) for path in paths})


def attach(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = ("all-linear",),
    *,
    dropout: float = 0.0,
    seed: int = 0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    token_ids: Sequence[int] = (),
    new_tokens: Sequence[str] = (),
    originals: Callable[[str], Tensor] | None = None,
    feed: Callable[[], None] | None = None,
) -> nn.Module:
    """Freeze `model` and put a new adapter on each layer that `targets` name; the same object comes back.

    Works on any torch module. The adapter changes no output until it is trained (init="loftq" does). Each adapter's
    start is a function of (seed, path) alone, of the layer's matrix, or of its inputs.

    use_rslora, use_dora, init ("default", "pissa", "loftq", "eva"): the kind of adapter, see docs/methods.md.
    rank_pattern, alpha_pattern: other ranks and alphas by name, path or glob; the first that fits counts.
    bias: which biases are trained: "none", those of "all" linear layers, or "lora_only", of adapted layers.
    modules_to_save: of embedding and head, those trained whole. token_ids: tokens whose rows of both are trained,
    the last of them those of `new_tokens`, which the vocabulary did not have.
    originals: gives a layer's matrix as it was before it was stored in 4 bits, for "loftq".
    feed: runs training rows through `model`, for "eva".

    Raises ConfigError when a target or pattern matches nothing, a layer has an adapter already, a rank is above a
    layer's size, or experts among the targets cannot have what is asked for.
    """
    paths = select(model, [targets] if isinstance(targets, str) else targets)
    layers = adaptable_layers(model)
    ranks = by_pattern("--rank-pattern", paths, rank_pattern or {}, rank)
    alphas = by_pattern("--alpha-pattern", paths, alpha_pattern or {}, alpha)
    for path in paths:
        _check(path, layers[path], ranks[path])
    _check_experts(model, {path: layers[path] for path in paths}, dropout, use_dora, init, bias)
    if init == "eva":
        _check_eva({path: layers[path] for path in paths}, feed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = Places()
    for path in paths:
        kind = {"use_rslora": use_rslora, "use_dora": use_dora, "pissa": init == "pissa"}
        put_adapter(model, path, int(ranks[path]), alphas[path], dropout, places, **kind)
        begin(model.get_submodule(path), _generator(seed, path), originals if init == "loftq" else None, path)
    if init == "eva":
        assert feed is not None, "checked above"
        enable_adapter(model, False)
        start_eva({path: model.get_submodule(path) for path in paths}, feed, _generator(seed, "eva"))  # type: ignore[misc]
        enable_adapter(model, True)
    train_biases(model, bias)
    if modules_to_save:
        train_whole(model, modules_to_save)
    if token_ids:
        train_rows(model, token_ids, new_tokens)
    for layer in model.modules():
        if isinstance(layer, DoraLinear):
            layer.start()
    model.lora_places, model.lora_init = places, init  # type: ignore[assignment]
    return model


def _check(path: str, layer: Any, rank: float) -> None:
    """A layer has one adapter, whose rank is no more than a change of the layer can have."""
    if isinstance(layer, Adapted):
        raise ConfigError(path, "has an adapter already", "attach once, to the plain model")
    outputs, inputs = features(layer)
    size = min(outputs, inputs)
    if rank > size:
        what = f"is {rank:g}, and {path} has {outputs} x {inputs} weights"
        remedy = f"give at most {size}, or --rank-pattern {path.rsplit('.', 1)[-1]}={size}, or --targets without it"
        raise ConfigError("--rank", what, remedy)


def _check_experts(
    model: nn.Module, layers: Mapping[str, nn.Module], dropout: float, use_dora: bool, init: str, bias: str
) -> None:
    """Experts and what routes to them have LoRA and rsLoRA; DoRA is for nothing that PEFT knows as a parameter."""
    asked = {
        "--dropout": dropout or None,
        "--use-dora": use_dora or None,
        "--init": init if init != "default" else None,
        "--bias": bias if bias != "none" else None,
    }
    for option, value in asked.items():
        if value is not None:
            refuse(model, layers, option, value)
    parameters = parameter_paths(layers, routers(model))
    if use_dora and parameters:
        what = f"cannot be put on {parameters[0].removesuffix('.weight')}, for PEFT a parameter beside experts"
        raise ConfigError("--use-dora", what, "leave it out, or give --targets attention")


def _check_eva(layers: Mapping[str, nn.Module], feed: Callable[[], None] | None) -> None:
    """EVA is for linear layers that rows run through; of the head only trained tokens are ever computed."""
    if feed is None:
        raise ConfigError("init", "is eva, and there are no rows to look at", "give feed, which runs some")
    for path, layer in layers.items():
        if isinstance(layer, EMBEDDING) or _name(path) in HEADS:
            raise ConfigError("--init eva", f"is not made for {path}", "leave it out of --targets")


def by_pattern(option: str, paths: Sequence[str], pattern: Mapping[str, float], default: float) -> dict[str, float]:
    """A number for each path: the pattern's first that fits, else the default. Raises ConfigError for one that fits no
    path."""
    for name in pattern:
        if not any(fits(path, name) for path in paths):
            raise ConfigError(option, f"{name} matches no adapted layer", f"adapted are {', '.join(_names(paths))}")
    return {path: next((value for name, value in pattern.items() if fits(path, name)), default) for path in paths}


def begin(
    layer: Any, generator: torch.Generator, originals: Callable[[str], Tensor] | None = None, path: str = ""
) -> None:  # fmt: skip
    """The adapter's start: PiSSA's from the layer's matrix, LoftQ's where it is stored in 4 bits, else LoRA's."""
    base, adapter = layer.base, layer.adapter
    if isinstance(layer, LoraEmbedding):
        layer.start(generator)
    elif isinstance(adapter, PissaAdapter):
        adapter.start_from(matrix_of(base), generator)
    elif originals is not None and isinstance(base, FrozenLinear) and base.weight.format == NF4:
        start_loftq(adapter, originals(path).float(), matrix_of(base), generator)
    else:
        adapter.start(generator)


def features(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a layer that can have an adapter; of an embedding its width and the vocabulary."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    rows, columns = shape_of(layer)
    return (columns, rows) if isinstance(layer, EMBEDDING) else (rows, columns)  # else a router of transformers


def train_biases(model: nn.Module, which: str) -> None:
    """Train the biases of adapted layers ("lora_only"), of every linear layer ("all"), or none. Raises ConfigError
    where there are none, or some that belong to no linear layer."""
    if which == "none":
        return
    layers = {path: layer for path, layer in linear_layers(model).items() if _bias(layer) is not None}
    chosen = {path: layer for path, layer in layers.items() if which == "all" or isinstance(layer, LoraLinear)}
    other = {name.removesuffix(".bias").removesuffix(".base") for name, _ in model.named_parameters()
             if name.endswith(".bias")} - set(layers)  # fmt: skip
    if which == "all" and other:
        raise ConfigError("--bias", f"all, and {sorted(other)[0]} is no linear layer", "give lora_only")
    if not chosen:
        raise ConfigError("--bias", f"{which}, and no {'adapted ' * (which != 'all')}layer has a bias", "leave it out")
    for path in chosen:
        own_bias(model, path)


def own_bias(model: nn.Module, path: str) -> BiasLinear:
    """Give the linear layer at `path`, adapted or not, a trained bias, starting as its own."""
    layer: Any = model.get_submodule(path)
    if not isinstance(layer, BiasLinear):
        layer = BiasLinear(layer)
        _replace(model, path, layer)
    layer.train_bias()
    return layer


def put_adapter(
    model: nn.Module,
    path: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    places: Places | None = None,
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
    pissa: bool = False,
) -> LoraAdapter | ExpertAdapter:
    """Wrap the layer at `path`; A comes back without values. Raises ConfigError if the layer has an adapter."""
    base: Any = model.get_submodule(path)
    if isinstance(base, Adapted):
        raise ConfigError(path, "has an adapter already", "attach once, to the plain model")
    if isinstance(base, FrozenStack):
        stack = put_on_experts(base, rank, alpha, use_rslora)
        _replace(model, path, stack)
        return stack.adapter
    outputs, inputs = features(base)
    embeds = isinstance(base, EMBEDDING)
    routes = not embeds and (not isinstance(base, LINEAR) or hasattr(base, "top_k"))  # gives more than a product
    if embeds or _name(path) in HEADS:
        if use_dora or pissa:
            kind = "--use-dora" if use_dora else "--init pissa"
            raise ConfigError(kind, f"is not made for {path}", "leave it out of --targets")
        dropout = 0.0  # the loss takes the head's input token by token, in no order that a mask knows
    dropped = PlacedDropout(dropout, path, places)
    adapter = (PissaAdapter if pissa else LoraAdapter)(inputs, outputs, rank, alpha, dropped, use_rslora)
    if embeds:
        layer: Adapted = LoraEmbedding(base, adapter)
    elif routes:
        layer = LoraRouter(base, adapter)
    else:
        layer = (DoraLinear if use_dora else LoraLinear)(base, adapter)
    _replace(model, path, layer)
    return adapter


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """Every layer with something trained beside it, by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name (`PATH.A`, `PATH.B`, ...), in the model's order."""
    found = model.named_parameters()
    return {name.replace(".adapter.", "."): parameter for name, parameter in found if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer with an adapter but embeddings, in the model's order."""
    return ((path, layer) for path, layer in adapted(model).items() if isinstance(layer, ADAPTED))


def detach(model: nn.Module) -> None:
    """Take every adapter off; the model is the base again."""
    for path, layer in adapted(model).items():
        _replace(model, path, layer.base)


def enable_adapter(model: nn.Module, enabled: bool) -> None:
    """Switch every adapter on or off; off gives the base model's logits bit for bit."""
    for layer in adapted(model).values():
        layer.enabled = enabled


def _bias(layer: nn.Module) -> Tensor | None:
    return layer.offset if isinstance(layer, BiasLinear) else layer.bias  # type: ignore[return-value]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
