"""The laws of lorafit.evaluate.advice: each advice follows from its curve, and stays away where its reason does."""

from __future__ import annotations

import pytest

from lorafit.evaluate.advice import advise

SETTINGS = {"lr": 2e-4, "clip_norm": 1.0, "rank": 16, "max_length": 128}


def told(train, held, *, low=-0.6, high=-0.4, norms=0.5, epochs=1.0, data=None, **settings) -> list[str]:
    """What is advised after a run with these training and held-out losses."""
    steps = len(train)
    lines = [
        {"step": n + 1, "loss": loss, "grad_norm": norms, "epoch": epochs * (n + 1) / steps}
        for n, loss in enumerate(train)
    ]
    lines += [{"step": (n + 1) * steps // len(held), "eval_loss": loss} for n, loss in enumerate(held)]
    counts = {"rows": 1000, "truncated": 0, "skipped": 0, "duplicates": 0, "held_out": 100} | (data or {})
    report = {
        "base_loss": 2.0,
        "difference": {"mean": None if low is None else (low + high) / 2, "low": low, "high": high},
        "data": counts,
        "settings": {name: {"value": value} for name, value in {**SETTINGS, **settings}.items()},
    }
    if low is None:
        report["difference"]["mean"] = -0.5
    return [one["do"] for one in advise(report, lines)]


FLAT = ([1.0] * 40, [1.02, 1.01, 1.0, 1.0])


def test_a_curve_that_still_falls_asks_for_longer():
    """The best evaluation is the last and the last quarter gained: twice the epochs."""
    assert told([1.0] * 40, [1.5, 1.3, 1.1, 0.9]) == ["Train longer: --epochs 2"]
    assert told([1.0] * 40, [1.5, 1.3, 1.1, 0.9], epochs=3.0) == ["Train longer: --epochs 6"]
    assert told([1.0] * 40, [1.5, 1.3, 1.1, 0.9], max_steps=40) == ["Train longer: --max-steps 80"]


def test_a_curve_that_rises_again_asks_for_less():
    """The best was earlier: fewer steps; learnt by heart too: more data."""
    assert told([1.0] * 40, [1.2, 1.0, 1.1, 1.2]) == ["Train less: --max-steps 20, or --patience 3"]
    assert told([0.2] * 40, [1.2, 1.0, 1.1, 1.2])[1] == "Add data, or train fewer passes"


def test_curves_at_rest_side_by_side_ask_for_more_weights():
    """Higher rank, and full fine-tuning where the rank is high already; nothing where it has been that."""
    assert told(*FLAT) == ["Try a higher rank: --rank 64"]
    assert told(*FLAT, rank=128) == ["Try a higher rank: --rank 256"]
    assert told(*FLAT, rank=256) == ["Try full fine-tuning: --method full"]
    assert told(*FLAT, method="full") == ["Add data, or take a larger model"]


def test_harm_and_rough_steps_ask_for_a_lower_rate():
    """An interval above zero: a third of the learning rate; gradients cut in most steps and a held-out loss that went
    up on the way: half. Cut gradients alone say nothing, since AdamW divides by their size."""
    assert told(*FLAT, low=0.1, high=0.2)[0] == "Lower the learning rate: --lr 7e-05"
    rough = ([1.0] * 40, [1.01, 1.04, 1.0, 1.0])
    assert told(*rough, norms=3.0)[0] == "Try a lower learning rate: --lr 0.0001"
    assert not any("rate" in advice for advice in told(*rough, norms=3.0, clip_norm=0.0))
    assert not any("rate" in advice for advice in told(*FLAT, norms=3.0))


def test_uncertain_differences_ask_for_more_rows():
    """Zero inside the interval, one row, or a wide interval from few rows."""
    assert "Hold more rows out, or train longer" in told(*FLAT, low=-0.2, high=0.1)
    assert "Hold more rows out: --eval DATA" in told(*FLAT, low=None, high=None)
    assert "Hold more rows out: --eval DATA" in told(*FLAT, low=-0.9, high=-0.1, data={"held_out": 10})
    assert "Hold more rows out: --eval DATA" not in told(*FLAT, low=-0.9, high=-0.1, data={"held_out": 100})


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ({"truncated": 3}, "Raise --max-length, or shorten the rows"),
        ({"skipped": 1}, "Look at the rows that were left out: lorafit preview"),
        ({"duplicates": 100}, "Remove duplicates"),
    ],
)
def test_odd_data_is_named(data, advice):
    """Cut rows, rows left out, many duplicates; none of them without reason."""
    assert advice in told(*FLAT, data=data)
    assert advice not in told(*FLAT)


def test_without_held_out_rows_that_is_the_advice():
    """Nothing else can be told."""
    report = {"base_loss": None, "difference": None}
    assert [one["do"] for one in advise(report, [])] == ["Hold rows out: --eval-fraction 0.05"]
