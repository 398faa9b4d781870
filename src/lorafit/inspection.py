"""What a path is, and what this machine offers: `lorafit info` and `lorafit doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafit import machine
from lorafit.errors import ConfigError


def describe(path: Path) -> dict[str, Any]:
    """Facts about a model, adapter, run or checkpoint. Raises ConfigError for anything else."""
    if path.is_file():
        return _gguf_adapter(path) or _model(path)
    readers = (
        ("run.yaml", _run),
        ("Modelfile", _ollama),
        ("adapters.safetensors", _mlx),
        ("adapter_config.json", _adapter),
        ("state.json", _checkpoint),
    )
    for name, reader in readers:
        if (path / name).is_file():
            return reader(path)
    if (path / "config.json").is_file():
        return _model(path)
    what = "does not exist" if not path.exists() else "is no model, adapter, run or checkpoint"
    raise ConfigError(str(path), what, "give a .gguf file, a model folder, an adapter or a run's folder")


def _model(path: Path) -> dict[str, Any]:
    from lorafit.model.sources import open_source

    source = open_source(path)
    parameters = sum(_size(shape) for shape in source.shapes.values())
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size", "max_position_embeddings")  # fmt: skip
    tokenizer = source.tokenizer(None)
    return {
        "kind": "model",
        "architecture": source.config["model_type"],
        **({"part_of": source.part_of} if source.part_of else {}),
        "parameters": parameters,
        "bytes_by_format": source.bytes_by_format(),
        "base": base_of(source.quantised),
        **{key: source.config[key] for key in keys if key in source.config},
        "chat_template": tokenizer.has_template,
        "tokenizer": tokenizer.fingerprint(),
    }


def base_of(quantised: bool) -> dict[str, str]:
    """How `--base auto` stores a model's matrices, which kernels read them, and why."""
    from lorafit.config import Resolved, TrainConfig
    from lorafit.kernels import native
    from lorafit.settings import settle_for_machine

    settled, (kernels, why) = settle_for_machine(Resolved(TrainConfig()), quantised), native.describe()
    return {"stored": settled.config.base, "why": settled.origin["base"], "kernels": f"{kernels} ({why})"}


def _adapter(path: Path) -> dict[str, Any]:
    from lorafit.adapter.peft_config import in_words, read_config
    from lorafit.errors import AdapterError
    from lorafit.formats.safetensors import open_file
    from lorafit.frozen.fingerprint import digest

    config = read_config(path)
    shapes = open_file(path / "adapter_model.safetensors", AdapterError).shapes
    about = _read_object(path / "lorafit.json") if (path / "lorafit.json").is_file() else {}
    base = about.get("base")
    return {
        "kind": "adapter",
        "base": config.get("base_model_name_or_path"),
        "method": about.get("method") or in_words(config),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": config.get("target_modules"),
        **{key: config[key] for key in ("target_parameters", "modules_to_save") if config.get(key)},
        "tensors": len(shapes),
        "parameters": sum(_size(shape) for shape in shapes.values()),
        "architecture": base.get("architecture") if isinstance(base, dict) else None,
        "data": about.get("data"),
        "fingerprints": {
            "base": digest(base) if isinstance(base, dict) else None,
            **{key: about.get(key) for key in ("tokenizer", "template")},
        },
    }


def _gguf_adapter(path: Path) -> dict[str, Any] | None:
    """A LoRA adapter for llama.cpp; None for another file."""
    from lorafit.formats.gguf import read_gguf

    if path.suffix != ".gguf":
        return None
    gguf = read_gguf(path)
    if gguf.value("general.type", str, "model") != "adapter":
        return None
    ranks = sorted({tensor.shape[-2] for name, tensor in gguf.tensors.items() if name.endswith(".lora_a")})
    return {
        "kind": "GGUF adapter",
        "architecture": gguf.value("general.architecture", str),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "alpha": gguf.value("adapter.lora.alpha", float),
        "tensors": len(gguf.tensors),
        "parameters": sum(_size(tensor.shape) for tensor in gguf.tensors.values()),
        "chat_template": "tokenizer.chat_template" in gguf.metadata,
    }


def _mlx(path: Path) -> dict[str, Any]:
    """An adapter in mlx-lm's layout."""
    from lorafit.export.mlx import read_mlx

    updates, config = read_mlx(path), _read_object(path / "adapter_config.json")
    return {
        "kind": "mlx-lm adapter",
        "base": config.get("model"),
        "rank": config["lora_parameters"]["rank"],
        "scale": config["lora_parameters"]["scale"],
        "target_modules": config["lora_parameters"]["keys"],
        "layers": len(updates),
        "parameters": sum(update.A.numel() + update.B.numel() for update in updates.values()),
    }


def _ollama(path: Path) -> dict[str, Any]:
    """A folder with Ollama's Modelfile."""
    lines = (path / "Modelfile").read_text(encoding="utf-8").splitlines()
    first = dict(line.split(" ", 1) for line in lines if line.startswith(("FROM ", "ADAPTER ")))
    adapter = path / first.get("ADAPTER", "")
    own = _gguf_adapter(adapter) if adapter.is_file() else None
    return {"kind": "Ollama model", "base": first.get("FROM"), "adapter": own}


def _run(path: Path) -> dict[str, Any]:
    from lorafit.config import read_yaml
    from lorafit.training.checkpoint import Checkpoints

    report = path / "report.json"
    keys = ("base_loss", "adapter_loss", "steps", "tokens", "training_seconds", "peak_memory_bytes")
    figures = _read_object(report) if report.is_file() else {}
    return {
        "kind": "run",
        "finished": report.is_file(),
        "checkpoints": Checkpoints(path).steps(),
        "figures": {key: figures[key] for key in keys if key in figures},
        "settings": read_yaml(path / "run.yaml"),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from lorafit.formats.folders import complete

    state = _read_object(path / "state.json")
    progress = state.get("progress")
    steps = progress if isinstance(progress, dict) else {}
    return {"kind": "checkpoint", "complete": complete(path), **steps, "identity": state.get("identity")}


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(file), f"does not read: {error}", "the file is damaged") from None
    if not isinstance(found, dict):
        raise ConfigError(str(file), f"holds {type(found).__name__}, not an object", "the file is damaged")
    return found


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def doctor() -> dict[str, Any]:
    """The machine, the versions, and which kernels run and why."""
    from lorafit.kernels import native, ops

    fast = machine.fast_bf16()
    kernels, why_kernels = native.describe()
    return {
        "machine": machine.describe(),
        "memory": {"available_bytes": machine.available_memory()},
        "versions": machine.versions(),
        "compute": "bf16" if fast else "fp32",
        "why": "the processor has fast bf16 products" if fast else "the processor has no fast bf16 products",
        "kernels": {
            "in_use": kernels,
            "why": why_kernels,
            "processor_paths": native.paths(),
            "formats": [*ops.CODES],
            "threads": "torch's own OpenMP team" if native.shares_threads() else "a second OpenMP team beside torch's",
        },
        "gpu": "not used yet",
    }
