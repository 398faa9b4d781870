"""A mapped base that is larger than memory: layers are read ahead, and dropped behind.

The pages of a mapping are the system's to keep or not. Left to itself it keeps what was read last, which for a walk
over all layers, there and back, is what is needed last; and a process in a container is charged for all of it. So each
layer, as its turn comes, asks for the pages of the next one and gives those of the one before back. No bit changes.

Source: ours; madvise(2), MADV_WILLNEED and MADV_DONTNEED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from lorafit import machine
from lorafit.model.fused import FusedLayer
from lorafit.model.head import decoder_of


def page(model: nn.Module, mapping: tuple[int, int] | None) -> None:
    """Have every layer call the one after it and drop the one before it, on the way there and on the way back.

    mapping: the first and last address of the mapped file; kept as `model.paged_from`, for whoever reads a weight
    outside of a layer's turn and has to drop it himself.
    """
    model.paged_from = mapping  # type: ignore[assignment]
    layers = list(decoder_of(model).layers)
    spans = [[(tensor.data_ptr(), tensor.nbytes) for tensor in _mapped(layer, mapping)] for layer in layers]

    def turn(index: int, way: int) -> None:
        for place, wanted in ((index + way, True), (index - way, False)):
            if 0 <= place < len(spans):
                for start, size in spans[place]:
                    machine.advise(start, size, wanted)

    for index, layer in enumerate(layers):
        if isinstance(layer, FusedLayer):
            layer.turn = partial(turn, index)
        else:
            layer.register_forward_pre_hook(partial(_there, partial(turn, index)))
            layer.register_forward_hook(partial(_back, partial(turn, index)))


def _there(turn: Callable[[int], None], *_: object) -> None:
    """A layer of transformers begins: for the first time, or once more in the backward pass."""
    turn(-1 if torch._C._current_graph_task_id() >= 0 else 1)


def _back(
    turn: Callable[[int], None], layer: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]
) -> None:
    """Its backward pass begins with the gradient of its output."""
    first = output if isinstance(output, Tensor) else output[0]
    if first.requires_grad:
        first.register_hook(lambda _: turn(-1))


def drop(module: nn.Module, mapping: tuple[int, int] | None) -> None:
    """Give the pages of a module's mapped tensors back; they are read again when they are needed."""
    for tensor in _mapped(module, mapping):
        machine.advise(tensor.data_ptr(), tensor.nbytes, wanted=False)


def _mapped(module: nn.Module, mapping: tuple[int, int] | None) -> Iterator[Tensor]:
    """The tensors of a module that lie in the mapped file: of any others the values would be lost."""
    if mapping is not None:
        start, stop = mapping
        tensors = chain(module.parameters(), module.buffers())
        yield from (t for t in tensors if start <= t.data_ptr() and t.data_ptr() + t.nbytes <= stop)
