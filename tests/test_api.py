"""The package from Python, as the specification shows it."""

from __future__ import annotations

import importlib
import json
import pkgutil

import pytest
import torch
from torch import nn

import lorafit
from builders.commands import QUICK, World, one_core
from lorafit.errors import ConfigError, LorafitError


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("api"))


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 20)[None]).logits


def test_train_returns_the_adapter_and_the_report(world):
    """result.report is report.json, result.adapter the folder; `run.yaml` says what was given."""
    assert world.result.adapter == world.folder / "out" / "adapter"
    assert world.result.report == json.loads((world.out / "report.json").read_text())
    assert f"model: {world.model}  # given" in (world.out / "run.yaml").read_text()


def test_train_takes_paths_lists_and_names(world, tmp_path):
    """Strings, paths, lists and tuples of them for data and eval; names for targets as a list or with commas."""
    ways = [
        {"data": [world.data], "eval": str(world.test), "targets": "q_proj,v_proj", "out": tmp_path / "a"},
        {"data": str(world.data), "eval": (world.test,), "targets": ["q_proj", "v_proj"], "out": str(tmp_path / "b")},
    ]
    one, two = (lorafit.train(model=world.model, **way, **QUICK) for way in ways)
    assert one.report["adapter_loss"] == two.report["adapter_loss"]
    weights = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (one, two)]
    assert weights[0] == weights[1]


def test_a_file_with_a_comma_in_its_name_is_one_file(world, tmp_path):
    """Commas separate targets, not files."""
    data = tmp_path / "a,b.jsonl"
    data.write_bytes(world.data.read_bytes())
    result = lorafit.train(model=world.model, data=data, out=tmp_path / "out", **{**QUICK, "max_steps": 1})
    assert result.report["data"]["rows"] == 24


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rnk": 3}, "lorafit.train: rnk: is no setting; did you mean rank?"),
        ({"learning_rate": 3}, "lorafit.train: learning_rate: is no setting"),
        ({"rank": "x"}, "lorafit.train: rank: is 'x'; give a whole number"),
        ({"rank": True}, "lorafit.train: rank: is True; give a whole number"),
        ({"data": 5}, "lorafit.train: data: is 5; give a list of names"),
        ({"data": []}, "lorafit.train: data is missing"),
        ({"model": None}, "lorafit.train: model: is None; give text"),
        ({"out": ""}, "lorafit.train: out is missing"),
        ({"base": "fp4"}, "lorafit.train: base: is 'fp4'; give auto or bf16 or fp32 or nf4 or int8 or packed"),
        ({"rank": 0}, "--rank: is 0"),
    ],
)
def test_wrong_options_are_the_familys_errors(world, tmp_path, options, says):
    """LorafitError and ValueError at once, with the nearest name; nothing is written."""
    with pytest.raises(ConfigError) as caught:
        lorafit.train(**{"model": world.model, "data": world.data, "out": tmp_path / "out", **options})
    assert str(caught.value).startswith(says)
    assert isinstance(caught.value, (LorafitError, ValueError))
    assert not (tmp_path / "out").exists()


def test_auto_is_what_the_rule_chooses(world, tmp_path):
    """lr="auto" is the default by its name, in Python as on the command line."""
    shared = {"model": world.model, "data": world.data, **QUICK, "max_steps": 1}
    del shared["lr"]
    runs = [lorafit.train(**shared, out=tmp_path / "a"), lorafit.train(**shared, lr="auto", out=tmp_path / "b")]
    assert runs[0].report["adapter_loss"] == runs[1].report["adapter_loss"]


def test_an_adapter_makes_the_round_trip(world, tmp_path):
    """load, attach, save_adapter, load_adapter: the logits come back bit for bit; a fresh adapter changes none."""
    plain = lorafit.load(world.model, compute="fp32")
    before = logits(plain)
    model = lorafit.attach(plain, rank=8, alpha=16, targets=["q_proj", "v_proj"])
    assert model is plain
    assert torch.equal(logits(model), before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = logits(model)
    assert not torch.equal(after, before)
    lorafit.save_adapter(model, tmp_path / "adapter")
    other = lorafit.load(world.model, compute="fp32")
    assert lorafit.load_adapter(other, tmp_path / "adapter") == []
    assert torch.equal(logits(other), after)
    assert torch.equal(logits(lorafit.load(world.model, adapter=tmp_path / "adapter", compute="fp32")), after)


def test_attach_trains_a_module_of_the_users_own():
    """Any torch module: only the adapter learns, and a step of it lowers the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    x_BI, y_B2 = torch.randn(32, 6), torch.randn(32, 2)
    lorafit.attach(model, rank=2, alpha=4, targets=["0", "2"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = ((model(x_BI) - y_B2) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


def test_names_of_the_package_stay_its_functions():
    """Whatever submodule is imported, `lorafit.train` and its neighbours are functions; others are no attributes."""
    for module in pkgutil.walk_packages(lorafit.__path__, "lorafit."):
        if module.name not in ("lorafit.__main__", "lorafit.kernels.triton_unpack"):  # one acts, one needs an extra
            importlib.import_module(module.name)
    for name in ("train", "plan", "load", "attach", "save_adapter", "load_adapter", "save_nf4"):
        assert callable(getattr(lorafit, name))
        assert name in dir(lorafit)
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has train, load"):
        _ = lorafit.trian
