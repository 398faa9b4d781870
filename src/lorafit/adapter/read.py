"""The tensors of an adapter's file, each checked against the model and the configuration: all must be there, and no
others, of the right shape, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter import peft_experts
from lorafit.adapter.attach import adaptable_layers, features, linear_layers
from lorafit.adapter.experts import expert_layers
from lorafit.adapter.peft_config import by_file_path, expected_paths, file_path, rank_of, token_indices
from lorafit.adapter.variants.vocabulary import matrix_of, shape_of
from lorafit.adapter.vocabulary import new_tokens, tied, vocabulary, wrong_ids
from lorafit.errors import AdapterError, Faults, LorafitError
from lorafit.formats.safetensors import open_file
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
OF_EMBEDDINGS = ("lora_embedding_A", "lora_embedding_B", ROWS, "base_layer.weight", "weight")
ENDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias", "bias", *OF_EMBEDDINGS)
HALVES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
SAME_MATRIX = 0.2  # relative distance that 4-bit rounding explains, as for fingerprints


def read_layers(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by its path, in the model's order, each checked; all faults at once.

    A stack of experts has A (E, r, I) and B (E, O, r), whatever the file's layout.
    """
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise AdapterError(str(folder), "holds no adapter_model.safetensors", "pickled .bin adapters are not read")
    shards = open_file(file, AdapterError)
    layers, stacks = by_file_path(model, adaptable_layers(model)), by_file_path(model, expert_layers(model))
    linear = by_file_path(model, linear_layers(model))
    expected = expected_paths(model, config)
    wanted = {path: _shapes(layers[path], config, path, path in linear) for path in expected - stacks.keys()}
    wanted |= _wanted_vocabulary(folder, model, config)
    faults: list[LorafitError] = []
    found: dict[str, dict[str, Tensor]] = {}
    of_experts: dict[str, dict[str, Tensor]] = {}
    for name in shards.shapes:
        path, end = _parse_name(name)
        if path not in layers and not peft_experts.belongs(path, stacks):
            path = file_path(model, path)  # made for the text model alone
        if end in HALVES and peft_experts.belongs(path, stacks):
            of_experts.setdefault(path, {})[HALVES[end]] = shards.load(name)
            continue
        if end == "" or path not in layers or path in stacks:
            faults.append(AdapterError(f"{file}: {name}", "names no linear layer of this model", "check the base"))
            continue
        found.setdefault(path, {})[end] = shards.load(name)
        if path not in wanted:
            alone = end == "bias" and config.get("bias") == "all" and path in linear
            shapes = _shapes(layers[path], config, path, path in linear)
            wanted[path] = {"bias": (features(layers[path])[0],)} if alone else shapes
    pairs, more = peft_experts.read_stacks(of_experts, stacks, config, str(file))
    faults += more
    for path, (A, B, branches) in pairs.items():
        faults += _check_stack(f"{file}: {path}", A, B, rank_of(config, path) * branches)
    if not more:
        missing = (expected & stacks.keys()) - pairs.keys()
        faults += [AdapterError(f"{file}: {path}", "is missing", "the adapter is incomplete") for path in missing]
    for path, shapes in wanted.items():
        place = f"{file}: {PREFIX}{path}"
        faults += _check_copy(place, found.get(path, {}), layers[path])
        faults += _check_layer(place, found.get(path, {}), shapes, rank_of(config, path))
    found |= {path: {"lora_A.weight": A, "lora_B.weight": B} for path, (A, B, _) in pairs.items()}
    if not found and not faults:
        faults.append(AdapterError(str(file), "holds no tensors", "train again"))
    if faults:
        raise Faults(sorted(faults, key=str)) if len(faults) > 1 else faults[0]
    return {path: found[path] for path in layers if path in found}


def _parse_name(name: str) -> tuple[str, str]:
    """base_model.model.PATH.lora_A.weight -> (PATH, lora_A.weight); ("", "") for other names."""
    for end in ENDS:
        if name.startswith(PREFIX) and name.endswith(f".{end}"):
            return name[len(PREFIX) : -len(end) - 1], end
    return "", ""


def _wanted_vocabulary(
    folder: Path, model: nn.Module, config: Mapping[str, Any]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What the file must hold of embedding and head where they are trained whole, or rows of theirs."""
    layers = by_file_path(model, vocabulary(model))
    one = by_file_path(model, {path: vocabulary(model)[path] for path in tied(model)})
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    named = list(layers)
    saved = config.get("modules_to_save") or []
    if config.get("ensure_weight_tying") and any(path.endswith(name) for path in one for name in saved):
        saved = [*saved, *one]  # PEFT names the one and saves both
    for key, names in (
        ("modules_to_save", saved),
        ("trainable_token_indices", token_indices(config)),
    ):
        for name in names:
            paths = [path for path in named if path == name or path.endswith(f".{name}")]
            if not paths:
                place, known = f"{folder / 'adapter_config.json'}: {key}", ", ".join(named)
                raise AdapterError(place, f"{name} is no embedding or head", f"this model has {known}")
            for path in paths:
                whole = shape_of(layers[path])
                fault = (
                    wrong_ids(names[name], whole[0] + len(new_tokens(model)))
                    if key == "trainable_token_indices"
                    else None
                )
                if fault:
                    raise AdapterError(f"{folder / 'adapter_config.json'}: {key}", fault, "check the base")
                rows: dict[str, tuple[int, ...]] = (
                    {"weight": whole} if key == "modules_to_save" else {ROWS: (len(names[name]), whole[1])}
                )
                head = isinstance(layers[path], (nn.Linear, FrozenLinear))
                if key == "modules_to_save" or not (head and path in one):  # a tied head has the embedding's rows
                    wanted[path] = rows
    return wanted


def _shapes(layer: Any, config: Mapping[str, Any], path: str, linear: bool) -> dict[str, tuple[int, ...]]:
    """What the file must hold of a layer with an adapter; linear: it is one, and no router."""
    rank, (outputs, inputs) = rank_of(config, path), features(layer)
    if isinstance(layer, (nn.Embedding, FrozenEmbedding)):
        return {"lora_embedding_A": (rank, inputs), "lora_embedding_B": (outputs, rank)}
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    if config.get("use_dora") and linear:
        shapes["lora_magnitude_vector"] = (outputs,)
    if config.get("bias", "none") != "none" and linear and layer.bias is not None:
        shapes["base_layer.bias"] = (outputs,)
    return shapes


def _check_copy(place: str, tensors: dict[str, Tensor], layer: nn.Module) -> list[AdapterError]:
    """PEFT repeats the base's embedding beside an adapter on it: it must be this base's, and is left out."""
    copy = tensors.pop("base_layer.weight", None)
    if copy is None:
        return []
    own = matrix_of(layer) if copy.shape == shape_of(layer) else None
    if own is None or (copy.float() - own).norm() > SAME_MATRIX * own.norm():
        return [AdapterError(f"{place}.base_layer.weight", "is another matrix than this base's", "give its own base")]
    return []


def _check_stack(place: str, A: Tensor, B: Tensor, rank: int) -> list[AdapterError]:
    if A.shape[1] != rank:
        return [AdapterError(place, f"has rank {A.shape[1]}, adapter_config.json says {rank}", "check r")]
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        return [AdapterError(place, "holds NaN or infinity", "train again, or use an older checkpoint")]
    return []


def _check_layer(
    place: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> list[AdapterError]:  # fmt: skip
    faults = []
    for end in shapes.keys() - tensors.keys():
        faults.append(AdapterError(f"{place}.{end}", "is missing", "the adapter is incomplete"))
    for end, tensor in tensors.items():
        if end not in shapes:
            faults.append(AdapterError(f"{place}.{end}", "has no place in this adapter", "check adapter_config.json"))
        elif tuple(tensor.shape) != shapes[end]:
            told = f"rank {rank} on this model" if end.startswith("lora") else "this model"
            what = f"has shape {list(tensor.shape)}, {told} needs {list(shapes[end])}"
            faults.append(AdapterError(f"{place}.{end}", what, "check r and the base"))
        elif not bool(torch.isfinite(tensor).all()):
            what = "holds NaN or infinity"
            faults.append(AdapterError(f"{place}.{end}", what, "train again, or use an older checkpoint"))
    return faults
