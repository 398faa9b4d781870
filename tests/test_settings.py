"""The laws of lorafit.settings: every value left to us follows its documented rule, and says which."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from builders.rows import Row
from lorafit import machine
from lorafit.config import Resolved, TrainConfig, from_values, read_yaml, to_yaml
from lorafit.kernels import native
from lorafit.settings import settle_for_data, settle_for_machine
from lorafit.training.loop import Plan
from lorafit.training.optim import auto_lr

MODEL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def settled(rows: int = 100, length: int = 20, longest: int = 50, **given) -> tuple[Resolved, Plan]:
    """Settings for that many rows of that length, with some given."""
    resolved = settle_for_machine(Resolved(TrainConfig(**given), dict.fromkeys(given, "given")))
    row = Row([5] * length, [True] * length)
    return settle_for_data(resolved, [row] * rows, longest, MODEL)


def test_nothing_is_left_to_choose():
    """With no option at all, every field that could be auto has a value, and its origin says by which rule."""
    resolved, plan = settled()
    config = resolved.config
    chosen = ("compute", "base", "threads", "batch_size", "max_length", "lr", "save_every", "eval_every")
    for name in (*chosen, "kernels"):
        assert getattr(config, name) not in (None, "auto"), name
        assert resolved.origin[name].startswith("auto: "), name
    assert config.epochs == 1.0
    still_none = {field.name for field in fields(config) if getattr(config, field.name) is None}
    theirs = {"micro_batch_tokens", "checkpointed_layers", "loss_chunk"}  # what memory decides: planning/predict.py
    assert still_none - theirs == {
        "max_steps",
        "patience",
        "template",
        "init_adapter",
        "memory",
    }  # that is their meaning
    assert plan == Plan(13, 13)


def test_what_is_given_is_kept():
    """No rule touches a value that the user gave, and its origin stays."""
    given = {
        "compute": "fp32",
        "base": "bf16",
        "threads": 3,
        "batch_size": 5,
        "max_length": 40,
        "epochs": 2.0,
        "lr": 3e-4,
        "save_every": 7,
        "eval_every": 9,
        "checkpointing": "all",
        "micro_batch_tokens": 700,
    }
    resolved, plan = settled(**given)
    assert {name: getattr(resolved.config, name) for name in given} == given
    assert all(resolved.origin[name] == "given" for name in given)
    assert plan == Plan(40, 20)


def test_settling_again_changes_nothing(tmp_path):
    """A resumed run reads the values from run.yaml and works none out again, whatever the machine has become."""
    resolved, plan = settled()
    (tmp_path / "run.yaml").write_text(to_yaml(resolved, {"identity": {}}))
    values = read_yaml(tmp_path / "run.yaml")
    values.pop("identity")
    config = TrainConfig(**from_values(values, "run.yaml"))
    again, same_plan = settle_for_data(settle_for_machine(Resolved(config)), [Row([5], [True])] * 100, 999, MODEL)
    assert again.config == resolved.config
    assert same_plan == plan


def test_a_quantised_file_stays_packed():
    """`auto` keeps what the file has; another choice is the user's."""
    resolved = settle_for_machine(Resolved(TrainConfig()), quantised=True)
    assert (resolved.config.base, resolved.origin["base"]) == ("packed", "auto: the model's file is quantised")
    assert settle_for_machine(Resolved(TrainConfig(base="bf16")), quantised=True).config.base == "bf16"


def test_compute_follows_the_processor(monkeypatch):
    """bf16 where its products are fast, else fp32; the base is stored as products run, unless told."""
    for features, dtype in ((("avx2", "avx512_bf16"), "bf16"), (("avx2", "avx512f"), "fp32"), ((), "fp32")):
        monkeypatch.setattr(machine, "processor", lambda features=features: ("some processor", frozenset(features)))
        resolved = settle_for_machine(Resolved(TrainConfig()))
        assert (resolved.config.compute, resolved.config.base) == (dtype, dtype)
        assert ("no fast bf16" in resolved.origin["compute"]) == (dtype == "fp32")
        assert settle_for_machine(Resolved(TrainConfig(compute="fp32"))).config.base == "fp32"
        assert settle_for_machine(Resolved(TrainConfig(base="fp32"))).config.compute == dtype


def test_kernels_are_the_best_there_are():
    """Whatever another run in this process has taken; what is given stays."""
    native.use("plain")
    try:
        assert settle_for_machine(Resolved(TrainConfig())).config.kernels == native.paths()[0]
    finally:
        native.use(native.best())
    assert settle_for_machine(Resolved(TrainConfig(kernels="portable"))).config.kernels == "portable"


def test_threads_are_the_cores():
    """One per physical core that this process may use."""
    assert settle_for_machine(Resolved(TrainConfig())).config.threads == machine.cores()


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (499, 8), (500, 16), (5000, 16)])
def test_batch_size_is_8_below_500_rows_and_16_above(rows, size):
    """And the origin says how many there were."""
    resolved, plan = settled(rows=rows)
    assert resolved.config.batch_size == size
    assert f"{rows} rows" in resolved.origin["batch_size"]
    assert plan.steps == plan.steps_per_epoch == math.ceil(rows / size)


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, 13, 1.0),
        ({"epochs": 2.5}, 33, 2.5),
        ({"epochs": 0.01}, 1, 0.01),
        ({"max_steps": 500}, 500, None),
        ({"max_steps": 5, "epochs": 1.0}, 5, 1.0),
        ({"max_steps": 50, "epochs": 1.0}, 13, 1.0),
    ],
)
def test_steps_are_what_is_reached_first(given, steps, epochs):
    """100 rows in batches of 8 are 13 steps; max_steps alone repeats the data, with epochs the first reached ends."""
    resolved, plan = settled(**given)
    assert (plan.steps, plan.steps_per_epoch, resolved.config.epochs) == (steps, 13, epochs)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (9, 1), (10, 1), (11, 2), (100, 10), (1234, 124)])
def test_a_save_every_tenth_of_the_run_and_an_evaluation_with_it(steps, every):
    """Ten saves at most, one at least; evaluations come with the saves, also with the user's."""
    resolved, _ = settled(max_steps=steps)
    assert (resolved.config.save_every, resolved.config.eval_every) == (every, every)
    assert settled(max_steps=steps, save_every=3)[0].config.eval_every == 3


def test_the_learning_rate_has_its_rule():
    """The published rule for this width and length of run, in words beside the value."""
    for steps in (50, 500):
        resolved, _ = settled(max_steps=steps)
        lr, rule = auto_lr("llama", 576, steps)
        assert resolved.config.lr == lr
        assert resolved.origin["lr"] == f"auto: {rule}"


def test_max_length_is_the_longest_row():
    """As the reader of the data found it, up to the model's context."""
    assert settled(longest=77)[0].config.max_length == 77


@pytest.mark.parametrize(("init", "times", "name"), [("pissa", 10, "PiSSA"), ("eva", 3, "EVA")])
def test_some_starts_get_a_lower_rate(init, times, name):
    """The rule's rate divided by ten or three, and the output says so; a rate that is given stays."""
    plain, lower = (settled(init=kind)[0] for kind in ("default", init))
    assert lower.config.lr == plain.config.lr / times
    assert lower.origin["lr"] == plain.origin["lr"] + f", / {times} for {name}"
    assert settled(init=init, lr=0.5)[0].config.lr == 0.5
