"""The configuration: declared once, checked, written and read back; every field is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from lorafit.config import Resolved, TrainConfig, field_docs, field_types, from_values, read_yaml, to_yaml
from lorafit.errors import ConfigError, Faults, LorafitError

SOURCE = Path(__file__).parent.parent / "src" / "lorafit"


def test_every_field_has_a_docstring():
    """Help, YAML and documents come from the text under each field."""
    assert set(field_docs()) == set(field_types())
    assert all(doc.endswith((".", "auto")) for doc in field_docs().values())


def test_every_field_is_read_somewhere():
    """A setting that nothing reads is a defect: each name is an attribute read outside config.py."""
    read = set()
    for file in SOURCE.rglob("*.py"):
        if file.name not in ("config.py", "cli.py"):
            read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert set(field_types()) - read == set()


def test_config_file_and_back_is_equal(tmp_path):
    """config -> run.yaml -> config loses nothing, and says where values came from."""
    config = TrainConfig(
        model="a b.gguf", data=("x.jsonl", "y: z.csv"), out="o", lr=1.3e-3, targets=("q_proj", "*.v_proj"),
        patience=3, eval_fraction=0.1, trained="last",
    )  # fmt: skip
    resolved = Resolved(config).settle("lr", 1e-4, "auto: a rule")
    (tmp_path / "run.yaml").write_text(to_yaml(resolved, {"identity": {"base": "x"}}))
    values = read_yaml(tmp_path / "run.yaml")
    assert values.pop("identity") == {"base": "x"}
    assert TrainConfig(**from_values(values, "run.yaml")) == resolved.config
    assert "lr: 0.0001  # auto: a rule" in (tmp_path / "run.yaml").read_text()


def test_a_text_that_looks_like_a_number_stays_text(tmp_path):
    """A fingerprint of digits and one e, a folder called 1e5: what is written as text comes back as text."""
    config = TrainConfig(model="1e5", data=("2E-3",), out="7")
    extra = {"identity": {"base": "4753012852353e85", "data": "0000000000000000"}}
    (tmp_path / "run.yaml").write_text(to_yaml(Resolved(config), extra))
    values = read_yaml(tmp_path / "run.yaml")
    assert {"identity": values.pop("identity")} == extra
    assert TrainConfig(**from_values(values, "run.yaml")) == config


def test_learning_rates_may_be_written_as_people_do(tmp_path):
    """1e-3 is a number, though YAML 1.1 thinks it is text."""
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nweight_decay: 0\n")
    assert from_values(read_yaml(tmp_path / "c.yaml"), "c") == {"lr": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1", "learning_rte: is no setting"),
        ("rnak: 8", "did you mean rank?"),
        ("rank: eight", "rank: is 'eight'; give a whole number"),
        ("rank: true", "give a whole number"),
        ("rank: 8.5", "give a whole number"),
        ("schedule: linaer", "give linear or cosine or constant"),
        ("rank: 8\nrank: 9", "key rank stands twice"),
        ("a: &x [1]\nb: *x", "aliases are not read"),
        ("- 1", "holds list"),
        ("model: !!python/object:os.system x", "is no YAML"),
        ("data: [1]", "a list of names"),
        ("{", "is no YAML"),
    ],
)
def test_a_bad_configuration_file_is_one_line(tmp_path, text, words):
    """Each fault names the file, the key, the value and what is wanted."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(LorafitError) as caught:
        from_values(read_yaml(tmp_path / "c.yaml"), str(tmp_path / "c.yaml"))
    (line,) = caught.value.lines()
    assert words in line
    assert "c.yaml" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0), ("rank", 5000), ("alpha", 0), ("alpha", float("nan")), ("alpha", float("inf")), ("dropout", 1.0),
        ("lr", 0), ("lr", -1.0), ("lr", float("nan")), ("warmup", 1.5), ("epochs", 0), ("max_steps", 0),
        ("batch_size", 0), ("max_length", 1), ("eval_fraction", 0.9), ("patience", 0), ("threads", 0), ("targets", ()),
        ("weight_decay", -0.1), ("clip_norm", float("inf")), ("seed", -1),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(name, value):
    """The message names the option as the user writes it."""
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: is"):
        TrainConfig(**{name: value})


def test_all_faults_are_reported_at_once():
    """Two bad values, two lines."""
    with pytest.raises(Faults) as caught:
        TrainConfig(rank=0, lr=-1.0)
    assert len(caught.value.lines()) == 2


def test_the_configuration_is_frozen():
    """Nothing changes a setting after it was resolved."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().rank = 3  # type: ignore[misc]
