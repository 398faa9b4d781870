"""What is said follows from the figures, and says which."""

from __future__ import annotations

import copy

import pytest

from lorafit.compare.advice import advice
from lorafit.compare.page import markdown, page


def gap(low: float | None, high: float | None) -> dict[str, float | None]:
    return {"mean": 0.0 if low is None or high is None else (low + high) / 2, "low": low, "high": high}


def arm(loss: float, seconds: float, memory: float, disk: float) -> dict:
    return {"run": "x", "loss": loss, "lr": 1e-3, "tokens": 9000, "trained_tokens": 5000, "seconds": seconds + 9,
            "training_seconds": seconds, "tokens_per_second": 100.0, "peak_memory_bytes": memory,
            "private_memory_bytes": memory, "trainable_parameters": 4_884_480, "bytes_on_disk": disk}  # fmt: skip


FOUND = {
    "rows": 50,
    "steps": 60,
    "base_loss": 2.0,
    "methods": {"lora": arm(1.0, 60, 1e9, 2e7), "full": arm(1.01, 90, 3e9, 2.7e8)},
    "differences": {"lora - base": gap(-1.1, -0.9), "full - base": gap(-1.1, -0.9), "full - lora": gap(-0.02, 0.04)},
    "sweep": None,
    "forget": None,
    "advice": [],
}


def said(found: dict) -> str:
    return " / ".join(f"{one['say']} {one['because']}" for one in advice(found))


def changed(**changes: object) -> dict:
    return {**copy.deepcopy(FOUND), **changes}


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (gap(-0.02, 0.04), "LoRA does what full fine-tuning does here: take LoRA. full minus LoRA is +0.0100 (-0.0200"),
        (gap(0.01, 0.03), "LoRA is better here: take LoRA."),
        (gap(-0.05, -0.03), "Full fine-tuning is better here"),
        (gap(None, None), "LoRA does what full fine-tuning does here"),
    ],
)
def test_the_winner_is_the_intervals(between, words):
    """A difference counts where its interval leaves out 0; else the cheaper method is advised."""
    assert words in said(changed(differences={**FOUND["differences"], "full - lora": between}))


@pytest.mark.parametrize(("steps", "warned"), [(99, True), (100, False)])
def test_a_short_comparison_decides_little(steps, warned):
    """Below 100 steps the learning rate's rule is another one, and which method is ahead may change."""
    assert ("99 steps are few" in said(changed(steps=steps))) == warned


def test_costs_are_told_with_their_figures():
    """Time, memory and disk, each as a factor or a pair of figures."""
    told = said(FOUND)
    assert "takes 1.5 times LoRA's time. 1 min 30 s against 1 min 00 s" in told
    assert "needs 3.0 times the memory. 3.00 GB against 1.00 GB" in told
    assert "0.27 GB against 20.0 MB on disk" in told


@pytest.mark.parametrize(
    ("between", "words"),
    [(gap(0.1, 0.2), "Full fine-tuning forgets more."), (gap(-0.2, -0.1), "LoRA forgets more."),
     (gap(-0.1, 0.1), "They forget alike")],
)  # fmt: skip
def test_forgetting_is_the_intervals_too(between, words):
    """Against each other and against the base, on the file that was named."""
    differences = {"lora - base": gap(0.0, 0.1), "full - base": gap(0.1, 0.2), "full - lora": between}
    told = said(changed(forget={"file": "wiki.txt", "losses": {}, "differences": differences}))
    assert words in told
    assert "on wiki.txt, full minus LoRA is" in told


def test_a_sweep_names_the_rate_and_its_edges():
    """Inside: train with it. At the edge: it may lie further out. Without a sweep: advise one."""
    rates = [{"lr": 1e-3, "loss": 1.2, "note": ""}, {"lr": 3e-3, "loss": 1.0, "note": ""}]
    for inside, words in ((True, "Train lora with --lr 0.003."), (False, "lora may lie further out.")):
        told = said(changed(sweep={"lora": {"best": 3e-3, "inside": inside, "rates": rates}}))
        assert words in told
        assert "--lr-sweep" not in told
    assert "Run again with --lr-sweep" in said(FOUND)


def test_a_method_without_a_result_is_said():
    """Out of memory or diverged: why, and nothing is compared with it."""
    methods = {
        "lora": FOUND["methods"]["lora"],
        "full": {"run": "full", "failure": "does not fit in memory: 2 GB more"},
    }
    told = said(changed(methods=methods, differences={"lora - base": gap(-1, -0.5)}))
    assert "full gave no result here. does not fit in memory: 2 GB more" in told
    assert "take LoRA" not in told


def test_tables_hold_every_figure_and_escape():
    """Markdown and HTML have each method's loss, interval, rate, time, memory, size; markup in names stays text."""
    differences = {f"{a} - {b}": gap(0, 1) for a, b in (("lora", "base"), ("full", "base"), ("full", "lora"))}
    forget = {"file": "<b>.txt", "losses": {"base": 3.0, "lora": 3.1, "full": 3.2}, "differences": differences}
    found = changed(forget=forget)
    found["advice"] = advice(found)
    for text in (markdown(found), page(found)):
        for figure in (
            "1.0000",
            "1.0100",
            "2.0000",
            "0.001",
            "1 min 30 s",
            "3.00 GB",
            "4,884,480",
            "0.27 GB",
            "3.2000",
        ):
            assert figure in text
    assert "<b>.txt" not in page(found)
    assert "&lt;b&gt;.txt" in page(found)
    assert "http" not in page(found).replace("http-equiv", "")
