"""From training to serving: SmolLM2's GGUF trained on WikiSQL, the adapter exported, the same file in llama.cpp.

Run with `make proof-serve`; needs xllamacpp. What is finished in runs/serve is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp  # noqa: F401  without it nothing is proven

import lorafit
from lorafit.export.probes import Probe, log_probabilities

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "serve"
DATA, TEST = ROOT / "examples" / "wikisql" / "train.jsonl", ROOT / "examples" / "wikisql" / "test.jsonl"
TOKENS = 64  # of an answer at most
SAME = 0.95  # share of rows whose answers must be the same
GAP = 1.0  # nats: the floor of a quantised base, up to which two tokens may change places (docs/export.md)

SERVE = """
import json, sys, xllamacpp
job = json.loads(sys.stdin.readline())
params = xllamacpp.CommonParams()
params.model.path = job["file"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
params.n_parallel, params.cache_ram_mib, params.n_ctx = 1, 0, 2048
if job["exact"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
server = xllamacpp.Server(params)
rules = {"n_predict": job["tokens"], "temperature": 0, "n_probs": 1, "cache_prompt": False}
for ids in job["prompts"]:
    choice = server.handle_completions({"prompt": ids, **rules})["choices"][0]
    chosen = [entry["id"] for entry in choice["logprobs"]["content"]]
    print("answer " + json.dumps({"text": choice["text"], "ids": chosen}), flush=True)
"""


def lorafit_command(*arguments: object) -> str:
    """`lorafit ARGUMENTS`: its standard output."""
    command = [sys.executable, "-m", "lorafit", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def model() -> Path:
    fetched = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch_model.py", "smollm2"], stdout=subprocess.PIPE, check=True
    )
    return Path(fetched.stdout.decode().strip())


@pytest.fixture(scope="module")
def adapter(model) -> Path:
    """Trained on 600 of the 1,000 rows, once: after the demo's 128 too many tokens are still as likely as another."""
    run = OUT / "run"
    if not (run / "report.json").exists():
        if (run / "run.yaml").exists():
            lorafit_command("train", "--resume", run)
        else:
            config = ROOT / "examples" / "wikisql" / "demo.yaml"
            steps = ("--max-steps", 150, "--eval-every", 150)
            lorafit_command("train", model, "--config", config, *steps, "--out", run, "--overwrite")
    return run / "adapter"


@pytest.fixture(scope="module")
def exported(model, adapter) -> Path:
    """The GGUF adapter; its export compares log-probabilities on rows of the test data with llama.cpp's."""
    file = OUT / "adapter.gguf"
    if not file.exists():
        told = lorafit_command("export", model, adapter, "--to", "gguf", "--out", file, "--data", TEST, "--json")
        (OUT / "export.json").write_text(told)
    return file


def ours(model: Path, adapter: Path, compute: str) -> list[str]:
    """Answers of `lorafit generate`."""
    file = OUT / f"ours-{compute}.jsonl"
    if not file.exists():
        found = lorafit_command("generate", model, "--adapter", adapter, "--data", TEST, "--max-tokens", TOKENS,
                                "--compute", compute, "--json")  # fmt: skip
        file.write_text(found)
    return [json.loads(line)["output"] for line in file.read_text().splitlines()]


def prompts(opened: Any) -> list[list[int]]:
    """Every row's prompt, as `lorafit generate` gives it to the model."""
    rows = [json.loads(line) for line in TEST.read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    render = opened.tokenizer.apply_chat_template
    return [render(chat, add_generation_prompt=True, tokenize=True, return_dict=False) for chat in chats]


def theirs(model: Path, file: Path, asked: list[list[int]], exact: bool) -> list[dict[str, Any]]:
    """llama.cpp's answers, base file and adapter file as they lie on the disk; exact: keys and values in fp32 and plain
    attention, else its own default settings."""
    kept = OUT / f"theirs-{'exact' if exact else 'default'}.jsonl"
    if not kept.exists():
        job = {"file": str(model), "adapter": str(file), "prompts": asked, "tokens": TOKENS,
               "exact": exact, "threads": torch.get_num_threads()}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", SERVE], input=json.dumps(job) + "\n", check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("answer ")]
        kept.write_text("".join(line + "\n" for line in lines))
    return [json.loads(line) for line in kept.read_text().splitlines()]


def test_served_answers_are_generated_answers(model, adapter, exported):
    """At least 95 of 100 answers are the same text; where they part, our log-probabilities of the two tokens are
    nearer to each other than rounding activations to 8 bits can move them."""
    told = json.loads((OUT / "export.json").read_text())
    print(f"\nexport: {told}")
    loaded: Any = lorafit.load(model, adapter=adapter, compute="fp32")
    asked = prompts(loaded)
    answers = theirs(model, exported, asked, exact=False)
    assert len(answers) == len(asked) == 100
    mine = ours(model, adapter, "fp32")
    right = [json.loads(line)["completion"].strip() for line in TEST.read_text().splitlines()]
    parted = [n for n, (a, b) in enumerate(zip(mine, answers, strict=True)) if a.strip() != b["text"].strip()]
    for name, found in (("lorafit", mine), ("llama.cpp", [a["text"] for a in answers])):
        exact = sum(a.strip() == b for a, b in zip(found, right, strict=True))
        print(f"{name}: {exact} of 100 answers are the row's own")
    same = 1 - len(parted) / len(asked)
    print(f"the same answer in {same:.0%} of 100 rows")
    for n in parted:
        gap, ours_token, their_token = parting(loaded, asked[n], mine[n], answers[n]["ids"])
        print(f"row {n + 1}: {ours_token!r} here, {their_token!r} there, {gap:.3f} nats apart here")
        assert gap < GAP
    exact = [answer["text"].strip() for answer in theirs(model, exported, asked, exact=True)]
    print(f"with keys and values in fp32 there: {sum(a.strip() == b for a, b in zip(mine, exact, strict=True))} of 100")
    auto = ours(model, adapter, "auto")
    print(f"lorafit with --compute auto: {sum(a == b for a, b in zip(auto, mine, strict=True))} of 100 as with fp32")
    assert same >= SAME


def parting(loaded: Any, prompt: list[int], mine: str, their_ids: list[int]) -> tuple[float, str, str]:
    """(how much likelier our token is than theirs, here, where the answers part; the two tokens)."""
    tokenizer = loaded.tokenizer
    our_ids = [*tokenizer(mine, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    at = next(n for n, (a, b) in enumerate(zip(our_ids, [*their_ids, -1], strict=False)) if a != b)
    there = their_ids[at] if at < len(their_ids) else tokenizer.eos_token_id
    ids = (*prompt, *our_ids[:at])
    row = log_probabilities(loaded, [Probe(ids, (len(ids),))])[0]
    gap = float(row[our_ids[at]] - row[there])
    return gap, tokenizer.decode([our_ids[at]]), tokenizer.decode([there])
