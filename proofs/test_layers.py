"""Claim T3: at equal numbers of parameters, adapters on attention alone do worst ("LoRA Without Regret", 2025; QLoRA,
arXiv:2305.14314). Run with `make proof-layers`; runs are kept in .cache/proofs/layers, finished ones not run again.
"""

from __future__ import annotations

from proofs.arms import DATA, loss, machine_line, measured, paired, told, train, write
from proofs.runs import KEPT as ALL
from proofs.runs import SLICE

KEPT = ALL / ("layers-slice" if SLICE else "layers")
WHERE = {"attention": ("attention", 16), "mlp": ("mlp", 10), "all": ("all-linear", 6)}
SEEDS = (0, 1) if SLICE else (0, 1, 2)
TEST = DATA / "e2e" / "test.csv"
LENGTH = {"max_steps": 3} if SLICE else {"epochs": 1.0}


def arm(name: str, seed: int):
    """One epoch of 1,200 rows, 8 rows a step, learning rate by the rule."""
    out = KEPT / f"{name}-seed{seed}"
    targets, rank = WHERE[name]
    report = train(
        out, data=DATA / "e2e" / "train.csv", targets=targets, rank=rank, seed=seed, batch_size=8, eval_fraction=0,
        save_every=75, **LENGTH,
    )  # fmt: skip
    kept = KEPT / "measured" / f"{out.name}.json"
    return report, measured(kept, out, TEST, answers=False, rows=16 if SLICE else None)


ABOUT = """# T3: which layers get the adapter, at equal parameters

E2E NLG, SmolLM2-135M-Instruct, {machine}. One epoch of 1,200 rows (every third of the development set, cut for time),
8 rows a step, alpha 32, learning rate by the rule for all (not swept); loss in nats per trained token on {n} rows of
the test set. The base alone: {base:.4f}.

| layers | rank | parameters | seed | loss |
|---|---|---|---|---|
"""


def table(done, base) -> str:
    """Everything that is finished, as Markdown."""
    text = ABOUT.format(machine=machine_line(), n=len(base["nats"]), base=loss(base))
    for (name, seed), (report, found) in done.items():
        count = f"{report['trainable_parameters']:,}"
        text += f"| {name} | {WHERE[name][1]} | {count} | {seed} | {loss(found):.4f} |\n"
    seeds = [seed for seed in SEEDS if all((name, seed) in done for name in WHERE)]
    if not seeds:
        return text
    mean = sum(base["tokens"]) / len(base["tokens"])  # rows' sums of nats over the mean row: nats per token
    side = {name: [[n / mean for n in done[name, seed][1]["nats"]] for seed in seeds] for name in WHERE}
    for name in ("mlp", "all"):
        gap = told(paired(side["attention"], side[name]))
        text += f"\nattention minus {name}, {len(seeds)} seeds: {gap} nats per token (95 %, paired over rows).\n"
    losses = [{name: loss(done[name, seed][1]) for name in WHERE} for seed in seeds]
    best, worst = (sum(pick(each, key=each.get) == "attention" for each in losses) for pick in (min, max))
    verdict = "speaks against the claim" if best >= 2 else "holds" if worst == len(seeds) else "undecided"
    return text + f"\n**T3** (attention worst): {verdict}; attention is worst with {worst} of {len(seeds)} seeds.\n"


def test_attention_alone_is_worst():
    """Every run has learnt; the losses and their paired differences are written, whatever they say."""
    base = measured(KEPT / "measured" / "base.json", None, TEST, answers=False, rows=16 if SLICE else None)
    done = {}
    for seed in SEEDS:
        for name in WHERE:
            done[name, seed] = arm(name, seed)
            write("layers", table(done, base))
            assert loss(done[name, seed][1]) < loss(base)
