"""Claim T8: variants of LoRA tie once each has its own learning rate (arXiv:2602.04998). `make proof-variants`.

Five variants, four learning rates each with seed 0, then the best rate of each with two more seeds. Runs are kept in
.cache/proofs/variants, finished ones are not run again. 30 runs of 40 steps: about 35 minutes on two cores.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from proofs.runs import KEPT, SLICE, WIKISQL, fetch, finished, write_table

STEPS, SEEDS = (2, (0,)) if SLICE else (40, (0, 1, 2))
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA+": {"lora_plus_ratio": 16.0},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # a factor of 3 apart; at the edges the best is not trusted, and that is said
LOWER = {"rsLoRA": 0.25, "LoRA+": 0.25, "PiSSA": 0.1}  # ranges of their own: larger updates at the same rate


def arm(variant: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: 8 WikiSQL rows a step, the 100 test rows held out."""
    return finished(
        KEPT / "variants" / f"{variant.replace('+', 'plus')}-{rate:g}-{seed}-{STEPS}",
        model=fetch("smollm2"), data=WIKISQL / "train.jsonl", eval=WIKISQL / "test.jsonl", rank=8, lr=rate, seed=seed,
        max_steps=STEPS, batch_size=8, eval_every=STEPS, save_every=20, **VARIANTS[variant],
    )  # fmt: skip


def rates(variant: str) -> list[float]:
    return [round(rate * LOWER.get(variant, 1.0), 9) for rate in RATES]


def test_variants_tie_once_their_learning_rate_is_tuned():
    """Best held-out losses, means over three seeds: none wins over the best of the others by more than 4 %, beyond
    which the claim would be false; within 2 % is expected, and what it comes to is printed."""
    rows, best = [], {}
    for variant in VARIANTS:
        swept = {rate: arm(variant, rate, 0)["adapter_loss"] for rate in rates(variant)}
        rate = min(swept, key=swept.__getitem__)
        losses = [swept[rate], *(arm(variant, rate, seed)["adapter_loss"] for seed in SEEDS[1:])]
        best[variant] = fmean(losses)
        edge = " (at the edge)" if rate in (rates(variant)[0], rates(variant)[-1]) else ""
        sweep = ", ".join(f"{at:g}: {loss:.4f}" for at, loss in swept.items())
        rows.append(
            [variant, sweep, f"{rate:g}{edge}", f"{best[variant]:.4f}", f"{min(losses):.4f} to {max(losses):.4f}"]
        )
    first, second = sorted(best.values())[:2]
    notes = f"""SmolLM2-135M on its Q4_1 file, WikiSQL, {STEPS} steps of 8 rows, rank 8, all linear layers, 100 held-out
rows, seeds {", ".join(map(str, SEEDS))}; nats per trained token. From the lowest best to the highest
{max(best.values()) / first - 1:.1%}, to the second {second / first - 1:.1%}.
135M parameters and one data set: this says that the code does what the methods say, not what holds at 7B."""
    header = ("variant", "held-out loss by learning rate, seed 0", "best rate", "mean over seeds", "lowest to highest")
    write_table("variants", "T8: variants of LoRA, each with its own learning rate", header, rows, notes)
    if not SLICE:
        assert second / first - 1 <= 0.04
