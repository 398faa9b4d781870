"""Finding where a NaN or an infinity came from, once one has shown itself in a step or an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorafit.data.batch import Pack
from lorafit.errors import NonFiniteError
from lorafit.frozen.weight import FrozenWeight
from lorafit.model.head import Head
from lorafit.training.step import pack_losses


def sums_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every tensor's sum is finite: one cheap pass, and no NaN or infinity gets lost in a sum."""
    return all(math.isfinite(tensor.sum()) for tensor in tensors)


def blame(
    model: nn.Module,
    head: Head,
    packs: Sequence[Pack],
    trained: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    step: int,
    loss: float,
    norm: float,
) -> NonFiniteError:
    """The error that names the first tensor with a non-finite value: weight, optimizer state, activation or gradient.

    packs: the step's rows. trained: what the step would change, with its gradients, by name. state: the optimizer's
    tensors by name. The model is left in eval mode.
    """
    name, kind = next(_bad(model, head, packs, trained, state))
    rows = ", ".join(str(number + 1) for pack in packs[:1] for number in pack.numbers[:8])
    remedy = {
        "frozen weight": "the base model's file is damaged",
        "adapter weight": "go back to an older checkpoint",
        "trained weight": "go back to an older checkpoint",
        "optimizer state": "go back to an older checkpoint",
        "activation": f"look at training rows {rows}, or use --compute fp32",
        "gradient": "lower --lr, or use --compute fp32",
    }[kind]
    what = f"{kind} holds NaN or infinity at step {step} (loss {loss}, gradient norm {norm}); nothing was changed by it"
    return NonFiniteError(name, what, remedy)


def _bad(
    model: nn.Module, head: Head, packs: Sequence[Pack], trained: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """(name, kind) of the tensors at fault, causes before effects; at least one."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            trainable = "adapter weight" if ".adapter." in name else "trained weight"
            yield _plain(name), trainable if parameter.requires_grad else "frozen weight"
    for name, tensor in state.items():
        if not _finite(tensor):
            yield name, "optimizer state"
    for name in _bad_activations(model, head, packs):
        yield _plain(name), "activation"
    every = {**dict(model.named_parameters()), **trained}  # of vectors the masters have the gradients
    largest = {n: float(p.grad.abs().max()) for n, p in every.items() if p.grad is not None}
    for name, value in largest.items():
        if not math.isfinite(value):
            yield _plain(name), "gradient"
    yield _plain(max(largest, key=largest.__getitem__)), "gradient"  # each is finite, and their norm is not


def _bad_activations(model: nn.Module, head: Head, packs: Sequence[Pack]) -> list[str]:
    """Modules whose output was not finite, in the order in which they ran, without dropout; then `loss`."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
                found.append(name)

        return hook

    model.eval()
    watched = {name: module for name, module in model.named_modules() if name and not isinstance(module, FrozenWeight)}
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            for pack in packs:
                if not _finite(pack_losses(model, head, pack)):
                    found.append("loss")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _plain(name: str) -> str:
    """A tensor's or module's name as the model's file has it."""
    return name.replace(".base.", ".").removesuffix(".base").removesuffix(".matrix")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
