"""A model as numbers: its matrices by layer and how its file stores them, from a header or a configuration alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lorafit.adapter.attach import HEADS, choose
from lorafit.kernels import BLOCK_TYPES
from lorafit.model.fused import FUSED_TYPES
from lorafit.model.sources import WeightSource

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
ROUTERS = (".gate", ".router", "router.proj", "shared_expert_gate")  # small matrices that choose experts
BUFFERS = ("e_score_correction_bias", "layer_scalar")  # of a file, and no parameters: DeepSeek's, Gemma 4's
EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer", "wte", "wpe")  # Gemma 4's small ones have two
DOWN, OUT = ("down_proj", "fc2", "fc_out"), ("o_proj", "out_proj", "dense")  # whose inputs are kept, not their outputs
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, 8-bit scales of 64, their fp32 scales of 256: QLoRA, section 3
FLOAT_BYTES = {"F32": 4, "FP32": 4, "F16": 2, "FP16": 2, "BF16": 2, "F64": 8, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Matrix:
    """One frozen matrix (rows O, columns I), or `experts` of them of which a token passes `active`."""

    path: str
    rows: int
    columns: int
    format: str
    """How the file has it, such as Q4_K or BF16."""
    experts: int = 1
    active: int = 1

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        return self.experts * self.rows * self.columns

    @property
    def file_bytes(self) -> int:
        """What it takes in its file."""
        if self.format in BLOCK_TYPES:
            return self.weights // BLOCK_TYPES[self.format].elements * BLOCK_TYPES[self.format].bytes
        return nf4_bytes(self.weights) if self.format == "NF4" else self.weights * FLOAT_BYTES[self.format]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linear matrices, and what a token needs of attention."""

    matrices: tuple[Matrix, ...]
    heads: int
    key_heads: int
    dim: int
    window: int | None
    normed: bool
    """Whether the outputs of its two halves are normed too (Gemma), and so kept."""
    head_norms: bool
    """Whether q and k are normed, and so stand in buffers of their own."""

    @property
    def query(self) -> int:
        return self.heads * self.dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.dim

    @property
    def inner(self) -> int:
        """Width of the MLP that a token passes, experts together."""
        return sum(m.columns * m.active for m in self.matrices if m.name in DOWN)

    @property
    def experts(self) -> Matrix | None:
        """The stack that experts' inputs go back through, (hidden, inner); None in a dense layer."""
        return next((m for m in self.matrices if m.name in DOWN and m.experts > 1), None)

    @property
    def routed(self) -> int:
        """Width of the experts that a token passes, together."""
        return 0 if self.experts is None else self.experts.columns * self.experts.active

    @property
    def outputs(self) -> int:
        """Numbers that the layer's products give a token, but for those that are added to it."""
        return sum(m.rows * m.active for m in self.matrices if m.name not in (*DOWN, *OUT))


@dataclass(frozen=True, eq=False)
class Outline:
    """A model before any of its weights is read."""

    kind: str
    hidden: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    embedding: Matrix
    head: Matrix | None
    """None: the embedding is the head too."""
    vectors: int
    """Numbers in norms, biases and what else is no matrix."""
    others: tuple[Matrix, ...]
    """Matrices outside of layers that are neither embedding nor head, and routers."""
    biases: Mapping[str, int]
    """Numbers of each linear layer's bias, by the layer's path."""
    mapped: bool
    """Whether matrices can be used as they lie in the file."""
    pageable: bool
    """Whether they are parts of one read-only mapping."""
    quantised: bool
    place: str | None
    """Its file or folder; None where there is a configuration alone."""
    file_bytes: int
    part_of: str = ""
    """The model_type of the multimodal model whose text part it is."""

    @property
    def on_disk(self) -> bool:
        return self.place is not None

    @property
    def fused(self) -> bool:
        """Whether we compute its layers ourselves."""
        return self.kind in FUSED_TYPES

    @property
    def ends(self) -> tuple[Matrix, ...]:
        """The embedding and the head; a tied one once."""
        return (self.embedding,) if self.head is None else (self.embedding, self.head)

    @property
    def tables(self) -> tuple[Matrix, ...]:
        """All that has a row for each token; a tied one once."""
        return (*self.ends, *(m for m in self.others if m.name in EMBEDDINGS))

    @property
    def output(self) -> Matrix:
        """The matrix that gives logits."""
        return self.head or self.embedding

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix, a tied one once."""
        return (*self.ends, *self.others, *(m for layer in self.layers for m in layer.matrices))

    @property
    def parameters(self) -> int:
        return sum(m.weights for m in self.matrices) + self.vectors

    def adapted(self, targets: Sequence[str]) -> list[Matrix]:
        """The matrices that get an adapter, as `attach` chooses them. Raises ConfigError as it does."""
        tied = () if self.head else (replace(self.embedding, path="lm_head"),)
        found = {m.path: m for m in (*self.matrices, *tied)}
        experts = [path for path, m in found.items() if m.experts > 1]
        choosing = [path for path in found if path.endswith(ROUTERS)]
        linear = [path for path, m in found.items() if m.name not in EMBEDDINGS and path not in (*experts, *choosing)]
        return [found[path] for path in choose(list(found), targets, linear, experts, choosing)]


def of_source(source: WeightSource, config: Mapping[str, Any]) -> Outline:
    """The outline of a model on disk, from its header; config: its configuration with every default in it."""
    formats = {name: source.format(name) for name in source.shapes}
    kinds = {"mapped": source.packs, "pageable": source.mapping is not None, "quantised": source.quantised}
    return of_shapes(config, source.shapes, formats, place=source.place, part_of=source.part_of, **kinds)


def of_shapes(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, str] | None = None,
    *,
    mapped: bool = False,
    pageable: bool = False,
    quantised: bool = False,
    place: str | None = None,
    part_of: str = "",
) -> Outline:
    """The outline of a model of these tensors; formats: of a file, else 16 bits, as models are published."""
    active = int(config.get("num_experts_per_tok") or config.get("moe_topk") or config.get("top_k_experts") or 1)
    found: list[Matrix] = []
    vectors = 0
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        form = (formats or {}).get(name, "BF16")
        if path.endswith(BUFFERS):
            continue
        if len(shape) < 2 or path.endswith(("norm", "_bias")) or (len(shape) == 3 and "conv" in path):
            vectors += math.prod(shape)
        elif len(shape) == 2:
            found.append(Matrix(path, *shape, form))
        else:
            found.append(_experts(path, shape, form, active, config))
    embedding = next(m for m in found if m.name in EMBEDDINGS)
    head = next((m for m in found if m.name in HEADS), None)
    if config.get("tie_word_embeddings") and head is not None:
        found.remove(head)
        head = None
    by_layer: dict[int, list[Matrix]] = {}
    others = []
    for matrix in found:
        found_layer = LAYER.search(matrix.path)
        if matrix is embedding or matrix is head:
            continue
        if found_layer and not matrix.path.endswith(ROUTERS):
            by_layer.setdefault(int(found_layer[1]), []).append(matrix)
        else:
            others.append(matrix)
    layers = tuple(_layer(config, shapes, index, tuple(by_layer[index])) for index in sorted(by_layer))
    return Outline(
        kind=str(config["model_type"]),
        hidden=int(config["hidden_size"]),
        vocabulary=embedding.rows,
        context=int(config.get("max_position_embeddings") or 2048),
        layers=layers,
        embedding=embedding,
        head=head,
        vectors=vectors,
        others=tuple(others),
        biases={m.path: shapes[f"{m.path}.bias"][0] for m in found if f"{m.path}.bias" in shapes and m.experts == 1},
        mapped=mapped,
        pageable=pageable,
        quantised=quantised,
        place=place,
        file_bytes=sum(m.file_bytes for m in found) + 4 * vectors,
        part_of=part_of,
    )


def nf4_bytes(weights: int) -> int:
    """Bytes of NF4 with double quantization."""
    return math.ceil(weights * NF4_BITS / 8)


def _experts(path: str, shape: tuple[int, ...], form: str, active: int, config: Mapping[str, Any]) -> Matrix:
    """A 3-D tensor of experts, (E, O, I) or (E, I, O): which is which, the hidden width says."""
    count, first, second = shape
    hidden = int(config["hidden_size"])
    down = path.endswith(DOWN)
    inputs_last = (first == hidden) if down else (second == hidden)
    rows, columns = (first, second) if inputs_last else (second, first)
    return Matrix(path, rows, columns, form, count, min(active, count))


def _layer(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], index: int, matrices: tuple[Matrix, ...]
) -> Layer:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or config.get("v_head_dim") or hidden // heads)
    key_heads = int(config.get("num_key_value_heads") or heads)
    kinds = config.get("layer_types") or ()
    local = kinds[index] == "sliding_attention" if index < len(kinds) else True
    window = config.get("sliding_window") if local and config.get("use_sliding_window", True) else None
    stem = next((name[: name.index(f"layers.{index}.")] for name in shapes if f"layers.{index}." in name), "")
    return Layer(
        matrices=matrices,
        heads=heads,
        key_heads=key_heads,
        dim=dim,
        window=int(window) if window else None,
        normed=f"{stem}layers.{index}.pre_feedforward_layernorm.weight" in shapes,
        head_norms=f"{stem}layers.{index}.self_attn.q_norm.weight" in shapes,
    )
