"""A model file or folder becomes a frozen transformers model: built without memory, then filled tensor by tensor.

transformers gives the definition; every linear layer and the embedding are replaced by ours over a `FrozenWeight`,
attention goes through the registry by name, and nothing of the library is patched. The set of tensors in the file must
be exactly the set that the model has: missing, unexpected and mis-shaped ones are errors, all reported at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from lorafit import console
from lorafit.adapter.lora import Adapted
from lorafit.errors import ConfigError, Faults, LorafitError, ModelError
from lorafit.formats.tokenizer import TextTokenizer
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear
from lorafit.frozen.packed import PackedWeight, quantise
from lorafit.frozen.stack import FrozenStack
from lorafit.frozen.weight import FrozenWeight
from lorafit.kernels import native, ops
from lorafit.model import attention, paging
from lorafit.model.architectures import IMAGE_TEXT, WRAPPERS
from lorafit.model.experts import Experts, RoutedBlock, is_experts, kind_of
from lorafit.model.fused import FusedLayer, fuse
from lorafit.model.head import Head, decoder_of
from lorafit.model.sources import WeightSource

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOATS = {torch.bfloat16: "BF16", torch.float32: "F32"}  # a file's name for each compute dtype
KEPT = "kept"  # how they leave embedding and head: packed where the file has them so, else in 16 bits
QUANTISED = ("nf4", "int8")  # what linear layers are quantised to while the model streams in


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready for an adapter."""

    model: PreTrainedModel
    head: Head
    tokenizer: TextTokenizer
    kept: tuple[str, ...] = ()
    """Linear layers that stay in 16 bits since their rows do not divide into the blocks of --base."""
    fused: int = 0
    """Decoder layers that we compute ourselves."""
    part_of: str = ""
    """The multimodal model whose text part it is, by model_type."""


def context_of(source: WeightSource) -> int:
    """Tokens that the model was made for."""
    return int(configuration(source).max_position_embeddings)


def load_base(source: WeightSource, tokenizer: TextTokenizer, base: str, compute: str, *, paged: bool = False) -> Base:
    """The model of `source` with frozen weights, in eval mode.

    base: how weights are stored: `packed` (as the file has them), `nf4`, `int8`, `bf16` or `fp32`. compute: what
    products run in, `bf16` or `fp32`. paged: mapped layers are dropped behind (model/paging.py). Raises ModelError (or
    Faults) for anything that does not fit.
    """
    if base == "packed" and not source.packs:
        remedy = "give nf4 or int8, or a GGUF file"
        raise ConfigError("--base", f"packed, and {source.place} holds no packed weights", remedy)
    if paged and not (base == "packed" and source.mapping):
        raise ConfigError("--paging", f"on, and {source.place} is no packed GGUF file", "leave it to lorafit: auto")
    model = build(source, base, DTYPES[compute], paged)
    if paged:
        paging.page(model, source.mapping)
    if native.library() is None:
        console.warn(f"attention, norms and packed weights run in plain torch, which is slow ({native.describe()[1]})")
    rows = head_of(model).weight.out_features
    if tokenizer.vocab_size - len(tokenizer.added) > rows:
        what = f"has {tokenizer.vocab_size} tokens and the embedding {rows} rows"
        raise ModelError(f"{source.place}: tokenizer", what, "use the tokenizer that belongs to the model")
    kept = _kept(model) if base in QUANTISED else []
    fused = sum(isinstance(layer, FusedLayer) for layer in decoder_of(model).layers)
    return Base(model, head_of(model), tokenizer, tuple(kept), fused, source.part_of)


def _kept(model: nn.Module) -> list[str]:
    """Linear layers and experts in 16 or 32 bits."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and path != "lm_head":
            weights: list[nn.Module] = [module.weight]
        else:
            weights = list(module.weights) if isinstance(module, FrozenStack) else []
        if any(isinstance(weight, DenseWeight) for weight in weights):
            found.append(path)
    return found


def build(source: WeightSource, base: str, compute: torch.dtype, paged: bool = False) -> PreTrainedModel:
    """The frozen model of a source, streaming: one tensor above the result at most."""
    model = empty(source, compute)
    config = model.config
    if config.tie_word_embeddings:
        source.shapes.pop("lm_head.weight", None)  # some exports repeat the tied matrix
    check_tensors(model, source)
    fill_buffers(model)
    embedding: FrozenWeight | None = None
    for path, module in list(model.named_modules()):
        if is_experts(module):
            _replace(model, path, _experts(source, path, module, base, compute))
        elif isinstance(module, nn.Embedding):
            rows = _weight(source, f"{path}.weight", KEPT if base in QUANTISED else base, compute)
            scale = float(getattr(module, "scalar_embed_scale", 1.0))
            _replace(model, path, FrozenEmbedding(rows, compute, scale))
            if path == "model.embed_tokens":  # Gemma 4 has others
                embedding = rows
        elif type(module) is nn.Linear:  # not Llama 4's router, which is one with a forward pass of its own
            tied = f"{path}.weight" not in source.shapes
            kept = path == "lm_head" and base in QUANTISED  # as QLoRA and bitsandbytes do: the head is not quantised
            weight = embedding if tied else _weight(source, f"{path}.weight", KEPT if kept else base, compute)
            assert weight is not None, "a tied head needs an embedding before it"
            bias = source.load(f"{path}.bias").to(compute) if module.bias is not None else None
            _replace(model, path, FrozenLinear(weight, bias))
        else:
            for name, _ in module.named_parameters(recurse=False):
                value = source.load(f"{path}.{name}").to(compute)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, _ in module.named_buffers(prefix=path, recurse=False):
            if name in source.shapes:  # Gemma 4's layer scalars, DeepSeek's correction of its router, added in fp32
                exact = name.endswith("e_score_correction_bias")
                module._buffers[name.rpartition(".")[2]] = source.load(name).to(torch.float32 if exact else compute)
        if paged:
            with suppress(AttributeError):  # what was inside of experts is gone
                paging.drop(model.get_submodule(path), source.mapping)  # it was read to be checked
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Llama4TextMoe":
            _replace(model, path, RoutedBlock(module))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"tensors without values: {left}"
    fuse(model)
    model.register_forward_pre_hook(attention.check_mask, with_kwargs=True)
    return model.eval()


class Described(Protocol):
    """What a model is built from: a WeightSource, or a configuration alone (model/shapes.py)."""

    @property
    def place(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def part_of(self) -> str: ...


def empty(source: Described, compute: torch.dtype) -> PreTrainedModel:
    """transformers' model of a source, without memory: every tensor on the meta device."""
    config = configuration(source)
    config.use_cache = False  # with a cache, packed documents would not be kept apart
    maker: type = AutoModelForImageTextToText if config.model_type in IMAGE_TEXT else AutoModelForCausalLM
    with _faults_of_configuration(source), torch.device("meta"):
        model: PreTrainedModel = maker.from_config(  # type: ignore[attr-defined]
            config, attn_implementation=attention.register(), dtype=compute
        )
    if source.part_of:
        model.peft_paths = WRAPPERS[source.part_of].paths  # type: ignore[assignment]
    return model


def configuration(source: Described) -> PretrainedConfig:
    """The source's configuration with transformers' defaults for what it leaves out. Raises ModelError."""
    with _faults_of_configuration(source):
        return AutoConfig.for_model(**source.config)


@contextmanager
def _faults_of_configuration(source: Described) -> Iterator[None]:
    """A configuration that transformers cannot build is the file's fault, said in one line."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        what = f"describes no {source.config['model_type']} model: {type(error).__name__}: {error}"
        raise ModelError(f"{source.place}: configuration", what[:400], "download the model again") from error


def check_tensors(model: PreTrainedModel, source: WeightSource) -> None:
    """Every tensor that the model has must be in the source, with its shape, and none besides."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())  # by transformers, for the family
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if not source.ignorable(name) and not any(re.search(pattern, name) for pattern in ignored)
    }
    faults: list[LorafitError] = []
    for name in expected.keys() - found.keys():
        faults.append(ModelError(f"{source.place}: {name}", "is missing", "the file is incomplete"))
    for name in found.keys() - expected.keys():
        faults.append(ModelError(f"{source.place}: {name}", f"has no place in a {model.config.model_type} model"))
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            what = f"has shape {list(found[name])}, the configuration says {list(expected[name])}"
            faults.append(ModelError(f"{source.place}: {name}", what))
    if faults:
        raise Faults(sorted(faults, key=str)) if len(faults) > 1 else faults[0]


def head_of(model: PreTrainedModel) -> Head:
    """The output matrix and what this family does to its logits."""
    config: PretrainedConfig = model.config
    multiplier = 1.0 / getattr(config, "logits_scaling", 1.0)
    layer: Any = model.lm_head.base if isinstance(model.lm_head, Adapted) else model.lm_head
    return Head(layer.weight, multiplier, getattr(config, "final_logit_softcapping", None), model=model)


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """Every frozen matrix by its path, a tied one once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenWeight)}


def bytes_by_format(model: nn.Module) -> dict[str, int]:
    """Bytes of the frozen matrices by how they are stored, the largest first."""
    sizes: Counter[str] = Counter()
    for weight in frozen_weights(model).values():
        sizes[weight.format] += weight.nbytes
    return dict(sizes.most_common())


def frozen_parameters(model: nn.Module) -> int:
    """Numbers that the base has, however they are stored; a tied matrix once, adapters not."""
    weights = frozen_weights(model).values()
    inside = {id(parameter) for weight in weights for parameter in weight.parameters()}
    others = [p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in inside]
    return sum(weight.out_features * weight.in_features for weight in weights) + sum(others)


def _weight(
    source: WeightSource, name: str, base: str, compute: torch.dtype, *, transposed: bool = False
) -> FrozenWeight:
    """The matrix in the format that `base` asks for; one that the format does not fit stays in 16 bits.

    A 3-D tensor (E, O, I) becomes one tall matrix (E O, I); transposed: it is (E, I, O).
    """

    def tall(values: Tensor) -> Tensor:
        return (values.transpose(1, 2) if transposed else values).reshape(-1, values.shape[1 if transposed else -1])

    stored = source.stored(name)
    if base in DTYPES:
        loaded = source.load(name)
        values = tall(loaded).to(DTYPES[base])
        if values.data_ptr() != loaded.data_ptr():
            source.drop(name, loaded)
        return DenseWeight(values, source.format(name))
    if stored is not None and (base in ("packed", KEPT) or stored.format == base.upper()):
        row = ops.first_bad_row(stored)
        if row is not None:
            what = f"row {row} has a weight or scale that is NaN or infinite"
            raise ModelError(f"{source.place}: {name}", what, "the file is damaged; download or convert it again")
        if stored.order is None and stored.format == FLOATS[compute]:  # a view of the file, multiplied where it lies
            return DenseWeight(stored.data.view(compute), stored.format, mapped=True)
        return PackedWeight(stored)
    loaded = source.load(name)
    values = tall(loaded)
    if base == "packed":
        plain = values if values.element_size() == 2 else values.to(compute)
        return DenseWeight(plain, source.format(name), mapped=True)
    try:
        found = quantise(values, base) if base in QUANTISED else None
    except ValueError as error:
        raise ModelError(f"{source.place}: {name}", str(error), "the file is damaged; download it again") from None
    if found is not None:
        source.drop(name, loaded)
    return found or DenseWeight(values if values.element_size() == 2 else values.bfloat16(), source.format(name))


def _experts(source: WeightSource, path: str, module: nn.Module, base: str, compute: torch.dtype) -> Experts:
    """Ours for an experts module of transformers: each 3-D parameter becomes a stack of frozen matrices."""
    kind = kind_of(module, source.place)

    def stack(name: str) -> FrozenStack:
        whole = f"{path}.{name}"
        layout = source.stacks.get(whole)
        if layout is None:  # one tensor, in the order of transformers' parameter
            parts = [([_weight(source, whole, base, compute, transposed=kind.transposed)], slice(None))]
        else:
            parts = [
                ([_weight(source, one, base, compute) for one in part.names], part.columns) for part in layout.parts
            ]
        bias = getattr(module, f"{name}_bias", None)
        return FrozenStack(
            source.shapes[whole][0],
            parts,
            None if bias is None else source.load(f"{whole}_bias").to(compute),
            transposed=kind.transposed,
            declared=kind.declared,
        )

    return Experts(stack("gate_up_proj"), stack("down_proj"), kind)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def fill_buffers(model: PreTrainedModel) -> None:
    """Values for the buffers that no file holds (rotary frequencies), by transformers' own initialisation."""
    for module in model.modules():
        buffers: dict[str, Tensor | None] = module._buffers
        if any(buffer is not None and buffer.is_meta for buffer in buffers.values()):
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
