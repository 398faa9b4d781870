"""Claim T2: LoRA's best learning rate is about 10 times full fine-tuning's, and more for runs under 100 steps ("LoRA
Without Regret", 2025). Run with `make proof-rates`; runs are kept in .cache/proofs/rates, finished ones not run again.
"""

from __future__ import annotations

from proofs.arms import DATA, machine_line, train, write
from proofs.runs import KEPT as ALL
from proofs.runs import SLICE

KEPT = ALL / ("rates-slice" if SLICE else "rates")
RATES = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
STEPS = (2, 3) if SLICE else (60, 300)


def arm(method: str, lr: float, steps: int) -> dict:
    """4 rows a step, seed 0; the 770 test rows are evaluated once, at the end."""
    data = DATA / "banking77"
    return train(
        KEPT / f"{method}-{steps}-{lr:g}", data=data / "train.csv", eval=data / "test.csv", method=method, lr=lr,
        max_steps=steps, batch_size=4, save_every=150, eval_every=10_000,
    )  # fmt: skip


ABOUT = """# T2: the best learning rate of LoRA and of full fine-tuning

BANKING77, SmolLM2-135M-Instruct, {machine}; 4 rows a step, rank 16, all linear layers, linear schedule, seed 0 alone;
loss in nats per trained token on 770 test rows at the end. Cut for time: the claim's runs of 600 steps are 300.

| method | steps | learning rate | loss |
|---|---|---|---|
"""


def table(losses: dict[tuple[str, int, float], float]) -> str:
    """Everything that is finished, as Markdown."""
    text, ratios = ABOUT.format(machine=machine_line()), {}
    text += "".join(f"| {m} | {steps} | {lr:g} | {loss:.4f} |\n" for (m, steps, lr), loss in losses.items())
    for steps in STEPS:
        if not all((m, steps, lr) in losses for m, rates in RATES.items() for lr in rates):
            continue
        best = {m: min(rates, key=lambda lr, m=m, steps=steps: losses[m, steps, lr]) for m, rates in RATES.items()}
        ratios[steps] = best["lora"] / best["full"]
        edge = [m for m, lr in best.items() if lr in (RATES[m][0], RATES[m][-1])]
        note = f" ({' and '.join(edge)} at the edge of the grid)" if edge else ""
        text += f"\n{steps} steps: best {best['lora']:g} against {best['full']:g}, ratio {ratios[steps]:.1f}{note}.\n"
    if len(ratios) == len(STEPS):
        holds = "holds" if all(5 <= ratio <= 20 for ratio in ratios.values()) else "does not hold"
        against = ", and speaks against it" if any(not 3 <= ratio <= 30 for ratio in ratios.values()) else ""
        larger = "larger" if ratios[STEPS[0]] > ratios[STEPS[1]] else "not larger"
        text += f"\n**T2** (a ratio of 5 to 20): {holds}{against}; the shorter run's ratio is {larger}.\n"
    return text


def test_the_best_rates_are_a_decade_apart():
    """Every run ends; the losses and the ratio of the best rates are written, whatever they say."""
    losses = {}
    for steps in STEPS:
        for method, rates in RATES.items():
            for lr in rates:
                report = arm(method, lr, steps)
                losses[method, steps, lr] = report["adapter_loss"]
                assert report["steps"] == steps
                write("rates", table(losses))
