"""Generation against its plain twin: the whole model again for every token, no cache."""

from __future__ import annotations

import pytest
import torch

from builders.models import FAMILIES, frozen, tiny_model
from lorafit.errors import NonFiniteError
from lorafit.model.generate import generate

PROMPT = torch.randint(3, 500, (20,), generator=torch.Generator().manual_seed(1)).tolist()  # the windows are 6 wide


def plain_greedy(model, prompt, tokens: int) -> list[int]:
    """The likeliest next token of the whole text so far, again and again."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_no_greedy_token(family, tmp_path):
    """Every family, its sliding windows shorter than prompt and answer: same tokens as without a cache."""
    untied = {"tie_word_embeddings": False}  # tied tiny models say the same token for ever
    model = frozen(tiny_model(family, **untied), tmp_path).model
    for prompt in (PROMPT, PROMPT[:3]):
        expected = plain_greedy(model, prompt, 16)
        assert generate(model, prompt, max_tokens=16, end_ids=()) == expected
        assert len(set(expected)) > 4, "the test must see different tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return frozen(tiny_model("llama"), tmp_path_factory.mktemp("model")).model


def test_generation_stops_before_an_end_token(model):
    """Any of the end tokens ends the answer and is not part of it."""
    whole = plain_greedy(model, PROMPT, 12)
    stop = whole[7]
    assert generate(model, PROMPT, max_tokens=12, end_ids={stop, 511}) == whole[: whole.index(stop)]
    assert generate(model, PROMPT, max_tokens=12, end_ids={whole[0]}) == []


def test_a_temperature_draws_by_its_seed(model):
    """Equal seeds give equal answers, others do not; next to temperature 0 the likeliest token is drawn."""

    def drawn(temperature: float, seed: int) -> list[int]:
        return generate(model, PROMPT, max_tokens=12, end_ids=(), temperature=temperature, seed=seed)

    assert drawn(1.0, 3) == drawn(1.0, 3) != drawn(1.0, 4)
    assert drawn(1e-300, 5) == drawn(0.0, 6) == plain_greedy(model, PROMPT, 12)


def test_draws_follow_the_softmax(model):
    """First tokens over 200 seeds: as often as softmax(logits / temperature) says, within 4 standard deviations."""
    logits_V = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double()
    chances_V = torch.softmax(logits_V / 2.0, dim=-1)
    seeds = range(200)
    first = [generate(model, PROMPT, max_tokens=1, end_ids=(), temperature=2.0, seed=seed)[0] for seed in seeds]
    likeliest = int(chances_V.argmax())
    expected = float(chances_V[likeliest]) * len(seeds)
    assert abs(first.count(likeliest) - expected) < 4 * expected**0.5


def test_damaged_weights_are_named_and_not_sampled(tmp_path):
    """A NaN in the base gives no answer, greedy or drawn, but an error."""
    damaged = tiny_model("llama")
    with torch.no_grad():
        damaged.model.norm.weight[0] = float("nan")
    model = frozen(damaged, tmp_path).model
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="NaN or infinity at answer token 1"):
            generate(model, PROMPT, max_tokens=2, end_ids=(), temperature=temperature)
