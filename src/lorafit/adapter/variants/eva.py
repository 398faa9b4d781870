"""EVA: A starts as the directions in which a layer's inputs are largest, found by running training rows; B is zero.

    A = V^T[:r]    of    X = U S V^T,    X (T, I): what the layer is given for T tokens of the training rows

Of all A of that rank, B A x can then follow the largest part of X's variance. Rows come pack by pack, and X as a whole
is never kept: what is left of the packs so far, S V^T cut to r + MORE rows, is put on top of the next one. That is
exact for one pack, and as long as nothing but zeros is cut. Layers with one input share the decomposition; where it is
of more than 256 tokens and directions, it is approximate, and a fifth of the time (SmolLM2, 1,056 x 576).

X is not centred, as in the paper's equations; PEFT centres it (its SVD is an incremental PCA). Not here: ranks
redistributed between layers (the paper's rho above 1) and whitening; all tokens count, not the trained ones alone.

Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170,
section 3, with rho = 1; for the way of going on, Ross et al. 2008, "Incremental Learning for Robust Visual Tracking".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorafit.adapter.lora import LoraLinear
from lorafit.adapter.variants.svd import MORE, leading
from lorafit.errors import ConfigError


@torch.no_grad()
def start_eva(layers: Mapping[str, LoraLinear], feed: Callable[[], None], generator: torch.Generator) -> None:
    """The start of these layers, by path; their B stays. feed: runs training rows through the model.

    Raises ConfigError where a layer gets no input, or fewer tokens than its rank.
    """
    inputs = _Inputs(max(layer.adapter.rank for layer in layers.values()) + MORE, generator)
    hooks = [layer.register_forward_pre_hook(inputs.of(path)) for path, layer in layers.items()]
    try:
        feed()
    finally:
        for hook in hooks:
            hook.remove()
    for path, layer in layers.items():
        rank, (_, V) = layer.adapter.rank, inputs.found(path)
        if len(V) < rank:
            what = f"is eva, and the rows give {path} {len(V)} tokens, fewer than the rank {rank}"
            raise ConfigError("--init", what, "give more rows, or a lower --rank")
        layer.adapter.A.copy_(V[:rank])


EXACT = 256  # shorter side up to which the whole decomposition is computed


class _Inputs:
    """(S (k,), V^T (k, I)) of all that was given to each layer so far; k at most `count`."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.first: dict[str, str] = {}  # of the layers with one input the first, which stands for all
        self.last: tuple[Any, str] = (None, "")

    def of(self, path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        """A hook for the layer at `path`."""

        def take(_: Any, given: tuple[Tensor, ...]) -> None:
            if given[0] is not self.last[0]:
                self.last = given[0], path
                self._add(path, given[0].flatten(0, -2).float())
            self.first[path] = self.last[1]

        return take

    def _add(self, path: str, x_TI: Tensor) -> None:
        if path in self.kept:
            S, V = self.kept[path]
            x_TI = torch.cat([S[:, None] * V, x_TI])
        _, S, V = leading(x_TI, min(self.count, *x_TI.shape), self.generator, EXACT)
        self.kept[path] = S, V

    def found(self, path: str) -> tuple[Tensor, Tensor]:
        """Of the layer at `path`."""
        if path not in self.first:
            raise ConfigError("--init", f"is eva, and the rows do not reach {path}", "leave it out of --targets")
        return self.kept[self.first[path]]
