"""Answers to many prompts at once, token by token, with a key-value cache.

The prompts of a batch are read as training reads rows: packed, each attending to itself. Then all rows grow by a token
per step. Their newest tokens stand in one column of the cache, so that shorter prompts begin further right, and what
lies to the left of a row is hidden from it. A row that has ended leaves, and its place goes to the rows after it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorafit.errors import NonFiniteError
from lorafit.model.architectures import unpackable

ROWS, TOKENS = 16, 8192  # of a batch at most: rows, and columns of the cache times rows (one row may need more)
WINDOW = 64  # prompts among which those of like length are put together; an answer waits for no later ones


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The token ids that follow each prompt, without the end token that stops them: what it is answered alone.

    max_tokens bounds each answer, and so does the model's context. temperature 0 takes the likeliest token; above 0 it
    samples from softmax(logits / temperature), each prompt with draws of its own by `seed` and its place in `prompts`.
    No prompt may be empty. The model must be in eval mode. Raises NonFiniteError for NaN or infinite logits.
    """
    return list(stream(model, prompts, max_tokens=max_tokens, end_ids=end_ids, temperature=temperature, seed=seed))


def stream(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[list[int]]:
    """What `generate` gives, in the prompts' order, each answer as soon as it and all before it are known."""
    context = int(model.config.max_position_embeddings)
    rooms = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    known: dict[int, list[int]] = {n: [] for n, room in enumerate(rooms) if room <= 0}
    following = 0
    for batch in _batches([len(prompt) for prompt in prompts], rooms, 1 if _is_alone(model) else ROWS):
        draws = [_draws(seed, n) for n in batch] if temperature > 0 else []
        chosen = [prompts[n] for n in batch], [rooms[n] for n in batch]
        known.update(zip(batch, _decode(model, *chosen, end_ids, temperature, draws), strict=True))
        while following in known:
            yield known.pop(following)
            following += 1
    yield from (known[n] for n in range(following, len(prompts)))


def _is_alone(model: PreTrainedModel) -> bool:
    """Whether prompts must be read one by one, since they would change each other in a pack."""
    return bool(unpackable(model.config.to_dict()))


def _batches(lengths: Sequence[int], rooms: Sequence[int], most: int = ROWS) -> Iterator[list[int]]:
    """Numbers of the prompts that have room for an answer, those of like length together."""
    for first in range(0, len(lengths), WINDOW):
        window = [n for n in range(first, min(first + WINDOW, len(lengths))) if rooms[n] > 0]
        batch: list[int] = []
        for n in sorted(window, key=lengths.__getitem__):  # so the last is the longest, the first has the most room
            if batch and (len(batch) == most or (len(batch) + 1) * (lengths[n] + rooms[batch[0]]) > TOKENS):
                yield batch
                batch = []
            batch.append(n)
        if batch:
            yield batch


def _draws(seed: int, number: int) -> torch.Generator:
    """The random numbers of one prompt."""
    mixed = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


def tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The answer to one prompt, each token as soon as it is chosen; what `generate` gives for it alone."""
    room = min(max_tokens, int(model.config.max_position_embeddings) - len(prompt))
    if room > 0:
        draws = [_draws(seed, 0)] if temperature > 0 else []
        for step in _steps(model, [prompt], [room], end_ids, temperature, draws):
            yield from (token for _, token in step)


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    end_ids: Collection[int],
    temperature: float,
    draws: Sequence[torch.Generator],
) -> list[list[int]]:
    """One batch, whole; rooms: tokens of each answer at most, 1 or more."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, rooms, end_ids, temperature, draws):
        for row, token in step:
            answers[row].append(token)
    return answers


@torch.no_grad()
def _steps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    end_ids: Collection[int],
    temperature: float,
    draws: Sequence[torch.Generator],
) -> Iterator[list[tuple[int, int]]]:
    """One batch, a step at a time: (row, token) of the rows whose answer goes on."""
    bounds = (0, *accumulate(map(len, prompts)))
    cache = _RowCache(model.config, bounds[1]) if _is_alone(model) else _Cache(bounds, max(rooms))
    rows, length = list(range(len(prompts))), 0
    logits_BV = model(
        input_ids=torch.tensor([list(chain.from_iterable(prompts))]),
        position_ids=torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None],
        documents=bounds,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor(bounds[1:]) - 1,
    ).logits[0]
    while True:
        length += 1
        if not math.isfinite(logits_BV.sum()):  # of one NaN or infinity the sum is one too
            what = f"hold NaN or infinity at answer token {length}"
            raise NonFiniteError("logits", what, "the model or adapter is damaged, or try --compute fp32")
        chosen = _choose(logits_BV, temperature, [draws[row] for row in rows] if draws else [])
        told = [place for place, token in enumerate(chosen) if token not in end_ids]
        yield [(rows[place], chosen[place]) for place in told]
        going = [place for place in told if length < rooms[rows[place]]]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[place] for place in going]
        newest_B1 = torch.tensor([[chosen[place]] for place in going])
        logits_BV = model(input_ids=newest_B1, past_key_values=cache, use_cache=True, **cache.grow()).logits[:, -1]


def _choose(logits_BV: Tensor, temperature: float, draws: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row."""
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    chances_BV = torch.softmax((logits_BV - logits_BV.amax(-1, keepdim=True)).double() / temperature, dim=-1)
    return [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(chances_BV, draws, strict=True)]


class _Cache:
    """Keys and values of B rows, as transformers' models write and read them: `update` is all that they ask for.

    bounds: of the prompts in the pack that is read first. room: columns for the answers. Room is taken up once, and
    layers with a sliding window have all of it: attention looks at the columns of its window alone.
    """

    def __init__(self, bounds: Sequence[int], room: int) -> None:
        self.spans = list(pairwise(bounds))
        self.end = max(stop - start for start, stop in self.spans)  # columns that are filled
        self.columns = self.end + room - 1  # an answer's last token is never read
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, (B, K, S, D) each
        self._begin([self.end - (stop - start) for start, stop in self.spans])

    def _begin(self, starts: list[int]) -> None:
        self.starts, self.first = starts, min(starts)
        self.starts_B1 = torch.tensor(starts)[:, None]

    def update(self, key_BKTD: Tensor, value_BKTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take up what is new and return all that the new tokens may see."""
        if layer == len(self.layers):
            self.layers.append((self._spread(key_BKTD), self._spread(value_BKTD)))
            return key_BKTD, value_BKTD
        keys, values = (part[: len(self.starts), :, self.first : self.end] for part in self.layers[layer])
        keys[:, :, -1:], values[:, :, -1:] = key_BKTD, value_BKTD
        return keys, values

    def _spread(self, packed_1KTD: Tensor) -> Tensor:
        """The packed prompts as rows that end at the same column."""
        _, heads, _, width = packed_1KTD.shape
        rows = packed_1KTD.new_empty(len(self.starts), heads, self.columns, width)
        rows[:, :, : self.end] = 0  # a hidden NaN would still spoil a sum
        for row, (start, stop) in enumerate(self.spans):
            rows[row, :, self.starts[row] : self.end] = packed_1KTD[0, :, start:stop]
        return rows

    def get_seq_length(self, *_: Any) -> int:
        """0: where its rows stand is told by `position_ids`, and by `visible_BS` to attention."""
        return 0

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these, which move up."""
        for new, old in enumerate(places):
            if new != old:
                columns = slice(self.starts[old], self.end)
                for part in chain.from_iterable(self.layers):
                    part[new, :, columns] = part[old, :, columns]
        self._begin([self.starts[place] for place in places])

    def grow(self) -> dict[str, Tensor | None]:
        """Make place for a token of each row; what the model must be told about the step: positions, what is hidden."""
        positions_B1 = self.end - self.starts_B1
        self.end += 1
        padded = any(start > self.first for start in self.starts)
        visible_BS = torch.arange(self.first, self.end) >= self.starts_B1 if padded else None
        return {"position_ids": positions_B1, "visible_BS": visible_BS}


class _RowCache(DynamicCache):
    """Keys, values and states of one row, as transformers keeps them."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config)
        self.length = length

    def keep(self, places: Sequence[int]) -> None:
        """Its one row stays."""

    def grow(self) -> dict[str, Tensor | None]:
        """The position of the next token."""
        self.length += 1
        return {"position_ids": torch.tensor([[self.length - 1]])}
