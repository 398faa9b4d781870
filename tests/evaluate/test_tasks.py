"""The laws of lorafit.evaluate.tasks: what is asked, what counts as equal, what cannot be compared."""

from __future__ import annotations

import pytest
import torch

from builders.chats import assistant, call, chat, text_record, user
from builders.models import frozen, tiny_model
from lorafit.errors import ConfigError
from lorafit.evaluate.tasks import matches, questions


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


def test_answers_are_equal_but_for_white_space_at_their_ends(tmp_path):
    """The base's own answers match however they are padded; inside, white space counts."""
    base = frozen(tiny_model("llama", tie_word_embeddings=False), tmp_path)
    prompts = [[5, 6, 7], [8], [9, 10]]
    told = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        told.append(base.tokenizer.decode(ids[len(prompt) :], skip_special=True))
    assert all(text.strip() for text in told)

    def found(*expected: str) -> dict:
        return matches(base.model, base.tokenizer, prompts, expected, 6)

    assert found(*(f" \n{text}\t" for text in told)) == {"share": 1.0, "rows": 3, "matches": 3}
    assert found(told[0], f"{told[1]}.", "") == {"share": 1 / 3, "rows": 3, "matches": 1}
