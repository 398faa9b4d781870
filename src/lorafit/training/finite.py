"""Finding where a NaN or an infinity came from, once one has shown itself in the loss or the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorafit.data.batch import Pack
from lorafit.errors import NonFiniteError
from lorafit.model.head import Head
from lorafit.training.step import pack_losses


def blame(
    model: nn.Module, head: Head, packs: Sequence[Pack], step: int, loss: float, norm: float
) -> NonFiniteError:  # fmt: skip
    """The error that names the first tensor with a non-finite value: weight, activation, or gradient."""
    name, kind = _first_bad(model, head, packs)
    rows = ", ".join(str(number + 1) for pack in packs[:1] for number in pack.numbers[:8])
    remedy = {
        "frozen weight": "the base model's file is damaged",
        "adapter weight": "go back to an older checkpoint",
        "activation": f"look at training rows {rows}, or use --compute fp32",
        "gradient": "lower --lr, or use --compute fp32",
    }[kind]
    what = f"{kind} holds NaN or infinity at step {step} (loss {loss}, gradient norm {norm}); nothing was changed by it"
    return NonFiniteError(name, what, remedy)


def _first_bad(model: nn.Module, head: Head, packs: Sequence[Pack]) -> tuple[str, str]:
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return name, "adapter weight" if parameter.requires_grad else "frozen weight"
    found: list[str] = []
    handles = [
        module.register_forward_hook(_watch(name, found)) for name, module in model.named_modules() if name
    ]  # fmt: skip
    try:
        with torch.no_grad():
            for pack in packs:
                if not found and not _finite(pack_losses(model, head, pack)):
                    found.append("loss")
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0], "activation"
    gradients = (n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad))
    return next(gradients, "loss"), "gradient"


def _watch(name: str, found: list[str]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        tensors: Iterable[object] = output if isinstance(output, tuple) else (output,)
        if not found and not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    return hook


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
