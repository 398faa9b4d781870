"""An adapter as mlx-lm reads it: `mlx_lm.generate --model BASE --adapter-path FOLDER`.

    adapters.safetensors    model.layers.3.self_attn.q_proj.lora_a (in, r), ....lora_b (r, out)
    adapter_config.json     fine_tune_type, num_layers, lora_parameters: rank, scale, dropout, keys

mlx-lm adapts the last num_layers layers at every key, all with one rank and one scale: y + scale * (x lora_a) lora_b.
Source: mlx-lm, mlx_lm/tuner/utils.py (load_adapters, linear_to_lora_layers) and lora.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorafit.adapter.combine import LowRank
from lorafit.errors import AdapterError
from lorafit.formats.safetensors import open_file, write_safetensors

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


def write_mlx(folder: Path, updates: Mapping[str, LowRank], layers: int, base: str) -> None:
    """Write both files. updates: of one rank, at scale 1; layers: of the model."""
    tensors: dict[str, Tensor] = {}
    keys, first = set(), layers
    for path, update in updates.items():
        if update.A.ndim == 3:
            raise AdapterError(path, "adapts experts, which is not written for mlx-lm", "merge it instead")
        number, key = _split(path)
        keys.add(key)
        first = min(first, number)
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = update.A.T.contiguous(), update.B.T.contiguous()
    rank = next(iter(updates.values())).rank
    config = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": layers - first,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_safetensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_mlx(folder: Path) -> dict[str, LowRank]:
    """The updates in an mlx-lm adapter by layer path, the scale in B, as mlx-lm would apply them.

    Raises AdapterError for another kind of adapter, and where mlx-lm would adapt a layer that the file leaves out.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale, keys = float(config["lora_parameters"]["scale"]), config["lora_parameters"]["keys"]
        kind, rank = config.get("fine_tune_type", "lora"), int(config["lora_parameters"]["rank"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(str(folder / CONFIG), f"does not read: {error}", "export it again") from None
    if kind != "lora":
        raise AdapterError(f"{folder / CONFIG}: fine_tune_type", f"is {kind!r}", "only lora is read")
    shards = open_file(folder / WEIGHTS, AdapterError)
    updates = {}
    for name in shards.shapes:
        path, _, half = name.rpartition(".")
        if half == "lora_a":
            A, B = shards.load(name).T.float(), shards.load(f"{path}.lora_b").T.float()
            if _split(path)[1] not in keys or len(A) != rank or B.shape[1] != rank:
                raise AdapterError(
                    f"{folder / WEIGHTS}: {name}", "does not fit to the configuration", "export it again"
                )
            updates[path] = LowRank(A.contiguous(), (B * scale).contiguous())
    return updates


def _split(path: str) -> tuple[int, str]:
    """model.layers.3.self_attn.q_proj -> (3, self_attn.q_proj). Raises AdapterError for a layer that is in no block."""
    parts = path.split(".")
    if "layers" not in parts[:-2] or not parts[parts.index("layers") + 1].isdigit():
        raise AdapterError(path, "is in no decoder layer, and mlx-lm adapts those alone", "merge it instead")
    at = parts.index("layers") + 1
    return int(parts[at]), ".".join(parts[at + 1 :])
