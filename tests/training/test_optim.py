"""Learning rate rule, schedule, and the optimizer's state as tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorafit.training.optim import (
    auto_lr,
    clip_gradient,
    load_optimizer_tensors,
    lr_at,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)


@pytest.mark.parametrize(
    ("kind", "width", "steps", "expected"),
    [
        ("llama", 576, 1000, 1.32e-3),
        ("llama", 4096, 1000, 2.86e-4),
        ("qwen3", 1024, 1000, 5.27e-4),
        ("llama", 576, 50, 1.98e-3),
        ("llama", 256, 50, 2e-3),
    ],
)
def test_auto_lr_is_the_published_rule(kind, width, steps, expected):
    """10 x 5e-5 x (2000 / width)^exponent, x 1.5 for short runs, never above 2e-3; worked by hand here."""
    lr, rule = auto_lr(kind, width, steps)
    assert math.isclose(lr, expected, rel_tol=5e-3)
    assert "10 x full fine-tuning's" in rule


@pytest.mark.parametrize(("width", "steps", "expected"), [(576, 1000, 1.32e-4), (576, 50, 1.32e-4), (256, 50, 2e-4)])
def test_full_fine_tunings_rate_is_a_tenth(width, steps, expected):
    """5e-5 x (2000 / width)^exponent whatever the length, never above 2e-4."""
    lr, rule = auto_lr("llama", width, steps, "full")
    assert math.isclose(lr, expected, rel_tol=5e-3)
    assert rule.startswith("5e-5 x (2000 /")


def test_warm_up_rises_to_the_peak_and_linear_falls_to_zero():
    """Ten steps, the first two of warm-up: half, full, then down by an eighth a step."""
    rates = [lr_at(step, 10, 1.0, "linear", 0.2) for step in range(1, 11)]
    assert rates == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_cosine_and_constant():
    """Cosine passes half of the peak at the middle; constant stays at the peak."""
    assert math.isclose(lr_at(6, 10, 1.0, "cosine", 0.0), 0.5)
    assert [lr_at(s, 10, 3.0, "constant", 0.0) for s in (1, 5, 10)] == [3.0, 3.0, 3.0]


def test_the_rate_is_positive_at_every_step_of_every_run():
    """No step of a run is wasted at rate zero, however short the run."""
    for steps in (1, 2, 3, 7, 100):
        for schedule in ("linear", "cosine", "constant"):
            assert all(lr_at(s, steps, 1.0, schedule, 0.03) > 0 for s in range(1, steps + 1))


def test_adamw_is_the_papers_update():
    """One parameter, three steps, against the update written out."""
    parameter = nn.Parameter(torch.tensor([0.5]))
    optimizer = make_optimizer([parameter], weight_decay=0.1)
    value, m, v = 0.5, 0.0, 0.0
    for t, gradient in enumerate((0.3, -0.2, 0.7), start=1):
        optimizer.param_groups[0]["lr"] = 0.01
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        value -= 0.01 * 0.1 * value
        value -= 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert math.isclose(parameter.item(), value, rel_tol=1e-5)


def test_optimizer_state_survives_the_trip_through_tensors():
    """Saved and loaded, the next update is the same in every bit."""
    torch.manual_seed(0)
    ends = []
    for reload in (False, True):
        parameters = {name: nn.Parameter(torch.linspace(-1, 1, 12)) for name in "ab"}
        optimizer = make_optimizer(parameters.values(), 0.01)
        for step in range(4):
            if reload and step == 2:
                state = {k: t.clone() for k, t in optimizer_tensors(optimizer, parameters).items()}
                optimizer = make_optimizer(parameters.values(), 0.01)
                load_optimizer_tensors(optimizer, parameters, state)
            optimizer.param_groups[0]["lr"] = 0.1
            for parameter in parameters.values():
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        ends.append([p.detach() for p in parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_clipping_scales_to_the_norm_and_reports_the_old_one():
    """A gradient of norm 5 clipped to 1 keeps its direction; 0 leaves it."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert math.isclose(clip_gradient([parameter], 0), 5.0)
    assert torch.equal(parameter.grad, torch.tensor([3.0, 4.0]))
    assert math.isclose(clip_gradient([parameter], 1.0), 5.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]), atol=1e-5)


def test_lora_plus_multiplies_the_rate_of_some():
    """B's rate is the ratio times the others' at every step; with ratio 1 there is one group, as without."""
    a, b, m = (nn.Parameter(torch.zeros(2)) for _ in "abm")
    optimizer = make_optimizer([a, b, m], 0.0, faster=[b], ratio=16.0)
    for lr in (1e-3, 5e-4):
        set_lr(optimizer, lr)
        for parameter in (a, b, m):
            parameter.grad = torch.ones(2)
        optimizer.step()
    assert torch.allclose(a, m)
    assert torch.allclose(b, 16 * a, rtol=1e-5)
    assert len(make_optimizer([a, b, m], 0.0, faster=[b], ratio=1.0).param_groups) == 1
