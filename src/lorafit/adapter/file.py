"""An adapter's folder in PEFT's layout: written whole, and read strictly.

    adapter_config.json          PEFT's keys: r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.PATH.lora_A.weight (r, in), ....lora_B.weight (out, r)
    lorafit.json                 ours: fingerprints of base, tokenizer, template and data
    README.md                    model card

Layers and ranks are taken from tensor names and shapes. Nothing from a file is compiled, run, or used as a regular
expression; what we cannot honour exactly is refused by name. Source: PEFT 0.21's `LoraConfig` and its saved files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafit.adapter import peft_experts
from lorafit.adapter.attach import HEADS, adaptable_layers, adapted_layers, features, put_adapter
from lorafit.adapter.dropout import Places
from lorafit.adapter.experts import LoraStack, expert_layers, routers
from lorafit.errors import AdapterError, Faults, LorafitError
from lorafit.formats.folders import commit
from lorafit.formats.safetensors import open_file, write_safetensors
from lorafit.frozen.fingerprint import difference, fingerprint
from lorafit.frozen.stack import FrozenStack

TEMPLATE_FILE = "chat_template.jinja"  # only where training used another template than the model's
FILES = ("adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md", TEMPLATE_FILE)
PREFIX = "base_model.model."
MAX_RANK = 4096
ANY = r".*\."
# Keys of PEFT's configuration that change the result; each must be absent or one of these values.
PLAIN = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False,),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    about: Mapping[str, Any] | None = None,
    experts: Literal["fused", "split"] = "fused",
) -> None:
    """Write the adapter on `model` into `folder`, which PEFT and lorafit.load_adapter read.

    about: facts for lorafit.json and the model card (`base_model`, `tokenizer`, `template`, `data`, `figures`), and
    `chat_template`, the source of a template that is not the model's own. experts: the layout of adapters on experts,
    a pair of tensors for all of them or for each (peft_experts.py).
    An older adapter there is replaced. Raises AdapterError when the model has no adapter or `folder` holds other files,
    which would be lost; ConfigError when the disk refuses.
    """
    folder, about = Path(folder).resolve(), dict(about or {})
    others = sorted({path.name for path in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
    if others:
        raise AdapterError(str(folder), f"holds {others[0]}, which is no adapter's file", "name another folder")
    layers = {file_path(model, path): layer for path, layer in adapted_layers(model)}
    if not layers:
        raise AdapterError(str(folder), "the model has no adapter", "attach one first")
    tensors = {}
    for path, layer in layers.items():
        if not isinstance(layer, LoraStack):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.adapter.A.detach()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.adapter.B.detach()
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    of_experts = peft_experts.split_tensors(layers, kind) if experts == "split" else peft_experts.fused_tensors(layers)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in of_experts}
    config = _peft_config(model, layers, str(about.get("base_model", "")))
    if experts == "split":
        peft_experts.name_split(config, layers, kind)
    ours: dict[str, Any] = {key: about[key] for key in ("tokenizer", "template", "data") if key in about}
    ours["base"] = fingerprint(model)

    def write(temporary: Path) -> None:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(temporary / "adapter_model.safetensors", tensors)
        (temporary / "lorafit.json").write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")
        (temporary / "README.md").write_text(_model_card(config, about), encoding="utf-8")
        if about.get("chat_template"):
            (temporary / TEMPLATE_FILE).write_text(about["chat_template"], encoding="utf-8")

    commit(folder, write, manifest=False)


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put the adapter in `folder` on `model` and return notes for the user, such as "same weights in another format".

    The model's other parameters are frozen. Strict: raises AdapterError (or Faults with one line per tensor) for
    anything renamed, missing, extra, non-finite, of a wrong dtype, rank or shape, or made for another base, and then
    the model is as it was.
    """
    folder = Path(folder)
    if any(adapted_layers(model)):
        raise AdapterError(str(folder), "cannot be put on a model that has an adapter", "load it on the plain model")
    config = _read_config(folder)
    notes = _check_base(model, folder)
    pairs = _read_pairs(folder, model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = Places()
    for path, (a, b, branches) in pairs.items():
        rank = a.shape[-2]
        alpha = _alpha(config, path, rank // branches) * branches
        adapter = put_adapter(model, own_path(model, path), rank, alpha, 0.0, places)
        with torch.no_grad():
            adapter.A.copy_(a)
            adapter.B.copy_(b)
    model.lora_places = places  # type: ignore[assignment]
    return notes


def file_path(model: nn.Module, path: str) -> str:
    """The path in an adapter's file of the layer at `path`: PEFT's, where the model is the text part of another."""
    return _renamed(path, getattr(model, "peft_paths", ()))


def own_path(model: nn.Module, path: str) -> str:
    """The inverse of `file_path`."""
    return _renamed(path, [(theirs, own) for own, theirs in getattr(model, "peft_paths", ())])


def _renamed(path: str, beginnings: Iterable[tuple[str, str]]) -> str:
    return next((new + path[len(old) :] for old, new in beginnings if path.startswith(old)), path)


def _peft_config(model: nn.Module, layers: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    adapters = [layer.adapter for layer in layers.values()]
    first = adapters[0]
    choosing = {file_path(model, path) for path in routers(model)}
    every = {file_path(model, path): layer for path, layer in adaptable_layers(model).items()}
    parameters = peft_experts.parameter_paths(layers, choosing)
    modules = [path for path in layers if not {path, f"{path}.weight"} & set(parameters)]
    names = sorted({path.rsplit(".", 1)[-1] for path in modules})
    by_name = {path for path in adaptable_layers(model) if path.rsplit(".", 1)[-1] in names}  # a wrapper has others
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0 if parameters else max(adapter.dropout.p for adapter in adapters),
        "target_modules": names if by_name == set(modules) else sorted(modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_parameters": peft_experts.shortest(parameters, peft_experts.parameter_paths(every, choosing)) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    for path, layer in layers.items():
        key = path if path in modules or path in parameters else f"{path}.weight"
        if layer.adapter.rank != first.rank:
            config["rank_pattern"][key] = layer.adapter.rank
        if layer.adapter.alpha != first.alpha:
            config["alpha_pattern"][key] = layer.adapter.alpha
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    config = _read_json(file, "give an adapter's folder")
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
    return config


def _check_pattern(file: Path, key: str, pattern: Any) -> None:
    """PEFT runs these keys as regular expressions; we take plain layer names and refuse the rest."""
    if not isinstance(pattern, dict):
        raise AdapterError(f"{file}: {key}", f"is {pattern!r}", "it must map layer names to numbers")
    for name, value in pattern.items():
        if not name.removeprefix(ANY).replace(".", "").replace("_", "").isalnum():
            raise AdapterError(f"{file}: {key}", f"{name!r} is a regular expression", "write plain layer names")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"{file}: {key}", f"{name} is {value!r}", "it must be a number")


def _pattern_value(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule for plain names: the first key that is the path's end, at a dot, or that of its weight's path."""
    paths = path, f"{path}.weight"
    return next((v for k, v in (pattern or {}).items() if any(p == k or p.endswith(f".{k}") for p in paths)), default)


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The alpha that gives PEFT's scale under our alpha / rank (rsLoRA divides by sqrt(rank) instead)."""
    alpha = float(_pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _check_base(model: nn.Module, folder: Path) -> list[str]:
    file = folder / "lorafit.json"
    if not file.exists():
        return ["the adapter has no lorafit.json: its base can be checked by names and shapes only"]
    stored = _read_json(file, "remove it if the adapter is another program's")
    try:
        same, what = difference(stored["base"], fingerprint(model))
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file}: base", f"is no fingerprint: {error}", "save the adapter again") from None
    if not same:
        raise AdapterError(str(folder), f"does not belong to this base: {what}", "give the base it was trained on")
    return [what] if what else []


def _read_pairs(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """(A, B, branches) by layer path, in the model's order, each checked; all faults at once.

    branches: see peft_experts.read_stacks.
    """
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise AdapterError(str(folder), "holds no adapter_model.safetensors", "pickled .bin adapters are not read")
    shards = open_file(file, AdapterError)
    layers = {file_path(model, path): layer for path, layer in adaptable_layers(model).items()}
    stacks = {file_path(model, path): layer for path, layer in expert_layers(model).items()}
    faults: list[LorafitError] = []
    halves: dict[str, dict[str, Tensor]] = {}
    of_experts: dict[str, dict[str, Tensor]] = {}
    for name in shards.shapes:
        path, half = _parse_name(name)
        if half and not peft_experts.belongs(path, stacks) and path not in layers:
            path = file_path(model, path)  # made for the text model alone
        if half and peft_experts.belongs(path, stacks):
            of_experts.setdefault(path, {})[half] = shards.load(name)
        elif half == "" or path not in layers or path.rsplit(".", 1)[-1] in HEADS:
            faults.append(AdapterError(f"{file}: {name}", "names no linear layer of this model"))
        else:
            halves.setdefault(path, {})[half] = shards.load(name)
    pairs, more = peft_experts.read_stacks(of_experts, stacks, config, str(file))
    faults += more
    expected = _expected_paths(model, layers, config)
    for path in (expected - stacks.keys()) | set(halves):
        faults += _check_pair(file, path, halves.get(path, {}), layers[path], config)
    for path, (a, b, branches) in pairs.items():
        faults += _check_stack(file, path, a, b, branches, config)
    if not more:
        faults += [AdapterError(f"{file}: {path}", "is missing", "the adapter is incomplete")
                   for path in (expected & stacks.keys()) - pairs.keys()]  # fmt: skip
    if not halves and not pairs and not faults:
        faults.append(AdapterError(str(file), "holds no tensors", "train again"))
    if faults:
        raise Faults(sorted(faults, key=str)) if len(faults) > 1 else faults[0]
    pairs |= {path: (pair["lora_A"], pair["lora_B"], 1) for path, pair in halves.items()}
    return {path: pairs[path] for path in layers if path in pairs}


def _check_stack(
    file: Path, path: str, a: Tensor, b: Tensor, branches: int, config: Mapping[str, Any]
) -> list[AdapterError]:  # fmt: skip
    rank = int(_pattern_value(config.get("rank_pattern"), path, config["r"]))
    if a.shape[1] != rank * branches:
        return [
            AdapterError(
                f"{file}: {path}", f"has rank {a.shape[1]}, adapter_config.json says {rank * branches}", "check r"
            )
        ]
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return [AdapterError(f"{file}: {path}", "holds NaN or infinity", "train again, or use an older checkpoint")]
    return []


def _parse_name(name: str) -> tuple[str, str]:
    """base_model.model.PATH.lora_A.weight -> (PATH, lora_A); ("", "") for other names."""
    for half in ("lora_A", "lora_B"):
        if name.startswith(PREFIX) and name.endswith(f".{half}.weight"):
            return name[len(PREFIX) : -len(f".{half}.weight")], half
    return "", ""


def _expected_paths(model: nn.Module, layers: Mapping[str, nn.Module], config: Mapping[str, Any]) -> set[str]:
    """The layers that the configuration's plain names stand for; none where it uses what only tensor names can tell."""
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    named = {
        path.removesuffix(".weight") if path not in layers else path
        for path in peft_experts.parameter_paths(layers, {file_path(model, path) for path in routers(model)})
        if any(path == t or path.endswith(f".{t}") for t in parameters)
    }
    stacks = {path for path, layer in layers.items() if isinstance(layer, FrozenStack)}
    if targets == "all-linear" and not stacks:  # with experts, what PEFT means by it depends on its version
        return {path for path in layers if path.rsplit(".", 1)[-1] not in HEADS}
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return named
    linear = layers.keys() - stacks
    named |= {path for target in targets for path in peft_experts.named_split(target, stacks)}
    return named | {path for path in linear if any(path == t or path.endswith(f".{t}") for t in targets)}


def _check_pair(
    file: Path, path: str, pair: Mapping[str, Tensor], layer: nn.Module, config: Mapping[str, Any]
) -> list[AdapterError]:
    faults = [
        AdapterError(f"{file}: {PREFIX}{path}.{half}.weight", "is missing", "the adapter is incomplete")
        for half in ("lora_A", "lora_B")
        if half not in pair
    ]
    rank = int(_pattern_value(config.get("rank_pattern"), path, config["r"]))
    outputs, inputs = features(layer)
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
    for half, tensor in pair.items():
        place = f"{file}: {PREFIX}{path}.{half}.weight"
        if tuple(tensor.shape) != wanted[half]:
            what = f"has shape {list(tensor.shape)}, rank {rank} on this model needs {list(wanted[half])}"
            faults.append(AdapterError(place, what, "check r and the base"))
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(AdapterError(place, "holds NaN or infinity", "train again, or use an older checkpoint"))
    return faults


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
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


def _model_card(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """README.md of the adapter: what it is, what it was trained on, what it gained."""
    base = config["base_model_name_or_path"] or "the base model"
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# LoRA adapter for {Path(base).name}",
        "",
    ]
    lines += [f"Rank {config['r']}, alpha {config['lora_alpha']:g}, trained with lorafit.", ""]
    figures = about.get("figures") or {}
    if figures:
        lines += ["| figure | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in figures.items()), ""]
    lines += [
        "Load it with PEFT's `PeftModel.from_pretrained(base, folder)` or `lorafit generate BASE --adapter folder`."
    ]
    return "\n".join(lines) + "\n"
