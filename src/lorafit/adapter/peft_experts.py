"""Adapters on experts in PEFT's files: two layouts, both written and read.

    fused    PATH.base_layer.lora_A.weight (E r, I), ....lora_B.weight (O, r E)    of gate_up_proj
             PATH.lora_A.weight,             ....lora_B.weight                     of down_proj, or of the only one
    split    PATH.7.gate_proj.lora_A.weight (r, I), ....lora_B.weight (O / 2, r)   of each expert; gate, up and down

PATH is the experts' module. In the fused layout A is expert-major and B rank-major: A.view(E, r, I), B.view(O, r, E).
Llama 4's module holds (E, inputs, outputs) and does not say so; PEFT then takes one for the other, so that its A is our
B and its B our A. The split layout halves B of gate_up_proj, and gate and up share A; read, the two make one adapter of
twice the rank. Source: PEFT 0.21's ParamWrapper, and its conversion of adapters of transformers 4.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.experts import LoraStack
from lorafit.errors import AdapterError
from lorafit.frozen.stack import FrozenStack

GATE_UP, DOWN = "gate_up_proj", "down_proj"
SPLIT = {"gate_proj": GATE_UP, "up_proj": GATE_UP, "down_proj": DOWN}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # its names, in modules called block_sparse_moe
# Families whose experts PEFT has as a whole only: their published files have no single ones, but for Qwen 2 MoE's.
WHOLE = ("gpt_oss", "llama4_text", "granitemoe", "mistral4", "qwen3_5_moe_text", "gemma4_text", "qwen2_moe")
SINGLE = re.compile(r"(?P<path>.+)\.(?P<expert>\d{1,5})\.(?P<matrix>gate_proj|up_proj|down_proj|w1|w2|w3)")
# Linear layers of these names PEFT takes for experts' in models that have some, unless they are named as parameters.
TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def fused_tensors(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of the stacks among `layers`, in the fused layout."""
    for path, members in _by_module(layers).items():
        for place, layer in enumerate(members):
            inside = ".base_layer" * (len(members) - 1 - place)
            first, second = _turned(layer.base, layer.adapter.A, layer.adapter.B)
            yield f"{path}{inside}.lora_A.weight", first.detach().reshape(-1, first.shape[2]).contiguous()
            yield f"{path}{inside}.lora_B.weight", second.detach().permute(1, 2, 0).reshape(len(second[0]), -1)


def fused_only(model: nn.Module) -> str:
    """Whose experts other programs have as a whole only: the family, or a text model inside a multimodal one, whose
    model_type is all that PEFT looks at; "" where they take single ones too."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    return f"{kind} in a multimodal model" if hasattr(model, "peft_paths") else kind if kind in WHOLE else ""


def split_tensors(layers: Mapping[str, nn.Module], model_type: str) -> Iterator[tuple[str, Tensor]]:
    """The same in the split layout."""
    mixtral = model_type == "mixtral"
    for path, layer in layers.items():
        if not isinstance(layer, LoraStack):
            continue
        module, _, name = path.rpartition(".")
        module = module.replace(".mlp.", ".block_sparse_moe.") if mixtral else module
        for expert in range(layer.base.experts):
            A, B = layer.adapter.A[expert].detach(), layer.adapter.B[expert].detach()
            halves = (
                [("down_proj", B)] if name == DOWN else list(zip(("gate_proj", "up_proj"), B.chunk(2), strict=True))
            )
            for matrix, half in halves:
                inside = f"{module}.{expert}.{MIXTRAL[matrix] if mixtral else matrix}"
                yield f"{inside}.lora_A.weight", A.clone()
                yield f"{inside}.lora_B.weight", half.clone()


def parameter_paths(layers: Mapping[str, nn.Module], choosing: Collection[str]) -> list[str]:
    """Which of these layers PEFT must be told as parameters, by the parameter's path: experts, what chooses among
    them (`choosing`), and linear layers that it would take for experts."""
    found = []
    for path, layer in layers.items():
        if isinstance(layer, (LoraStack, FrozenStack)):
            found.append(path)
        elif path in choosing or (choosing and path.rsplit(".", 1)[-1] in TAKEN):
            found.append(f"{path}.weight")
    return found


def shortest(paths: list[str], every: list[str]) -> list[str]:
    """These parameters by their last two or three names, where those of `every` that end so are all among them."""
    chosen, named = set(paths), set()
    for path in paths:
        short = ".".join(path.split(".")[-3 if path.endswith(".weight") else -2 :])
        alike = {other for other in every if _ends(other, short)}
        named.add(short if alike <= chosen else path)
    return sorted(named)


def name_split(config: dict[str, Any], layers: Mapping[str, nn.Module], model_type: str) -> None:
    """Change a configuration of the fused layout into the split one's: experts are linear layers by name again."""
    stacks = {path.rpartition(".")[2] for path, layer in layers.items() if isinstance(layer, LoraStack)}
    own = [name for name in config["target_parameters"] or [] if name.rpartition(".")[2] in stacks]
    split = [name for name, whole in SPLIT.items() if whole in stacks]
    names = {f"experts.{MIXTRAL[name] if model_type == 'mixtral' else name}" for name in split}
    config["target_modules"] = sorted({*config["target_modules"], *names})
    config["target_parameters"] = [name for name in config["target_parameters"] or [] if name not in own] or None


def named_split(target: str, stacks: Iterable[str]) -> set[str]:
    """The stacks that a name of the split layout, such as experts.up_proj, stands for."""
    head, _, name = target.rpartition(".")
    plain = {theirs: ours for ours, theirs in MIXTRAL.items()}
    whole = SPLIT.get(plain.get(name, name)) if head == "experts" else None
    return {path for path in stacks if path.rpartition(".")[2] == whole}


def belongs(path: str, stacks: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor's path is of experts: of their module, of what PEFT puts around it, or of a single one."""
    return _module_of(path) in {stack.rpartition(".")[0] for stack in stacks}


def _module_of(path: str) -> str:
    """The experts' module of a tensor's path, under the name that transformers 5 gives it."""
    match = SINGLE.fullmatch(path)
    module = match["path"] if match else path.removesuffix(".base_layer")
    return (
        module.replace(".block_sparse_moe.experts", ".mlp.experts") if match and match["matrix"][0] == "w" else module
    )


def read_stacks(
    halves: Mapping[str, Mapping[str, Tensor]], stacks: Mapping[str, nn.Module], config: Mapping[str, Any], file: str
) -> tuple[dict[str, tuple[Tensor, Tensor, int]], list[AdapterError]]:
    """(A (E, r, I), B (E, O, r), branches) by stack, and the faults. halves: lora_A and lora_B by tensors' path.

    branches: 2 where gate and up had an adapter each, so that r is twice what the configuration says.
    """
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    faults: list[AdapterError] = []
    by_module: dict[str, dict[str, Mapping[str, Tensor]]] = defaultdict(dict)
    for path, pair in halves.items():
        for half in {"lora_A", "lora_B"} - set(pair):
            faults.append(AdapterError(f"{file}: {path}.{half}.weight", "is missing", "the adapter is incomplete"))
        by_module[_module_of(path)][path] = pair
    if faults:
        return {}, faults
    for module, pairs in by_module.items():
        own = {path: stack for path, stack in stacks.items() if path.rpartition(".")[0] == module}
        single = {path: SINGLE.fullmatch(path) for path in pairs}
        if all(single.values()):
            read = _from_split(pairs, own, module, file)
        elif not any(single.values()):
            read = _from_fused(pairs, own, module, config, file)
        else:
            fault = AdapterError(f"{file}: {module}", "has adapters of both layouts", "save it again")
            read = {}, [fault]
        found |= read[0]
        faults += read[1]
    return found, faults


def _from_fused(
    pairs: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, nn.Module], module: str, config: Mapping[str, Any],
    file: str,
) -> tuple[dict[str, tuple[Tensor, Tensor, int]], list[AdapterError]]:  # fmt: skip
    named = [path for path in own if any(_ends(path, target) for target in config.get("target_parameters") or [])]
    inner, outer = f"{module}.base_layer", module
    if set(pairs) == {inner, outer}:
        places = {f"{module}.{GATE_UP}": inner, f"{module}.{DOWN}": outer}
    elif set(pairs) == {outer} and len(named) == 1:
        places = {named[0]: outer}
    else:
        what = f"has adapters of {len(pairs)} parameters, and target_parameters names {len(named)}"
        return {}, [AdapterError(f"{file}: {module}", what, "save it again")]
    found, faults = {}, []
    for path, place in places.items():
        stack = _base(own[path])
        inputs, outputs = _sizes(stack)
        first, second = pairs[place]["lora_A"], pairs[place]["lora_B"]
        rank = first.shape[0] // stack.experts if first.dim() == 2 else 0
        wanted = (rank * stack.experts, inputs), (outputs, rank * stack.experts)
        if not rank or (tuple(first.shape), tuple(second.shape)) != wanted:
            what = f"has shapes {list(first.shape)} and {list(second.shape)}"
            remedy = f"{stack.experts} experts need [r {stack.experts}, {inputs}] and [{outputs}, r {stack.experts}]"
            faults.append(AdapterError(f"{file}: {place}", what, remedy))
            continue
        A, B = first.view(stack.experts, rank, inputs), second.reshape(outputs, rank, stack.experts).permute(2, 0, 1)
        found[path] = (*_turned(stack, A, B), 1)
    return found, faults


def _from_split(
    pairs: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, nn.Module], module: str, file: str
) -> tuple[dict[str, tuple[Tensor, Tensor, int]], list[AdapterError]]:
    matrices: dict[str, dict[int, Mapping[str, Tensor]]] = defaultdict(dict)
    plain = {name: matrix for matrix, name in MIXTRAL.items()}
    for path, pair in pairs.items():
        match = SINGLE.fullmatch(path)
        assert match, "these are of single experts"
        matrices[plain.get(match["matrix"], match["matrix"])][int(match["expert"])] = pair
    found, faults = {}, []
    for path, layer in own.items():
        stack, name = _base(layer), path.rpartition(".")[2]
        parts = [part for part, whole in SPLIT.items() if whole == name]
        if not any(part in matrices for part in parts):
            continue
        missing = [
            f"{expert}.{part}" for part in parts for expert in range(stack.experts) if expert not in matrices[part]
        ]
        if missing or any(len(matrices[part]) > stack.experts for part in parts):
            what = f"{missing[0]} is missing" if missing else f"has more than {stack.experts} experts"
            faults.append(AdapterError(f"{file}: {module}", what, "the adapter is incomplete"))
            continue
        shares = [[matrices[part][expert] for expert in range(stack.experts)] for part in parts]
        rank, rows = shares[0][0]["lora_A"].shape[0], stack.out_features // len(parts)
        wanted = {"lora_A": (rank, stack.in_features), "lora_B": (rows, rank)}
        if stack.transposed or any(
            tuple(pair[half].shape) != shape for share in shares for pair in share for half, shape in wanted.items()
        ):
            faults.append(
                AdapterError(f"{file}: {path}", f"is not all of shapes {list(wanted.values())}", "save again")
            )
            continue
        A = torch.stack([torch.cat([share[e]["lora_A"] for share in shares]) for e in range(stack.experts)])
        B = torch.stack([torch.block_diag(*(share[e]["lora_B"] for share in shares)) for e in range(stack.experts)])
        found[path] = A, B, len(parts)
    return found, faults


def _by_module(layers: Mapping[str, nn.Module]) -> dict[str, list[LoraStack]]:
    """The adapted stacks of each experts module, in the module's order."""
    found: dict[str, list[LoraStack]] = defaultdict(list)
    for path, layer in layers.items():
        if isinstance(layer, LoraStack):
            found[path.rpartition(".")[0]].append(layer)
    return found


def _base(layer: nn.Module) -> FrozenStack:
    base = layer.base if isinstance(layer, LoraStack) else layer
    assert isinstance(base, FrozenStack), "experts are stacks"
    return base


def _sizes(stack: FrozenStack) -> tuple[int, int]:
    """What PEFT takes for the inputs and outputs."""
    sizes = stack.in_features, stack.out_features
    return sizes if stack.declared else sizes[::-1]


def _turned(stack: FrozenStack, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Our pair for PEFT's, or PEFT's for ours."""
    return (A, B) if stack.declared else (B.transpose(1, 2), A.transpose(1, 2))


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
