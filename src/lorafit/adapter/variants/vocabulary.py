"""What can be trained of a vocabulary: LoRA on the embedding, whole matrices, or the rows of some tokens.

    LoRA    e(id) = W[id] + s A[:, id] B^T             A (r, V) zero and B (H, r) random at the start, as loralib has it
    whole   a copy of the embedding or of the head, fp32, trained instead of it (PEFT's modules_to_save)
    rows    a row of its own for each of some tokens instead of W's (PEFT's trainable_token_indices)

LoRA on the head is a linear layer's. Where embedding and head are one matrix, LoRA changes the one that it is on, as
PEFT's does; a whole matrix or rows of tokens stay tied. Families that scale embeddings scale these too. Source: Hu et
al. 2021 and their code for LoRA; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.adapter.lora import Adapted, LoraAdapter


class AdaptedEmbedding(Adapted):
    """An embedding with something trained beside it, or instead of it."""

    @property
    def weight(self) -> Any:
        """The base's, which some families ask for its device (Llama 4)."""
        return self.base.weight


class LoraEmbedding(AdaptedEmbedding):
    """An embedding and the adapter beside it: of V inputs and H outputs."""

    def __init__(self, base: nn.Module, adapter: LoraAdapter) -> None:
        super().__init__(base)
        self.adapter = adapter

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.base(ids)
        if not self.enabled:
            return rows
        low = F.embedding(ids, self.adapter.A.T).to(rows.dtype)
        return rows + (low @ self.adapter.B.to(rows.dtype).T) * (self.adapter.scale * scale_of(self.base))

    def start(self, generator: torch.Generator) -> None:
        """A to zero, B to N(0, 1): the update is exactly 0."""
        nn.init.zeros_(self.adapter.A)
        nn.init.normal_(self.adapter.B, generator=generator)

    def parts(self) -> dict[str, nn.Parameter]:
        return {"lora_embedding_A": self.adapter.A, "lora_embedding_B": self.adapter.B}


class WholeEmbedding(AdaptedEmbedding):
    """An embedding in place of which `matrix` (V, H) fp32 is trained."""

    def __init__(self, base: nn.Module, matrix: nn.Parameter) -> None:
        super().__init__(base)
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(ids)
        rows = F.embedding(ids, self.matrix).to(dtype_of(self.base))
        scale = scale_of(self.base)
        return rows if scale == 1.0 else rows * scale

    def parts(self) -> dict[str, nn.Parameter]:
        return {"weight": self.matrix}


class WholeLinear(Adapted):
    """A head, without a bias, in place of which `matrix` (V, H) fp32 is trained."""

    def __init__(self, base: nn.Module, matrix: nn.Parameter) -> None:
        super().__init__(base)
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype)) if self.enabled else self.base(x)

    def parts(self) -> dict[str, nn.Parameter]:
        return {"weight": self.matrix}


class TokenEmbedding(AdaptedEmbedding):
    """An embedding with trained rows (n, H) fp32 for the tokens `ids`. Those that the base lacks have the rows `start`
    while the adapter is switched off."""

    places: Tensor
    start: Tensor

    def __init__(self, base: nn.Module, rows: nn.Parameter, ids: Sequence[int], start: Tensor) -> None:
        super().__init__(base)
        self.rows, self.ids, self.own = rows, tuple(ids), shape_of(base)[0]
        places = torch.full((max(self.own, *(number + 1 for number in ids)),), -1)
        places[list(ids)] = torch.arange(len(self.ids))
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("start", start, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        values: Tensor = self.base(ids.clamp_max(self.own - 1))
        places = self.places[ids]
        rows = self.rows if self.enabled else self.start
        own = F.embedding(places.clamp_min(0), rows).to(values.dtype) * scale_of(self.base)
        replaced = places >= 0 if self.enabled else ids >= self.own
        return torch.where(replaced[..., None], own, values)

    def parts(self) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.rows}


class TokenHead(Adapted):
    """A head, without a bias, with trained rows (n, H) fp32 for the tokens `ids`; `tied`: the embedding's. It has a
    logit for tokens that the base lacks, too."""

    index: Tensor
    start: Tensor

    def __init__(self, base: nn.Module, rows: nn.Parameter, ids: Sequence[int], start: Tensor, tied: bool) -> None:
        super().__init__(base)
        self.rows, self.ids, self.tied, self.own = rows, tuple(ids), tied, shape_of(base)[0]
        self.register_buffer("index", torch.tensor(self.ids), persistent=False)
        self.register_buffer("start", start, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        index, rows = self.replaced()
        y = F.pad(y, (0, self.width - self.own)) if self.width > self.own else y
        return y.index_copy(-1, index, x @ rows.to(x.dtype).T) if len(index) else y

    @property
    def width(self) -> int:
        """The number of logits."""
        return max(self.own, *(number + 1 for number in self.ids))

    def replaced(self) -> tuple[Tensor, Tensor]:
        """(ids (n,), rows (n, H)) that count now: all of them; of one switched off, those that the base lacks."""
        if self.enabled:
            return self.index, self.rows
        new = self.index >= self.own
        return self.index[new], self.start[new]

    def parts(self) -> dict[str, nn.Parameter]:
        return {} if self.tied else {"token_adapter.trainable_tokens_delta": self.rows}


def shape_of(base: Any) -> tuple[int, int]:
    """(V, H) of an embedding or a head."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    weight = base.weight
    return (len(weight), weight.shape[1]) if isinstance(weight, Tensor) else (weight.out_features, weight.in_features)


def matrix_of(base: Any) -> Tensor:
    """The matrix of an embedding or a head, (V, H) fp32, a copy."""
    weight = base.weight
    return weight.detach().float().clone() if isinstance(weight, Tensor) else weight.dense()


def rows_of(base: Any, ids: Sequence[int]) -> Tensor:
    """Rows of that matrix, (n, H) fp32, a copy."""
    weight, chosen = base.weight, torch.tensor(ids)
    if isinstance(weight, Tensor):
        return weight.detach()[chosen].float()
    rows: Tensor = weight.embed(chosen, torch.float32)
    return rows.clone()


def mean_of(base: Any) -> Tensor:
    """The mean of its rows, (H,) fp32, unpacked in blocks."""
    weight = base.weight
    if isinstance(weight, Tensor):
        return weight.detach().float().mean(0)
    total = sum(weight.block(start, stop, torch.float32).sum(0) for start, stop in weight.blocks(1 << 23))
    return total / weight.out_features


def scale_of(base: Any) -> float:
    """What the family multiplies its embeddings with."""
    return float(getattr(base, "scale", getattr(base, "scalar_embed_scale", 1.0)))


def dtype_of(base: Any) -> torch.dtype:
    """What an embedding gives."""
    found: torch.dtype = base.weight.dtype if isinstance(base.weight, Tensor) else base.dtype
    return found
