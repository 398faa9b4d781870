"""The folders of PEFT, mlx-lm and Ollama: what is in them, and that each is the adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lorafit
from builders.adapters import logits, write_adapter
from builders.chats import STYLES, style_tokenizer
from builders.commands import run
from builders.gguf_experts import write_moe_gguf
from builders.gguf_files import write_tiny_gguf
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import CHAT_TEMPLATE, tiny_gguf_metadata, write_tiny_folder
from lorafit.adapter.attach import adapted_layers
from lorafit.errors import AdapterError
from lorafit.export.mlx import read_mlx
from lorafit.export.ollama import frames
from lorafit.export.opened import open_model
from lorafit.export.placement import placement
from lorafit.export.targets import _or_in_f32
from lorafit.export.verify import Gap, Verdict
from lorafit.formats.gguf import read_gguf
from lorafit.formats.safetensors import open_file
from lorafit.formats.template import PLAIN_TEMPLATE
from lorafit.model.sources import open_source

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny llama, and an adapter of ranks 4 and 2 and scales 2 and 4 that leaves layer 1's k_proj out."""
    folder = tmp_path_factory.mktemp("world")
    model = save_folder(tiny_model("llama"), folder / "model")
    loaded = lorafit.load(model, compute="fp32")
    lorafit.attach(loaded, rank=4, alpha=8, targets=["q_proj", "down_proj", "model.layers.0.self_attn.k_proj"])
    torch.manual_seed(0)
    layers = dict(adapted_layers(loaded))
    for path, layer in layers.items():
        if path.endswith("layers.1.self_attn.q_proj"):
            own = layer.adapter
            own.rank, own.scale = 2, 4.0
            own.A, own.B = (torch.nn.Parameter(t) for t in (own.A[:2].clone(), own.B[:, :2].clone()))
        torch.nn.init.normal_(layer.adapter.B, std=0.1)
    lorafit.save_adapter(loaded, folder / "adapter", {"base_model": str(model)})
    return folder


def export(world, target, out, *more):
    done = run("export", world / "model", world / "adapter", "--to", target, "--out", out, "--json", *more)
    assert done.code == 0, done.err
    return done


def test_peft_is_the_adapter_with_its_tokenizer(world, tmp_path):
    """The adapter's own bytes, tokenizer and chat template beside them; PEFT agrees to 0.001."""
    told = export(world, "peft", tmp_path / "peft").json
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorafit.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (world / "adapter" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").chat_template == CHAT_TEMPLATE
    assert told["program"] == "PEFT"
    assert told["largest_difference"] < 1e-3
    assert told["rank"] == [2, 4]


def test_portable_has_one_rank_one_scale_and_plain_names(world, tmp_path):
    """Ranks are filled up, scales are in B, alpha is the rank; lorafit and PEFT give the adapter's logits."""
    told = export(world, "portable", tmp_path / "portable").json
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    shapes = open_file(tmp_path / "portable" / "adapter_model.safetensors").shapes
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {4}
    assert len(shapes) == 2 * 6
    want = logits(lorafit.load(world / "model", adapter=world / "adapter", compute="fp32"), IDS)
    got = logits(lorafit.load(world / "model", adapter=tmp_path / "portable", compute="fp32"), IDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert told["largest_difference"] < 1e-3


def test_mlx_is_its_layout(world, tmp_path):
    """lora_a (in, r) and lora_b (r, out), one rank and scale; x + scale * (x lora_a) lora_b is the adapter's update."""
    export(world, "mlx", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert parameters["keys"] == ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    file = open_file(tmp_path / "mlx" / "adapters.safetensors")
    loaded = lorafit.load(world / "model", adapter=world / "adapter", compute="fp32")
    x = torch.randn(3, 48)
    for path, layer in adapted_layers(loaded):
        a, b = file.load(f"{path}.lora_a"), file.load(f"{path}.lora_b")
        assert tuple(a.shape) == (layer.base.in_features, parameters["rank"])
        assert tuple(b.shape) == (parameters["rank"], layer.base.out_features)
        own = x[:, : layer.base.in_features]
        torch.testing.assert_close(parameters["scale"] * (own @ a) @ b, layer.adapter(own), rtol=1e-4, atol=1e-5)
    assert not file.load("model.layers.1.self_attn.k_proj.lora_b").any()  # mlx-lm adapts it: so it is there, as zero
    assert len(read_mlx(tmp_path / "mlx")) == 6
    assert (tmp_path / "mlx" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_ollama_names_base_and_adapter(world, tmp_path):
    """A folder base becomes a GGUF file beside the adapter; the template is Go, answers stop at the end of a turn."""
    export(world, "ollama", tmp_path / "ollama")
    lines = (tmp_path / "ollama" / "Modelfile").read_text()
    assert lines.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in lines
    assert lorafit.load(tmp_path / "ollama" / "base.gguf", adapter=tmp_path / "ollama" / "adapter.gguf")
    base = write_tiny_gguf(tmp_path / "base.gguf", tiny_model("llama"), "llama", tiny_gguf_metadata())
    done = run("export", base, world / "adapter", "--to", "ollama", "--out", tmp_path / "second")
    assert done.code == 0, done.err
    assert (tmp_path / "second" / "Modelfile").read_text().startswith(f"FROM {base.resolve()}\n")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        "Modelfile", "adapter.gguf", "chat_template.jinja",
    }  # fmt: skip


@pytest.mark.parametrize("style", list(STYLES))
def test_ollamas_template_is_the_models_or_none(style):
    """Where a template is translated, the translation renders conversations as the template does, character by
    character; the simple ones are translated, those that look back or forward are not."""
    tokenizer = style_tokenizer(style)
    found = frames(tokenizer)
    assert (found is not None) == (style in ("chatml", "llama3", "mistral", "bare", "unprompted", "opened")), style
    if found is None:
        return
    begins = tokenizer.bos_token if tokenizer.add_bos else ""
    for roles in ("u", "uau", "suau", "suaua", "uaua"):
        names = {"s": "system", "u": "user", "a": "assistant"}
        chat = [{"role": names[role], "content": f"text {n} {{x}}"} for n, role in enumerate(roles)]
        for prompt in (False, True):
            want = tokenizer.render(chat, add_generation_prompt=prompt).removeprefix(begins or "")
            assert found.render(chat, prompt) == want


def test_the_template_that_was_trained_with_goes_along(world, tmp_path):
    """A run with --template keeps it beside the adapter; exports carry it, and without it the mismatch is said."""
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE.replace("You are a helpful assistant", "Write SQL"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "How many?", "completion": "SELECT COUNT"}\n' * 4)
    lorafit.train(model=world / "model", data=data, out=tmp_path / "run", max_steps=2, template=str(template), lr=0.05,
                  compute="fp32", threads=1, eval_fraction=0.0)  # fmt: skip
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == template.read_text()
    for target, file in (("peft", "chat_template.jinja"), ("mlx", "chat_template.jinja")):
        done = run("export", world / "model", adapter, "--to", target, "--out", tmp_path / target)
        assert done.code == 0, done.err
        assert (tmp_path / target / file).read_text() == template.read_text()
    (adapter / "chat_template.jinja").unlink()
    done = run("export", world / "model", adapter, "--to", "peft", "--out", tmp_path / "again")
    assert done.code == 2
    assert "was trained with another chat template than the model has; give the file" in done.err
    assert not (tmp_path / "again").exists()
    other = save_folder(tiny_model("llama", seed=1), tmp_path / "other")
    done = run("export", other, adapter, "--to", "peft", "--out", tmp_path / "again")
    assert "does not belong to this base" in done.err, "another model's template is the lesser fault"
    done = run("export", world / "model", adapter, "--to", "peft", "--out", tmp_path / "again", "--template", template)
    assert done.code == 0, done.err


def test_a_model_without_a_template_gets_the_plain_one(tmp_path):
    """What training used is what is written, without the BOS that this model does not begin with."""
    base = write_tiny_gguf(tmp_path / "base.gguf", tiny_model("llama"), "llama", tiny_gguf_metadata(None))
    adapter = write_adapter(base, tmp_path / "adapter")
    assert run("export", base, adapter, "--to", "peft", "--out", tmp_path / "peft").code == 0
    assert (tmp_path / "peft" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE.removeprefix("{{- bos_token }}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "gguf", "--dtype", "Q8_0"), "--dtype: is Q8_0, and gguf has fp32 adapters alone"),
        (("--to", "peft", "--data", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments, said, world, tmp_path):
    """One line, exit code 2, nothing written."""
    done = run("export", world / "model", world / "adapter", "--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_effect_is_refused(world, tmp_path):
    """A is zero, B is not: no log-probability changes, and that is an error."""
    adapter = write_adapter(world / "model", tmp_path / "silent", spread=0.0)
    done = run("export", world / "model", adapter, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert done.code == 2
    assert "changes nothing" in done.err
    assert not (tmp_path / "a.gguf").exists()


def test_a_layer_that_gguf_has_no_name_for_is_refused(world, tmp_path):
    """Placement names every linear layer of the families here; another path is an error that names it."""
    where = placement(world / "model", open_source(world / "model"))
    with pytest.raises(lorafit.LorafitError, match="has no name in GGUF's llama files"):
        where.of("model.layers.0.vision.fc1", "model")


@pytest.mark.parametrize("base", ["a matrix for each expert", "GGUF"])
def test_experts_that_the_file_has_in_parts(base, tmp_path):
    """PEFT and extract on a mixture whose stacks are several tensors of the file, as published folders and GGUF files
    are: the whole is put together."""
    model = tiny_model("qwen3_moe")
    path = tmp_path / "model"
    if base == "GGUF":
        path = write_moe_gguf(tmp_path / "model.gguf", model)
    else:
        model.save_pretrained(path)
        write_tiny_folder(path)
        assert "model.layers.0.mlp.experts.5.down_proj.weight" in load_file(path / "model.safetensors")
    adapter = write_adapter(path, tmp_path / "adapter", targets=["all-linear", "experts"])
    done = run("export", path, adapter, "--to", "peft", "--out", tmp_path / "peft", "--json")
    assert done.code == 0, done.err
    assert done.json["largest_difference"] < 1e-3
    linear = write_adapter(path, tmp_path / "linear")
    assert run("merge", path, linear, "--out", tmp_path / "merged", "--dtype", "fp32").code == 0
    done = run("extract", path, tmp_path / "merged", "--rank", 4, "--out", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert done.json["kept"] > 0.999
    assert done.json["outside"]["tensors"] == 0


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "llama4_text", "mistral4", "qwen3_5_moe_text"])
def test_experts_known_as_a_whole_are_portable_fused(family, tmp_path):
    """Where other programs have no single experts, portable is PEFT's fused layout, with one rank and scale 1."""
    path = save_folder(tiny_model(family), tmp_path / "model")
    adapter = write_adapter(path, tmp_path / "adapter", alpha=10, targets=["experts", "o_proj"])
    done = run("export", path, adapter, "--to", "portable", "--out", tmp_path / "p", "--json")
    assert done.code == 0, done.err
    assert done.json["largest_difference"] < 1e-3
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["target_parameters"]


def test_what_rounding_hides_is_compared_in_f32(tmp_path, capsys):
    """A quantised file that the other program answers differently is written again with its own values in F32: what is
    found there counts, and is an error if it is one there too; nothing is left."""
    model = tiny_model("qwen3_moe", hidden_size=64, intermediate_size=64, moe_intermediate_size=32)
    file = write_moe_gguf(tmp_path / "model.gguf", model, "Q8_0")
    opened, asked, work = open_model(str(file), []), [], tmp_path / "work"
    work.mkdir()

    def ask(path, format):
        asked.append(format)
        kinds = {tensor.type.name for tensor in read_gguf(path).tensors.values()}
        assert kinds == ({"F32"} if format == "F32" else {"Q8_0", "F32"})
        if format == "Q8_0":
            raise AdapterError("x", "differs by 3", "")
        values = [lorafit.load(one, base="fp32", compute="fp32") for one in (file, path)]
        assert torch.equal(*(logits(one, IDS) for one in values))
        return Verdict("llama.cpp", 1, 0.005, Gap(0.01 if fails else 0.001, 0.001)).check("x")

    fails = False
    assert _or_in_f32(ask, file, "Q8_0", opened, work).adapted.largest == 0.001
    assert "differs by 3: by what llama.cpp rounds in Q8_0" in capsys.readouterr().err
    fails = True
    with pytest.raises(AdapterError, match=r"log-probabilities in llama\.cpp differ by 0\.01, more than 0\.005"):
        _or_in_f32(ask, file, "Q8_0", opened, work)
    assert asked == ["Q8_0", "F32"] * 2
    assert not list(work.iterdir())
