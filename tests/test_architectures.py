"""Every dense architecture and multimodal wrapper on its way through the product: what docs/models.md is made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafit
from builders.architectures import DENSE, WRAPPED, folder_of, reference, tiny
from builders.commands import run
from builders.gguf_files import ARCHITECTURES, write_tiny_gguf
from builders.models import save_folder
from builders.processes import assert_same_run, write_data
from builders.rows import random_rows
from builders.tokenizers_tiny import tiny_gguf_metadata
from lorafit.adapter.attach import adapted_layers
from lorafit.adapter.experts import expert_layers
from lorafit.config import read_yaml
from lorafit.data.batch import pack_rows
from lorafit.errors import ConfigError
from lorafit.model.architectures import LINEAR_ATTENTION
from lorafit.model.generate import generate
from lorafit.model.load import Base, frozen_weights, load_base
from lorafit.model.sources import open_source
from lorafit.run import resume
from lorafit.training.step import accumulate

ALL = (*DENSE, *WRAPPED)
HYBRID = ("qwen3_5_text", "qwen3_5", "qwen3_5_moe")
PACKING = [name for name in ALL if name not in HYBRID]
GGUF = [name for name in DENSE if name in ARCHITECTURES and name not in ("llama", "qwen2", "qwen3", "gemma3_text")]
WIDE = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3]])


def base_of(name: str, folder: Path, base: str = "fp32") -> Base:
    """Our frozen model of this architecture."""
    source = open_source(folder_of(name, folder))
    return load_base(source, source.tokenizer(None), base, "fp32")


def adapted(name: str, folder: Path, base: str = "fp32") -> Base:
    """The same with an adapter that is not zero."""
    found = base_of(name, folder, base)
    lorafit.attach(found.model, 4, 8, ["all-linear", *(["experts"] if expert_layers(found.model) else [])])
    torch.manual_seed(1)
    for _, layer in adapted_layers(found.model):
        nn.init.normal_(layer.adapter.B, std=0.05)
    return found


@pytest.mark.parametrize("name", ALL)
def test_loss_falls(name, tmp_path):
    """A batch is learnt by heart: ten steps take a quarter off its loss, and no weight of the base has changed."""
    base = base_of(name, tmp_path)
    lorafit.attach(base.model, rank=4, alpha=8)
    frozen = {n: p.detach().clone() for n, p in base.model.named_parameters() if not p.requires_grad}
    rows = random_rows([11] if name in HYBRID else [11, 7, 9])
    packs = pack_rows(rows, range(len(rows)), 64)
    optimizer = torch.optim.Adam([p for p in base.model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    base.model.train()
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(accumulate(base.model, base.head, packs))
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(frozen[n], p) for n, p in base.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", PACKING)
def test_packs_exactly(name, tmp_path):
    """Rows in one sequence have the loss and the gradients that they have one by one."""
    base, rows = adapted(name, tmp_path), random_rows([11, 3, 26, 8])
    outcomes = []
    for together in (True, False):
        base.model.zero_grad()
        loss = accumulate(base.model, base.head, pack_rows(rows, range(4), 64, together))
        outcomes.append((loss, [p.grad.clone() for p in base.model.parameters() if p.requires_grad]))
    (loss, grads), (alone, wanted) = outcomes
    assert loss == pytest.approx(alone, rel=1e-5)
    scale = max(float(grad.norm()) for grad in wanted)
    assert all((a - b).norm() <= 1e-5 * max(float(b.norm()), scale / 100) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("name", [*HYBRID, "qwen3_5_moe_text", "qwen3_next"])
def test_packing_is_refused(name, tmp_path):
    """Linear attention carries a state from row to row: one row at a time, and the run says so and why."""
    data, model, out = write_data(tmp_path / "data.jsonl"), folder_of(name, tmp_path / "model"), tmp_path / "out"
    done = run("train", model, data, "--out", out, "--rank", 2, "--max-steps", 1, "--threads", 1, "--eval-fraction", 0)
    assert done.code == 0
    assert "packing   off  (auto: its linear attention carries a state from row to row)" in done.err
    assert read_yaml(out / "run.yaml")["packing"] == "off"


@pytest.mark.parametrize("name", ALL)
def test_adapter_goes_to_peft_and_back(name, tmp_path):
    """Saved here, PEFT loads it on transformers' own model with the same logits (1e-5); what PEFT saves, we load."""
    ours = adapted(name, tmp_path / "model").model
    lorafit.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference(name), tmp_path / "adapter")
    written = sum("lora_A" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert sum("lora_A" in key for key, _ in theirs.named_parameters()) == written  # none in a tower
    with torch.no_grad():
        want, got = theirs(input_ids=IDS, use_cache=False).logits, ours(input_ids=IDS, use_cache=False).logits
        base = reference(name)(input_ids=IDS, use_cache=False).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (got - base).abs().max() > 1e-3 * base.abs().max(), "the adapter must do something"
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = base_of(name, tmp_path / "model").model
    lorafit.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, use_cache=False).logits, got)


@pytest.mark.parametrize("name", ALL)
def test_resumes(name, tmp_path):
    """A run that ended after step 1 of 2 and goes on gives the bytes of one that never stopped."""
    model, data = folder_of(name, tmp_path / "model"), write_data(tmp_path / "data.jsonl", rows=8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lorafit.train(model=model, data=data, out=whole, rank=2, max_steps=2, save_every=1, batch_size=2, threads=1,
                  eval_fraction=0, lr=0.01)  # fmt: skip
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000002")
    shutil.rmtree(cut / "adapter")
    resume(cut)
    assert_same_run(whole, cut)


@pytest.mark.parametrize(
    "kind", [{"targets": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}, {"token_ids": [5]}]
)
def test_llama4_takes_an_adapted_embedding(kind, tmp_path):
    """Its model asks the embedding for its weight's device."""
    base = base_of("llama4", tmp_path)
    lorafit.attach(base.model, 2, 4, **{"targets": ["q_proj"], **kind})
    rows = random_rows([11, 7])
    assert accumulate(base.model, base.head, pack_rows(rows, range(2), 64)) > 0


@pytest.mark.parametrize("name", ALL)
def test_batches_are_padded_on_the_right(name, tmp_path):
    """Rows of several lengths in one call have the logits that they have alone; padding on the left, which no mask
    here would hide, is refused."""
    model, rows = base_of(name, tmp_path).model, [[5, 9, 200, 31, 7, 88, 120], [8, 1, 4]]
    ids = torch.tensor([rows[0], [*rows[1], 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for got, row in zip(together, rows, strict=True):
            want = model(input_ids=torch.tensor([row])).logits[0]
            assert (got[: len(row)] - want).abs().max() < 2e-5 * want.abs().max()
        for wrong in (mask.flip(1), mask[:, None, None, :]):
            with pytest.raises(ConfigError, match="attention_mask: hides other tokens than those at the end of a row"):
                model(input_ids=ids, attention_mask=wrong)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_is_its_text_part(name, tmp_path):
    """A multimodal folder, with transformers' old names of tensors or its new ones, is the text model inside: nothing
    of the tower is in memory, and the run and `info` say whose part it is."""
    theirs = reference(name)
    folder = folder_of(name, tmp_path / "saved")
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    save_file({n: t.clone() for n, t in theirs.state_dict().items()}, plain / "model.safetensors")
    names = [open_source(path) for path in (folder, plain)]
    assert names[0].shapes == names[1].shapes
    assert names[0].part_of == name.partition("-")[0]
    model = base_of(name, tmp_path / "third").model
    assert not any("vision" in path or "visual" in path for path, _ in model.named_modules())
    assert run("info", folder, "--json").json["part_of"] == name.partition("-")[0]
    with pytest.raises(ConfigError, match="text part of another"):
        lorafit.save_nf4(model, tmp_path / "nf4")


@pytest.mark.parametrize("name", DENSE)
def test_nf4_base(name, tmp_path):
    """Every linear layer whose rows are whole blocks is in NF4 and trains; the others are listed."""
    source = open_source(save_folder(tiny(name, **WIDE), tmp_path))
    base = load_base(source, source.tokenizer(None), "nf4", "fp32")
    weights = {path.removesuffix(".weight"): weight for path, weight in frozen_weights(base.model).items()}
    inner = {path: weight for path, weight in weights.items() if ".layers." in path}
    assert {path for path, weight in inner.items() if weight.format != "NF4"} == set(base.kept)
    assert all(inner[path].in_features % 64 for path in base.kept)
    assert len(base.kept) < len(inner) / 2
    lorafit.attach(base.model, rank=2)
    packs = pack_rows(random_rows([5, 4]), range(2), 64, together=name not in HYBRID)
    assert accumulate(base.model, base.head, packs) > 0
    assert all(layer.adapter.B.grad.abs().sum() > 0 for _, layer in adapted_layers(base.model))


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", GGUF)
def test_gguf_packed(name, kind, tmp_path):
    """A GGUF file used as it lies, and unpacked: the same logits and gradients in every bit. The other families are
    in test_load.py."""
    changes = {"num_hidden_layers": 4, "no_rope_layers": None} if name == "smollm3" else {}
    changes |= {"rope_parameters": None} if name == "olmo3" else {}
    changes |= {"original_max_position_embeddings": 256} if name == "phi3" else {}
    model = tiny(name, **WIDE, **changes)
    file = write_tiny_gguf(tmp_path / "model.gguf", model, ARCHITECTURES[name], tiny_gguf_metadata(), kind)
    outcomes = []
    for base in ("packed", "fp32"):
        ours = lorafit.load(file, base=base, compute="fp32")
        lorafit.attach(ours, rank=2)
        for _, layer in adapted_layers(ours):
            nn.init.constant_(layer.adapter.B, 0.01)
        logits = ours(input_ids=IDS).logits
        logits.square().sum().backward()
        outcomes.append([logits, *(p.grad for p in ours.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_generates(name, tmp_path):
    """Answers of several prompts, with a cache, are those of the likeliest token found again and again without one."""
    base, theirs = base_of(name, tmp_path), reference(name)
    prompts = [[5, 9, 200, 31, 7, 88, 120], [8, 1, 4], [90]]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                newest = theirs(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, newest.view(1, 1)], dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    assert generate(base.model, prompts, max_tokens=6, end_ids=()) == wanted


def test_hybrids_are_those_with_linear_attention():
    """The tests' list is the product's."""
    assert {name for name in DENSE if name in LINEAR_ATTENTION} == set(HYBRID) & set(DENSE)
