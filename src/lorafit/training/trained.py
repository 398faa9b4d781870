"""What is trained: every parameter that asks for a gradient, as the fp32 parameter that the optimizer changes.

With LoRA these are A and B. In full fine-tuning they are all weights of the model. Its matrices are fp32 themselves and
are rounded as products take them (frozen/dense.py); its vectors (norms, biases) are in the compute dtype, as the
model's own code wants them, and have an fp32 master beside them: an update of 1e-5 would be lost in a bf16 weight.

Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, section 3.1, for master weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.weight import FrozenWeight


def train_everything(model: nn.Module) -> None:
    """Have every weight of `model` trained, a tied one once. Its matrices must be dense fp32.

    Raises ConfigError for a weight whose gradient nothing computes, such as a packed one.
    """
    for path, module in model.named_modules():
        dense = isinstance(module, DenseWeight) and module.matrix.dtype == torch.float32 and not module.mapped
        if isinstance(module, FrozenWeight) and not dense:
            raise ConfigError("--method full", f"{path} is {module.format}, which is not trained", "use --method lora")
    for parameter in model.parameters():
        parameter.requires_grad_(True)


class Trained:
    """The trained parameters of a model by name; made once for a model, before its first step."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            master = parameter
            if parameter.dtype != torch.float32:
                master = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))
                self._rounded.append((parameter, master))
            self.parameters[_plain(name)] = master
        self._fixed = {_plain(name): buffer for name, buffer in model.named_buffers() if ".adapter." in name}

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of a model: what is trained, and the start that PiSSA measures from."""
        return {**self.parameters, **self._fixed}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(values[name])
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Have the model's own vectors follow their masters; after every step."""
        for parameter, master in self._rounded:
            parameter.copy_(master)

    def without_gradient(self) -> str | None:
        """The first parameter that the passes so far gave no gradient, if there is one."""
        return next((name for name, parameter in self.parameters.items() if parameter.grad is None), None)


def _hand_over(master: nn.Parameter, parameter: Tensor) -> None:
    """Add a gradient that has just arrived to the master's, in fp32."""
    assert parameter.grad is not None, "called when there is one"
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


def _plain(name: str) -> str:
    """A parameter's name as checkpoints have it: the model's own, and PATH.A, PATH.B for an adapter."""
    return name.replace(".adapter.", ".").replace(".base.", ".").removesuffix(".matrix")
