"""A base quantised to NF4 here, written as the Hugging Face folder that transformers and bitsandbytes load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.errors import ConfigError
from lorafit.formats.bitsandbytes import Nf4Parts, quantization_config, write_nf4
from lorafit.formats.folders import commit
from lorafit.formats.safetensors import SINGLE, write_safetensors
from lorafit.frozen.packed import PackedWeight
from lorafit.frozen.stack import FrozenStack
from lorafit.frozen.weight import FrozenWeight
from lorafit.kernels import ops


def save_nf4(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model of `lorafit.load(..., base="nf4")`: config.json, model.safetensors, its tokenizer.

    NF4 layers are written byte for byte in bitsandbytes' layout; what is packed otherwise is unpacked to 16 bits, and
    so are experts, which bitsandbytes does not read in 4 bits. The folder is complete or absent. Raises
    ConfigError when no layer is in NF4 or the folder exists.
    """
    folder, config = Path(folder), model.config
    if hasattr(model, "peft_paths"):
        raise ConfigError(str(folder), "the model is the text part of another", "quantise the text model's own folder")
    tensors = _tensors(model)
    if not any(name.endswith(".absmax") for name in tensors):
        raise ConfigError(str(folder), "the model has no layer in NF4", 'load it with base="nf4"')
    if folder.exists():
        raise ConfigError(str(folder), "exists already", "name another folder")
    about: dict[str, Any] = {**config.to_dict(), "quantization_config": quantization_config()}
    about |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}

    def write(path: Path) -> None:
        (path / "config.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_safetensors(path / SINGLE, tensors)
        tokenizer: Any = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    folder.parent.mkdir(parents=True, exist_ok=True)
    commit(folder, write)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the file by its name: quantised layers in parts, the rest in 16 bits, a tied matrix once."""
    found: dict[str, Tensor] = {}
    stacks = [path for path, module in model.named_modules() if isinstance(module, FrozenStack)]
    for path, module in model.named_modules():
        if isinstance(module, FrozenStack):
            found[path] = module.dense(torch.bfloat16)
            if module.bias is not None:
                found[f"{path}_bias"] = module.bias.detach().bfloat16()
        elif any(path.startswith(f"{stack}.") for stack in stacks):
            continue  # its weights are in there already
        elif isinstance(module, PackedWeight) and module.format == ops.NF4:
            stored = module.stored
            assert stored.scales is not None, "NF4 has scales"
            shape = (module.out_features, module.in_features)
            parts = Nf4Parts(stored.data, stored.scales, stored.nested, stored.offset, shape)
            found |= write_nf4(path, parts, "bfloat16")
        elif isinstance(module, FrozenWeight):
            found[path] = module.dense(torch.bfloat16)
        else:
            own = module.named_parameters(recurse=False)
            found |= {f"{path}.{name}": parameter.detach().bfloat16() for name, parameter in own}
    return found
