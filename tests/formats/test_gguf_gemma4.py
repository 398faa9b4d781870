"""Gemma 4 in GGUF files as llama.cpp's converter writes them: dense, small with embeddings per layer, with experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import lorafit
from builders.architectures import GEMMA4, tiny
from builders.gguf_experts import write_moe_gguf
from builders.gguf_gemma4 import gemma4_metadata, gemma4_table
from builders.models import save_folder
from builders.published import text_of
from builders.rows import random_rows
from lorafit import catalogue
from lorafit.adapter.attach import adapted_layers
from lorafit.data.batch import pack_rows
from lorafit.errors import Faults, ModelError
from lorafit.formats.gguf import GgufFile, GgufTensor, read_gguf
from lorafit.formats.gguf_config import hf_config
from lorafit.formats.gguf_write import write_gguf
from lorafit.frozen.fingerprint import difference, fingerprint
from lorafit.kernels import BLOCK_TYPES
from lorafit.model.generate import generate
from lorafit.model.load import bytes_by_format, frozen_weights, load_base
from lorafit.model.sources import open_source
from lorafit.training.step import accumulate

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
OF_64 = {"small": {"hidden_size_per_layer_input": 64}, "experts": {"moe_intermediate_size": 64}}
K_QUANTS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "global_head_dim": 64}
OF_256 = {"small": {"hidden_size_per_layer_input": 256}, "experts": {"moe_intermediate_size": 256}}
PUBLISHED = [name for name in catalogue.names() if name.startswith("gemma-4")]
SMALL = {  # the shapes of gemma-4-e2b: by the names of its keys, at a sixteenth of its widths
    "num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_attention_heads": 8, "num_key_value_heads": 1,
    "num_global_key_value_heads": None, "hidden_size": 96, "intermediate_size": 384, "head_dim": 16,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
}  # fmt: skip


def model_of(kind: str, **changes: Any):
    return tiny("gemma4_text", **{**GEMMA4[kind], **changes})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", GEMMA4)
def test_the_file_is_the_model(kind: str, tmp_path: Path) -> None:
    """Configuration and every value come back with their bits, and the file gives transformers' logits."""
    model = model_of(kind)
    source = open_source(write_moe_gguf(tmp_path / "m.gguf", model))
    theirs, ours = model.config.to_dict(), AutoConfig.for_model(**source.config).to_dict()
    unused = {"pad_token_id", *(["vocab_size_per_layer_input"] if kind != "small" else [])}
    assert {k: v for k, v in ours.items() if k not in unused} == {k: v for k, v in theirs.items() if k not in unused}
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        assert torch.equal(source.load(name).view(tensor.shape), tensor), name
    assert_close(logits(lorafit.load(tmp_path / "m.gguf", base="fp32", compute="fp32")), logits(model))


def test_the_small_ones_layers_are_read_as_published(tmp_path: Path) -> None:
    """35 layers, of which the last 20 are twice as wide and share keys and values: arrays in the file."""
    model = model_of("small", **SMALL)
    file = write_moe_gguf(tmp_path / "m.gguf", model)
    assert read_gguf(file).metadata["gemma4.feed_forward_length"] == [384] * 15 + [768] * 20
    folder = save_folder(model, tmp_path / "folder")
    both = [logits(lorafit.load(path, base="fp32", compute="fp32")) for path in (file, folder)]
    assert torch.equal(*both)
    assert (both[0] - logits(model)).abs().max() < 1e-3  # so many random layers make much of rounding


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_come_back(name: str) -> None:
    """The keys that the converter makes of a published configuration give it back, field by field."""
    config = AutoConfig.for_model(**text_of(name))
    keys = {f"gemma4.{key}": value for key, value in gemma4_metadata(config).items()}
    keys |= {f"tokenizer.ggml.{name}_token_id": number for name, number in (("bos", 2), ("eos", 1), ("padding", 0))}
    table = gemma4_table(config)
    plain = GgufTensor("token_embd.weight", (config.vocab_size, 1), BLOCK_TYPES["F32"], np.zeros((1, 4), np.uint8))
    own = [n for n, one in enumerate(config.layer_types) if one == "sliding_attention" or not config.attention_k_eq_v]
    shapes = {f"blk.{n}.attn_v.weight" for n in own}
    tensors = {one: replace(plain, name=one) for one in ("token_embd.weight", *shapes, *map(str, range(60)))}
    data = table.view(np.uint8).reshape(1, -1)
    tensors["rope_freqs.weight"] = replace(plain, name="rope_freqs.weight", shape=table.shape, data=data)
    if config.enable_moe_block:
        tensors["blk.0.ffn_gate_inp.weight"] = plain
    if config.hidden_size_per_layer_input:
        shape = config.vocab_size_per_layer_input, 1
        tensors["per_layer_token_embd.weight"] = replace(plain, name="per_layer_token_embd.weight", shape=shape)
    keys["general.architecture"] = "gemma4"
    again = AutoConfig.for_model(**hf_config(GgufFile(Path(name), keys, dict.fromkeys(keys, "uint32"), tensors)))
    unused = {
        "use_bidirectional_attention",
        "vocab_size_per_layer_input",
    }  # of images, and of a table that is not there
    theirs, ours = config.to_dict(), again.to_dict()
    assert {k: v for k, v in ours.items() if k not in unused} == {k: v for k, v in theirs.items() if k not in unused}


@pytest.mark.parametrize("kind", GEMMA4)
@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q4_K"])
def test_packed_is_the_unpacked_file(kind: str, format: str, tmp_path: Path) -> None:
    """Matrices are used as they lie in the file, embeddings for each layer and experts too: logits and gradients of the
    unpacked file, within the rounding of other sums, and the same bits but for experts."""
    changes = K_QUANTS | OF_256.get(kind, {}) if format == "Q4_K" else WIDE | OF_64.get(kind, {})
    file = write_moe_gguf(tmp_path / "m.gguf", model_of(kind, **changes), format)
    found = []
    for base in ("packed", "fp32"):
        model = lorafit.load(file, base=base, compute="fp32")
        if base == "packed":
            formats = {path: weight.format for path, weight in frozen_weights(model).items() if "router" not in path}
            assert set(formats.values()) == {format}, formats
        lorafit.attach(model, rank=2, targets=["all-linear", *(["experts"] if kind == "experts" else [])])
        for _, layer in adapted_layers(model):
            layer.adapter.B.data.fill_(0.01)
        out = model(input_ids=IDS).logits
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if kind != "experts" else (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("kind", GEMMA4)
def test_quantised_while_it_streams_in(kind: str, tmp_path: Path) -> None:
    """NF4 of the file's values, the embedding as the file has it; nothing else in 16 bits."""
    changes = WIDE | OF_64.get(kind, {})
    source = open_source(write_moe_gguf(tmp_path / "m.gguf", model_of(kind, **changes), "BF16"))
    base = load_base(source, source.tokenizer(None), "nf4", "fp32")
    assert base.kept == ()
    weights = frozen_weights(base.model)
    assert {path for path, weight in weights.items() if weight.format != "NF4"} == {
        "model.embed_tokens.weight", *(["model.embed_tokens_per_layer.weight"] if kind == "small" else [])
    }  # fmt: skip
    assert set(bytes_by_format(base.model)) == {"NF4", "BF16"}


@pytest.mark.parametrize("kind", GEMMA4)
def test_it_trains_and_packs(kind: str, tmp_path: Path) -> None:
    """On the file's own Q8_0 blocks rows in one sequence have the loss and gradients that they have alone, and a batch
    is learnt by heart."""
    changes = WIDE | OF_64.get(kind, {}) | {"final_logit_softcapping": 30.0}
    source = open_source(write_moe_gguf(tmp_path / "m.gguf", model_of(kind, **changes), "Q8_0"))
    base = load_base(source, source.tokenizer(None), "packed", "fp32")
    lorafit.attach(base.model, rank=4, alpha=8, targets=["all-linear", *(["experts"] if kind == "experts" else [])])
    torch.manual_seed(1)
    for _, layer in adapted_layers(base.model):
        torch.nn.init.normal_(layer.adapter.B, std=0.02)
    rows, parameters = random_rows([11, 3, 17, 8]), [p for p in base.model.parameters() if p.requires_grad]
    found = []
    for together in (True, False):
        base.model.zero_grad()
        loss = accumulate(base.model, base.head, pack_rows(rows, range(4), 64, together))
        found.append((loss, torch.cat([p.grad.flatten() for p in parameters])))
    (loss, grad), (other, alone) = found
    assert loss == pytest.approx(other, rel=1e-5)
    assert float((grad - alone).norm() / alone.norm()) < 1e-5
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        last = accumulate(base.model, base.head, pack_rows(rows, range(4), 64))
        optimizer.step()
    assert last < 0.75 * loss


@pytest.mark.parametrize("kind", GEMMA4)
def test_layers_computed_twice_and_a_cache_change_nothing(kind: str, tmp_path: Path) -> None:
    """Gradients are the same bits however many layers are computed again, keys that later layers share too; answers
    with a cache are the likeliest tokens without one."""
    model = model_of(kind)
    source = open_source(write_moe_gguf(tmp_path / "m.gguf", model))
    base = load_base(source, source.tokenizer(None), "packed", "fp32")
    prompts, wanted = [[5, 9, 200, 31, 7, 88, 120, 44], [8, 1, 4], [90]], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                newest = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, newest.view(1, 1)], dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    assert generate(base.model, prompts, max_tokens=6, end_ids=()) == wanted
    lorafit.attach(base.model, rank=4)
    for _, layer in adapted_layers(base.model):
        layer.adapter.B.data.fill_(0.01)
    base.model.train()
    found = []
    for layers in (0, 1, 2, 4):
        base.model.zero_grad()
        accumulate(base.model, base.head, pack_rows(random_rows([11, 7]), range(2), 64), checkpointed=layers)
        found.append(torch.cat([p.grad.flatten() for p in base.model.parameters() if p.requires_grad]))
    assert found[0].abs().sum() > 0
    assert all(torch.equal(grad, found[0]) for grad in found)


@pytest.mark.parametrize("kind", GEMMA4)
def test_a_folder_and_a_file_are_one_base(kind: str, tmp_path: Path) -> None:
    """The base's fingerprint is the same, so that an adapter goes from one to the other."""
    model = model_of(kind)
    file, folder = write_moe_gguf(tmp_path / "m.gguf", model), save_folder(model, tmp_path / "folder")
    prints = [fingerprint(lorafit.load(path, base="fp32", compute="fp32")) for path in (file, folder)]
    assert difference(*prints) == (True, "")


def test_keys_of_layers_that_share_are_left_in_the_file(tmp_path: Path) -> None:
    """Published files of the small models hold k and v of layers that never use them, as their folders do."""
    model = model_of("small")
    extra = {f"model.layers.3.self_attn.{name}_proj.weight": torch.ones(32, 32) for name in ("k", "v")}
    extra["model.layers.3.self_attn.k_norm.weight"] = torch.ones(16)
    plain = model.state_dict
    model.state_dict = lambda: plain() | extra
    file = write_moe_gguf(tmp_path / "m.gguf", model)
    assert "blk.3.attn_k.weight" in read_gguf(file).tensors
    assert_close(logits(lorafit.load(file, base="fp32", compute="fp32")), logits(model))


def test_gate_and_up_may_be_apart(tmp_path: Path) -> None:
    """llama.cpp reads experts whose gate and up are two tensors, too."""
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", model_of("experts")))
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in file.tensors.items():
        values = tensor.data.view("<f4").reshape(tensor.shape)
        halves = np.split(values, 2, axis=1) if "gate_up" in name else [values]
        for half, matrix in zip(halves, ("gate", "up"), strict=False):
            tensors[name.replace("gate_up", matrix)] = half
    metadata = {key: (value, file.types[key]) for key, value in file.metadata.items()}
    write_gguf(tmp_path / "apart.gguf", "gemma4", metadata, {n: (t.shape, "F32") for n, t in tensors.items()},
               tensors.__getitem__)  # fmt: skip
    assert "blk.0.ffn_gate_exps.weight" in read_gguf(tmp_path / "apart.gguf").tensors
    both = [logits(lorafit.load(tmp_path / name, base="fp32", compute="fp32")) for name in ("m.gguf", "apart.gguf")]
    assert torch.equal(*both)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no pattern": ("dense", {"attention.sliding_window_pattern": None}, "holds no truth value for each of the 4"),
    "a pattern of one": ("dense", {"attention.sliding_window_pattern": [True]}, "holds no truth value for each"),
    "a last layer that slides": (
        "dense", {"attention.sliding_window_pattern": [False, True] * 2}, "lets the last layer's window slide"
    ),
    "no layer that slides": ("dense", {"attention.sliding_window_pattern": [False] * 4}, "lets no layer's window"),
    "no window": ("dense", {"attention.sliding_window": None}, "attention.sliding_window: is missing"),
    "no width of sliding heads": ("dense", {"attention.key_length_swa": None}, "key_length_swa: is missing"),
    "odd heads": (
        "dense",
        {"attention.key_length_swa": 7, "attention.value_length_swa": 7, "rope.dimension_count_swa": 7},
        "key_length_swa: is 7, which is odd",
    ),
    "other values": ("dense", {"attention.value_length_swa": 4}, "value_length_swa: is 4 where a key has 8 features"),
    "rotated in part": ("dense", {"rope.dimension_count_swa": 4}, "dimension_count_swa: is 4 where a key has 8"),
    "heads that vary": ("dense", {"attention.head_count_kv": [2, 1, 1, 1]}, r"is \[2, 1, 1, 1\]: not one number"),
    "heads that do not divide": ("dense", {"attention.head_count_kv": [3, 1, 3, 1]}, "head_count_kv: is 3, which does"),
    "full heads that do not": ("dense", {"attention.head_count_kv": [2, 3, 2, 3]}, "not one number that divides 4"),
    "all layers share": ("dense", {"attention.shared_kv_layers": 4}, "shared_kv_layers: is 4 of 4 layers"),
    "a full layer is not before": ("small", {"attention.shared_kv_layers": 1}, "shared_kv_layers: is 1, and before"),
    "no sliding one before": ("small", {"attention.shared_kv_layers": 3}, "shared_kv_layers: is 3, and before"),
    "three widths": ("small", {"feed_forward_length": [48, 48, 96, 48]}, "feed_forward_length: is .*: not one width"),
    "thrice as wide": ("small", {"feed_forward_length": [48, 48, 144, 144]}, "not one width for all layers"),
    "no width of experts": ("experts", {"expert_feed_forward_length": None}, "expert_feed_forward_length: is missing"),
    "no use of experts": ("experts", {"expert_used_count": 0}, "expert_used_count: is 0, not 1 to"),
    "scaled": ("dense", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "rotary scaling 'linear' is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    """One line with the key and its value."""
    kind, changes, words = REFUSED[case]
    with pytest.raises(ModelError, match=words):
        open_source(write_moe_gguf(tmp_path / "m.gguf", model_of(kind), **changes))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.linspace(1, 2, 8), "is no table of ones and then 1e30"),
        (np.array([1.0, 1e30, 1.0, *[1e30] * 5]), "is no table of ones and then 1e30"),
        (np.full(8, 1e30), "is no table of ones and then 1e30"),
        (np.ones(4), r"has type F32 and shape \[4\], not F32 and \[8\]"),
        (None, "is missing"),
    ],
)
def test_other_rotary_tables_are_refused(table: np.ndarray | None, words: str, tmp_path: Path) -> None:
    """The part of a head that is rotated is told by ones, the rest by 1e30; any other table is another model."""
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", model_of("dense")))
    name, tensors = "rope_freqs.weight", dict(file.tensors)
    old = tensors.pop(name)
    if table is not None:
        data = table.astype("<f4").view(np.uint8).reshape(1, -1)
        tensors[name] = replace(old, shape=table.shape, data=data)
    with pytest.raises(ModelError, match=f"{name}: {words}"):
        hf_config(replace(file, tensors=tensors))


@pytest.mark.parametrize("width", [16, 24, 40, 96, 512])
def test_the_rotated_share_counts_as_transformers_counts(width: int, tmp_path: Path) -> None:
    """Of any number of ones transformers makes as many frequencies."""
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", model_of("dense", global_head_dim=width)))
    old = file.tensors["rope_freqs.weight"]
    for used in range(1, width // 2 + 1):
        table = np.array([1.0] * used + [1e30] * (width // 2 - used), "<f4").view(np.uint8).reshape(1, -1)
        config = hf_config(replace(file, tensors=file.tensors | {"rope_freqs.weight": replace(old, data=table)}))
        share = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
        assert int(share * width // 2) == used


def test_towers_are_refused_by_name(tmp_path: Path) -> None:
    """Vision and sound lie in a file of their own; in a model's file their tensors have no place."""
    model = model_of("dense")
    file = read_gguf(write_moe_gguf(tmp_path / "m.gguf", model))
    tower = replace(file.tensors["output_norm.weight"], name="v.blk.0.ln1.weight")
    from lorafit.formats.names import entries

    with pytest.raises(Faults) as caught:
        entries(replace(file, tensors=file.tensors | {"v.blk.0.ln1.weight": tower}))
    assert "v.blk.0.ln1.weight: has no place in a gemma4 model" in str(caught.value)
