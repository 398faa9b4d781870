"""The roof: how fast this machine multiplies, what a step must multiply, and where a step's time goes.

Model FLOPs of a token: 4 for each frozen weight of a linear layer (2 forward, 2 for the gradient of the input), 6 for
each weight of the adapter, and 4 for each weight of the head where the token is trained. Attention, norms and the rest
are left out, so a share of the roof says how much of the machine does what cannot be avoided.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import table
from benchmarks.jobs import packs_of
from benchmarks.trainee import Trainee

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS, SQUARES = (512, 2048), (1024, 2048, 4096)
SECONDS, LEAST = 0.4, 5  # of products of one shape, and how many at least
SHOWN = 12
LIBRARIES = {
    "torch.mm": lambda x, weight: torch.mm(x, weight.T),
    "oneDNN": lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
}
WIDTHS = "hidden", "inner"  # facts that give the shapes
GROUPS = (
    ("products", ("mm", "linear", "matmul", "mkldnn")),
    ("attention", ("attention",)),
    ("copies and casts", ("copy_", "_to", "::to", "clone", "cat", "contiguous", "fill_", "zero", "empty", "stack")),
    ("optimizer", ("optimizer", "adam", "foreach", "clip_grad")),
)
"""(group, what a name of torch's holds); the first that fits."""
TORCH = ("aten::", "mkldnn::", "torch::", "autograd::", "optimizer")  # how its own names begin


def flops(facts: dict[str, Any]) -> float:
    """Model FLOPs of a token of the job, in the mean."""
    head = facts["vocabulary"] * facts["hidden"] * facts["trained"] / facts["tokens"]
    return 4 * facts["linear"] + 6 * facts["adapter"] + 4 * head


def rates(job: dict[str, Any]) -> list[tuple[str, float]]:
    """(shape and library, FLOP/s) in job["compute"], the fastest first; medians over repeats. fp32 by oneDNN as well as
    by torch.mm, which is MKL's; neither with reduced precision."""
    torch.set_num_threads(job["threads"])
    hidden, inner, dtype = job["hidden"], job["inner"], DTYPES[job["compute"]]
    shapes = [(tokens, *pair) for tokens in TOKENS for pair in ((hidden, hidden), (hidden, inner), (inner, hidden))]
    shapes += [(size, size, size) for size in SQUARES]
    found = []
    for m, k, n in shapes:
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for library, product in LIBRARIES.items():
            if library == "torch.mm" or dtype == torch.float32:
                found.append((f"{m} x {k} x {n} by {library}", 2 * m * k * n / _seconds(product, x, weight)))
    return sorted(found, key=lambda shape: -shape[1])


def _seconds(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *factors: torch.Tensor) -> float:
    """Of (m, k) times a weight (n, k) transposed, as a linear layer multiplies; the median."""
    product(*factors)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < LEAST:
        began = time.perf_counter()
        product(*factors)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def profile(job: dict[str, Any]) -> list[tuple[str, float, int]]:
    """(operation, its own seconds, calls) of lorafit's third step, the dearest first."""
    trainee = Trainee(**job["options"])
    packs = packs_of(job["kind"], trainee)
    for number in range(2):
        trainee.step(packs(number))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        trainee.step(packs(2))
    found = [(event.key, event.self_cpu_time_total / 1e6, event.count) for event in seen.key_averages()]
    return sorted(found, key=lambda event: -event[1])


def group_of(name: str) -> str:
    """The group of an operation. What has none of torch's own names is a function of lorafit."""
    lowered = name.lower()
    if not lowered.startswith(TORCH) and not re.fullmatch(r"[a-z]\w*backward\d", lowered):
        return "lorafit's own functions"
    return next((group for group, parts in GROUPS if any(part in lowered for part in parts)), "element-wise and others")


def profile_tables(events: list[tuple[str, float, int]]) -> list[str]:
    """Two tables: by group, and the dearest operations."""
    whole = sum(seconds for _, seconds, _ in events)
    groups: dict[str, float] = {}
    for name, seconds, _ in events:
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + seconds
    ordered = sorted(groups.items(), key=lambda group: -group[1])
    first = [[group, f"{seconds:.2f}", f"{seconds / whole:.1%}"] for group, seconds in ordered]
    second = [
        [f"`{name}`", group_of(name), f"{seconds:.2f}", f"{seconds / whole:.1%}", calls]
        for name, seconds, calls in events[:SHOWN]
    ]
    return [table(["group", "seconds", "share"], first),
            table(["operation", "group", "seconds of its own", "share", "calls"], second)]  # fmt: skip
