"""Every kind of adapter through PEFT's layout, both ways, and its laws on a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from builders.models import frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted, attach, detach, enable_adapter, trained
from lorafit.adapter.file import load_adapter, save_adapter
from lorafit.adapter.merge import HEAD, changes, low_rank
from lorafit.adapter.peft_config import in_words, method_of
from lorafit.data.batch import pack_rows
from lorafit.errors import AdapterError, ConfigError, LorafitError
from lorafit.model.fused import FusedLayer
from lorafit.training.step import accumulate

IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120]])
KINDS = {
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora with biases": ("qwen2", {"use_dora": True, "bias": "lora_only"}),
    "pissa": ("gemma3_text", {"init": "pissa"}),
    "pissa, rslora": ("llama", {"init": "pissa", "use_rslora": True}),
    "pissa, dora": ("llama", {"init": "pissa", "use_dora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 3}, "alpha_pattern": {"down_proj": 5}}),
    "biases of adapted layers": ("qwen2", {"bias": "lora_only", "targets": ["q_proj", "down_proj"]}),
    "all biases": ("qwen2", {"bias": "all", "targets": ["q_proj", "down_proj"]}),
    "embedding": ("llama", {"targets": ["q_proj", "embed_tokens"]}),
    "scaled embedding": ("gemma3_text", {"targets": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"targets": ["q_proj", "lm_head"]}),
    "tied embedding and head": ("qwen2", {"targets": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "whole": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole head": ("llama", {"modules_to_save": ["lm_head"]}),
    "whole, tied": ("gemma3_text", {"modules_to_save": ["embed_tokens"]}),
    "rows": ("llama", {"token_ids": [9, 31]}),
    "rows, tied": ("gemma3_text", {"token_ids": [9, 31]}),
    "embedding that is asked for its device": ("llama4_text", {"targets": ["q_proj", "embed_tokens"]}),
    "the same, whole": ("llama4_text", {"modules_to_save": ["embed_tokens"]}),
    "its rows": ("llama4_text", {"token_ids": [9, 31]}),
    "experts": ("qwen3_moe", {"targets": ["attention", "experts"]}),
    "experts, rslora": ("qwen3_moe", {"targets": ["attention", "experts"], "use_rslora": True}),
    "experts, patterns": (
        "gpt_oss",
        {"targets": ["q_proj", "experts"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}},
    ),
    "router": ("qwen3_moe", {"targets": ["q_proj", "gate"], "use_rslora": True}),
    "dora and pissa beside experts": ("qwen3_moe", {"targets": ["attention"], "use_dora": True, "init": "pissa"}),
    "rows beside experts": ("qwen3_moe", {"targets": ["experts"], "token_ids": [9, 31]}),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def learnt(model: torch.nn.Module) -> torch.nn.Module:
    """Everything that is trained, moved from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def model_of(kind: str, folder: Path, moved: bool = True):
    family, options = KINDS[kind]
    base = frozen(tiny_model(family), folder)
    attach(base.model, **{"rank": 4, "alpha": 6, **options})
    if moved:
        learnt(base.model)
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_in_peft_ours_gives_our_logits(kind, tmp_path):
    """Saved here, loaded by PEFT on transformers' own model: logits equal within 1e-5 relative, in fp32."""
    ours = model_of(kind, tmp_path / "model").model
    save_adapter(ours, tmp_path / "adapter")
    plain = tiny_model(KINDS[kind][0])
    with torch.no_grad():
        base = plain(IDS).logits
        want = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(IDS).logits
        got = ours(input_ids=IDS).logits
    assert relative(got, want) < 1e-5
    assert relative(got, base) > 1e-3, "the adapter must do something for this test to mean anything"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_keeps_every_bit(kind, tmp_path):
    """Through disk and into a fresh model: the logits' bits stay, and saving again gives the same tensors."""
    ours = model_of(kind, tmp_path / "model").model
    save_adapter(ours, tmp_path / "adapter")
    again = frozen(tiny_model(KINDS[kind][0]), tmp_path / "model").model
    assert load_adapter(again, tmp_path / "adapter") == []
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    save_adapter(again, tmp_path / "twice")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "moving"),
    [({"modules_to_save": ["embed_tokens"]}, 512 * 32), ({"token_ids": [9, 31]}, 2 * 32 + 2 * 16)],
)
def test_a_table_for_the_layers_leaves_embedding_and_head_one(options, moving, tmp_path):
    """Gemma 4's small models have a second embedding: the first and the head stay one matrix, trained once, in PEFT,
    and loaded again."""
    plain = tiny_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=512)
    ours = frozen(plain, tmp_path / "model").model
    learnt(attach(ours, rank=4, alpha=6, targets=["q_proj"], **options))
    beside = [parameter.numel() for name, parameter in trained(ours).items() if not name.endswith((".A", ".B"))]
    assert sum(beside) == moving
    assert {"model.embed_tokens", "lm_head"} <= set(adapted(ours))
    save_adapter(ours, tmp_path / "adapter")
    again = frozen(plain, tmp_path / "model").model
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        got = ours(input_ids=IDS).logits
        want = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(IDS).logits
        assert relative(got, want) < 1e-5
        assert torch.equal(again(input_ids=IDS).logits, got)


PEFTS = {
    "dora": ("llama", {"use_dora": True}),
    "dora, rslora": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "lora_only": ("qwen2", {"bias": "lora_only"}),
    "all": ("qwen2", {"bias": "all"}),
    "embedding": ("llama", {"target_modules": ["v_proj", "embed_tokens"]}),
    "head": ("qwen2", {"target_modules": ["v_proj", "lm_head"]}),
    "whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "whole, both of a tied pair apart": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole, a tied pair as one": (
        "qwen2",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "rows": ("llama", {"trainable_token_indices": [9, 31]}),
    "rows of both": ("llama", {"trainable_token_indices": {"embed_tokens": [9, 31], "lm_head": [5, 9]}}),
    "rows, tied": ("gemma3_text", {"trainable_token_indices": [9, 31]}),
}


@pytest.mark.parametrize("kind", PEFTS)
@pytest.mark.parametrize("repeats_embeddings", [False, True])
def test_pefts_adapter_here_gives_pefts_logits(kind, repeats_embeddings, tmp_path):
    """Saved by PEFT, with the base's embedding or without: loaded here, logits equal within 1e-5 relative."""
    family, options = PEFTS[kind]
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    theirs = peft.get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=repeats_embeddings and "embed" in kind)
    ours = frozen(tiny_model(family), tmp_path / "model").model
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        assert relative(ours(input_ids=IDS).logits, theirs(IDS).logits) < 1e-5


def test_pefts_conversion_of_pissa_is_ours(tmp_path):
    """PEFT trains PiSSA and converts it by `path_initial_model_for_weight_conversion`: rank, alpha and product of each
    layer are those of the file that we write for the same training."""
    theirs = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    )
    theirs.peft_config["default"].init_lora_weights = True  # as its documentation says
    theirs.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    ours = frozen(tiny_model("llama"), tmp_path / "model").model
    attach(ours, rank=4, alpha=6, targets=["q_proj", "down_proj"], init="pissa")
    layers = dict(ours.named_modules())
    torch.manual_seed(3)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                adapter = layers[name.removeprefix("base_model.model.")].adapter
                signs = (module.lora_A["default"].weight * adapter.A).sum(1).sign()  # of singular vectors: free
                for own, other, turn in (
                    (adapter.A, module.lora_A["default"].weight, signs[:, None]),
                    (adapter.B, module.lora_B["default"].weight, signs),
                ):
                    step = torch.randn_like(own) * 0.05
                    own.add_(step)
                    other.add_(step * turn)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(
        tmp_path / "theirs",
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    save_adapter(ours, tmp_path / "ours")
    found = {}
    for side in ("ours", "theirs"):
        config = json.loads((tmp_path / side / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (8, 12)
        tensors = peft.utils.save_and_load.load_peft_weights(str(tmp_path / side), device="cpu")
        found[side] = {
            name: tensors[name.replace("lora_A", "lora_B")] @ tensor
            for name, tensor in tensors.items()
            if "lora_A" in name
        }
    assert found["ours"].keys() == found["theirs"].keys()
    for name, product in found["theirs"].items():
        assert relative(found["ours"][name], product) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_no_logit(kind, tmp_path, monkeypatch):
    """X3, X15: at the start, each kind gives the base's logits, bit for bit where the same code computes the layers;
    the logits of tokens with rows of their own come from a product of their own."""
    base = frozen(tiny_model(KINDS[kind][0]), tmp_path)
    monkeypatch.setattr(FusedLayer, "_fits", lambda self, cos: False)
    with torch.no_grad():
        before = base.model(IDS).logits
        attach(base.model, **{"rank": 4, "alpha": 6, **KINDS[kind][1]})
        after = base.model(IDS).logits
        apart = list(KINDS[kind][1].get("token_ids", []))
        assert torch.allclose(after[..., apart], before[..., apart], atol=1e-5)
        after[..., apart] = before[..., apart]
        assert torch.equal(after, before)
        monkeypatch.undo()
        assert relative(base.model(IDS).logits, before) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_or_detached_the_base_comes_back(kind, tmp_path):
    """Switched off, and taken off: the base's logits, bit for bit; the fingerprint never saw the adapter."""
    base = frozen(tiny_model(KINDS[kind][0]), tmp_path)
    with torch.no_grad():
        before = base.model(IDS).logits
        attach(base.model, **{"rank": 4, "alpha": 6, **KINDS[kind][1]})
        learnt(base.model)
        assert not torch.equal(base.model(IDS).logits, before)
        enable_adapter(base.model, False)
        assert torch.equal(base.model(IDS).logits, before)
        detach(base.model)
        assert torch.equal(base.model(IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_steps_gradient_is_that_of_plain_logits(kind, tmp_path, monkeypatch):
    """Loss and gradients of packed rows by our layers and chunked loss, against the original layers, all logits and
    torch's cross-entropy: within 1e-4 of the largest, and for exactly what is trained."""
    base = model_of(kind, tmp_path)
    rows = random_rows([11, 9, 17])
    base.model.train()
    found = []
    loss = accumulate(base.model, base.head, pack_rows(rows, range(3), 50))
    found.append({name: p.grad.clone() for name, p in trained(base.model).items() if p.grad is not None})
    base.model.zero_grad()
    monkeypatch.setattr(FusedLayer, "_fits", lambda self, cos: False)
    total, count = 0.0, sum(sum(row.trained[1:]) for row in rows)
    for row in rows:
        logits = base.model(torch.tensor(row.ids)[None], use_cache=False).logits[0, :-1]
        wanted = torch.tensor(row.trained[1:])
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
        (losses[wanted].sum() / count).backward()
        total += float(losses[wanted].sum().detach()) / count
    found.append({name: p.grad.clone() for name, p in trained(base.model).items() if p.grad is not None})
    assert loss == pytest.approx(total, rel=1e-5)
    assert found[0].keys() == found[1].keys() == trained(base.model).keys()
    scale = max(float(gradient.norm()) for gradient in found[1].values())
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 1e-2 * scale), name


def test_a_tied_pair_is_trained_as_one(tmp_path):
    """A whole matrix, and rows of tokens: one tensor, whichever of the two is named; the file has both for PEFT."""
    for options, count in (({"modules_to_save": ["lm_head"]}, 512 * 32), ({"token_ids": [4, 5]}, 2 * 32)):
        model = frozen(tiny_model("qwen2"), tmp_path / "m").model
        attach(model, rank=2, targets=["q_proj"], **options)
        own = [p.numel() for name, p in trained(model).items() if "q_proj" not in name]
        assert own == [count]


WORDS = {
    "rslora": "rank 4, alpha 6, rsLoRA",
    "pissa, dora": "rank 4, alpha 6, DoRA, PiSSA",
    "patterns": "ranks by layer, alphas by layer",
    "all biases": "rank 4, alpha 6, all biases",
    "whole": "rank 4, alpha 6, embed_tokens and lm_head whole",
    "rows": "rank 4, alpha 6, rows of 2 tokens",
}


@pytest.mark.parametrize("kind", WORDS)
def test_the_kind_in_words(kind, tmp_path):
    """What the output, the card and `info` say; of another program's file, from its configuration."""
    model = model_of(kind, tmp_path / "model").model
    assert WORDS[kind] in method_of(model)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "lorafit.json").read_text())["method"] == method_of(model)
    if "pissa" not in kind:
        assert in_words(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())) == method_of(model)


REFUSED = {
    "rank above a layer": (
        {"rank": 17},
        "--rank: is 17, and .*k_proj has 16 x 32 weights; give at most 16, or --rank-pattern k_proj=16",
    ),
    "pattern of nothing": ({"rank_pattern": {"w_proj": 2}}, "--rank-pattern: w_proj matches no adapted layer"),
    "no biases": ({"bias": "all"}, "--bias: all, and no layer has a bias"),
    "dora on the head": ({"targets": ["lm_head"], "use_dora": True}, "--use-dora: is not made for lm_head"),
    "pissa on the embedding": ({"targets": ["embed_tokens"], "init": "pissa"}, "--init pissa: is not made for .*embed"),
    "whole norm": (
        {"modules_to_save": ["norm"]},
        "norm is no embedding or head.*embed_tokens, lm_head",
    ),
    "two ways": ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "lm_head is trained in another way already"),
    "no such token": ({"token_ids": [512]}, "512 is no row of a vocabulary of 512"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(fault, tmp_path):
    """Each in one line that says what to do."""
    options, words = REFUSED[fault]
    model = frozen(tiny_model("llama"), tmp_path).model
    with pytest.raises(ConfigError, match=words) as caught:
        attach(model, **{"rank": 4, **options})
    assert len(caught.value.lines()) == 1


DAMAGED = {
    "no magnitude": ("dora", {"use_dora": False}, "lora_magnitude_vector: has no place in this adapter"),
    "dora claimed": ("rslora", {"use_dora": True}, "lora_magnitude_vector: is missing"),
    "biases claimed": ("dora with biases", {"bias": "none"}, "base_layer.bias: has no place"),
    "whole claimed": ("rslora", {"modules_to_save": ["lm_head"]}, "lm_head.weight: is missing"),
    "rows of another number": ("rows", {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [9, 31]}}, "shape"),
    "rows beyond": ("rows", {"trainable_token_indices": {"embed_tokens": [9, 512], "lm_head": [9, 31]}}, "512"),
    "rows twice": ("rows", {"trainable_token_indices": {"embed_tokens": [9, 9], "lm_head": [9, 31]}}, "twice"),
    "rows that are none": ("rows", {"trainable_token_indices": [-1]}, "must hold lists of ids"),
    "odd names": ("rslora", {"modules_to_save": [7]}, "must be a list of names"),
    "unknown module": ("rslora", {"modules_to_save": ["score"]}, "score is no embedding or head"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_file_that_does_not_hold_what_it_says_is_refused(fault, tmp_path):
    """Configuration and tensors must agree on every kind; then the model is as it was."""
    kind, changes, words = DAMAGED[fault]
    save_adapter(model_of(kind, tmp_path / "model").model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    model = frozen(tiny_model(KINDS[kind][0]), tmp_path / "model").model
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(LorafitError) as caught:
        load_adapter(model, tmp_path / "adapter")
    assert any(words in line for line in caught.value.lines()), caught.value.lines()
    assert [name for name, _ in model.named_parameters()] == before


def test_another_bases_embedding_beside_an_adapter_is_refused(tmp_path):
    """PEFT repeats the embedding: where it is not this base's, the adapter belongs elsewhere."""
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = frozen(tiny_model("llama", seed=9), tmp_path / "model").model
    with pytest.raises(AdapterError, match="is another matrix than this base's"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind, tmp_path):
    """A base with each change added in gives the adapter's logits within 1e-5, whatever is trained."""
    ours, merged = model_of(kind, tmp_path).model, tiny_model(KINDS[kind][0])
    found = changes(ours)
    if HEAD in found:  # a tied head goes its own way
        merged.lm_head.weight = torch.nn.Parameter(merged.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, change in found.items():
            weight = merged.get_parameter(name)
            weight.add_(change(weight.detach().clone()))
        assert relative(merged(IDS).logits, ours(input_ids=IDS).logits) < 1e-5


@pytest.mark.parametrize("kind", ["dora", "biases of adapted layers", "embedding", "rows"])
def test_what_is_no_pair_of_factors_is_not_given_as_one(kind, tmp_path):
    """Formats that hold A and B alone can tell that an adapter has more: it changes other tensors too."""
    model = model_of(kind, tmp_path).model
    assert changes(model).keys() > {f"{path}.weight" for path in low_rank(model)}
