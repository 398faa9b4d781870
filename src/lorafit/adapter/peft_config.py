"""PEFT's adapter_config.json: what an adapter is, written and read strictly.

Layers and ranks are taken from tensor names and shapes. Nothing from a file is run or used as a regular expression;
what we cannot honour exactly is refused by name. Source: PEFT 0.21's `LoraConfig`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lorafit.adapter import peft_experts
from lorafit.adapter.attach import HEADS, adaptable_layers, adapted, linear_layers
from lorafit.adapter.experts import ExpertAdapter, LoraRouter, LoraStack, expert_layers, routers
from lorafit.adapter.lora import BiasLinear, LoraAdapter, LoraLinear
from lorafit.adapter.variants.dora import DoraLinear
from lorafit.adapter.variants.vocabulary import LoraEmbedding, TokenEmbedding, TokenHead, WholeEmbedding, WholeLinear
from lorafit.errors import AdapterError

Layer = TypeVar("Layer", bound=nn.Module)
STARTS = {"pissa": "PiSSA", "loftq": "LoftQ", "eva": "EVA"}
MAX_RANK = 4096
SEQUENCES = (list, tuple)
LORA = (LoraLinear, LoraEmbedding, LoraStack, LoraRouter)
WHOLE, ROWS = (WholeEmbedding, WholeLinear), (TokenEmbedding, TokenHead)
ANY = r".*\."
# Keys of PEFT's configuration that change the result; each must be absent or one of these values.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, True),
    "bias": ("none", "all", "lora_only"),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False,),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "pissa"),
}


def file_path(model: nn.Module, path: str) -> str:
    """The path in an adapter's file of the layer at `path`: PEFT's, where the model is the text part of another."""
    return renamed(path, getattr(model, "peft_paths", ()))


def own_path(model: nn.Module, path: str) -> str:
    """The inverse of `file_path`."""
    return renamed(path, [(theirs, own) for own, theirs in getattr(model, "peft_paths", ())])


def by_file_path(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """These layers by their paths in an adapter's file."""
    return {file_path(model, path): layer for path, layer in layers.items()}


def renamed(path: str, beginnings: Iterable[tuple[str, str]]) -> str:
    """The path with the first of these (old, new) beginnings exchanged that it has."""
    return next((new + path[len(old) :] for old, new in beginnings if path.startswith(old)), path)


def peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    """The configuration of the adapter on `model`."""
    layers = by_file_path(model, adapted(model))
    adapters = {path: layer.adapter for path, layer in layers.items() if isinstance(layer, LORA)}
    ranks = {path: adapter.width for path, adapter in adapters.items()}
    alphas = {path: _alpha(adapter) for path, adapter in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(adapters.values()))
    choosing = {file_path(model, path) for path in routers(model)}
    parameters = peft_experts.parameter_paths({path: layers[path] for path in adapters}, choosing)
    every = peft_experts.parameter_paths(by_file_path(model, adaptable_layers(model)), choosing)
    keys = {path: path if path in parameters or f"{path}.weight" not in parameters else f"{path}.weight"
            for path in adapters}  # fmt: skip
    modules = [path for path, key in keys.items() if key not in parameters]
    names = sorted({path.rsplit(".", 1)[-1] for path in modules})
    by_name = {path for path in adaptable_layers(model) if path.rsplit(".", 1)[-1] in names}  # a wrapper has others
    whole = [path.rsplit(".", 1)[-1] for path, layer in layers.items() if isinstance(layer, WHOLE)]
    rows = {path.rsplit(".", 1)[-1]: list(layer.ids) for path, layer in layers.items()
            if isinstance(layer, TokenEmbedding) or (isinstance(layer, TokenHead) and not layer.tied)}  # fmt: skip
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else max(adapter.dropout.p for adapter in adapters.values()),
        "target_modules": names if by_name == set(modules) else sorted(modules),
        "bias": _biases(layers),
        "use_rslora": first.use_rslora,
        "use_dora": any(isinstance(layer, DoraLinear) for layer in layers.values()),
        "modules_to_save": whole or None,
        "trainable_token_indices": rows or None,
        "target_parameters": peft_experts.shortest(parameters, every) or None,
        "rank_pattern": {keys[path]: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {keys[path]: own for path, own in alphas.items() if own != alpha},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(adapter: LoraAdapter | ExpertAdapter) -> float:
    """The alpha that gives the adapter's scale at the rank that is saved."""
    times = adapter.width / adapter.rank
    return adapter.alpha * (math.sqrt(times) if adapter.use_rslora else times)


def _biases(layers: Mapping[str, nn.Module]) -> str:
    trained = [layer for layer in layers.values() if isinstance(layer, BiasLinear) and layer.bias is not None]
    if not trained:
        return "none"
    return "lora_only" if all(isinstance(layer, LoraLinear) for layer in trained) else "all"


def method_of(model: nn.Module) -> str:
    """The adapter on `model` in words: rank, alpha, and its kind."""
    layers = adapted(model)
    adapters = [layer.adapter for layer in layers.values() if isinstance(layer, LORA)]
    pissa = any(adapter.width != adapter.rank for adapter in adapters)
    start = STARTS.get("pissa" if pissa else getattr(model, "lora_init", "default"))
    facts = {
        "r": Counter(adapter.rank for adapter in adapters).most_common(1)[0][0],
        "lora_alpha": Counter(adapter.alpha for adapter in adapters).most_common(1)[0][0],
        "rank_pattern": len({adapter.rank for adapter in adapters}) > 1,
        "alpha_pattern": len({adapter.alpha for adapter in adapters}) > 1,
        "use_rslora": adapters[0].use_rslora,
        "use_dora": any(isinstance(layer, DoraLinear) for layer in layers.values()),
        "bias": _biases(layers),
        "modules_to_save": [path.rsplit(".", 1)[-1] for path, layer in layers.items() if isinstance(layer, WHOLE)],
        "trainable_token_indices": next((layer.ids for layer in layers.values() if isinstance(layer, ROWS)), []),
    }
    return ", ".join([in_words(facts), *([start] if start else [])])


def in_words(config: Mapping[str, Any]) -> str:
    """A PEFT configuration in words: rank, alpha, and its kind."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    words = [f"rank {rank}", f"alpha {alpha:g}" if isinstance(alpha, (int, float)) else f"alpha {alpha}"]
    words += [f"{key}s by layer" for key in ("rank", "alpha") if config.get(f"{key}_pattern")]
    words += [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    words += ["PiSSA"] if config.get("init_lora_weights") == "pissa" else []
    bias = config.get("bias")
    words += (
        [{"all": "all biases", "lora_only": "biases of adapted layers"}[bias]] if bias in ("all", "lora_only") else []
    )
    whole, rows = config.get("modules_to_save"), config.get("trainable_token_indices")
    words += [f"{' and '.join(whole)} whole"] if isinstance(whole, list) and whole else []
    counts = [len(ids) for ids in (rows.values() if isinstance(rows, dict) else [rows]) if isinstance(ids, SEQUENCES)]
    words += [f"rows of {max(counts)} tokens"] if any(counts) else []
    return ", ".join(words)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`. Raises AdapterError for what is damaged, absurd, or cannot be honoured."""
    file = folder / "adapter_config.json"
    config = read_json(file, "give an adapter's folder")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type", f"is {config.get('peft_type')!r}", "only LORA adapters are read")
    for key, allowed in PLAIN.items():
        if key in config and config[key] not in allowed:
            raise AdapterError(f"{file}: {key}", f"{config[key]!r} is not supported", "merge it with PEFT first")
    for key, low in (("r", 1), ("lora_alpha", None)):
        value = config.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (low is not None and not (isinstance(value, int) and low <= value <= MAX_RANK)):
            raise AdapterError(f"{file}: {key}", f"is {value!r}", "it must be a number that a rank or alpha can be")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(file, key, config.get(key) or {})
        # what PEFT writes for fused experts is a plain name behind any path
        config[key] = {name.removeprefix(ANY): value for name, value in (config.get(key) or {}).items()}
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise AdapterError(f"{file}: target_parameters", f"is {parameters!r}", "it must be a list of names")
    for key, kind in (("use_dora", True), ("init_lora_weights", "pissa")):
        if parameters and config.get(key) == kind:
            raise AdapterError(f"{file}: {key}", f"is {kind!r}, and no kind of target_parameters", "train it without")
    whole, rows = config.get("modules_to_save") or [], token_indices(config)
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise AdapterError(f"{file}: modules_to_save", f"is {whole!r}", "it must be a list of names")
    lists = list(rows.values()) if isinstance(rows, dict) else [None]
    if not all(isinstance(ids, list) and all(type(number) is int and number >= 0 for number in ids) for ids in lists):
        raise AdapterError(f"{file}: trainable_token_indices", f"is {str(rows)[:80]}", "it must hold lists of ids")
    return config


def token_indices(config: Mapping[str, Any]) -> Any:
    """trainable_token_indices by layer; a plain list is the embedding's."""
    found = config.get("trainable_token_indices") or {}
    return {"embed_tokens": found} if isinstance(found, list) else found


def _check_pattern(file: Path, key: str, pattern: Any) -> None:
    """PEFT runs these keys as regular expressions; we take plain layer names and refuse the rest."""
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file}: {key}", f"is {pattern!r}", "it must map layer names to numbers")
    for name, value in pattern.items():
        if not name.removeprefix(ANY).replace(".", "").replace("_", "").isalnum():
            raise AdapterError(f"{file}: {key}", f"{name!r} is a regular expression", "write plain layer names")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"{file}: {key}", f"{name} is {value!r}", "it must be a number")


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank that the configuration gives a layer."""
    return int(_pattern_value(config.get("rank_pattern"), path, config["r"]))


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """The alpha that the configuration gives a layer."""
    return float(_pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"]))


def _pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule for plain names: the first key that is the path's end, at a dot, or that of its weight's path."""
    paths = path, f"{path}.weight"
    return next((v for k, v in (pattern or {}).items() if any(_ends(p, k) for p in paths)), default)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def expected_paths(model: nn.Module, config: Mapping[str, Any]) -> set[str]:
    """The layers that the configuration's plain names stand for; none where it uses what only tensor names can tell."""
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    layers, stacks = by_file_path(model, adaptable_layers(model)), by_file_path(model, expert_layers(model))
    known = peft_experts.parameter_paths(layers, {file_path(model, path) for path in routers(model)})
    named = {
        path if path in layers else path.removesuffix(".weight")
        for path in known
        if any(_ends(path, name) for name in parameters)
    }
    if targets == "all-linear" and not stacks:  # with experts, what PEFT means by it depends on its version
        return {path for path in by_file_path(model, linear_layers(model)) if path.rsplit(".", 1)[-1] not in HEADS}
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return named
    named |= {path for target in targets for path in peft_experts.named_split(target, stacks)}
    return named | {path for path in layers.keys() - stacks.keys() if any(_ends(path, t) for t in targets)}


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object of at most 16 MB. Raises AdapterError for anything else."""
    try:
        if file.stat().st_size > 16 << 20:
            raise AdapterError(str(file), f"has {file.stat().st_size} bytes", remedy)
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(str(file), "does not exist", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(str(file), f"does not read: {error}", remedy) from None
    if not isinstance(found, dict):
        raise AdapterError(str(file), f"holds {type(found).__name__}, not an object", remedy)
    return found
