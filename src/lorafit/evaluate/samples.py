"""Answers to held-out prompts, before training and after, beside the right ones."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.data.batch import Tokens
from lorafit.model.generate import generate
from lorafit.model.load import Base

SAMPLES, SAMPLE_TOKENS = 6, 64


def prompt_and_answer(row: Tokens) -> tuple[list[int], list[int]]:
    """Token ids before the first trained one, and the trained ones that follow it without a gap."""
    trained = list(row.trained)
    start = trained.index(True)
    end = next((i for i in range(start, len(trained)) if not trained[i]), len(trained))
    return list(row.ids[:start]), list(row.ids[start:end])


def sampled(rows: Sequence[Tokens]) -> list[tuple[int, tuple[list[int], list[int]]]]:
    """Place, and prompt and answer, of the first held-out rows that have both."""
    found = enumerate(map(prompt_and_answer, rows[:SAMPLES]))
    return [(place, pair) for place, pair in found if all(pair)]


def question(row: Tokens, rendered: str) -> str:
    """The row's one user message, or `rendered` where it has none or several."""
    record = getattr(row, "record", None)
    asked = [message["content"] for message in getattr(record, "messages", None) or () if message["role"] == "user"]
    return str(asked[0] if len(asked) == 1 else rendered)


def answers(base: Base, rows: Sequence[Tokens]) -> list[str]:
    """What the model as it stands says to the sampled prompts, greedily."""
    prompts = [prompt for _, (prompt, _) in sampled(rows)]
    told = generate(base.model, prompts, max_tokens=SAMPLE_TOKENS, end_ids=base.tokenizer.end_ids)
    return [base.tokenizer.decode(ids, True).strip() for ids in told]


def samples(base: Base, rows: Sequence[Tokens], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """The report's samples: prompt, expected, and what base and adapter said."""
    return [
        {
            "prompt": base.tokenizer.decode(prompt),
            "question": question(rows[place], base.tokenizer.decode(prompt, True)),
            "expected": base.tokenizer.decode(answer, True).strip(),
            "base": before[number],
            "adapter": after[number],
        }
        for number, (place, (prompt, answer)) in enumerate(sampled(rows))
    ]
