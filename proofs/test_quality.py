"""Claim T7: LoRA on an NF4 base ends where LoRA on the 16-bit base ends (QLoRA, arXiv:2305.14314), and so does LoRA on
the packed file. Run with `make proof-quality`; runs are kept in .cache/proofs/quality, finished ones are not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafit
from lorafit.config import TrainConfig
from lorafit.evaluate.heldout import held_out
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import PackedWeight
from lorafit.inputs import read_rows
from lorafit.kernels.nf4 import quantise_nf4
from lorafit.model.sources import open_source
from lorafit.run import resume
from lorafit.use import open_base

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".cache" / "proofs" / "quality"
WIKISQL = ROOT / "examples" / "wikisql"
BASES = ("bf16", "nf4", "packed")
WIKITEXT = ROOT / "proofs" / "data" / "wikitext2.txt"
STEPS = {"smollm2": 150, "gemma3": 150}
WARNING = """The base weights are already quantised: SmolLM2's matrices are Q4_1, which 4-bit integers with a minimum
and the packed base reproduce exactly and NF4 does not; Gemma's are Q5_0, Q4_K, Q6_K and Q8_0. What is shown is that
training closes NF4's gap on these weights, not that 4 bits of a 16-bit model cost nothing."""


def fetch(model: str) -> Path:
    """The real model's file."""
    command = [sys.executable, ROOT / "scripts" / "fetch_model.py", model]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.strip())


def arm(model: str, base: str) -> dict:
    """report.json of one run: 4 WikiSQL rows a step, the 100 test rows held out, seed 0; begun, resumed or read."""
    out = KEPT / f"{model}-{base}-{STEPS[model]}"
    if not (out / "report.json").exists():
        if (out / "run.yaml").exists():
            resume(out)
        else:
            lorafit.train(
                model=fetch(model), base=base, data=WIKISQL / "train.jsonl", eval=WIKISQL / "test.jsonl", out=out,
                max_steps=STEPS[model], batch_size=4, eval_every=STEPS[model], save_every=15, overwrite=True,
            )  # fmt: skip
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("model", STEPS)
def test_training_closes_the_gap_of_four_bits(model):
    """After training, held-out losses: |NF4 - bf16| under 0.02 nats and under half of the gap before; packed within
    0.5 % of bf16."""
    reports = {base: arm(model, base) for base in BASES}
    before = {base: report["base_loss"] for base, report in reports.items()}
    after = {base: report["adapter_loss"] for base, report in reports.items()}
    print(f"\n{model}, WikiSQL, {STEPS[model]} steps of 4 rows, nats per trained token of 100 held-out rows")
    print("| base | before | after | gap before | gap after |\n| --- | --- | --- | --- | --- |")
    for base in BASES:
        gaps = f"{before[base] - before['bf16']:+.4f} | {after[base] - after['bf16']:+.4f}"
        print(f"| {base} | {before[base]:.4f} | {after[base]:.4f} | {gaps} |")
    print(WARNING)
    gap_before, gap_after = (abs(loss["nf4"] - loss["bf16"]) for loss in (before, after))
    assert gap_after < 0.02
    assert gap_after < gap_before / 2
    assert abs(after["packed"] - after["bf16"]) < 0.005 * after["bf16"]


@pytest.mark.parametrize("model", STEPS)
def test_double_quantization_costs_nothing_that_shows(model):
    """Claim X6: on WikiText-2 the loss of NF4 with 8-bit scales is within 0.02 nats of that with fp32 scales, beyond
    which the claim would be false; under 0.005 is expected, and what it comes to is printed."""
    file = fetch(model)
    base, source = open_base(TrainConfig(model=str(file), base="nf4")), open_source(file)
    context = int(base.model.config.max_position_embeddings)
    rows = read_rows((str(WIKITEXT),), base.tokenizer, TrainConfig(), context)[0].rows
    nested = held_out(base.model, base.head, rows, 2048).loss
    for path, layer in base.model.named_modules():
        if isinstance(layer, FrozenLinear) and layer.weight.format == "NF4":
            stored = layer.weight.stored
            codes, absmax = quantise_nf4(source.load(f"{path}.weight"))
            assert torch.equal(codes, stored.data)
            layer.weight = PackedWeight(replace(stored, scales=absmax, nested=None, offset=0.0))
    plain = held_out(base.model, base.head, rows, 2048).loss
    print(f"\n{model}: NF4 with 8-bit scales {nested:.5f}, with fp32 scales {plain:.5f} nats per token")
    assert abs(nested - plain) < 0.02
