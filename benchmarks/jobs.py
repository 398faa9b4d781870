"""What all sides of a comparison train: the token rows of each step, the adapter's start, the model's weights.

A job is written into a folder by lorafit itself, so that a peer gets its very tokens: steps.json (for each step its
rows: ids, and which of them are trained), start.safetensors (A of every layer), facts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sides import Gate
from benchmarks.trainee import Trainee, random_pack, tokens_of

DENSE = 4, 512  # rows, tokens of each


def packs_of(kind: str, trainee: Trainee) -> Callable[[int], list[Any]]:
    """The packs of each step, by its number: random ids, all trained (`dense`), or the trainee's own rows (`chat`)."""
    dense = [random_pack(trainee.model.config.vocab_size, *DENSE)]
    return lambda number: dense if kind == "dense" else trainee.packs(number)


def take_steps(spec: dict[str, Any], gate: Gate) -> None:
    """lorafit's side."""
    trainee = Trainee(**spec["options"])
    packs = packs_of(spec["kind"], trainee)
    for number in gate.steps():
        found = packs(number)
        gate.answer(trainee.step(found), tokens_of(found))


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Write the first job["steps"] steps into job["folder"]; what a peer and the reader must know of them."""
    from safetensors.torch import save_file

    trainee, folder = Trainee(**job["options"]), Path(job["folder"])
    packs = packs_of(job["kind"], trainee)
    steps = [_rows(packs(number)) for number in range(job["steps"])]
    sizes = {len(rows) for rows in steps}
    assert len(sizes) == 1, f"steps of {sizes} rows: give a multiple of the batch"
    (folder / "steps.json").write_text(json.dumps(steps))
    matrices = {name: parameter.detach().contiguous() for name, parameter in trainee.named.items()}
    save_file({name: value for name, value in matrices.items() if name.endswith(".A")}, folder / "start.safetensors")
    config, shape = trainee.config, trainee.model.config
    paths = [name.removesuffix(".A") for name in matrices if name.endswith(".A")]
    facts = {key: getattr(config, key) for key in ("compute", "rank", "alpha", "lr", "weight_decay", "clip_norm")}
    facts |= {key: getattr(config, key) for key in ("micro_batch_tokens", "checkpointing", "threads")}
    facts["linear"] = sum(len(matrices[f"{path}.B"]) * matrices[f"{path}.A"].shape[1] for path in paths)
    facts["adapter"] = sum(value.numel() for value in matrices.values())
    facts |= {"vocabulary": shape.vocab_size, "hidden": shape.hidden_size, "inner": shape.intermediate_size}
    facts["rows"] = sizes.pop()
    facts["tokens"] = sum(len(row["ids"]) for rows in steps for row in rows) / len(steps)
    facts["trained"] = sum(sum(row["trained"]) for rows in steps for row in rows) / len(steps)
    return facts


def _rows(packs: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows in the packs of one step, the longest first."""
    found = []
    for pack in packs:
        trained = np.zeros(len(pack.ids_T), dtype=bool)
        trained[pack.predictors_N + 1] = True
        for start, end in pairwise(pack.documents):
            found.append({"ids": pack.ids_T[start:end].tolist(), "trained": trained[start:end].tolist()})
    return sorted(found, key=lambda row: -len(row["ids"]))


def convert(job: dict[str, Any]) -> None:
    """The weights of a GGUF file, as transformers unpacks them, in a Hugging Face folder of job["compute"]'s dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file, dtype = Path(job["model"]), {"bf16": torch.bfloat16, "fp32": torch.float32}[job["compute"]]
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config).float()  # one loaded from GGUF can be neither saved nor trained
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(dtype).save_pretrained(job["folder"])
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(job["folder"])
