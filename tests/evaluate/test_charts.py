"""The laws of lorafit.evaluate.charts: every point stands where its number says, inside the axes."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from lorafit.evaluate.charts import LINE_POINTS, histogram, interval, layer_map, loss_curve, smoothed, thinned, ticks

TRAINING = [(n + 1, 3.0 / (n + 1) + 0.5) for n in range(20)]
HELD = [(10, 0.9), (15, 0.7), (20, 0.8)]


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    [found] = re.findall(rf"<polyline class={kind} points='(.*?)'", svg)
    return [tuple(map(float, point.split(","))) for point in found.split()]


@pytest.mark.parametrize("width", [360, 860])
def test_the_curve_is_to_scale(width):
    """Two points give the scale of both axes; every other point lies where it says, within the drawing's tenths. Held
    out begins with the base at step 0."""
    svg = loss_curve(TRAINING, HELD, 2.0, width)
    drawn = points(svg, "raw")
    assert len(drawn) == 20
    (x0, y0), (x1, y1) = drawn[0], drawn[-1]
    per_step, per_nat = (x1 - x0) / 19, (y1 - y0) / (TRAINING[-1][1] - TRAINING[0][1])
    everything = [*zip(TRAINING, drawn, strict=True), *zip([(0, 2.0), *HELD], points(svg, "held"), strict=True)]
    for (step, loss), (x, y) in everything:
        assert x == pytest.approx(x0 + (step - 1) * per_step, abs=0.15)
        assert y == pytest.approx(y0 + (loss - TRAINING[0][1]) * per_nat, abs=0.15)
        assert 0 <= x <= width
        assert 0 <= y <= 320
    [base] = re.findall(r"<path class=base d='M46 ([\d.]+)H", svg)
    assert float(base) == pytest.approx(y0 + (2.0 - TRAINING[0][1]) * per_nat, abs=0.15)


def test_the_best_evaluation_is_the_ring():
    """Every evaluation is a point with its figure; the lowest is the one ring."""
    svg = loss_curve(TRAINING, HELD, None, 860)
    assert svg.count("<circle") == 3
    [ring] = re.findall(r"<circle class=best .*?<title>(.*?)</title>", svg)
    assert ring == "step 15: held-out loss 0.7000 (the best)"
    assert "class=base" not in svg
    assert loss_curve([], [], 2.0, 860) == ""


def test_wild_steps_do_not_flatten_the_curve():
    """One loss of 1000 among 100 of about 1: the axis ends near 1, and the point lies on its upper end."""
    training = [(n + 1, 1.0 + n / 1000) for n in range(100)]
    training[3] = (4, 1000.0)
    drawn = points(loss_curve(training, [], None, 860), "raw")
    assert drawn[3][1] == 16
    assert drawn[99][1] - drawn[0][1] < -20


def test_long_curves_are_thinned_without_losing_their_level():
    """At most LINE_POINTS points; the mean over all is kept where stretches are equally long."""
    line = [(n + 1, float(n % 7)) for n in range(LINE_POINTS * 7)]
    found = thinned(line)
    assert len(found) == LINE_POINTS
    assert found[-1][0] == line[-1][0]
    assert sum(y for _, y in found) / len(found) == pytest.approx(sum(y for _, y in line) / len(line))
    assert smoothed([(1, 2.0)]) == [(1, 2.0)]
    assert [x for x, _ in smoothed(line)] == [x for x, _ in line]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 60), (1.2345, 1.2346), (2.0, 2.0), (4.2, 7.98), (0, 1_000_000)])
def test_ticks_are_round_and_enclose_the_data(low, high):
    """Steps of 1, 2 or 5 x 10^n, a handful of them."""
    found = ticks(low, high, 5)
    assert found[0] <= low <= high <= found[-1] + 1e-12
    assert 2 <= len(found) <= 8
    apart = found[1] - found[0]
    assert f"{apart:.0e}"[0] in "125"
    assert [f"{b - a:.6g}" for a, b in pairwise(found)] == [f"{apart:.6g}"] * (len(found) - 1)


@pytest.mark.parametrize(("mean", "low", "high"), [(-1.0, -1.2, -0.8), (0.3, -0.1, 0.7), (0.0, 0.0, 0.0), (5, 4, 6)])
def test_the_interval_lies_on_its_side_of_zero(mean, low, high):
    """Left of the line for a gain, right of it for harm, across it for neither."""
    svg = interval(mean, low, high)
    [zero] = map(float, re.findall(r"class=zero d='M([\d.]+) ", svg))
    [(start, end)] = re.findall(r"class=span d='M([\d.]+) 18H([\d.]+)'", svg)
    assert (float(start) < zero, float(end) < zero) == (low < 0, high < 0)
    assert 10 <= float(start) <= float(end) <= 310


def test_bars_are_as_high_as_their_rows():
    """A bar per bin, heights in proportion."""
    svg = histogram({"start": 20, "width": 10, "counts": [1, 0, 4]}, 860)
    heights = [float(height) for height in re.findall(r"<rect .*? height=([\d.]+) ", svg)]
    assert heights[1] == 0
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.3)
    assert re.findall(r"<title>(.*?)</title>", svg)[2] == "40 to 49 tokens: 4 rows"


def test_the_layer_map_has_a_cell_per_matrix_the_darkest_the_one_that_moved_most():
    """Rows are kinds of matrices, columns are layers; text from paths is escaped."""
    updates = [
        {"layer": f"model.layers.{n}.{kind}", "norm": n + 1.0, "relative": (n + 1) / 100}
        for n in range(3)
        for kind in ("q_proj", "<up>")
    ]
    svg = layer_map(updates, "relative", 860)
    assert svg.count("<rect") == 6
    assert "<up>" not in svg
    strengths = [float(value) for value in re.findall(r"fill-opacity=([\d.]+)", svg)]
    assert strengths.index(max(strengths)) == 4
    assert max(strengths) == 1.0
    assert layer_map([{"layer": "a", "norm": 1.0, "relative": None}], "relative", 860) == ""
    assert layer_map([{"layer": "a", "norm": 0.0, "relative": 0.0}], "relative", 860).count("<rect") == 1
