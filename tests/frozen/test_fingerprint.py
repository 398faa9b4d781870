"""The laws of lorafit.frozen.fingerprint: the same weights in any format are known again, and others are not."""

from __future__ import annotations

import json
import math

import gguf
import pytest
import torch
from torch import nn

from lorafit.adapter.attach import attach
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.fingerprint import difference, digest, fingerprint
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear

WIDTH = 96


class Block(nn.Module):
    """Two matrices and a norm."""

    def __init__(self, up: nn.Module, down: nn.Module, norm: torch.Tensor) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up, down
        self.norm = nn.Parameter(norm, requires_grad=False)


def model(seed: int = 0, change=lambda tensor: tensor, store=lambda tensor: DenseWeight(tensor), layers: int = 5):
    """A stack of frozen layers with random weights; `change` works on every tensor, `store` makes the matrices."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return change(torch.randn(*shape, generator=generator) / math.sqrt(shape[-1]))

    embedding = FrozenEmbedding(store(random(50, WIDTH)), torch.float32)
    blocks = [
        Block(FrozenLinear(store(random(64, WIDTH))), FrozenLinear(store(random(WIDTH, 64))), random(WIDTH) + 1)
        for _ in range(layers)
    ]
    return nn.ModuleDict({"embed": embedding, "blocks": nn.ModuleList(blocks)})


def quantised(kind: gguf.GGMLQuantizationType):
    """Stores a matrix as a file of that format would give it back."""

    def store(tensor: torch.Tensor) -> DenseWeight:
        packed = gguf.quants.quantize(tensor.numpy(), kind)
        return DenseWeight(torch.from_numpy(gguf.quants.dequantize(packed, kind)), kind.name)

    return store


def told(stored: dict) -> dict:
    """A fingerprint as it comes back from an adapter's lorafit.json."""
    return json.loads(json.dumps(stored))


def test_it_is_a_function_of_the_weights():
    """Two models with the same weights have the same fingerprint, which survives the trip through JSON."""
    one, two = fingerprint(model()), fingerprint(model())
    assert one == two == told(one)
    assert digest(one) == digest(two)
    assert difference(told(one), two) == (True, "")


def test_sampling_is_small():
    """At most 8 matrices and 8 vectors of 24 values, however deep the model is."""
    samples = fingerprint(model(layers=40))["samples"]
    assert len(samples) == 16
    assert all(len(sample["values"]) == 24 for sample in samples.values())


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "FP16")])
def test_another_float_format_is_the_same_weights(dtype, name):
    """fp32 and a 16-bit copy belong together, either way round, with a note that says both formats."""
    plain, other = fingerprint(model()), fingerprint(model(store=lambda t: DenseWeight(t.to(dtype))))
    for stored, own, there, here in ((plain, other, "FP32", name), (other, plain, name, "FP32")):
        same, note = difference(told(stored), own)
        assert same
        assert note.startswith("same weights in another format (")
        assert note.endswith(f": {there} there, {here} here)")
    assert digest(plain) != digest(other)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("seed", range(5))
def test_a_quantised_copy_is_the_same_weights(kind, seed):
    """What a GGUF file of these weights dequantises to belongs to the plain model, with a note."""
    plain = fingerprint(model(seed))
    copy = fingerprint(model(seed, store=quantised(gguf.GGMLQuantizationType[kind])))
    for stored, own in ((plain, copy), (copy, plain)):
        same, note = difference(told(stored), own)
        assert same, note
        assert kind in note


def test_two_quantised_copies_are_the_same_weights():
    """A 4-bit and an 8-bit file of one model."""
    four, eight = (
        fingerprint(model(store=quantised(gguf.GGMLQuantizationType[kind]))) for kind in ("Q4_0", "Q8_0")
    )  # fmt: skip
    assert difference(told(four), eight)[0]


@pytest.mark.parametrize("kind", ["FP32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_other_weights_of_the_same_shapes_are_refused(kind, seed):
    """Another random model, in the same format or a quantised one, with the tensor and the difference named."""
    store = DenseWeight if kind == "FP32" else quantised(gguf.GGMLQuantizationType[kind])
    same, what = difference(told(fingerprint(model(0))), fingerprint(model(seed, store=store)))
    assert not same
    assert what.startswith("it was trained on other weights: ")
    assert "% (" in what


@pytest.mark.parametrize("kind", ["FP32", "Q8_0"])
@pytest.mark.parametrize("seed", range(5))
def test_a_fine_tuned_sibling_is_refused(kind, seed):
    """Weights that moved by 1 %, in the same format."""
    store = DenseWeight if kind == "FP32" else quantised(gguf.GGMLQuantizationType[kind])
    noise = torch.Generator().manual_seed(100 + seed)
    moved = model(seed, change=lambda t: t * (1 + 0.01 * torch.randn(t.shape, generator=noise)), store=store)
    same, what = difference(told(fingerprint(model(seed, store=store))), fingerprint(moved))
    assert not same
    assert "it was trained on other weights" in what


def test_a_sibling_in_another_format_is_told_by_its_norms():
    """Norms are stored exactly in every format, so a model whose norms moved by 2 % is seen through 4 bits."""
    sibling = model(store=quantised(gguf.GGMLQuantizationType.Q4_0))
    for block in sibling["blocks"]:
        block.norm.mul_(1.02)
    same, what = difference(told(fingerprint(model())), fingerprint(sibling))
    assert not same
    assert ".norm differs by 2.0%" in what


def test_other_shapes_and_architectures_are_refused():
    """Said as such, before any value is compared."""
    own = fingerprint(model())
    assert difference(told(fingerprint(model(layers=4))), own) == (
        False,
        "it was trained on a model with other tensor shapes",
    )
    same, what = difference({**told(own), "architecture": "mamba"}, own)
    assert (same, what) == (False, "it was trained on a mamba model and this is ModuleDict")


def test_adapters_on_the_model_do_not_count():
    """Base and base with adapter are one base, here and where torch's own layers are adapted."""
    for make in (model, lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 6))):
        torch.manual_seed(0)
        plain = make()
        before = fingerprint(plain)
        assert fingerprint(attach(plain, rank=2, targets=["all-linear"])) == before


def test_what_is_no_fingerprint_is_a_type_or_key_error():
    """An adapter's file may hold anything; a NaN matches nothing."""
    own = fingerprint(model())
    name = next(iter(own["samples"]))
    for values in (None, [], [1.0], ["a"] * 24, [True] * 24, [10**400] * 24, {"0": 1.0}, 7):
        stored = told(own)
        stored["samples"][name]["values"] = values
        with pytest.raises(TypeError):
            difference(stored, own)
    for key in own:
        with pytest.raises(KeyError):
            difference({k: v for k, v in own.items() if k != key}, own)
    stored = told(own)
    stored["samples"][name]["values"] = [math.nan] * 24
    assert not difference(stored, own)[0]
