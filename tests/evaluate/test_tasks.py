"""The laws of lorafit.evaluate.tasks: what is asked, what counts, what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders.chats import assistant, call, chat, text_record, user
from builders.models import frozen, tiny_model
from lorafit.errors import ConfigError
from lorafit.evaluate.choice import choices
from lorafit.evaluate.tasks import METRICS, Judge, Task, check_json, questions, read_metrics


def test_the_question_is_all_before_the_last_answer():
    """What stands before the last assistant turn is asked, what it says is compared, what follows is left out."""
    talk = (user("a"), assistant("b"), user("c"), assistant(""))
    [first, second], said = questions([chat(*talk), chat(*talk[:3])])
    assert (first.messages, second.messages, said) == (talk[:3], talk[:1], ["", "b"])


@pytest.mark.parametrize("record", [text_record("a"), chat(user("a"), call("f", x=1)), chat(user("a"))])
def test_rows_without_an_answer_in_words_are_refused(record):
    """Text, a turn that only calls a tool, no turn at all: one line with the row's place."""
    with pytest.raises(ConfigError, match=r"^--exact-match: train.jsonl:1 holds no assistant's words"):
        questions([chat(user("a"), assistant("b")), record])


def test_metrics_are_named_or_refused():
    """In their own order whatever order they are asked in; --exact-match is exact; another name is one line."""
    assert read_metrics("rouge, exact", False) == ("exact", "rouge")
    assert read_metrics(None, True) == ("exact",)
    assert read_metrics(None, False) == ()
    assert read_metrics(",".join(METRICS), True) == METRICS
    with pytest.raises(ConfigError, match=r"^--metrics: 'f1' is none; there are exact, normalised, choice"):
        read_metrics("exact,f1", False)


def test_right_answers_must_be_json_where_json_is_asked():
    """The first that is none is named with its place."""
    check_json([chat(user("a"))], ['{"a": 1}'])
    with pytest.raises(ConfigError, match=r"^--metrics json: the answer of train.jsonl:1 is no JSON"):
        check_json([chat(user("a"))], ["{a: 1}"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return frozen(tiny_model("llama", tie_word_embeddings=False), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return frozen(tiny_model("llama", seed=3, tie_word_embeddings=False), tmp_path_factory.mktemp("other"))


PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13]]


def greedy(base, tokens: int = 6) -> list[str]:
    """The base's own answers, without a cache."""
    told = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + tokens:
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        told.append(base.tokenizer.decode(ids[len(prompt) :], skip_special=True))
    return told


def test_answers_are_equal_but_for_white_space_at_their_ends(base):
    """The base's own answers match however they are padded; inside, white space counts."""
    told = greedy(base)
    assert all(text.strip() for text in told)

    def found(*expected: str) -> dict:
        judge = Judge(Task(("exact",), PROMPTS, list(expected), None, 6), 64)
        return judge(base.model, base.head, base.tokenizer)["exact_match"]

    assert found(*(f" \n{text}\t" for text in told)) == {
        "share": 1.0,
        "rows": 4,
        "matches": 4,
        "difference": {"mean": 0.0, "low": 0.0, "high": 0.0},
    }
    assert found(told[0], f"{told[1]}.", "", "x")["matches"] == 1


def test_the_second_model_is_compared_with_the_first_row_by_row(base, other):
    """All right against none: the difference is 1 and certain; each measure has its own first."""
    task = Task(("exact", "normalised", "json", "bleu", "rouge"), PROMPTS, greedy(base), None, 6)
    judge = Judge(task, 64)
    first = judge(base.model, base.head, base.tokenizer)
    second = judge(other.model, other.head, other.tokenizer)
    assert list(first) == ["exact_match", "normalised_match", "json", "bleu", "rouge"]
    assert first["exact_match"]["share"] == 1.0
    assert second["exact_match"]["difference"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert first["bleu"]["score"] == pytest.approx(100)
    assert first["bleu"]["difference"]["mean"] == 0
    assert second["bleu"]["difference"]["mean"] == pytest.approx(second["bleu"]["score"] - 100)
    for kind in ("rouge1", "rouge2", "rougeL"):
        gap = second["rouge"][kind]["mean"] - first["rouge"][kind]["mean"]
        assert second["rouge"][kind]["difference"]["mean"] == pytest.approx(gap)
    assert second["json"]["rows"] == 4


def test_choice_takes_the_likeliest_label(base):
    """Accuracy over rows whose right label is the likeliest or not, and the mean chance of the right one; no answer
    is generated for it."""
    asked = [chat(user(text)) for text in ("Is it?", "Why?", "So?")]
    labels = ["yes", "no", "perhaps"]
    likely = choices(asked, ["yes"] * 3, labels, base.tokenizer, 256).likelihoods(base.model, base.head, 64)
    best = [labels[place] for place in likely.argmax(1)]
    worst = labels[int(likely[2].argmin())]
    task = Task(("choice",), [], [], choices(asked, [*best[:2], worst], labels, base.tokenizer, 256), 6)
    found = Judge(task, 64)(base.model, base.head, base.tokenizer)["choice"]
    assert (found["accuracy"], found["rows"], found["labels"]) == (pytest.approx(2 / 3), 3, 3)
    odds = np.exp(likely)
    shares = odds / odds.sum(1, keepdims=True)
    right = [labels.index(label) for label in (*best[:2], worst)]
    assert found["mean_chance"] == pytest.approx(shares[range(3), right].mean(), rel=1e-6)
