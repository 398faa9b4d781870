"""How well an answer agrees with the right one: one number per row for each measure, and BLEU for all rows.

exact       equal, white space at both ends aside
normalised  equal without case, punctuation, articles and extra white space (Rajpurkar et al. 2016, arXiv:1606.05250)
json        valid: the whole answer is one JSON value; field_f1: F1 over its (path, value) pairs
bleu        corpus BLEU by sacrebleu (Post 2018, arXiv:1804.08771), with its signature
rouge       ROUGE-1, ROUGE-2 and ROUGE-L F1 by rouge-score (Lin 2004)
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lorafit.errors import ConfigError

ARTICLES = re.compile(r"\b(a|an|the)\b")
LIBRARIES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}  # module, package
RESAMPLED = 1000
Scores = dict[str, list[float]]


def needed(metric: str) -> Any:
    """The library that a metric needs, or None. Raises ConfigError where it is not installed."""
    if metric not in LIBRARIES:
        return None
    module, package = LIBRARIES[metric]
    try:
        return importlib.import_module(module)
    except ImportError:
        remedy = "pip install 'lorafit[eval]'"
        raise ConfigError(f"--metrics {metric}", f"needs {package}, which is not installed", remedy) from None


def exact(answer: str, expected: str) -> float:
    """1 where the two are equal, white space at both ends aside."""
    return float(answer.strip() == expected.strip())


def normalised(answer: str, expected: str) -> float:
    """1 where the two are equal once `plain`."""
    return float(plain(answer) == plain(expected))


def plain(text: str) -> str:
    """Lower case, without punctuation and English articles, words one space apart; compatibility forms unified."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(ARTICLES.sub(" ", kept).split())


def read_json(text: str) -> Any:
    """The value that the whole text is. Raises ValueError for anything else, NaN and doubled keys too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("too deep") from None


def fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of every leaf. Items of a list share their path, so that their order does not count; what is empty
    is a leaf too."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields(inner, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for inner in value:
            yield from fields(inner, f"{path}[]")
    else:
        number = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if number else value, ensure_ascii=False)  # 1.0 is 1


def field_f1(answer: Any, expected: Any) -> float:
    """F1 of the answer's leaves against the right ones, as multisets."""
    said, right = Counter(fields(answer)), Counter(fields(expected))
    return 2 * (said & right).total() / (said.total() + right.total())


def json_scores(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Per row whether the answer is JSON, and its field F1, 0 where it is not. The right answers must be JSON."""
    valid, f1 = [], []
    for answer, right in zip(answers, expected, strict=True):
        try:
            found = read_json(answer)
        except ValueError:
            valid.append(0.0)
            f1.append(0.0)
            continue
        valid.append(1.0)
        f1.append(field_f1(found, read_json(right)))
    return {"valid": valid, "field_f1": f1}


def rouge_scores(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Per row ROUGE-1, ROUGE-2 and ROUGE-L F1, with Porter's stemmer."""
    needed("rouge")
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    rows = [scorer.score(right, answer) for answer, right in zip(answers, expected, strict=True)]
    return {kind: [row[kind].fmeasure for row in rows] for kind in kinds}


def corpus_bleu(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """sacrebleu's corpus BLEU from 0 to 100, one reference per answer, and the signature of how it was counted."""
    metric = needed("bleu").metrics.BLEU()
    score = metric.corpus_score([text.strip() for text in answers], [[text.strip() for text in expected]])
    return {"score": float(score.score), "signature": str(metric.get_signature())}


def bleu_counts(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """What corpus BLEU sums, per row (R, 10): words of answer and reference, matches and n-grams for n of 1 to 4."""
    metric = needed("bleu").metrics.BLEU(effective_order=True)
    rows = [
        metric.sentence_score(answer.strip(), [right.strip()]) for answer, right in zip(answers, expected, strict=True)
    ]
    return np.array([[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows], dtype=np.int64)


def bleu_of(counts_R: np.ndarray) -> float:
    """Corpus BLEU from 0 to 100 of rows' counts (R, 10)."""
    words, reference, *grams = (int(total) for total in counts_R.sum(0))
    score = needed("bleu").metrics.BLEU.compute_bleu(grams[:4], grams[4:], words, reference)
    return float(score.score)


def bleu_difference(counts_R: np.ndarray, first_R: np.ndarray) -> dict[str, float | None]:
    """BLEU less that of the first model, and its 95 % interval from RESAMPLED samples of the rows, paired.

    One row has no interval: null. Source: Koehn 2004, "Statistical Significance Tests for Machine Translation".
    """
    mean, rows = bleu_of(counts_R) - bleu_of(first_R), len(counts_R)
    if rows < 2:
        return {"mean": mean, "low": None, "high": None}
    drawn = np.random.default_rng(0).integers(rows, size=(RESAMPLED, rows))
    gaps = [bleu_of(counts_R[sample]) - bleu_of(first_R[sample]) for sample in drawn]
    low, high = np.percentile(gaps, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


PER_ROW: dict[str, Callable[[str, str], float]] = {"exact": exact, "normalised": normalised}
