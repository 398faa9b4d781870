"""PEFT with the exported folder on transformers' own model, against ours."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Size

from lorafit import console, machine
from lorafit.adapter.merge import grown
from lorafit.errors import AdapterError
from lorafit.export.opened import Opened
from lorafit.export.probes import Probe
from lorafit.export.verify import OURS, Ours, Verdict, against_model, floor
from lorafit.model.plain import plain_model


def against_peft(opened: Opened, mine: Ours, found: Sequence[Probe], folder: Path, place: str) -> Verdict | None:
    """None where PEFT is not installed, or the model in fp32 would not fit into memory. Raises AdapterError."""
    if find_spec("peft") is None:
        return None
    needed = 4 * sum(Size(shape).numel() for shape in opened.source.shapes.values())
    if needed > 0.8 * machine.available_memory():
        console.warn(f"not tried in PEFT: the model in fp32 takes {console.gigabytes(needed)}, more than is free")
        return None
    import peft

    plain = plain_model(opened.source, opened.load)
    if grown(opened.model):
        plain.resize_token_embeddings(max(grown(opened.model).values()))
    model: Any = peft.PeftModel.from_pretrained(plain, folder).eval()
    loaded = {name for name, _ in model.named_parameters() if ".lora_" in name}
    if not loaded:
        raise AdapterError(place, "PEFT finds no layer for it", OURS)
    return against_model(mine, found, model, "PEFT", floor("F32"), place)
