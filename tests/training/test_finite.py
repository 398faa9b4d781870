"""The laws of lorafit.training.finite: the first NaN or infinity stops the run, by name, before it changes anything."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from builders.models import frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.config import TrainConfig
from lorafit.errors import NonFiniteError
from lorafit.training.checkpoint import Checkpoints
from lorafit.training.finite import sums_finite
from lorafit.training.loop import Plan, Run, fit, step_rows
from lorafit.training.metrics import Metrics, read_metrics
from lorafit.training.optim import clip_gradient

CONFIG = TrainConfig(rank=4, dropout=0.1, lr=0.01, batch_size=4, save_every=1, eval_every=1, micro_batch_tokens=16)
STEPS = 4


@dataclass
class Accident:
    """A run in which `harm` happens after step `after`, and the adapter's weights as they then were."""

    run: Run
    after: int
    named: dict[str, nn.Parameter]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def happens(self, harm) -> NonFiniteError:
        """Train; the error, which must come in the very next step, with every weight as it was."""

        def report(line):
            if line["step"] == self.after:
                harm()
                self.weights = {name: p.detach().clone() for name, p in self.named.items()}

        self.run.report = report
        with pytest.raises(NonFiniteError) as caught:
            fit(self.run, None)
        for name, before in self.weights.items():
            assert torch.equal(self.named[name].detach().nan_to_num(7.0), before.nan_to_num(7.0)), name
        written = read_metrics(self.run.checkpoints.folder.parent / "metrics.jsonl")
        assert [line["step"] for line in written] == list(range(1, self.after + 1))
        assert f"at step {self.after + 1} (" in caught.value.what
        return caught.value


def accident(out: Path, after: int = 1) -> Accident:
    """A run of 4 steps with dropout, a save at each, and several packs to a step."""
    base = frozen(tiny_model("llama"), out / "model")
    attach(base.model, rank=4, alpha=8, dropout=0.1)
    layers = dict(adapted_layers(base.model))
    named = {f"{path}.{part}": getattr(layer.adapter, part) for path, layer in layers.items() for part in "AB"}
    run = Run(
        config=CONFIG,
        plan=Plan(STEPS, 3),
        model=base.model,
        head=base.head,
        rows=random_rows([9, 4, 12, 7, 5, 11, 8, 6, 10, 3]),
        checkpoints=Checkpoints(out),
        metrics=Metrics(out / "metrics.jsonl", 0),
        identity={},
        evaluate=None,
        report=lambda line: None,
        memory=lambda: 1,
    )
    return Accident(run, after, named)


@pytest.fixture
def optimizers() -> Iterator[list[torch.optim.Optimizer]]:
    """The optimizer of each step taken, for a test to reach into."""
    used: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: used.append(optimizer))
    yield used
    handle.remove()


def spoil(tensor: torch.Tensor, chance: random.Random, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[chance.randrange(tensor.numel())] = value


@pytest.mark.parametrize("seed", range(20))
def test_the_tensor_at_fault_is_named(tmp_path, optimizers, seed):
    """20 random accidents: NaN or infinity in a frozen weight, an adapter's weight, or the optimizer's state, or a
    frozen weight so large that its products overflow, after a random step. The next step names that tensor and
    changes no weight."""
    chance = random.Random(seed)
    case = accident(tmp_path, after=chance.randrange(1, STEPS))
    kind = ("frozen weight", "adapter weight", "optimizer state", "activation")[seed % 4]
    path = chance.choice(sorted({name[:-2] for name in case.named}))
    matrix = case.run.model.get_submodule(path).base.weight.matrix
    part, moment = chance.choice("AB"), chance.choice(("exp_avg", "exp_avg_sq"))
    value = chance.choice((math.nan, math.inf, -math.inf))

    def harm() -> None:
        if kind == "frozen weight":
            spoil(matrix, chance, value)
        elif kind == "adapter weight":
            spoil(case.named[f"{path}.{part}"], chance, value)
        elif kind == "optimizer state":
            spoil(optimizers[0].state[case.named[f"{path}.{part}"]][moment], chance, value)
        else:
            with torch.no_grad():
                matrix.fill_(3e38)

    error = case.happens(harm)
    wanted = {
        "frozen weight": f"{path}.weight",
        "adapter weight": f"{path}.adapter.{part}",
        "optimizer state": f"{path}.{part}.{moment}",
        "activation": path,
    }
    assert error.place == wanted[kind]
    assert error.what.startswith(f"{kind} holds NaN or infinity")
    assert len(error.lines()) == 1
    assert error.exit_code == 2


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_vector_at_fault_is_named(tmp_path, name):
    """Norms too, which are no matrices of ours."""
    case = accident(tmp_path)
    error = case.happens(lambda: spoil(case.run.model.get_parameter(name), random.Random(0), math.nan))
    assert (error.place, error.what.split(" holds")[0]) == (name, "frozen weight")
    assert error.remedy == "the base model's file is damaged"


def test_the_head_and_the_embedding_are_named(tmp_path):
    """Also where the damage lies outside of every adapted layer."""
    for name, module in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        case = accident(tmp_path / module)

        def harm(case=case, name=name) -> None:
            with torch.no_grad():
                case.run.model.get_submodule(name).weight.matrix[:, 3] = math.nan

        assert case.happens(harm).place == f"{name}.weight"


def test_a_gradient_at_fault_is_named(tmp_path):
    """Everything forward is finite and one gradient is not: that one is named, not the first in the model."""
    case = accident(tmp_path)
    name = "model.layers.1.self_attn.v_proj"
    row = torch.tensor([2])
    error = case.happens(lambda: case.named[f"{name}.B"].register_hook(lambda g: g.index_fill(0, row, math.nan)))
    assert error.place == f"{name}.adapter.B"
    assert error.what.startswith("gradient holds NaN or infinity at step 2 (loss ")
    assert error.remedy == "lower --lr, or use --compute fp32"


def test_a_gradient_whose_norm_overflows_is_named(tmp_path):
    """Each number is finite and the norm is not: the largest gradient is named."""
    case = accident(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    error = case.happens(lambda: case.named[f"{name}.A"].register_hook(lambda gradient: gradient * 0 + 1e30))
    assert error.place == f"{name}.adapter.A"
    assert "gradient norm inf" in error.what


def test_rows_to_look_at_are_given_for_an_activation(tmp_path):
    """Training rows, counted from 1, of the pack in hand."""
    case = accident(tmp_path, after=1)
    matrix = case.run.model.get_submodule("model.layers.0.self_attn.q_proj").base.weight.matrix
    error = case.happens(lambda: matrix.data.fill_(3e38))
    assert error.remedy.startswith("look at training rows ")
    numbers = {int(n) for n in error.remedy.removeprefix("look at training rows ").split(", or")[0].split(", ")}
    assert numbers <= {n + 1 for n in step_rows(0, 2, 10, 4)}


def test_sums_see_every_nan_and_infinity():
    """One bad number anywhere is enough; none is none, and large finite numbers are finite."""
    assert sums_finite([])
    assert sums_finite([torch.zeros(3), torch.full((4, 4), 1e36), torch.tensor(5.0)])
    for bad in (math.nan, math.inf, -math.inf):
        tensor = torch.ones(5, 5)
        tensor[3, 4] = bad
        assert not sums_finite([torch.ones(2), tensor])
    assert not sums_finite([torch.tensor([math.inf, -math.inf])])


def test_clipping_does_not_spread_a_nan():
    """A gradient that is not finite is left as it is, so that it can still be told from its neighbours."""
    good, bad = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    good.grad, bad.grad = torch.tensor([3.0, 4.0]), torch.tensor([1.0, math.nan])
    assert math.isnan(clip_gradient([good, bad], 1.0))
    assert good.grad.tolist() == [3.0, 4.0]
