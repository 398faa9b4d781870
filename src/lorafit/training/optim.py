"""Optimizer, learning rate and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FULL_LR = 5e-5  # full fine-tuning's learning rate at width 2000
LORA_FACTOR = 10.0
LR_CAP = 2e-3
SHORT_RUN = 100  # steps


def auto_lr(model_type: str, hidden_size: int, steps: int, method: str = "lora") -> tuple[float, str]:
    """The learning rate of a method for a model of this width, and the rule in words.

    Source: "LoRA Without Regret" (Schulman & Thinking Machines, 2025): LoRA's is 10 x full fine-tuning's rate, 15 x for
    short runs; width exponents as in tinker-cookbook's public code. The cap is ours: 3e-3 mostly diverges there; a
    tenth of it for full fine-tuning.
    """
    exponent = 0.0775 if model_type.startswith("qwen") else 0.781
    factor, cap, rule = 1.0, LR_CAP / LORA_FACTOR, f"5e-5 x (2000 / {hidden_size})^{exponent}"
    if method == "lora":
        factor, cap, rule = LORA_FACTOR, LR_CAP, f"10 x full fine-tuning's {rule}"
        if steps < SHORT_RUN:
            factor, rule = 1.5 * factor, f"{rule}, x 1.5 for under {SHORT_RUN} steps"
    lr = FULL_LR * factor * (2000 / hidden_size) ** exponent
    if lr > cap:
        return cap, f"{rule} = {lr:.2e}, capped at {cap:g}"
    return float(f"{lr:.3g}"), rule


def lr_at(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of step `step` (from 1) of `steps`: a pure function, so a resumed run needs no scheduler state.

    Rises linearly over ceil(warmup * steps) steps and reaches the peak at the last of them; then falls to 0 just
    after the last step (linear, cosine) or stays (constant).
    """
    rise = math.ceil(warmup * steps)
    if step <= rise:
        return peak * step / rise
    if schedule == "constant":
        return peak
    done = (step - 1 - rise) / max(1, steps - rise)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(
    parameters: Iterable[nn.Parameter], weight_decay: float, faster: Iterable[nn.Parameter] = (), ratio: float = 1.0
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with torch's defaults for betas and eps, in torch's own fused
    kernel: one pass over memory for all parameters.

    faster: those among them whose learning rate is `ratio` times the others', LoRA+'s B (Hayou et al. 2024,
    arXiv:2402.12354, section 4).
    """
    chosen = {id(parameter) for parameter in faster} if ratio != 1.0 else set()
    groups: list[dict[str, Any]] = [{"params": [], "ratio": 1.0}, {"params": [], "ratio": ratio}]
    for parameter in parameters:
        groups[id(parameter) in chosen]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, times each group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `NAME.exp_avg` and so on."""
    return {
        f"{name}.{key}": value for name, parameter in named.items() for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; the tensors become the optimizer's own."""
    for name, parameter in named.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"{name}.{key}"] for key in keys}


def clip_gradient(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale the whole gradient down to norm `largest` (0: leave it) and return its norm before that.

    One that is not finite is left as it is: scaled, every part of it would be NaN, and none to blame.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest and norm.isfinite():
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)
