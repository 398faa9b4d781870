"""The laws of lorafit.evaluate.choice: likelihoods as the whole model gives them, row by row and label by label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders.chats import assistant, chat, user
from builders.models import frozen, tiny_model
from lorafit.errors import ConfigError
from lorafit.evaluate.choice import chances, choices, read_labels

LABELS = ["yes", "no", "perhaps not"]


def test_likelihoods_are_those_of_the_whole_answers(tmp_path):
    """log p(label, end | prompt), by the original model on each rendered conversation alone, within fp32's rounding."""
    original = tiny_model("llama")
    base = frozen(original, tmp_path)
    asked = [chat(user("Is it?")), chat(user("Why?"), assistant("So."), user("Is it?"))]
    found = choices(asked, ["no", "perhaps not"], LABELS, base.tokenizer, 256)
    likelihoods = found.likelihoods(base.model, base.head, 64)
    assert found.right.tolist() == [1, 2]
    for r, record in enumerate(asked):
        prompt = base.tokenizer.render(list(record.messages), add_generation_prompt=True)
        for place, label in enumerate(LABELS):
            start = len(base.tokenizer.encode(prompt).ids)
            ids = base.tokenizer.encode(f"{prompt}{label}<|im_end|>").ids
            with torch.no_grad():
                logits = original(torch.tensor([ids])).logits[0].log_softmax(-1)
            plain = sum(float(logits[n - 1, ids[n]]) for n in range(start, len(ids)))
            assert likelihoods[r, place] == pytest.approx(plain, rel=1e-4)


def test_chances_are_a_distribution_over_the_labels():
    """Softmax over the labels, safe for likelihoods far below what exp can hold."""
    found = chances(np.array([[-1000.0, -1000.0 - np.log(3)], [0.0, -np.inf]]))
    assert found == pytest.approx(np.array([[0.75, 0.25], [1.0, 0.0]]))


def test_labels_are_read_from_lines_or_a_json_list(tmp_path):
    """Blank lines are no labels; white space at the ends goes."""
    (tmp_path / "a.txt").write_text("yes\n\n  no \nper haps\n")
    (tmp_path / "a.json").write_text('["yes", "no", "per haps"]')
    assert read_labels(str(tmp_path / "a.txt")) == read_labels(str(tmp_path / "a.json")) == ["yes", "no", "per haps"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("no.txt", None, "does not read: No such file"),
        ("a.json", '{"a": 1}', "is no list of texts"),
        ("a.json", "[1, 2]", "is no list of texts"),
        ("a.json", "[", "does not read"),
        ("a.txt", "yes\nno\nyes", "names 'yes' twice"),
    ],
)
def test_files_that_are_no_labels_are_refused(name, text, says, tmp_path):
    """One line with the file's name."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        read_labels(str(tmp_path / name))
    assert str(refused.value).startswith(f"--labels: {tmp_path / name}: ")


def test_rows_that_cannot_be_chosen_are_refused(tmp_path):
    """Another answer than the labels, too few labels, a row longer than the context."""
    tokenizer = frozen(tiny_model("llama"), tmp_path).tokenizer
    for expected, labels, context, says in [
        ("maybe", LABELS, 256, "--labels: train.jsonl:1 is answered by 'maybe', which is none of them"),
        ("yes", ["yes"], 256, "--labels: are 1"),
        ("yes", LABELS, 8, "train.jsonl:1: has "),
    ]:
        with pytest.raises(ConfigError) as refused:
            choices([chat(user("Is it?"))], [expected], labels, tokenizer, context)
        assert str(refused.value).startswith(says)
