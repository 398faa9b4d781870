"""Where each tensor of a model lies in a GGUF file: its name there, and the order of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_linear import Gathered, arrange
from lorafit.formats.names import FAMILIES, Entry, architecture_of, entries, hf_names
from lorafit.model.sources import WeightSource

# What llama.cpp's converter makes of models whose type is not the name of a GGUF family here.
ALSO = {"mistral": "llama", "mixtral": "llama"}
GATE_UP = ("gate_proj", "up_proj")  # of experts; transformers has both in one tensor


@dataclass(frozen=True)
class Placement:
    """GGUF's side of a model."""

    architecture: str
    entries: Mapping[str, Entry]
    """By Hugging Face parameter name."""

    def of(self, path: str, place: str) -> list[Entry]:
        """Where a layer's weight lies: one tensor, or the two of experts' gate and up, whose outputs follow each other.

        Raises ModelError when GGUF has no name for it.
        """
        module, _, own = path.rpartition(".")
        alternate = getattr(FAMILIES[self.architecture], "gates_alternate", False)
        fused = [f"{module}.{name}" for name in GATE_UP] if own == "gate_up_proj" and not alternate else []
        for names in ([f"{path}.weight"], [path], fused):
            if names and all(name in self.entries for name in names):
                found = [self.entries[name] for name in names]
                if isinstance(found[0], Gathered):
                    what = f"lies in two tensors of GGUF's {self.architecture} files, which is not written yet"
                    raise ModelError(f"{place}: {path}", what, "export to peft, or merge to a folder")
                return found
        raise ModelError(f"{place}: {path}", f"has no name in GGUF's {self.architecture} files", "merge it instead")


def placement(path: Path, source: WeightSource) -> Placement:
    """Of the GGUF file at `path`, or of the file that llama.cpp's converter would make of the folder there.

    Raises ModelError for a model type that has no GGUF architecture here.
    """
    if path.is_file():
        gguf = read_gguf(path)
        return Placement(architecture_of(gguf), arrange(entries(gguf), source.config, path))
    kind = source.config["model_type"]
    architecture = ALSO.get(kind) or next(
        (name for name, family in FAMILIES.items() if family.model_type == kind), None
    )
    if architecture is None:
        what = f"{kind!r} has no GGUF architecture that lorafit writes"
        raise ModelError(f"{source.place}: model_type", what, "export to peft, or merge and convert with llama.cpp")
    family = FAMILIES[architecture]
    names_of = hf_names(architecture, int(source.config["num_hidden_layers"]))
    by_name = {name: tensor for tensor, name in names_of.items() if ".ssm_in." not in tensor}  # of older files alone
    found = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in source.shapes.items():
        if len(shape) != 3:
            shapes[name] = shape
            continue
        module, _, own = name.rpartition(".")
        names = [f"{module}.{part}" for part in GATE_UP] if own == "gate_up_proj" else [name]
        turned = name not in getattr(source, "stacks", {}) and getattr(family, "experts_last", False)
        outputs, inputs = shape[:0:-1] if turned else shape[1:]
        shapes |= dict.fromkeys(names, (shape[0], outputs // len(names), inputs))
    for name, shape in shapes.items():
        if name in by_name:
            tensor = by_name[name]
            interleaved = _heads(source.config).get(tensor.split(".")[-2], 0) if family.interleaved else 0
            found[name] = Entry(tensor, shape, interleaved, family.plus(tensor.split(".")[-2]))
    return Placement(architecture, arrange(found, source.config, path))


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    heads = int(config["num_attention_heads"])
    return {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}
