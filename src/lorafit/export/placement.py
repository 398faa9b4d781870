"""Where a model's parameters lie in a GGUF file: their tensors, the order of rows, and what takes an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_experts import join
from lorafit.formats.gguf_linear import arrange
from lorafit.formats.gguf_pieces import GATE_UP, Piece, pieces
from lorafit.formats.names import FAMILIES, Entry, Family, architecture_of, entries, hf_names
from lorafit.model.sources import WeightSource

# What llama.cpp's converter makes of models whose type is not the name of a GGUF family here.
ALSO = {"mistral": "llama", "mixtral": "llama", "olmo3": "olmo2"}
# What llama.cpp's converter does not know: MinistralForCausalLM is none of its conversion/__init__.py's names, and the
# llama and mistral3 architectures have no sliding window.
UNKNOWN = {"ministral": "llama.cpp knows, whose Mistrals have no sliding windows"}
# What llama.cpp multiplies without asking for adapters, though it takes a file that has some there; and what its
# versions differ in: an expert's scale is multiplied into the update or is not. With what can be adapted instead.
# Source: its src/models/deepseek2.cpp and gemma4.cpp, of build 11549; measured in proofs/test_export_*.py.
LATENT = ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "output")
NOT_ASKED = "and llama.cpp takes no adapter there"
DIFFERENTLY = "where llama.cpp's versions scale an adapter differently"
DEAF = {
    "deepseek2": dict.fromkeys(LATENT, (NOT_ASKED, "mlp,experts,o_proj")),
    "mistral4": dict.fromkeys(LATENT, (NOT_ASKED, "mlp,experts,o_proj")),
    "gemma4": {
        "per_layer_model_proj": (NOT_ASKED, "attention,mlp"),
        "ffn_down_exps": (DIFFERENTLY, "all-linear,*.gate_up_proj"),
    },
}


@dataclass(frozen=True)
class Placement:
    """GGUF's side of a model."""

    architecture: str
    pieces: Mapping[str, list[Piece]]
    """The tensors of each parameter, by its name in transformers."""

    def of(self, path: str, place: str) -> list[Piece]:
        """The tensors that an update of a layer goes to. Raises ModelError when GGUF has no name for it, or llama.cpp
        no product that asks for adapters."""
        found = self.pieces.get(f"{path}.weight", self.pieces.get(path))
        if found is None:
            raise ModelError(f"{place}: {path}", f"has no name in GGUF's {self.architecture} files", "merge it instead")
        for piece in found:
            module = piece.entry.tensor.split(".")[-2]
            if module in DEAF.get(self.architecture, {}):
                why, targets = DEAF[self.architecture][module]
                what = f"lies in {module}, {why} in {self.architecture} models"
                raise ModelError(f"{place}: {path}", what, f"export to gguf-merged, or train with --targets {targets}")
        return found


def placement(path: Path, source: WeightSource) -> Placement:
    """Of the GGUF file at `path`, or of the file that llama.cpp's converter would make of the folder there.

    Raises ModelError for a model type that has no GGUF architecture here.
    """
    if path.is_file():
        gguf = read_gguf(path)
        architecture, found = architecture_of(gguf), entries(gguf)
    else:
        architecture = _architecture(source)
        found = _entries(architecture, source)
    alternate = FAMILIES[architecture].gates_alternate
    return Placement(architecture, pieces(join(arrange(found, source.config, path), alternate, path), alternate))


def _architecture(source: WeightSource) -> str:
    kind = source.config["model_type"]
    if source.part_of == "mistral3" and kind == "mistral":
        return "mistral3"  # Mistral Small 3, which llama.cpp's converter knows by its wrapper
    found = ALSO.get(kind) or next((name for name, family in FAMILIES.items() if family.model_type == kind), None)
    if found is None:
        what = f"{kind!r} has no GGUF architecture that {UNKNOWN.get(kind, 'lorafit writes')}"
        raise ModelError(f"{source.place}: model_type", what, "export to peft, or merge to a folder")
    return found


def _entries(architecture: str, source: WeightSource) -> dict[str, Entry]:
    """Of a folder's parameters, those that GGUF has in parts under the parts' names."""
    family, config, found = FAMILIES[architecture], source.config, {}
    names = hf_names(architecture, int(config["num_hidden_layers"]))
    by_name = {name: tensor for tensor, name in names.items() if ".ssm_in." not in tensor}  # of older files alone
    if any(".k_b_proj." in name for name in by_name):
        by_name = {name: tensor for name, tensor in by_name.items() if ".kv_b_proj." not in name}  # the same
    for whole, shape in source.shapes.items():
        for name, own in _parts(whole, shape, family, source).items():
            if name in by_name:
                tensor = by_name[name]
                interleaved = _heads(config).get(tensor.split(".")[-2], 0) if family.interleaved else 0
                found[name] = Entry(tensor, own, interleaved, family.plus(tensor.split(".")[-2]))
    return found


def _parts(name: str, shape: tuple[int, ...], family: Family, source: WeightSource) -> dict[str, tuple[int, ...]]:
    """The parts that GGUF has of a parameter, with their shapes; itself if it is one tensor."""
    module, _, own = name.rpartition(".")
    config = source.config
    if len(shape) == 3 and ".experts." in name:
        turned = name not in source.stacks and family.experts_last
        outputs, inputs = shape[:0:-1] if turned else shape[1:]
        if own == "gate_up_proj" and not family.experts_fused:
            return dict.fromkeys((f"{module}.{part}" for part in GATE_UP), (shape[0], outputs // 2, inputs))
        return {name: (shape[0], outputs, inputs)}
    if own == "gate_up_proj_bias":
        return dict.fromkeys((f"{module}.{part}_bias" for part in GATE_UP), (shape[0], shape[1] // 2))
    if name.endswith(".in_proj_qkvz.weight"):
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        parts = {"in_proj_qkv": shape[0] - values, "in_proj_z": values}
        return {name.replace("in_proj_qkvz", part): (rows, shape[1]) for part, rows in parts.items()}
    if name.endswith(".kv_b_proj.weight"):
        heads, key, value = (int(config[field]) for field in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
        return {
            name.replace("kv_b_proj", "k_b_proj"): (heads, shape[1], key),
            name.replace("kv_b_proj", "v_b_proj"): (heads, value, shape[1]),
        }
    return {name: shape}


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    heads = int(config["num_attention_heads"])
    return {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}
