"""What to do next, read from the curves and the data: each piece of advice with the figures that it follows from.

Rules of thumb, ours; their thresholds are named here. Nothing is said where nothing points to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

FALLING = 0.01  # gain of the held-out loss in about the last quarter of a run, as a share of it
RISEN = 0.01  # above its best, as a share: the run went on too long
GAP = 0.25  # of training under held-out loss, as a share: the rows are learnt by heart
CLIPPED = 0.5  # of the steps
WIDE = 0.5  # of the interval beside the difference itself
SMALL_RANK, LARGE_RANK = 64, 256
FEW_ROWS = 50

Advice = dict[str, str]


def advise(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> list[Advice]:
    """{"do", "why"} for each thing worth trying, the most telling first. lines: of metrics.jsonl."""
    steps = [line for line in lines if "loss" in line]
    held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if report["base_loss"] is None:
        why = "No rows were held out, so nothing says whether training helped or when it should end."
        return [{"do": "Hold rows out: --eval-fraction 0.05", "why": why}]
    return [{"do": do, "why": why} for do, why in (*_course(report, steps, held), *_certainty(report), *_data(report))]


def _course(
    report: dict[str, Any], steps: Sequence[dict[str, Any]], held: Sequence[tuple[int, float]]
) -> Iterator[tuple[str, str]]:
    """What the two curves say: longer, shorter, slower, more rank, more data."""
    gap = report["difference"]
    settings = {name: entry["value"] for name, entry in report["settings"].items()}
    if gap["low"] is not None and gap["low"] > 0:
        yield (
            f"Lower the learning rate: --lr {settings['lr'] / 3:.1g}",
            f"Training made the held-out loss worse ({gap['mean']:+.4f}): steps of {settings['lr']:.1g} are too long.",
        )
    clip = settings.get("clip_norm") or 0
    clipped = sum(line["grad_norm"] > clip for line in steps) / len(steps) if clip and steps else 0
    back = [after[0] for before, after in pairwise(held) if after[1] > before[1]]
    if clipped > CLIPPED and len(steps) >= 10 and back:  # AdamW alone makes nothing of a gradient that is always cut
        yield (
            f"Try a lower learning rate: --lr {settings['lr'] / 2:.1g}",
            f"In {clipped:.0%} of the steps the gradient was cut to norm {clip:g}, and the held-out loss went up again "
            f"at step {back[0]:,}: training is rough.",
        )
    if len(held) < 2 or not steps:
        return
    best_step, best = min(held, key=lambda point: point[1])
    last_step, last = held[-1]
    train = fmean(line["loss"] for line in steps[-max(1, len(steps) // 5) :])
    memorised = train < best * (1 - GAP)
    rising = last > best * (1 + RISEN)
    earlier_step, earlier = _at(held, 0.75 * last_step)
    falling = best_step == last_step and earlier - last > FALLING * last
    epochs = steps[-1]["epoch"]
    if rising:
        yield (
            f"Train less: --max-steps {best_step}, or --patience 3",
            f"The held-out loss was lowest at step {best_step:,} ({best:.4f}) and rose to {last:.4f} by step "
            f"{last_step:,}. The adapter is the best one, so nothing is lost but time.",
        )
    elif falling:
        longer = f"--epochs {max(2, round(2 * epochs))}"
        longer = f"--max-steps {2 * last_step}" if settings.get("max_steps") else longer
        yield (
            f"Train longer: {longer}",
            f"The held-out loss was still falling when the run ended, by {earlier - last:.4f} since step "
            f"{earlier_step:,}.",
        )
    if memorised and (rising or epochs > 1):
        yield (
            "Add data, or train fewer passes",
            f"Training loss {train:.4f} lies far under held-out loss {best:.4f}: the rows are learnt by heart, and "
            f"other rows would teach more than more steps.",
        )
    flat = not rising and not falling
    if flat and not memorised and gap["high"] is not None and gap["high"] < 0:
        yield from _capacity(settings, train, best)


def _capacity(settings: dict[str, Any], train: float, best: float) -> Iterator[tuple[str, str]]:
    """Both curves have come to rest side by side: more weights could still learn something."""
    why = (
        f"Training loss {train:.4f} and held-out loss {best:.4f} have come to rest close together: longer training "
        "alone would change little, and more trained weights may fit what is left."
    )
    rank = settings.get("rank") or 0
    if settings.get("method") == "full":
        yield "Add data, or take a larger model", why
    elif rank < LARGE_RANK:
        yield f"Try a higher rank: --rank {min(LARGE_RANK, max(SMALL_RANK, 2 * rank))}", why
    else:
        yield "Try full fine-tuning: --method full", why


def _certainty(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Whether there were rows enough to tell."""
    gap, rows = report["difference"], report["data"]["held_out"]
    if gap["low"] is None:
        yield "Hold more rows out: --eval DATA", "One held-out row has no interval."
        return
    if gap["low"] <= 0 <= gap["high"]:
        yield (
            "Hold more rows out, or train longer",
            f"The interval from {gap['low']:+.4f} to {gap['high']:+.4f} holds zero: with {rows} held-out rows this run "
            "cannot be told from no change.",
        )
    elif rows < FEW_ROWS and (gap["high"] - gap["low"]) / 2 > WIDE * abs(gap["mean"]):
        yield (
            "Hold more rows out: --eval DATA",
            f"The adapter's gain is certain in sign and not in size: {rows} held-out rows leave it between "
            f"{gap['low']:+.4f} and {gap['high']:+.4f}.",
        )


def _data(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows that were cut, left out or seen twice."""
    data = report["data"]
    if data["truncated"]:
        longest = report["settings"]["max_length"]["value"]
        yield (
            "Raise --max-length, or shorten the rows",
            f"{data['truncated']:,} rows were cut at {longest:,} tokens; a cut answer does not learn to end.",
        )
    if data["skipped"]:
        yield (
            "Look at the rows that were left out: lorafit preview",
            f"{data['skipped']:,} of {data['rows']:,} rows have no trained token or a fault.",
        )
    if data["duplicates"] > 0.05 * data["rows"]:
        yield (
            "Remove duplicates",
            f"{data['duplicates']:,} of {data['rows']:,} rows say what an earlier row says, and so weigh more.",
        )


def _at(held: Sequence[tuple[int, float]], step: float) -> tuple[int, float]:
    """The last evaluation up to `step`, or the first there is."""
    before = [point for point in held if point[0] <= step]
    return before[-1] if before else held[0]
