"""The laws of lorafit.planning.memory: formulas give the bytes that the code takes, part by part."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from builders.gguf_files import write_tiny_gguf
from builders.models import FAMILIES, save_folder, tiny_model
from builders.outlines import llama
from builders.rows import random_rows
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.group import Group
from lorafit.adapter.lora import LoraAdapter, LoraLinear, PlacedDropout
from lorafit.data.batch import pack_rows
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenLinear
from lorafit.kernels.attention import Rules
from lorafit.model import buffers, layer
from lorafit.model.load import configuration, frozen_weights, load_base
from lorafit.model.sources import open_source
from lorafit.planning import memory
from lorafit.planning.memory import Use
from lorafit.planning.outline import Outline, of_source
from lorafit.training.step import accumulate

USE = Use("fp32", "fp32", 4, ("all-linear",), limit=64, tokens=64, trained=32, longest=16, chunk=512)


def opened(folder: Path, family: str = "llama", base: str = "fp32", compute: str = "fp32"):
    source = open_source(save_folder(tiny_model(family), folder / family))
    return of_source(source, configuration(source).to_dict()), load_base(source, source.tokenizer(None), base, compute)


def mapping(path: Path) -> list[tuple[int, int]]:
    """Where this process has mapped the file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [(int(start, 16), int(stop, 16)) for start, stop in (words[0].split("-") for words in lines)]


def bytes_of(kept: object) -> int:
    """Bytes of all tensors of a dataclass and the dataclasses in it."""
    if isinstance(kept, Tensor):
        return kept.nbytes
    if not dataclasses.is_dataclass(kept):
        return 0
    return sum(bytes_of(getattr(kept, field.name)) for field in dataclasses.fields(kept))


@pytest.mark.parametrize("targets", [("all-linear",), ("o_proj", "up_proj")])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_formula_says(tmp_path, monkeypatch, family, dora, targets):
    """Bytes of a token that a layer keeps for its backward pass: of every family, with DoRA too, to the byte."""
    outline, base = opened(tmp_path, family)
    attach(base.model, 4, targets=targets, use_dora=dora)
    use = dataclasses.replace(USE, dora=dora, targets=targets)
    seen = []
    forward = layer.Layer.forward

    def watched(self, x, keeps):
        y, kept = forward(self, x, keeps)
        seen.append(bytes_of(kept))
        return y, kept

    monkeypatch.setattr(layer.Layer, "forward", watched)
    (pack,) = pack_rows(random_rows([16] * 4), range(4), 64)
    base.model.train()
    accumulate(base.model, base.head, [pack])
    assert seen == [64 * memory.layer_bytes(outline, one, use) for one in outline.layers]


@pytest.mark.parametrize(("hidden", "mlp", "heads", "key_heads"), [(4096, 14336, 32, 8), (8192, 28672, 64, 8)])
def test_fake_tensors_of_a_large_layer_agree(hidden, mlp, heads, key_heads):
    """Layers of 8B's and 70B's width run forward under FakeTensorMode, without memory: the same bytes are kept."""
    outline = llama(1, hidden, mlp, heads=heads, key_heads=key_heads)
    use = dataclasses.replace(USE, base="bf16", compute="bf16", rank=16)
    dim, tokens = hidden // heads, 2048

    def group(rows: list[int], columns: int) -> Group:
        return Group([
            LoraLinear(FrozenLinear(DenseWeight(torch.empty(one, columns, dtype=torch.bfloat16))),
                       LoraAdapter(columns, one, 16, 32.0, PlacedDropout()))
            for one in rows
        ])  # fmt: skip

    def forward() -> int:
        norm = layer.Norm(torch.empty(hidden), 1e-6)
        shape = layer.Shape(heads, key_heads, dim, Rules(dim**-0.5), "silu", 1.0)
        groups = group([hidden, key_heads * dim, key_heads * dim], hidden), group([hidden], hidden)
        groups += group([mlp, mlp], hidden), group([hidden], mlp)
        angles = torch.empty(tokens, dim // 2), torch.empty(tokens, dim // 2)
        made = layer.Layer(*groups, layer.Norms(norm, norm), shape, *angles, (0, tokens), False, False)
        _, kept = made.forward(torch.empty(tokens, hidden, dtype=torch.bfloat16), True)
        return bytes_of(kept)

    def faked() -> int:
        with FakeTensorMode(), torch.no_grad():
            return forward()

    with ThreadPoolExecutor(1) as apart:  # the scratch buffer is a thread's own, and must not stay a fake
        assert apart.submit(faked).result() == tokens * memory.layer_bytes(outline, outline.layers[0], use)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_buffers_take_what_is_predicted(tmp_path, family, checkpointed, dora):
    """All buffers after a step are the predicted activations, but for what is no buffer: never more, and nearly as
    many (the formula takes the most of every width at once)."""
    outline, base = opened(tmp_path, family)
    attach(base.model, 4, use_dora=dora)
    buffers.forget()
    buffers.expect(64)
    (pack,) = pack_rows(random_rows([16] * 4), range(4), 64)
    base.model.train()
    accumulate(base.model, base.head, [pack], checkpointed=checkpointed)
    logits = len(pack.targets_N) * outline.vocabulary * 4
    found = buffers.free_bytes() - min(512, memory.CHUNK_BYTES) * outline.vocabulary * 4 * (logits > 0)
    buffers.forget()
    predicted = memory.activations(outline, dataclasses.replace(USE, checkpointed=checkpointed, dora=dora))
    assert 0.6 * predicted < found <= predicted


@pytest.mark.parametrize("base", ["packed", "bf16", "fp32", "nf4", "int8"])
def test_weights_take_what_is_predicted(tmp_path, base):
    """Frozen matrices of a GGUF file and of a folder, by how they are stored; a mapped one is not private."""
    gguf = write_tiny_gguf(tmp_path / "m.gguf", tiny_model("llama", hidden_size=64), "llama", tiny_gguf_metadata())
    folder = save_folder(tiny_model("llama", hidden_size=64), tmp_path / "folder")
    for path in (gguf, *(() if base == "packed" else (folder,))):
        source = open_source(path)
        outline = of_source(source, configuration(source).to_dict())
        model = load_base(source, source.tokenizer(None), base, "fp32").model
        private = mapped = 0
        places = mapping(path if path == gguf else folder / "model.safetensors")
        for weight in {id(one): one for one in frozen_weights(model).values()}.values():
            for part in weight.parameters():
                inside = any(start <= part.data_ptr() < stop for start, stop in places)
                private, mapped = (private, mapped + part.nbytes) if inside else (private + part.nbytes, mapped)
        own, shared = memory.weights(outline, base, "fp32")
        if path == folder and base == "fp32":  # what is copied to lie together stays in the mapping, too
            assert private + mapped < own + shared == pytest.approx(2 * private + mapped, rel=0.02)
        else:
            assert (own - 4 * outline.vectors, shared) == pytest.approx((private, mapped), rel=0.02, abs=64)


def test_parameters_are_those_that_are_attached(tmp_path):
    """For every way to name targets, the adapter's numbers are counted exactly."""
    for targets in (("all-linear",), ("attention",), ("mlp",), ("q_proj", "v_proj"), ("*.1.*",)):
        outline, base = opened(tmp_path)
        attach(base.model, 4, targets=targets)
        real = sum(p.numel() for _, one in adapted_layers(base.model) for p in one.adapter.parameters())
        assert memory.parameters(outline, dataclasses.replace(USE, targets=targets)) == real


def test_more_of_anything_needs_more():
    """Memory grows with tokens, rank, threads and logits alive, and falls with every layer that is computed twice."""
    model = llama(8, 256, 1024, heads=4)

    def total(**changes: object) -> int:
        given = {"tokens": 512, "trained": 400, "longest": 512, "chunk": 128, **changes}
        use = dataclasses.replace(USE, **given)
        return memory.predict(model, use, libraries=0, data=0).total

    for changes in ({"rank": 8}, {"threads": 2}, {"chunk": 256}, {"compute": "fp32", "base": "int8", "rank": 64}):
        assert total(**changes) > total() or "base" in changes
    falling = [total(checkpointed=n) for n in range(9)]
    assert falling[:8] == sorted(set(falling[:8]), reverse=True)
    assert falling[8] < falling[6]  # one layer is kept whole in any case: the last one spares nothing


def test_paging_bounds_the_mapped_part():
    """A base that is dropped behind holds two layers and the head."""
    model: Outline = llama(32, 4096, 14336, heads=32, key_heads=8, mapped=True)
    _, mapped = memory.weights(model, "packed", "bf16")
    layer_size = sum(m.file_bytes for m in model.layers[0].matrices)
    assert mapped - memory.paged(model, mapped) == 30 * layer_size + model.embedding.file_bytes
