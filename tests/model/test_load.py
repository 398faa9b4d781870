"""A model on disk becomes a frozen model with transformers' own logits."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorafit
from builders.gguf_files import ARCHITECTURES, write_tiny_gguf
from builders.models import FAMILIES, frozen, save_folder, tiny_model
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.adapter.attach import adapted_layers
from lorafit.errors import ConfigError, LorafitError, ModelError
from lorafit.formats.gguf import read_gguf
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import quantise
from lorafit.machine import memory_bytes
from lorafit.model.load import frozen_weights, load_base
from lorafit.model.sources import open_source

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3], [8, 1, 4, 4, 90, 2, 6, 301, 12, 77]])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    """The same weights through our frozen layers and attention: max difference under 1e-5, in fp32."""
    original = tiny_model(family)
    with torch.no_grad():
        want = original(IDS, use_cache=False).logits
        got = frozen(original, tmp_path).model(input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_everything_is_frozen_and_nothing_is_left_on_meta(tmp_path):
    """No parameter asks for a gradient; linear layers are ours; every tensor has values."""
    model = frozen(tiny_model("qwen2"), tmp_path).model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert isinstance(model.model.layers[0].self_attn.q_proj, FrozenLinear)
    assert not any(type(m) is torch.nn.Linear for m in model.modules())


@pytest.mark.parametrize("base", ["nf4", "int8", "fp32"])
def test_no_copy_of_a_folder_stays_in_memory_but_the_one_that_is_asked_for(base, tmp_path):
    """While 256 experts stream in, the file's pages go as they are copied (of 25 MB less than 2 stay), and nothing is
    left beside what the base is kept in (8 MB: modules, and the heap). Each matrix is a tensor of 33 KB."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 256, "num_hidden_layers": 1}
    model = tiny_model("qwen3_moe", **sizes, head_dim=16).bfloat16()
    folder = save_folder(model, tmp_path / "model")
    del model
    split_experts(folder)
    source = open_source(folder)
    before = memory_bytes("RssAnon")
    base_model = load_base(source, source.tokenizer(None), base, "fp32").model
    held = sum(weight.nbytes for weight in frozen_weights(base_model).values())
    assert (folder / "model.safetensors").stat().st_size > 25e6
    assert resident(folder / "model.safetensors") < 2e6
    assert memory_bytes("RssAnon") - before < 1.05 * held + 8e6


def split_experts(folder: Path) -> None:
    """The folder's fused experts, as one matrix for each of them."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        whole, stem = tensors.pop(name), name.rpartition(".")[0]
        halves = {"down_proj": whole} if name.endswith("down_proj") else dict(
            zip(("gate_proj", "up_proj"), whole.chunk(2, dim=1), strict=True)
        )  # fmt: skip
        for matrix, values in halves.items():
            for expert, one in enumerate(values):
                tensors[f"{stem}.{expert}.{matrix}.weight"] = one.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_tied_head_shares_the_embeddings_memory(tmp_path):
    """One matrix, not two."""
    model = frozen(tiny_model("gemma3_text"), tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_folders_load_too(tmp_path):
    """Two shards with an index give the logits of one file."""
    original = tiny_model("llama")
    save_folder(original, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, members in parts.items() for n in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = lorafit.load(tmp_path, compute="fp32")
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, original(IDS, use_cache=False).logits, atol=1e-4)


def broken(folder: Path, change, **sizes: int) -> Path:
    """A folder whose tensors were changed."""
    save_folder(tiny_model("llama", **sizes), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), f"{UP}: is missing"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(3)}), "model.extra.weight: has no place"),
        (lambda t: t.update({UP: torch.zeros(47, 32)}), r"has shape [47, 32], the configuration says [48, 32]"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_errors(tmp_path, change, words):
    """Nothing is filled in at random and nothing is ignored: one line with the tensor's name."""
    with pytest.raises(LorafitError) as caught:
        lorafit.load(broken(tmp_path, change))
    (line,) = caught.value.lines()
    assert words in line


def test_all_faulty_tensors_are_reported_at_once(tmp_path):
    """Two missing, one extra: three lines."""

    def change(tensors):
        tensors.pop(UP)
        tensors.pop("model.norm.weight")
        tensors["more"] = torch.zeros(1)

    with pytest.raises(LorafitError) as caught:
        lorafit.load(broken(tmp_path, change))
    assert len(caught.value.lines()) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "'lama' is not supported yet; the nearest supported one is llama"),
        ({"model_type": "x\nimport os"}, "is not supported yet"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: is 'gptq', which is not read"),
        ({"quantization_config": 3}, "quantization_config: is '3', which is not read"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            "quantization_config: is 'bitsandbytes' fp4, which is not read",
        ),
    ],
)
def test_models_that_we_cannot_load_are_refused_by_name(tmp_path, change, words):
    """An unknown architecture names the nearest known one."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=words.replace("(", r"\(")):
        lorafit.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 33},
        {"hidden_size": "x"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"max_position_embeddings": "a"},
        {"max_position_embeddings": 0},
        {"rope_parameters": {"rope_type": "zz"}},
        {"rope_parameters": 3},
        {"hidden_act": "zzz"},
        {"eos_token_id": "x"},
    ],
)
def test_an_impossible_configuration_is_one_line(tmp_path, change):
    """Numbers and names that describe no model end in one error, before anything large is built."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LorafitError) as caught:
        lorafit.load(tmp_path)
    assert all("\n" not in line and str(tmp_path) in line for line in caught.value.lines())


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    """Token ids beyond the matrix are found before training, not in step 1."""
    save_folder(tiny_model("llama", vocab_size=300), tmp_path)
    with pytest.raises(ModelError, match="tokenizer: has 400 tokens and the embedding 300 rows"):
        lorafit.load(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    """`auto_map` and Python files beside the weights are data like any other."""
    save_folder(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('ran')")
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **auto}))
    assert lorafit.load(tmp_path) is not None


def test_load_gives_a_module_with_logits_and_a_tokenizer(tmp_path):
    """The Python face: [B, L] ids in, [B, L, V] logits out, eval mode, tokenizer beside it."""
    save_folder(tiny_model("llama"), tmp_path)
    model = lorafit.load(tmp_path, base="fp32", compute="fp32")
    assert model(input_ids=IDS).logits.shape == (2, 10, 512)
    assert not model.training
    ids = model.tokenizer("SELECT name")["input_ids"]
    assert model.tokenizer.decode(ids) == "SELECT name"
    with pytest.raises(ModelError, match="does not exist"):
        lorafit.load(tmp_path / "nowhere")


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks, of NF4's too


def gguf_file(family: str, folder: Path, kind: str, **changes: object) -> Path:
    """A tiny model as a GGUF file with matrices of this type."""
    model = tiny_model(family, **{**WIDE, **changes})
    return write_tiny_gguf(folder / f"{kind}.gguf", model, ARCHITECTURES[family], tiny_gguf_metadata(), kind)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_packed_and_unpacked_give_the_same_bits(family, kind, compute, tmp_path):
    """A GGUF file used as it lies, and the same file unpacked to the compute dtype: logits and the adapter's
    gradients are equal in every bit, embedding, tied head and reordered q and k rows included."""
    file, results = gguf_file(family, tmp_path, kind), []
    for base in ("packed", compute):
        model = lorafit.load(file, base=base, compute=compute)
        lorafit.attach(model, rank=4)
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.adapter.B.fill_(0.01)
        logits = model(input_ids=IDS).logits
        logits.float().square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(results[0]) == 1 + 2 * 14


def test_a_quantised_file_is_used_as_it_lies_unless_told(tmp_path):
    """Packed is the default of a quantised GGUF, whose tensors stay views of the mapped file; other files are stored
    as products run."""
    weights = frozen_weights(lorafit.load(gguf_file("llama", tmp_path, "Q4_0"), compute="fp32"))
    assert {type(weight).__name__ for weight in weights.values()} == {"PackedWeight"}
    total = sum(weight.nbytes for weight in weights.values())
    orders = sum(weight.order.nbytes for weight in weights.values() if weight.order is not None)
    assert total - orders == sum(w.in_features * w.out_features for w in weights.values()) * 18 // 32
    plain = frozen_weights(lorafit.load(gguf_file("llama", tmp_path, "F32"), compute="fp32"))
    assert {weight.format for weight in plain.values()} == {"fp32"}


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantising_while_loading_changes_linear_layers_alone(family, base, tmp_path):
    """Every linear layer has the quantiser's values of its matrix; embedding and head keep theirs."""
    original = tiny_model(family, **WIDE, head_dim=16)
    model = lorafit.load(save_folder(original, tmp_path), base=base, compute="fp32")
    state = original.state_dict()
    for path, weight in frozen_weights(model).items():
        plain = state[f"{path}" if path.endswith(".weight") else f"{path}.weight"]
        if "layers." in path:
            assert weight.format == base.upper()
            assert torch.equal(weight.dense(), quantise(plain, base).dense())
        else:
            assert torch.equal(weight.dense(), plain.bfloat16().float())
    with torch.no_grad():
        gap = (model(input_ids=IDS).logits - original(IDS, use_cache=False).logits).abs().mean()
    assert gap < original(IDS, use_cache=False).logits.abs().mean()


def test_layers_whose_rows_do_not_divide_stay_in_16_bits_and_are_listed(tmp_path, capsys):
    """Rows of 48 are no whole blocks of 64: down_proj stays as it is, is named, and nothing fails."""
    source = open_source(save_folder(tiny_model("llama", hidden_size=64, intermediate_size=48), tmp_path))
    base = load_base(source, source.tokenizer(None), "nf4", "fp32")
    assert base.kept == tuple(f"model.layers.{n}.mlp.down_proj" for n in range(2))
    assert base.model.model.layers[0].mlp.down_proj.weight.format == "bf16"
    assert base.model.model.layers[0].mlp.up_proj.weight.format == "NF4"


def test_packed_needs_packed_weights(tmp_path):
    """A plain folder has none; the error says what to give."""
    with pytest.raises(ConfigError, match=r"--base: packed, and .* holds no packed weights; give nf4 or int8"):
        lorafit.load(save_folder(tiny_model("llama"), tmp_path), base="packed")


@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01])
def test_a_packed_scale_that_is_not_finite_is_refused(bad, tmp_path):
    """Infinity of either sign or NaN in one scale of one block: the tensor and the row are named."""
    file = gguf_file("llama", tmp_path, "Q4_0")
    tensor = read_gguf(file).tensors["blk.1.ffn_up.weight"]
    at = file.read_bytes().index(tensor.data.tobytes()) + 5 * tensor.data.shape[1] + 18
    with file.open("r+b") as raw:
        raw.seek(at)
        raw.write(bad.to_bytes(2, "little"))
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight: row 5 has a weight or scale that is NaN"):
        lorafit.load(file)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_matrix_that_is_not_finite_is_not_quantised(base, tmp_path):
    """The tensor is named."""

    def change(tensors):
        tensors[UP][3, 4] = float("inf")

    with pytest.raises(ModelError, match=f"{UP}: holds NaN or infinity"):
        lorafit.load(broken(tmp_path, change, **WIDE), base=base)


@pytest.mark.parametrize("double", [True, False])
def test_a_folder_that_bitsandbytes_quantised_is_used_as_it_lies(double, tmp_path):
    """transformers and bitsandbytes write NF4; we read the same values, by default without unpacking them; bf16 and
    int8 are made from those. What we quantise and write loads there."""
    theirs, folder = bitsandbytes_model(tmp_path, double)
    model = lorafit.load(folder, compute="fp32")
    kinds = Counter(weight.format for weight in frozen_weights(model).values())
    assert kinds == {"NF4": 14, "fp32": 2}
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(model.get_submodule(name).weight.dense(), values.float())
    with torch.no_grad():
        want, got = theirs(IDS, use_cache=False).logits, model(input_ids=IDS).logits
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        unpacked = lorafit.load(folder, base="fp32", compute="fp32")(input_ids=IDS).logits
    assert torch.equal(unpacked, got)


def bitsandbytes_model(folder: Path, double: bool):
    """A tiny llama with NF4 layers by bitsandbytes, and the folder that transformers' `save_pretrained` makes of it."""
    save_folder(tiny_model("llama", **WIDE), folder / "plain")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).train()  # in eval mode bitsandbytes repacks its weights at the first product
    saved = folder / "nf4"
    model.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((folder / "plain" / name).read_bytes())
    return model, saved


def test_quantising_holds_one_matrix_above_the_result(tmp_path, monkeypatch):
    """When a layer's matrix is read, those read before it are gone: only their codes are left."""
    source = open_source(save_folder(tiny_model("llama", **WIDE), tmp_path))
    read: list[weakref.ref] = []
    load = source.load

    def watched(name: str) -> torch.Tensor:
        assert sum(tensor() is not None for tensor in read) <= 1
        values = load(name).clone()
        if "layers" in name and values.ndim == 2:
            read.append(weakref.ref(values))
        return values

    monkeypatch.setattr(source, "load", watched)
    load_base(source, source.tokenizer(None), "nf4", "fp32")
    assert len(read) == 14
