"""LoRA on a mixture's experts: lorafit's grouped products against PEFT's target_parameters, on a tiny-wide model.

    python -m benchmarks.experts [--experts 8 32 128] [--active 2 8] [--out experts.md]

A Qwen 3 MoE of two layers with random weights, made on the spot: all of its size is in the experts. Rank 16 on both
stacks of each layer, one pack of random ids a step, all trained; other ids each step, since the same would send as many
tokens to each expert again, and products of known sizes are faster. Each side stands in a process of its own; memory is
what that process had most of while it stepped, seen from outside, above what it had loaded. Experts grow with the
active ones held, and the active ones with the experts held: what a step takes should follow the second alone.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import STATUS, arguments, heading, memory, publish, say, spread, table, watch
from benchmarks.trainee import random_pack
from lorafit import machine

SIDES = ("lorafit bf16", "lorafit nf4", "peft bf16", "lorafit fp32", "peft fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MB = 1e6


def write_model(folder: Path, experts: int, active: int, hidden: int, inner: int) -> None:
    """A folder with random weights in bf16, and no tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=experts, num_experts_per_tok=active,
        norm_topk_prob=True, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def lorafit_step(job: dict[str, Any]) -> Any:
    """A function that takes the optimizer step of this number, and returns its loss."""
    from lorafit.adapter.attach import adapted_layers, attach
    from lorafit.model.load import build, head_of
    from lorafit.model.sources import open_source
    from lorafit.training.optim import make_optimizer
    from lorafit.training.step import accumulate

    base, dtype = job["base"], DTYPES[job["compute"]]
    model = build(open_source(Path(job["folder"])), base, dtype)
    attach(model, job["rank"], 2 * job["rank"], ["experts"])
    optimizer = make_optimizer([p for _, layer in adapted_layers(model) for p in layer.adapter.parameters()], 0.0)
    optimizer.param_groups[0]["lr"] = 1e-3
    head = head_of(model)
    model.train()

    def step(number: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate(model, head, [random_pack(512, 1, job["tokens"], seed=number)])
        optimizer.step()
        return loss

    return step


def peft_step(job: dict[str, Any]) -> Any:
    """The same by PEFT: its adapters in the base's dtype, transformers' grouped products, its own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=DTYPES[job["compute"]])
    config = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=[], target_parameters=TARGETS)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    adapted.train()

    def step(number: int) -> float:
        ids = torch.from_numpy(random_pack(512, 1, job["tokens"], seed=number).ids_T)[None]
        optimizer.zero_grad(set_to_none=True)
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def child(job: dict[str, Any]) -> None:
    """One side: memory when it is loaded, the seconds of each step, the first and last loss."""
    torch.set_num_threads(job["threads"])
    if job["side"].startswith("lorafit"):
        machine.bound_primitives()  # as `lorafit train` does
    step = (lorafit_step if job["side"].startswith("lorafit") else peft_step)(job)
    loaded, seconds, losses = memory(), [], []
    for number in range(1 + job["repeats"]):
        began = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - began)
    found = {"loaded": loaded, "seconds": seconds[1:], "losses": [losses[0], losses[-1]]}
    print(json.dumps(found))


def row(side: str, options: dict[str, Any]) -> list[str]:
    """A line of the table."""
    base = side.split()[1]
    seen = watch("benchmarks.experts", {**options, "side": side, "base": base, "compute": base.replace("nf4", "bf16")})
    if seen.result is None:
        return [side, seen.ending, *[""] * 5]
    rate = [options["tokens"] / seconds for seconds in seen.result["seconds"]]
    loaded = seen.result["loaded"]
    private, peak = loaded["RssAnon"], seen.peaks["RssAnon"]
    losses = (f"{loss:.4f}" for loss in seen.result["losses"])
    figures = (f"{value / MB:,.0f}" for value in (private, peak - private, seen.peaks[STATUS[2]]))
    return [side, spread(rate), f"{statistics.median(seen.result['seconds']):.2f}", *figures, *losses]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128], help="with the first --active")
    parser.add_argument(
        "--active", type=int, nargs="+", default=[2, 8], help="the further ones with the first --experts"
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child)
    parts = [heading("LoRA on experts", asked.threads, ("peft",))]
    columns = ["side", "tokens/s", "s a step", "private MB, loaded", "more in a step", "peak MB", "first loss", "last"]
    pairs = [(n, asked.active[0]) for n in asked.experts] + [(asked.experts[0], k) for k in asked.active[1:]]
    for experts, active in pairs:
        with tempfile.TemporaryDirectory() as folder:
            say(f"{experts} experts, {active} active")
            write_model(Path(folder), experts, active, asked.hidden, asked.inner)
            options = {key: getattr(asked, key) for key in ("tokens", "rank", "threads", "repeats")} | {
                "folder": folder
            }
            rows = [row(side, options) for side in asked.sides]
        title = f"## {experts} experts of {asked.hidden} x {asked.inner}, {active} for each of {asked.tokens} tokens"
        parts += [title, table(columns, rows)]
    return publish(parts, asked.out)


if __name__ == "__main__":
    main()
