"""A GGUF file's tensors in Hugging Face's terms: their names, and what was done to them.

    blk.3.attn_q.weight          model.layers.3.self_attn.q_proj.weight      llama: rows interleaved within heads
    blk.3.post_ffw_norm.weight   model.layers.3.post_feedforward_layernorm.weight      gemma3: stored plus one

Supported are the architectures of `FAMILIES`; the rest is refused by name. Sources: gguf-py's tensor names and
llama.cpp's conversion of each family.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import Faults, ModelError
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile
from lorafit.kernels import ops
from lorafit.kernels.ops import Stored

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}  # gate's rows come first in both
NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
FUSED_EXPERTS = {"ffn_gate_up_exps": "mlp.experts.gate_up_proj"}
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
GPT_OSS = {
    "ffn_gate_inp": "mlp.router",
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
}
LLAMA4 = {
    "ffn_gate_inp": "feed_forward.router",
    **{f"ffn_{matrix}": f"feed_forward.{matrix}_proj" for matrix in ("gate", "up", "down")},
    **{f"ffn_{matrix}_exps": f"feed_forward.experts.{matrix}_proj" for matrix in ("gate", "up", "down")},
    **{f"ffn_{matrix}_shexp": f"feed_forward.shared_expert.{matrix}_proj" for matrix in ("gate", "up", "down")},
}
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{matrix}_shexp": f"mlp.shared_expert.{matrix}_proj" for matrix in ("gate", "up", "down")},
}
GRANITE_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router",
    **{f"ffn_{matrix}_exps": f"block_sparse_moe.experts.{matrix}_proj" for matrix in ("gate", "up", "down")},
}
DEEPSEEK2 = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",  # the last one in halves, the first transposed: see gguf_experts.py
    "attn_v_b": "self_attn.v_b_proj",
    "exp_probs_b": "mlp.gate.e_score_correction",
    **{f"ffn_{matrix}_shexp": f"mlp.shared_experts.{matrix}_proj" for matrix in ("gate", "up", "down")},
}
LINEAR = {  # see gguf_linear.py
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
LINEAR_NEXT = {
    "ssm_in": "linear_attn.in_proj_qkvz",  # of older files, in transformers' order
    "ssm_ba": "linear_attn.in_proj_ba",
}
LINEAR_35 = {"ssm_alpha": "linear_attn.in_proj_a", "ssm_beta": "linear_attn.in_proj_b"}
LINEAR_PARAMETERS = {"ssm_dt.bias": "linear_attn.dt_bias", "ssm_a": "linear_attn.A_log"}
TOP_GEMMA4 = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
GEMMA4 = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    **{f"ffn_{matrix}_exps": f"experts.{matrix}_proj" for matrix in ("gate_up", "gate", "up", "down")},
}
GEMMA4_PARAMETERS = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
ROPE_FACTORS = "rope_freqs.weight"
MAX_WIDTH = 1 << 20  # features, heads, layers


@dataclass(frozen=True)
class Family:
    """What one GGUF architecture is called in transformers, and how its files differ from transformers' weights."""

    model_type: str
    layer: dict[str, str]
    """Module names within a layer: GGUF's to Hugging Face's."""
    interleaved: bool = False
    """Rows of q and k come in the order of ggml's rotary embedding: (0, half, 1, half + 1, ...) within each head."""
    norms_plus_one: bool = False
    """The file's norms multiply by what it holds; transformers' multiply by one more than their weight."""
    experts_last: bool = False
    """transformers' parameters of experts are (E, inputs, outputs); the file's are (E, outputs, inputs) always."""
    experts_fused: bool = False
    """llama.cpp's converter leaves experts' gate and up in one tensor. Files with two are read as well."""
    gates_alternate: bool = False
    """transformers interleaves the rows of experts' gate and up."""
    top: dict[str, str] = field(default_factory=lambda: TOP)
    """Module names outside of layers."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Tensors within a layer whose parameter is no module's weight or bias."""

    def plus(self, module: str) -> float:
        """What the file's values of this GGUF module are larger by."""
        return 1.0 if self.norms_plus_one and module.endswith("norm") and module != "ssm_norm" else 0.0


def _without(names: dict[str, str], *left_out: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in names.items() if ours not in left_out}


HYBRID = _without(LAYER, "ffn_norm") | HEAD_NORMS | LINEAR
HYBRID_EXPERTS = _without(HYBRID, *DENSE) | EXPERTS | FUSED_EXPERTS | SHARED_EXPERT
FAMILIES = {
    "llama": Family("llama", LAYER, interleaved=True),
    "qwen2": Family("qwen2", LAYER),
    "qwen3": Family("qwen3", LAYER | HEAD_NORMS),
    "gemma3": Family("gemma3_text", LAYER | HEAD_NORMS | GEMMA_NORMS, norms_plus_one=True),
    "granite": Family("granite", LAYER, interleaved=True),
    "smollm3": Family("smollm3", LAYER, interleaved=True),
    "mistral3": Family("ministral3", LAYER, interleaved=True),
    "phi3": Family("phi3", _without(LAYER, "attn_q", "attn_k", "attn_v", "ffn_gate") | FUSED),
    "olmo2": Family("olmo2", _without(LAYER, "attn_norm", "ffn_norm") | HEAD_NORMS | NORMS_BEHIND),
    "qwen3moe": Family("qwen3_moe", _without(LAYER, *DENSE) | HEAD_NORMS | EXPERTS),
    "qwen2moe": Family("qwen2_moe", _without(LAYER, *DENSE) | EXPERTS | SHARED_EXPERT),
    "olmoe": Family("olmoe", _without(LAYER, *DENSE) | HEAD_NORMS | EXPERTS),
    "granitemoe": Family("granitemoe", _without(LAYER, *DENSE) | GRANITE_EXPERTS, interleaved=True),
    "gpt-oss": Family(
        "gpt_oss",
        _without(LAYER, *DENSE, "ffn_norm") | EXPERTS | GPT_OSS,
        experts_last=True,
        gates_alternate=True,
    ),
    "llama4": Family("llama4_text", LAYER | LLAMA4, experts_last=True),
    "deepseek2": Family("deepseek_v3", LAYER | EXPERTS | DEEPSEEK2),
    "mistral4": Family(
        "mistral4", _without(LAYER, "attn_k", "attn_v") | EXPERTS | FUSED_EXPERTS | DEEPSEEK2, experts_fused=True
    ),
    "qwen3next": Family("qwen3_next", HYBRID_EXPERTS | LINEAR_NEXT, norms_plus_one=True, parameters=LINEAR_PARAMETERS),
    "qwen35": Family("qwen3_5_text", HYBRID | LINEAR_35, norms_plus_one=True, parameters=LINEAR_PARAMETERS),
    "qwen35moe": Family(
        "qwen3_5_moe_text", HYBRID_EXPERTS | LINEAR_35, norms_plus_one=True, parameters=LINEAR_PARAMETERS
    ),
    "gemma4": Family(
        "gemma4_text",
        LAYER | HEAD_NORMS | GEMMA_NORMS | GEMMA4,
        experts_fused=True,
        top=TOP | TOP_GEMMA4,
        parameters=GEMMA4_PARAMETERS,
    ),
}
MIXTRAL = Family("mixtral", LAYER | EXPERTS, interleaved=True)  # its architecture is `llama`, with experts


@dataclass(frozen=True)
class Entry:
    """How one parameter lies in the file."""

    tensor: str
    """Its GGUF name."""
    shape: tuple[int, ...]
    heads: int = 0
    """Heads whose rows are interleaved; 0: rows are in Hugging Face's order."""
    plus: float = 0.0
    """What the file's values are larger by."""

    def row_order(self) -> np.ndarray | None:
        """The file's row for each row of the parameter, (rows,) int64; None where they are the same."""
        if not self.heads:
            return None
        return np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def column_order(self) -> np.ndarray | None:
        """The file's column for each column of the parameter; None where they are the same."""
        return None

    def to_file(self, values: Tensor) -> Tensor:
        """The parameter as it stands in the file: rows and columns in the file's order, its norm's one added."""
        for dim, order in ((0, self.row_order()), (1, self.column_order())):
            values = values if order is None else placed(values, order, dim)
        return (values + self.plus if self.plus else values).contiguous()

    def stored(self, gguf: GgufFile) -> Stored:
        """The parameter's rows as they lie in the mapped file, in the file's order."""
        tensor = gguf.tensors[self.tensor]
        return Stored(tensor.type.name, self.shape[-1], torch.from_dlpack(tensor.data))

    def matrix(self, gguf: GgufFile) -> Stored | None:
        """A matrix as it lies in the mapped file, the order of its rows beside it; None for a vector, or where values
        are not what the file holds."""
        if len(self.shape) < 2 or self.plus:
            return None
        order = self.row_order()
        return replace(self.stored(gguf), order=None if order is None else torch.from_numpy(order))

    def load(self, gguf: GgufFile) -> Tensor:
        """The parameter, fp32, in its shape."""
        values, order = ops.values(self.stored(gguf)).view(self.shape), self.row_order()
        if order is not None:
            values = values[torch.from_numpy(order)]
        return values - self.plus if self.plus else values


def placed(values: Tensor, order: np.ndarray, dim: int) -> Tensor:
    """Values in the file's order along `dim`; order: the file's place of each."""
    return torch.empty_like(values).index_copy_(dim, torch.from_numpy(order), values)


def hf_names(architecture: str, n_layers: int) -> dict[str, str]:
    """Every tensor name that a file of this architecture may hold, with its parameter's name."""
    family = FAMILIES[architecture]
    modules, found = dict(family.top), {}
    names = MIXTRAL.layer | family.layer if architecture == "llama" else family.layer
    for layer in range(n_layers):
        for ours, theirs in names.items():
            modules[f"blk.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
        for ours, theirs in family.parameters.items():
            found[f"blk.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    for ours, theirs in modules.items():
        found |= {f"{ours}.{kind}": _parameter(theirs, kind) for kind in ("weight", "bias")}
    return found


def _parameter(module: str, kind: str) -> str:
    """The parameter's name; of experts and sinks it is the module's, with the kind behind it if it is a bias."""
    if ".experts." in module or module.endswith((".sinks", ".e_score_correction")):
        return module if kind == "weight" else f"{module}_bias"
    return f"{module}.{kind}"


def entries(gguf: GgufFile) -> dict[str, Entry]:
    """The file's tensors by Hugging Face parameter name. Which of them the model needs, its loader knows.

    Raises ModelError for an unsupported architecture and q or k rows that do not divide into heads; Faults for
    tensors that no model of this architecture has.
    """
    architecture = architecture_of(gguf)
    family = family_of(gguf)
    layers = layer_count(gguf, architecture)
    names = hf_names(architecture, layers)
    heads = {}
    if family.interleaved:
        (heads["attn_q"], *_) = counts(gguf, f"{architecture}.attention.head_count", layers)
        (heads["attn_k"], *_) = counts(gguf, f"{architecture}.attention.head_count_kv", layers, heads["attn_q"])
    rotary = architecture in ("llama", "llama4", "gemma4")
    ahead = tuple(f"blk.{layer}." for layer in range(layers, layers + _ahead(gguf, architecture)))
    stored = [t for t in gguf.tensors.values() if not ((t.name == ROPE_FACTORS and rotary) or t.name.startswith(ahead))]
    unknown = [tensor.name for tensor in stored if tensor.name not in names]
    if unknown:
        raise Faults([fault(gguf, name, f"has no place in a {architecture} model") for name in unknown])
    found = {}
    for tensor in stored:
        module = tensor.name.split(".")[-2]
        interleaved = heads.get(module, 0)
        if interleaved and tensor.shape[0] % (2 * interleaved):
            what = f"has {tensor.shape[0]} rows, which {interleaved} heads of even size do not divide"
            raise fault(gguf, tensor.name, what)
        one_row = module == "ffn_gate_inp_shexp" and len(tensor.shape) == 1  # llama.cpp drops last dimensions of 1
        shape = (1, *tensor.shape) if one_row else tensor.shape
        found[names[tensor.name]] = Entry(tensor.name, shape, interleaved, family.plus(module))
    return found


def architecture_of(gguf: GgufFile) -> str:
    """The file's architecture, a key of FAMILIES. Raises ModelError, with the nearest supported one, for another."""
    kind = gguf.value("general.type", str, "model")
    if kind != "model":
        raise fault(gguf, "general.type", f"is {kind[:40]!r}, not a model", "give the base model's file")
    if gguf.value("split.count", int, 1) > 1:
        what = f"the model is split into {gguf.metadata['split.count']} files"
        raise fault(gguf, "split.count", what, "join them with llama-gguf-split --merge")
    architecture = gguf.value("general.architecture", str)
    if architecture not in FAMILIES:
        architecture = architecture[:40]
        near = difflib.get_close_matches(architecture, FAMILIES, 1)
        remedy = f"the nearest supported one is {near[0]}" if near else f"supported: {', '.join(FAMILIES)}"
        raise fault(gguf, "general.architecture", f"{architecture!r} is not supported yet", remedy)
    experts = next((name for name in gguf.tensors if "_exps." in name or ".ffn_gate_inp." in name), "")
    known = "ffn_gate_inp" in FAMILIES[architecture].layer or architecture == "llama"
    if not known and (experts or gguf.value(f"{architecture}.expert_count", int, 0)):
        where = experts or f"{architecture}.expert_count"
        raise fault(gguf, where, f"experts are not supported in a {architecture} model", "use another model")
    return architecture


def family_of(gguf: GgufFile) -> Family:
    """What the file's architecture is called in transformers: a `llama` with experts is a Mixtral."""
    architecture = architecture_of(gguf)
    mixtral = architecture == "llama" and gguf.value("llama.expert_count", int, 0)
    return MIXTRAL if mixtral else FAMILIES[architecture]


def fault(gguf: GgufFile, name: str, what: str, remedy: str = "convert the model again") -> ModelError:
    """The error at this key or tensor of the file."""
    return ModelError(place(gguf.path, name), what, remedy)


def count(gguf: GgufFile, key: str, default: int | None = None, most: int = MAX_WIDTH) -> int:
    """An integer from 1 to `most`, which keeps every product of two or three of them far from overflow."""
    value = gguf.value(key, int, default)
    if not 0 < value <= most:
        raise fault(gguf, key, f"is {value}, not 1 to {most}")
    return value


def counts(gguf: GgufFile, key: str, layers: int, default: int | None = None) -> list[int]:
    """The same for each layer: files may have one number for all of them or an array."""
    found = gguf.metadata.get(key)
    if not isinstance(found, list):
        return [count(gguf, key, default)] * layers
    if len(found) != layers or not all(type(one) is int and 0 < one <= MAX_WIDTH for one in found):
        raise fault(gguf, key, f"holds no number from 1 to {MAX_WIDTH} for each of the {layers} layers")
    return found


def positive(gguf: GgufFile, key: str, default: float | None = None) -> float:
    """A positive number, as the shortest decimal that is the same fp32: 1e-05, not the 9.99999975e-06 in the file."""
    value = gguf.value(key, float, default)
    if not 1e-30 < value < 1e30:
        raise fault(gguf, key, f"is {value}")
    return float(str(np.float32(value)))


def layer_count(gguf: GgufFile, architecture: str) -> int:
    """Layers, of which there are no more than tensors: names and work follow from this number. Blocks behind them
    predict further tokens ahead, and are not read."""
    return count(gguf, f"{architecture}.block_count", most=len(gguf.tensors)) - _ahead(gguf, architecture)


def _ahead(gguf: GgufFile, architecture: str) -> int:
    key = f"{architecture}.nextn_predict_layers"
    found, blocks = gguf.value(key, int, 0), count(gguf, f"{architecture}.block_count", most=len(gguf.tensors))
    if not 0 <= found < blocks:
        raise fault(gguf, key, f"is {found} of {blocks} blocks")
    return found
