"""Devices that lorafit has never run on: memory and bf16 rate as published. What is said of them is an estimate.

A rate is dense, without sparsity. No run reaches it: a time from it is the least that the device could take.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lorafit.errors import ConfigError
from lorafit.planning.duration import Work
from lorafit.planning.memory import Use, parameters
from lorafit.planning.outline import Outline


@dataclass(frozen=True)
class Device:
    """Bytes of memory, dense bf16 operations a second (multiplications and additions), where that is published."""

    memory: int
    flops: float
    source: str


DEVICES = {
    "a100-40gb": Device(40 * 10**9, 312e12, "NVIDIA A100 datasheet: 40 GB HBM2, 312 TFLOPS bf16"),
    "a100-80gb": Device(80 * 10**9, 312e12, "NVIDIA A100 datasheet: 80 GB HBM2e, 312 TFLOPS bf16"),
    "h100": Device(80 * 10**9, 989.5e12, "NVIDIA H100 SXM datasheet: 80 GB HBM3, 1,979 TFLOPS bf16 with sparsity"),
    "h200": Device(141 * 10**9, 989.5e12, "NVIDIA H200 SXM datasheet: 141 GB HBM3e, 1,979 TFLOPS bf16 with sparsity"),
    "l40s": Device(48 * 10**9, 362e12, "NVIDIA L40S datasheet: 48 GB GDDR6, 362.05 TFLOPS bf16"),
    "l4": Device(24 * 10**9, 121e12, "NVIDIA L4 datasheet: 24 GB GDDR6, 242 TFLOPS bf16 with sparsity"),
    "a6000": Device(48 * 10**9, 154.8e12, "NVIDIA RTX A6000 datasheet: 48 GB, 309.7 TFLOPS tensor with sparsity"),
    "t4": Device(16 * 10**9, 65e12, "NVIDIA T4 datasheet: 16 GB GDDR6, 65 TFLOPS fp16 (it has no bf16)"),
    "rtx3090": Device(24 * 10**9, 71e12, "NVIDIA GA102 whitepaper: 24 GB, 71 TFLOPS bf16 with fp32 accumulation"),
    "rtx4090": Device(24 * 10**9, 165.2e12, "NVIDIA Ada whitepaper: 24 GB, 165.2 TFLOPS bf16 with fp32 accumulation"),
    "rtx5090": Device(32 * 10**9, 209.5e12, "NVIDIA Blackwell whitepaper: 32 GB, 209.5 TFLOPS bf16, fp32 accumulation"),
    "mi300x": Device(192 * 10**9, 1307.4e12, "AMD Instinct MI300X datasheet: 192 GB HBM3, 1,307.4 TFLOPS bf16"),
    "m3-max": Device(
        128 * 10**9, 14.2e12, "Apple M3 Max, up to 128 GB; no rate is published: 40 cores x 128 x 2 x 1.39 GHz"
    ),
}


def find(name: str) -> Device:
    """The device of that name. Raises ConfigError with the nearest ones for another."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, 3) or list(DEVICES)
    raise ConfigError("--device", f"{name} is not in the table", f"it has {', '.join(near)}; or give --device-memory")


def flops(model: Outline, use: Use, work: Work) -> float:
    """Operations of all steps: of each token 4 a weight that it passes (there, and the input's gradient), 2 more where
    a layer is computed twice; 6 a parameter of the adapters; attention 3.5 times 2 a score and feature, half of them
    masked; 4 a weight of the head for each trained token."""
    total = 0.0
    trainable = parameters(model, use)
    for packs in work.steps:
        for pack in packs:
            for index, layer in enumerate(model.layers):
                weights = sum(m.rows * m.columns * m.active for m in layer.matrices)
                seen = min(pack.length, layer.window or pack.length)
                total += pack.tokens * (weights * (6 if index < use.checkpointed else 4) + 7 * layer.query * seen)
            total += 6 * trainable * pack.tokens + 4 * model.output.weights * pack.trained
    return total / max(1, len(work.steps)) * work.count
