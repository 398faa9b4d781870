"""The report's drawings as inline SVG: no script, colours by class, so that light and dark share them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]
LINE_POINTS = 300  # of a curve at most; longer ones are averaged in stretches


def loss_curve(training: Points, held: Points, base: float | None, width: int) -> str:
    """Loss by step: training thin and smoothed, held out with its points, the base's as a level line.

    held: (step, loss) of the evaluations. width: of the drawing in its own units, which are pixels at full size.
    """
    levels = [] if base is None else [base]
    values = [y for _, y in (*training, *held)] + levels
    if not training and not held:
        return ""
    last = max(x for x, _ in (*training, *held))
    xs = [x for x in ticks(0, last, min(last, 6 if width > 500 else 4)) if x <= last]
    ys = ticks(*_visible(values), 5)
    height, left, right, top, bottom = 320, 46, width - 14, 16, 274

    def across(x: float) -> float:
        return round(left + (right - left) * x / last, 1)

    def up(y: float) -> float:
        share = (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        return round(bottom - (bottom - top) * share, 1)

    def path(points: Points) -> str:
        return " ".join(f"{across(x)},{up(y)}" for x, y in points)

    parts = [f"<path class=grid d='M{left} {up(y)}H{right}'/>" for y in ys]
    parts += [f"<text x={left - 8} y={up(y) + 4} class=y>{y:.6g}</text>" for y in ys]
    parts += [f"<text x={across(x)} y={bottom + 20} class=x>{x:.6g}</text>" for x in xs]
    parts.append(f"<text x={(left + right) / 2} y={height - 8} class=x>step</text>")
    if training:
        thin = thinned(training)
        parts.append(f"<polyline class=raw points='{path(thin)}'/>")
        parts.append(f"<polyline class=train points='{path(smoothed(thin))}'/>")
    if base is not None:
        parts.append(f"<path class=base d='M{left} {up(base)}H{right}'/>")
        below = up(base) - top < 16
        parts.append(f"<text x={right} y={up(base) + (16 if below else -7)} class='y basetext'>base {base:.3f}</text>")
    if held:
        begun = [] if base is None else [(0, base)]
        best = min(held, key=lambda point: point[1])
        parts.append(f"<polyline class=held points='{path([*begun, *held])}'/>")
        for x, y in [*begun, *held]:
            kind = "best" if (x, y) == best else "dot"
            told = f"step {x:g}: held-out loss {y:.4f}" + (" (the best)" if kind == "best" else "")
            told = told if x else f"the base: held-out loss {y:.4f}"
            parts.append(f"<circle class={kind} cx={across(x)} cy={up(y)} r={5 if kind == 'best' else 3.2}>"
                         f"<title>{told}</title></circle>")  # fmt: skip
    label = "Loss in nats per trained token by step: training, held out, and the base"
    return f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{label}'>{''.join(parts)}</svg>"


def _visible(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw: a few wild training steps at the top are cut off."""
    ordered = sorted(values)
    high = ordered[-1]
    if len(ordered) > 40:
        usual = ordered[int(len(ordered) * 0.98)]
        high = usual if high > 1.5 * usual else high
    return ordered[0], high


def thinned(points: Points) -> Points:
    """At most LINE_POINTS points, each the mean of a stretch."""
    each = math.ceil(len(points) / LINE_POINTS)
    stretches = [points[n : n + each] for n in range(0, len(points), each)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in stretches]


def smoothed(points: Points) -> Points:
    """The mean over a tenth of the points around each."""
    reach = len(points) // 20
    found = []
    for n, (x, _) in enumerate(points):
        near = points[max(0, n - reach) : n + reach + 1]
        found.append((x, sum(y for _, y in near) / len(near)))
    return found


def interval(mean: float, low: float, high: float) -> str:
    """The difference of two losses with its interval, beside zero."""
    ends = (min(low, 0.0), max(high, 0.0))
    room = (ends[1] - ends[0]) * 0.12 or 1.0
    first, last = ends[0] - room, ends[1] + room

    def across(x: float) -> float:
        return round(10 + 300 * (x - first) / (last - first), 1)

    told = f"difference {mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    return (
        f"<svg class=interval viewBox='0 0 320 44' role=img aria-label='{told}'>"
        f"<path class=grid d='M10 18H310'/><path class=zero d='M{across(0)} 6V30'/>"
        f"<text x={across(0)} y=42 class=x>no difference</text>"
        f"<path class=span d='M{across(low)} 18H{across(high)}'/>"
        f"<circle class=best cx={across(mean)} cy=18 r=6 /></svg>"
    )


def histogram(found: dict[str, Any], width: int) -> str:
    """Rows by length in tokens; found: start, width and counts of the bins."""
    counts, start, bin_width = found["counts"], found["start"], found["width"]
    left, right, top, bottom = 8, width - 8, 20, 150
    each, most = (right - left) / len(counts), max(counts)
    parts = []
    for n, count in enumerate(counts):
        height = round((bottom - top) * count / most, 1)
        x = round(left + n * each, 1)
        told = f"{start + n * bin_width} to {start + (n + 1) * bin_width - 1} tokens: {count} rows"
        parts.append(f"<rect class=bar x={x + 1} y={bottom - height} width={max(1.0, round(each - 2, 1))} "
                     f"height={height} rx=2><title>{told}</title></rect>")  # fmt: skip
        if count and each > 24:
            parts.append(f"<text class=x x={round(x + each / 2, 1)} y={bottom - height - 5}>{count:,}</text>")
    shown = max(1, math.ceil(len(counts) / (8 if width > 500 else 5)))
    for n in range(0, len(counts) + 1, shown):
        parts.append(f"<text class=x x={round(left + n * each, 1) + (8 if n == 0 else 0)} y={bottom + 18}>"
                     f"{start + n * bin_width:,}</text>")  # fmt: skip
    parts.append(f"<path class=axis d='M{left} {bottom}H{right}'/>")
    parts.append(f"<text class=x x={width / 2} y={bottom + 36}>tokens per row</text>")
    label = "Rows by their length in tokens"
    return f"<svg viewBox='0 0 {width} 190' role=img aria-label='{label}'>{''.join(parts)}</svg>"


def layer_map(updates: Sequence[dict[str, Any]], measure: str, width: int) -> str:
    """How far each matrix moved: a row per kind of matrix, a column per layer, the darker the further.

    updates: of `movement`. measure: its key that is drawn. Layers without a number stand in column 0.
    """
    placed = [(*_place(update["layer"]), update) for update in updates if update[measure] is not None]
    if not placed:
        return ""
    kinds = list(dict.fromkeys(kind for _, kind, _ in placed))
    numbers = sorted({number for number, _, _ in placed})
    most = max(update[measure] for *_, update in placed) or 1.0
    left, gap = 84, 18
    cell = (width - left - 4) / len(numbers)
    parts = [f"<text class=row x=0 y={n * gap + 13}>{html.escape(kind[:12])}</text>" for n, kind in enumerate(kinds)]
    for number, kind, update in placed:
        column, row = numbers.index(number), kinds.index(kind)
        told = html.escape(f"{update['layer']}: {amount(update, measure)}")
        strength, x, wide = 0.06 + 0.94 * update[measure] / most, left + column * cell, max(0.8, cell - 1)
        parts.append(
            f"<rect class=cell x={x:.1f} y={row * gap} width={wide:.1f} height={gap - 2} rx=1.5 "
            f"fill-opacity={strength:.3f}><title>{told}</title></rect>"
        )
    bottom = len(kinds) * gap + 14
    each = max(1, math.ceil(len(numbers) / (12 if width > 500 else 6)))
    parts += [
        f"<text class=x x={left + (n + 0.5) * cell:.1f} y={bottom}>{numbers[n]}</text>"
        for n in range(0, len(numbers), each)
    ]
    parts.append(f"<text class=x x={(left + width) / 2} y={bottom + 18}>layer</text>")
    label = "How far each layer's matrices moved"
    return f"<svg viewBox='0 0 {width} {bottom + 24}' role=img aria-label='{label}'>{''.join(parts)}</svg>"


def amount(update: dict[str, Any], measure: str) -> str:
    """A layer's movement in words."""
    return f"{update[measure]:.2%} of its weight" if measure == "relative" else f"norm {update[measure]:.3g}"


def _place(path: str) -> tuple[int, str]:
    """(number, kind) of a layer's path: model.layers.3.self_attn.q_proj is (3, q_proj)."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else 0, path.rsplit(".", 1)[-1]


def ticks(low: float, high: float, about: float) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^n apart that enclose low and high; `about` as many."""
    rough = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [apart * number for number in range(first, max(last, first + 1) + 1)]
