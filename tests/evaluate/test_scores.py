"""The laws of lorafit.evaluate.scores: each score against what it is by hand or by its own library."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lorafit.errors import ConfigError
from lorafit.evaluate import scores
from lorafit.evaluate.scores import (
    bleu_counts,
    bleu_difference,
    bleu_of,
    corpus_bleu,
    exact,
    field_f1,
    fields,
    json_scores,
    needed,
    normalised,
    plain,
    read_json,
    rouge_scores,
)


@pytest.mark.parametrize(
    ("answer", "expected", "equal", "alike"),
    [
        ("The cat.", "cat", 0, 1),
        (" a  Dog!\n", "the dog", 0, 1),
        ("yes", " yes\n", 1, 1),
        ("Anatomy", "atomy", 0, 0),
        ("Straße, № 5", "STRASSE no 5", 0, 1),
        ("1,000", "1.000", 0, 1),
        ("cat", "cats", 0, 0),
        ("", "", 1, 1),
    ],
)
def test_exact_and_normalised_match(answer, expected, equal, alike):
    """White space at the ends counts for neither; case, punctuation, articles, compatibility forms for exact alone."""
    assert exact(answer, expected) == equal
    assert normalised(answer, expected) == alike
    assert exact(answer, expected) <= normalised(answer, expected)


def test_normalising_twice_changes_nothing():
    """What is plain stays as it is."""
    for text in ("The A-Team, an answer!", "  ﬁne “quotes” ", "日本、東京"):
        assert plain(plain(text)) == plain(text)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} and more', '{"a": NaN}', '{"a": 1, "a": 2}', "```json\n{}\n```",
                                  "[" * 100_000, "Infinity"])  # fmt: skip
def test_only_a_whole_strict_value_is_json(text):
    """Fences, words around it, NaN, doubled keys and towers of brackets are none."""
    with pytest.raises(ValueError, match=r".*"):
        read_json(text)
    assert json_scores([text], ["{}"]) == {"valid": [0.0], "field_f1": [0.0]}


def test_leaves_have_paths_and_lists_have_no_order():
    """Nested values are leaves by path; 1.0 is 1 and true is not 1; what is empty is a leaf."""
    assert sorted(fields({"a": {"b": [1.0, "x"]}, "c": {}, "d": []})) == [
        ('."a"."b"[]', '"x"'),
        ('."a"."b"[]', "1"),
        ('."c"', "{}"),
        ('."d"', "[]"),
    ]
    assert list(fields(True)) != list(fields(1))


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, 1.0),
        ({"a": 1}, {"a": 1, "b": 2}, 2 / 3),
        ({"a": 2}, {"a": 1}, 0.0),
        ([1, 1, 2], [2, 1, 1], 1.0),
        ([1, 1], [1], 2 / 3),
        ("x", "x", 1.0),
        ({}, {"a": 1}, 0.0),
    ],
)
def test_field_f1_by_hand(answer, expected, f1):
    """2 x common leaves over all leaves of both."""
    assert field_f1(answer, expected) == pytest.approx(f1)
    assert field_f1(expected, answer) == pytest.approx(f1)


def test_bleu_is_sacrebleus():
    """The library's own corpus score of stripped texts, and its signature."""
    answers, right = [" the cat sat on the mat\n", "a dog"], ["the cat sat on a mat", "a dog barks loudly"]
    found = corpus_bleu(answers, right)
    assert found["score"] == sacrebleu.corpus_bleu(["the cat sat on the mat", "a dog"], [right]).score
    assert "version:" in found["signature"]
    assert corpus_bleu(right, right)["score"] == pytest.approx(100)


def test_bleu_from_counts_is_bleu_of_the_texts():
    """Sums of rows' counts give the library's corpus score; the paired interval is that of scoring each sample's texts
    anew, which is the slow way."""
    rng = np.random.default_rng(3)
    words = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "barks", "loudly", "now"]
    right = [" ".join(rng.choice(words, 9)) for _ in range(12)]
    one, other = (
        [" ".join(w if rng.random() < p else "x" for w in text.split()) for text in right] for p in (0.9, 0.7)
    )
    a, b = bleu_counts(one, right), bleu_counts(other, right)
    assert bleu_of(a) == pytest.approx(corpus_bleu(one, right)["score"])

    def slow(texts, sample):
        return corpus_bleu([texts[n] for n in sample], [right[n] for n in sample])["score"]

    samples = np.random.default_rng(0).integers(12, size=(scores.RESAMPLED, 12))
    gaps = [slow(one, sample) - slow(other, sample) for sample in samples]
    found = bleu_difference(a, b)
    assert [found["low"], found["high"]] == pytest.approx(list(np.percentile(gaps, [2.5, 97.5])))
    assert found["mean"] == pytest.approx(bleu_of(a) - bleu_of(b))
    assert found["low"] > 0
    assert bleu_difference(a[:1], b[:1])["low"] is None
    assert bleu_difference(a, a) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_rouge_is_rouge_scores():
    """Per row the library's F1; equal texts have 1, texts without common words 0."""
    answers, right = ["the cats sat", "x"], ["the cat sat down", "y"]
    found = rouge_scores(answers, right)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    assert found["rougeL"] == [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, right, strict=True)]
    assert set(found) == {"rouge1", "rouge2", "rougeL"}
    assert found["rouge1"][1] == 0
    assert rouge_scores(["a b c"], ["a b c"]) == {"rouge1": [1.0], "rouge2": [1.0], "rougeL": [1.0]}


@pytest.mark.parametrize(("metric", "module", "package"), [("bleu", "sacrebleu", "sacrebleu"),
                                                           ("rouge", "rouge_score", "rouge-score")])  # fmt: skip
def test_a_missing_library_is_named_with_what_to_install(metric, module, package, monkeypatch):
    """One line; the metrics that need none are never refused."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as refused:
        needed(metric)
    assert str(refused.value) == (
        f"--metrics {metric}: needs {package}, which is not installed; pip install 'lorafit[eval]'"
    )
    assert needed("exact") is None
