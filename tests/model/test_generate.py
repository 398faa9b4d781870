"""Generation against its plain twin: the whole model again for every token, no cache."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from builders.models import FAMILIES, frozen, tiny_model
from lorafit.errors import NonFiniteError
from lorafit.model import generate as module
from lorafit.model.generate import generate, stream

UNTIED = {"tie_word_embeddings": False}  # tied tiny models say the same token for ever
LENGTHS = (20, 3, 1, 47, 8, 3, 30)  # the sliding windows are 6 wide
_random = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(3, 500, (length,), generator=_random).tolist() for length in LENGTHS]
PROMPT = PROMPTS[0]


def plain_greedy(model, prompt, tokens: int, end_ids=()) -> list[int]:
    """The likeliest next token of the whole text so far, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def batch_sizes(model, sizes: list[int]):
    """Writes down how many rows each forward pass has, from now on."""
    return model.register_forward_pre_hook(lambda _, __, words: sizes.append(len(words["input_ids"])), with_kwargs=True)


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request, tmp_path_factory):
    return frozen(tiny_model(request.param, **UNTIED), tmp_path_factory.mktemp(request.param)).model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return frozen(tiny_model("llama", **UNTIED), tmp_path_factory.mktemp("model")).model


def test_a_batch_and_a_cache_change_no_greedy_token(any_model):
    """Every family, prompts shorter and longer than its windows: the tokens of each alone and without a cache."""
    expected = [plain_greedy(any_model, prompt, 16) for prompt in PROMPTS]
    assert generate(any_model, PROMPTS, max_tokens=16, end_ids=()) == expected
    assert [generate(any_model, [prompt], max_tokens=16, end_ids=())[0] for prompt in PROMPTS] == expected
    assert len(set(chain.from_iterable(expected))) > 20, "the test must see different tokens"


def test_rows_that_have_ended_leave_the_batch(any_model):
    """Answers of 0, 3, 9 and 16 tokens: the others go on unchanged, and no step computes a row that has ended."""
    whole = [plain_greedy(any_model, prompt, 16) for prompt in PROMPTS]
    ends = {answer[place] for answer, place in zip(whole, (9, 3, 0), strict=False)}
    expected = [plain_greedy(any_model, prompt, 16, ends) for prompt in PROMPTS]
    sizes: list[int] = []
    with batch_sizes(any_model, sizes):
        assert generate(any_model, PROMPTS, max_tokens=16, end_ids=ends) == expected
    assert len({len(answer) for answer in expected}) > 2, "the test must see different lengths"
    steps = range(1, max(map(len, expected)) + 1)
    going = [sum(len(answer) >= step for answer in expected) for step in steps]
    assert sizes == [1, *going][:16]  # the prompts are read as one pack; the last token of 16 is not read


def test_draws_do_not_depend_on_the_batch(any_model):
    """With a temperature each prompt draws by the seed and its own place: what else is asked changes nothing."""

    def drawn(prompts) -> list[list[int]]:
        return generate(any_model, prompts, max_tokens=12, end_ids=(), temperature=1.0, seed=3)

    together = drawn(PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        others = [[5]] * place
        assert drawn([*others, prompt])[place] == together[place]
    assert len(set(map(tuple, drawn([PROMPT] * 3)))) == 3


def test_long_lists_are_cut_into_batches_and_come_back_in_order(model, monkeypatch):
    """At most ROWS rows and TOKENS cached tokens at once, prompts of like length together, answers in order."""
    expected = [plain_greedy(model, prompt, 5) for prompt in PROMPTS]
    monkeypatch.setattr(module, "ROWS", 3)
    for window, tokens, batches in [(100, 10_000, 3), (100, 60, 4), (1, 10_000, 7), (4, 10_000, 3), (100, 1, 7)]:
        monkeypatch.setattr(module, "WINDOW", window)
        monkeypatch.setattr(module, "TOKENS", tokens)
        sizes: list[int] = []
        with batch_sizes(model, sizes):
            assert generate(model, PROMPTS, max_tokens=5, end_ids=()) == expected
        assert len(sizes) == 5 * batches
        assert max(sizes) <= 3
    assert generate(model, [], max_tokens=5, end_ids=()) == []


def test_an_answer_waits_for_no_later_window(model, monkeypatch):
    """The first window's answers come before anything of the second is computed."""
    monkeypatch.setattr(module, "WINDOW", 2)
    expected = [plain_greedy(model, prompt, 3) for prompt in PROMPTS[:2]]
    sizes: list[int] = []
    with batch_sizes(model, sizes):
        answers = stream(model, PROMPTS, max_tokens=3, end_ids=())
        assert [next(answers), next(answers)] == expected
        assert sizes == [1, 2, 2]


def test_an_answer_ends_with_max_tokens_or_the_context(model):
    """256 tokens are the context: a row close to it ends early, one that fills it has no answer, others go on."""
    prompts = [PROMPT, [7] * 252, [7] * 256, [7] * 300, PROMPTS[1]]
    expected = [plain_greedy(model, prompts[0], 9), plain_greedy(model, prompts[1], 4), [], []]
    assert generate(model, prompts, max_tokens=9, end_ids=()) == [*expected, plain_greedy(model, prompts[4], 9)]
    assert generate(model, prompts, max_tokens=0, end_ids=()) == [[]] * 5


def test_generation_stops_before_an_end_token(model):
    """Any of the end tokens ends the answer and is not part of it."""
    whole = plain_greedy(model, PROMPT, 12)
    stop = whole[7]
    assert generate(model, [PROMPT], max_tokens=12, end_ids={stop, 511}) == [whole[: whole.index(stop)]]
    assert generate(model, [PROMPT], max_tokens=12, end_ids={whole[0]}) == [[]]


def test_a_temperature_draws_by_its_seed(model):
    """Equal seeds give equal answers, others do not; next to temperature 0 the likeliest token is drawn."""

    def drawn(temperature: float, seed: int) -> list[int]:
        [answer] = generate(model, [PROMPT], max_tokens=12, end_ids=(), temperature=temperature, seed=seed)
        return answer

    assert drawn(1.0, 3) == drawn(1.0, 3) != drawn(1.0, 4)
    assert drawn(1e-300, 5) == drawn(0.0, 6) == plain_greedy(model, PROMPT, 12)


def test_draws_follow_the_softmax(model):
    """First tokens of 200 draws: as often as softmax(logits / temperature) says, within 4 standard deviations."""
    logits_V = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double()
    chances_V = torch.softmax(logits_V / 2.0, dim=-1)
    first = [answer[0] for answer in generate(model, [PROMPT] * 200, max_tokens=1, end_ids=(), temperature=2.0)]
    likeliest = int(chances_V.argmax())
    expected = float(chances_V[likeliest]) * len(first)
    assert abs(first.count(likeliest) - expected) < 4 * expected**0.5


def test_damaged_weights_are_named_and_not_sampled(tmp_path):
    """A NaN in the base gives no answer, greedy or drawn, but an error."""
    damaged = tiny_model("llama")
    with torch.no_grad():
        damaged.model.norm.weight[0] = float("nan")
    model = frozen(damaged, tmp_path).model
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="NaN or infinity at answer token 1"):
            generate(model, PROMPTS, max_tokens=2, end_ids=(), temperature=temperature)


def test_one_damaged_row_is_not_hidden_by_the_others(tmp_path):
    """An infinity in one token's embedding: the batch fails at the step that reads it, though the others are whole."""
    damaged = tiny_model("llama", **UNTIED)
    bad = plain_greedy(damaged, PROMPT, 3)[2]
    with torch.no_grad():
        damaged.model.embed_tokens.weight[bad] = float("inf")
    model = frozen(damaged, tmp_path).model
    fine = [prompt for prompt in PROMPTS[1:4] if bad not in [*prompt, *plain_greedy(model, prompt, 6)]]
    assert fine
    with pytest.raises(NonFiniteError, match="NaN or infinity at answer token 4"):
        generate(model, [*fine, PROMPT], max_tokens=6, end_ids=())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_come_one_by_one_and_are_the_whole_answer(model, temperature):
    """What generate gives for the prompt alone; each token before the next is computed; none where there is no room."""
    words = {"max_tokens": 9, "end_ids": (), "temperature": temperature, "seed": 5}
    [expected] = generate(model, [PROMPT], **words)
    sizes: list[int] = []
    with batch_sizes(model, sizes):
        seen = []
        for token in module.tokens(model, PROMPT, **words):
            seen.append(token)
            assert len(sizes) == len(seen)
    assert seen == expected
    assert list(module.tokens(model, [7] * 256, **words)) == []
    stops = {**words, "end_ids": {expected[3]}}
    assert list(module.tokens(model, PROMPT, **stops)) == expected[: expected.index(expected[3])]
