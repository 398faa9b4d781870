"""One optimizer step's gradient, exact per token however its rows are cut into packs.

    loss = (sum over trained tokens of the step) / (number of trained tokens of the step)

Averaging the packs' means instead would weigh a token in a short pack more than one in a long pack.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.adapter.dropout import Places
from lorafit.adapter.variants.dora import lengths_kept
from lorafit.data.batch import Pack
from lorafit.model.head import Head, decoder_of
from lorafit.training.loss import token_losses


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Compute the first `count` layers twice in training, and the others once. The first, since the others' activations
    are gone by then."""
    again = functools.partial(checkpoint, use_reentrant=False)
    for index, layer in enumerate(decoder_of(model).layers):
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = again  # what transformers' own layers call


def pack_losses(model: nn.Module, head: Head, pack: Pack) -> Tensor:
    """Losses (N,) in nats of the pack's trained tokens, in the pack's order; differentiable in the adapter."""
    hidden_TH = pack_hidden(model, pack)
    return token_losses(hidden_TH[torch.from_numpy(pack.predictors_N)], torch.from_numpy(pack.targets_N), head)


def pack_hidden(model: nn.Module, pack: Pack) -> Tensor:
    """The last hidden states (T, H) of the pack, in the compute dtype."""
    hidden_1TH: Tensor = decoder_of(model)(
        input_ids=torch.from_numpy(pack.ids_T)[None],
        position_ids=torch.from_numpy(pack.positions_T)[None],
        documents=pack.documents,
        use_cache=False,
    ).last_hidden_state
    return hidden_1TH[0]


def accumulate(
    model: nn.Module,
    head: Head,
    packs: Sequence[Pack],
    *,
    seed: int = 0,
    step: int = 0,
    checkpointed: int = 0,
) -> float:
    """Add the step's gradient to the adapter's `.grad` and return the step's loss in nats per trained token.

    packs: all rows of one optimizer step. seed and step name the dropout masks. checkpointed: layers computed twice.
    """
    trained = sum(len(pack.targets_N) for pack in packs)
    places: Places | None = getattr(model, "lora_places", None)
    total = 0.0
    checkpoint_layers(model, checkpointed)
    with lengths_kept(model):
        for pack in packs:
            if places is not None:
                places.set(seed, step, torch.from_numpy(pack.rows_T), torch.from_numpy(pack.positions_T))
            loss = pack_losses(model, head, pack).sum()
            (loss / trained).backward()
            total += loss.item()
    return total / trained
