"""Answers, token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from lorafit.errors import NonFiniteError


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """The token ids that follow the prompt, without the end token that stops them.

    temperature 0 takes the likeliest token; above 0 it samples from softmax(logits / temperature) with `seed`.
    max_tokens bounds the answer. The model must be in eval mode. Raises NonFiniteError for NaN or infinite logits.
    """
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(seed)
    step_ids = torch.tensor([list(prompt_ids)])
    answer: list[int] = []
    while len(answer) < max_tokens:
        logits_V = model(input_ids=step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        if not torch.isfinite(logits_V).all():
            what = f"hold NaN or infinity at answer token {len(answer) + 1}"
            raise NonFiniteError("logits", what, "the model or adapter is damaged, or try --compute fp32")
        if temperature > 0:
            chances_V = torch.softmax((logits_V - logits_V.max()).double() / temperature, dim=-1)
            token = int(torch.multinomial(chances_V, 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        if token in end_ids:
            break
        answer.append(token)
        step_ids = torch.tensor([[token]])
    return answer
