"""The adapter's folder: PEFT's layout, both ways, and strict."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from builders.models import FAMILIES, frozen, tiny_model
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.adapter.file import load_adapter, save_adapter
from lorafit.errors import AdapterError, LorafitError

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def trained(family: str, folder: Path, **options):
    """A tiny frozen model whose adapter is not zero."""
    model = frozen(tiny_model(family), folder).model
    attach(model, **{"rank": 4, "alpha": 8, "targets": TARGETS, **options})
    torch.manual_seed(3)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.adapter.B, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [TARGETS, ["all-linear"], ["model.layers.1.self_attn.q_proj"]])
def test_our_adapter_in_peft_gives_our_logits(family, targets, tmp_path):
    """Saved here, loaded by PEFT on transformers' own model: logits equal within 1e-5 relative, in fp32."""
    ours = trained(family, tmp_path / "model", targets=targets)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    with torch.no_grad():
        base, want = tiny_model(family)(IDS).logits, theirs(IDS).logits
        got = ours(input_ids=IDS).logits
    assert relative(got, want) < 1e-5
    assert relative(got, base) > 1e-2, "the adapter must do something for this test to mean anything"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 3}},
        {"layers_to_transform": [1]},
    ],
)
def test_pefts_adapter_here_gives_pefts_logits(options, tmp_path):
    """Saved by PEFT, loaded here: logits equal within 1e-5 relative; ranks and scales per layer too."""
    torch.manual_seed(5)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **options}
    )
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = frozen(tiny_model("llama"), tmp_path / "model").model
    (note,) = load_adapter(ours, tmp_path / "adapter")
    assert "no lorafit.json" in note
    with torch.no_grad():
        assert relative(ours(input_ids=IDS).logits, theirs(IDS).logits) < 1e-5


def test_saved_and_loaded_keeps_every_bit(tmp_path):
    """Through disk and into a fresh model: the logits' bits stay; saving again gives the same bytes."""
    model = trained("qwen3", tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    again = frozen(tiny_model("qwen3"), tmp_path / "model").model
    assert load_adapter(again, tmp_path / "adapter") == []
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    save_adapter(again, tmp_path / "twice")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorafit.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_module_of_the_users_own_saves_and_loads(tmp_path):
    """The file works for any torch module."""
    models = []
    for _ in "ab":
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    attach(models[0], rank=2, alpha=4)
    nn.init.normal_(models[0][0].adapter.B)
    save_adapter(models[0], tmp_path / "a")
    load_adapter(models[1], tmp_path / "a")
    x = torch.randn(4, 6)
    assert torch.equal(models[0](x), models[1](x))


def test_the_same_weights_in_another_format_are_accepted_with_a_note(tmp_path):
    """The base in bf16 instead of fp32 is the same base; the note says so."""
    save_adapter(trained("llama", tmp_path / "model"), tmp_path / "adapter")
    half = tiny_model("llama").to(torch.bfloat16)
    ours = frozen(half, tmp_path / "half").model
    (note,) = load_adapter(ours, tmp_path / "adapter")
    assert "same weights in another format" in note


def tamper(folder: Path, change) -> None:
    """Change the tensors of an adapter on disk."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _nan(tensors):
    tensors[FIRST][0, 0] = math.nan


TENSOR_FAULTS = {
    "renamed": (lambda t: t.update({FIRST.replace("q_proj", "w_proj"): t.pop(FIRST)}), "w_proj.*names no linear layer"),
    "missing": (lambda t: t.pop(FIRST), "layers.0.self_attn.q_proj.lora_A.weight: is missing"),
    "missing layer": (
        lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.down_proj" in k],
        "layers.1.mlp.down_proj.lora_A.weight: is missing",
    ),
    "extra": (lambda t: t.update({"base_model.model.score.weight": torch.zeros(2)}), "score.weight: names no linear"),
    "nan": (_nan, "q_proj.lora_A.weight: holds NaN or infinity"),
    "dtype": (lambda t: t.update({FIRST: t[FIRST].double()}), "F64"),
    "rank": (lambda t: t.update({FIRST: torch.zeros(3, 32)}), r"has shape \[3, 32\], rank 4"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_damaged_adapter_is_refused_and_the_model_untouched(fault, tmp_path):
    """Renamed, missing, extra, NaN, wrong dtype, wrong rank: each refused with the tensor's name, nothing attached."""
    change, words = TENSOR_FAULTS[fault]
    save_adapter(trained("llama", tmp_path / "model"), tmp_path / "adapter")
    tamper(tmp_path / "adapter", change)
    model = frozen(tiny_model("llama"), tmp_path / "model").model
    with pytest.raises(LorafitError) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert any(re.search(words, line) for line in caught.value.lines()), caught.value.lines()
    assert all("\n" not in line for line in caught.value.lines())
    assert not list(adapted_layers(model))


def test_another_base_is_refused(tmp_path):
    """A base of equal shape and other weights, one of other shape, and another architecture: refused in one line."""
    save_adapter(trained("llama", tmp_path / "model"), tmp_path / "adapter")
    others = {
        "equal shape": (tiny_model("llama", seed=9), "other weights"),
        "other shape": (tiny_model("llama", hidden_size=64), "other tensor shapes"),
        "architecture": (tiny_model("qwen3"), "trained on a llama model and this is qwen3"),
    }
    for name, (other, words) in others.items():
        model = frozen(other, tmp_path / name).model
        with pytest.raises(AdapterError, match=words) as caught:
            load_adapter(model, tmp_path / "adapter")
        assert len(caught.value.lines()) == 1


CONFIG_FAULTS = {
    "no rank": ({"r": None}, "r: is None"),
    "huge rank": ({"r": 4000000}, "r: is 4000000"),
    "text rank": ({"r": "8"}, "r: is '8'"),
    "other rank": ({"r": 8}, "rank 8 on this model needs"),
    "nan alpha": ({"lora_alpha": math.nan}, "lora_alpha: is nan"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector: is missing"),
    "bias": ({"bias": "some"}, "bias: 'some' is not supported"),
    "saved modules": ({"modules_to_save": ["score"]}, "modules_to_save: score is no embedding or head"),
    "other kind": ({"peft_type": "IA3"}, "only LORA adapters"),
    "regex": ({"rank_pattern": {"(a+)+$": 4}}, "is a regular expression"),
    "regex alpha": ({"alpha_pattern": {"layers\\.[0-9]+": 4}}, "is a regular expression"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_configuration_that_we_cannot_honour_is_refused(fault, tmp_path):
    """What changes the result and is not supported is named; what is absurd is refused before anything is allocated."""
    values, words = CONFIG_FAULTS[fault]
    save_adapter(trained("llama", tmp_path / "model"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    model = frozen(tiny_model("llama"), tmp_path / "model").model
    with pytest.raises(LorafitError) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert any(words in line for line in caught.value.lines()), caught.value.lines()


def test_target_modules_is_never_run_as_a_regular_expression(tmp_path):
    """A pattern that would take for ever is not evaluated: the layers come from the tensors' names."""
    model = trained("llama", tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": "(a+)+$" * 20}))
    fresh = frozen(tiny_model("llama"), tmp_path / "model").model
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_folders_that_are_no_adapter_are_refused(tmp_path):
    """Nothing there, no tensors, or a pickle: one line each, and no pickle is opened."""
    model = frozen(tiny_model("llama"), tmp_path / "model").model
    with pytest.raises(AdapterError, match="does not exist"):
        load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / "p" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(AdapterError, match=r"pickled .bin adapters are not read"):
        load_adapter(model, tmp_path / "p")


def test_a_second_adapter_is_refused(tmp_path):
    """One adapter at a time: loading on top of another is an error, and the first stays as it was."""
    model = trained("llama", tmp_path / "model")
    save_adapter(model, tmp_path / "a")
    before = model(input_ids=IDS).logits
    with pytest.raises(AdapterError, match="has an adapter"):
        load_adapter(model, tmp_path / "a")
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_saving_without_an_adapter_is_refused(tmp_path):
    """There is nothing to save, and nothing is written."""
    model = frozen(tiny_model("llama"), tmp_path / "model").model
    with pytest.raises(AdapterError, match="has no adapter"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_over_an_older_adapter_replaces_it_whole(tmp_path):
    """No file of the old one stays, no temporary folder either."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("old")
    save_adapter(trained("llama", tmp_path / "model"), tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md",
    }  # fmt: skip
    assert (tmp_path / "a" / "README.md").read_text() != "old"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "model"}


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    """Saving into a folder that holds something else would lose it: refused, nothing changed."""
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds model, which|holds thesis.txt, which is no adapter's file"):
        save_adapter(trained("llama", tmp_path / "model"), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
