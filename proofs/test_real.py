"""Laws on the real models: SmolLM2-135M-Instruct and Gemma-3-270M, fetched by hash. Run with `make proof-real`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lorafit
from builders.processes import assert_same_run, finish, kill_at_random
from lorafit.adapter.attach import adapted_layers
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf

ROOT = Path(__file__).parent.parent
TEXT = "The harbour was quiet at 6:45; 12 ships, naïve café 東京 🚢\n\n\tdef f(x):\n    return x  # fin"


@pytest.fixture(scope="session", params=["smollm2", "gemma3"])
def model_file(request) -> Path:
    """The GGUF file of each real model."""
    fetched = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch_model.py", request.param], stdout=subprocess.PIPE, check=True
    )
    return Path(fetched.stdout.decode().strip())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    fetched = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch_model.py", "smollm2"], stdout=subprocess.PIPE, check=True
    )
    return Path(fetched.stdout.decode().strip())


def dense_reference(file: Path):
    """transformers' own unpacking of the file as a plain fp32 model."""
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()


def test_logits_and_token_ids_equal_transformers(model_file):
    """Token ids equal transformers' tokenizer from the file; fp32 logits are as near to fp64's as transformers' own.

    Layers of ours round in another order, so both fp32 results are held against fp64: at most twice the error in the
    mean (root of squares), since the largest of 9 million logits comes and goes with the number of threads.
    """
    theirs = AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)
    ids = from_gguf(read_gguf(model_file)).encode(TEXT).ids
    assert ids == theirs(TEXT, add_special_tokens=False)["input_ids"]
    ids_BL = torch.tensor([ids])
    with torch.no_grad():
        reference = dense_reference(model_file)
        single = reference(ids_BL, use_cache=False).logits
        exact = reference.double()(ids_BL, use_cache=False).logits
        got = lorafit.load(model_file, base="fp32", compute="fp32")(input_ids=ids_BL).logits
    ours, their_own = ((logits - exact).pow(2).mean().sqrt().item() for logits in (got, single))
    largest = (got - exact).abs().max().item()
    print(f"\n{model_file.name}: error of logits {ours:.1e}, at most {largest:.1e}; of transformers' {their_own:.1e}")
    assert ours < 2 * their_own < 1e-4
    assert largest < 1e-3


def test_our_adapter_in_peft_gives_our_logits(smollm2, tmp_path):
    """An adapter saved here and loaded by PEFT on the dense reference: logits within 1e-3."""
    import peft

    ours = lorafit.load(smollm2, base="fp32", compute="fp32")
    lorafit.attach(ours, rank=16, alpha=32)
    torch.manual_seed(0)
    for _, layer in adapted_layers(ours):
        nn.init.normal_(layer.adapter.B, std=0.02)
    lorafit.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(dense_reference(smollm2), tmp_path / "adapter")
    ids_BL = torch.tensor([ours.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        gap = (ours(input_ids=ids_BL).logits - theirs(ids_BL, use_cache=False).logits).abs().max().item()
    print(f"\nmax logit difference to PEFT {gap:.2e}")
    assert gap < 1e-3
    again = lorafit.load(smollm2, adapter=tmp_path / "adapter", base="fp32", compute="fp32")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids_BL).logits, ours(input_ids=ids_BL).logits)


def test_one_row_overfitted_stops_by_itself(smollm2, tmp_path):
    """Trained on a single row, the model answers with it and ends: the end-of-turn token is trained."""
    row = {"prompt": "What is the harbour's colour?", "completion": "Seven shades of copper."}
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(row) + "\n")
    lorafit.train(
        model=smollm2, data=data, out=tmp_path / "out", max_steps=25, eval_fraction=0.0, batch_size=1, lr=1e-3
    )  # fmt: skip
    answer = subprocess.run(
        [sys.executable, "-m", "lorafit", "generate", smollm2, "--adapter", tmp_path / "out" / "adapter",
         "--prompt", row["prompt"], "--max-tokens", "40"],
        stdout=subprocess.PIPE, check=True, text=True,
    ).stdout  # fmt: skip
    assert answer.strip() == row["completion"]


def test_killed_on_smollm2_and_resumed_to_the_same_bytes(smollm2, tmp_path):
    """Three runs of eight steps, killed at random instants: adapter and metrics equal byte for byte."""
    options = {
        "model": str(smollm2),
        "data": str(ROOT / "examples" / "wikisql" / "test.jsonl"),
        "max_steps": 8,
        "batch_size": 2,
        "save_every": 1,
        "eval_every": 4,
        "eval_fraction": 0.02,
    }
    finish({**options, "out": str(tmp_path / "whole")})
    chance, kills = random.Random(11), 0
    for attempt in range(3):
        out = tmp_path / f"killed-{attempt}"
        times = kill_at_random({**options, "out": str(out)}, chance, longest=20, most=3)
        assert times, "the run ended before it was killed"
        kills += times
        assert_same_run(tmp_path / "whole", out)
    print(f"\n{kills} kills in 3 runs, 3 of 3 equal")
