"""Seconds of the few operations that a step is made of, measured on this machine once and kept.

    LORAFIT_CACHE/speeds/KEY.json    {operation: seconds}; KEY names processor, threads, kernels and versions

Each is run at the model's own widths on a few thousand numbers, at most `WEIGHTS` weights and `WORK` operations, the
best of `TIMES`: a third of a second for SmolLM2, about one for an 8B model, and nothing when it is known. No bit of a
run follows from them, but for settings that `--memory` chooses, which are in run.yaml before step 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit import machine
from lorafit.adapter.dropout import PlacedDropout
from lorafit.adapter.experts import put_on_experts
from lorafit.adapter.group import Group
from lorafit.adapter.lora import LoraAdapter, LoraLinear
from lorafit.adapter.variants.dora import multiply, multiply_backward
from lorafit.adapter.variants.eva import EXACT
from lorafit.adapter.variants.svd import MORE, leading, leading_pair
from lorafit.data.cache import folder_of
from lorafit.frozen.dense import DenseWeight
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.stack import FrozenStack
from lorafit.kernels import BLOCK_TYPES, native, ops
from lorafit.kernels import layer as parts
from lorafit.kernels.attention import Rules, attend, attend_backward
from lorafit.kernels.layer import entropy
from lorafit.kernels.product import product
from lorafit.model.experts import Experts, Halves, Kind
from lorafit.training.sample import PACK

TIMES = 5
SQUARE = 768  # rows and columns of the matrix that PiSSA's start is measured on
WEIGHTS = 1 << 22  # of a product that is measured; wider ones are taken as so many times as long
WORK = 3 * 10**9  # multiplications of one measured call at most
TOKENS = 1024  # at which products are measured: a pack's, so that what leaves the cache there leaves it here
EXPERT_TOKENS = 16, 256  # of an expert, between and beyond which its time is a straight line
LENGTHS = 64, 512  # of documents, between and beyond which attention's time per token is a straight line
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Speeds:
    """Seconds by operation: those known for this machine, others measured when asked for."""

    def __init__(self, threads: int, compute: str) -> None:
        self.dtype, self.compute = DTYPES[compute], compute
        self._file = _file(threads)
        self._known = _read(self._file)
        self._threads = threads
        self._new = False

    def of(self, name: str, measure: Callable[[], float]) -> float:
        """The seconds kept under this name (with the compute dtype), or measured now."""
        key = f"{name} {self.compute}"
        if key not in self._known:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            self._known[key], self._new = measure(), True
            torch.set_num_threads(before)
        return self._known[key]

    def keep(self) -> None:
        """Write what was measured, where a disk takes it."""
        if self._file is None or not self._new:
            return
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._file.with_name(f".tmp-{os.getpid()}-{self._file.name}")
            temporary.write_text(json.dumps(self._known, indent=1, sort_keys=True))
            temporary.replace(self._file)
        self._new = False

    def forget(self) -> None:
        """Measure anew next time: the machine was busy when these were taken."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def product(self, rows: int, columns: int, rank: int, backward: bool) -> float:
        """Seconds a token of y = x W^T with its adapter (rank 0: none), or of the way back."""
        tall = max(1, min(rows, WEIGHTS // columns))
        tokens = max(32, min(TOKENS, WORK // (tall * columns)))
        way = "back" if backward else "there"
        seconds = self.of(
            f"product {way} {tall}x{columns} r{rank} t{tokens}",
            lambda: _product(tall, columns, rank, tokens, self.dtype, backward),
        )
        return seconds / tokens * rows / tall

    def attention(self, heads: int, keys: int, dim: int, length: float, backward: bool) -> float:
        """Seconds a token within documents of this length."""
        way = "back" if backward else "there"
        short, long = (
            self.of(
                f"attention {way} {heads}/{keys}x{dim} l{n}",
                lambda n=n: _attention(heads, keys, dim, n, self.dtype, backward),  # type: ignore[misc]
            )
            / max(LENGTHS)
            for n in LENGTHS
        )
        slope = max(0.0, long - short) / (LENGTHS[1] - LENGTHS[0])
        return max(0.2 * short, short + slope * (length - LENGTHS[0]))

    def between(self, hidden: int, inner: int, query: int, keys: int, backward: bool) -> float:
        """Seconds a token of what stands between a layer's products: norms, rotations, the gate."""
        way = "back" if backward else "there"
        name = f"between {way} {hidden} {inner} {query} {keys}"
        return self.of(name, lambda: _between(hidden, inner, query, keys, self.dtype, backward)) / TOKENS

    def expert(self, hidden: int, inner: int, rank: int, tokens: float, backward: bool) -> float:
        """Seconds of one expert's MLP with so many tokens, gate and up of width `inner` each; without unpacking."""
        way = "back" if backward else "there"
        few, many = (
            self.of(
                f"expert {way} {hidden} {inner} r{rank} t{n}",
                lambda n=n: _expert(hidden, inner, rank, n, self.dtype, backward),  # type: ignore[misc]
            )
            for n in EXPERT_TOKENS
        )
        slope = max(0.0, many - few) / (EXPERT_TOKENS[1] - EXPERT_TOKENS[0])
        return max(0.5 * few, few + slope * (tokens - EXPERT_TOKENS[0]))

    def gains(self, width: int, backward: bool) -> float:
        """Seconds a token of DoRA's scaling of so many outputs, or of its way back."""
        name = f"gains {'back' if backward else 'there'} {width}"
        return self.of(name, lambda: _gains(width, self.dtype, backward)) / TOKENS

    def unpack(self, form: str) -> float:
        """Seconds a weight to unpack from this format."""
        return self.of(f"unpack {form}", lambda: _unpack(form, self.dtype)) / (1 << 21)

    def decode(self, form: str | None, rows: int) -> float:
        """Seconds a weight of a product of few rows, as one more token of each answer takes; None: not packed."""
        name = f"decode {rows} {form or 'dense'}"
        return self.of(name, lambda: _decode(form, rows, self.dtype)) / (1 << 21)

    def quantise(self, form: str) -> float:
        """Seconds a weight to quantise to `nf4` or `int8`."""
        return self.of(f"quantise {form}", lambda: _quantise(form)) / (1 << 18)

    def head(self, hidden: int, vocabulary: int) -> float:
        """Seconds a trained token of logits, loss and its gradient."""
        wide = max(1, min(vocabulary, WEIGHTS // hidden))
        tokens = max(32, min(TOKENS, WORK // (2 * wide * hidden)))
        seconds = self.of(f"head {wide}x{hidden} t{tokens}", lambda: _head(hidden, wide, tokens, self.dtype))
        return seconds / tokens * vocabulary / wide

    def disk(self, file: str) -> float:
        """Seconds a byte of a file that is not in the page cache."""
        return self.of("disk", lambda: _disk(file))

    def overhead(self, rank: int) -> float:
        """Seconds that a layer takes there and back however few its tokens: calls, casts, small tensors."""
        return self.of(f"overhead r{rank}", lambda: 4 * _overhead(rank, self.dtype))

    def start(self) -> float:
        """Seconds a weight to find the largest singular part of a matrix, as PiSSA starts."""
        return self.of("start", _start)

    def inputs(self, rank: int) -> float:
        """Seconds a number to find the largest directions of a pack's inputs, as EVA starts."""
        return self.of(f"inputs r{rank}", lambda: _inputs(rank))


def _inputs(rank: int) -> float:
    x, generator = torch.randn(PACK + rank + MORE, SQUARE), torch.Generator().manual_seed(0)
    return _usual(lambda: leading(x, rank + MORE, generator, EXACT)) / (PACK * SQUARE)


def _start() -> float:
    matrix, generator = torch.randn(SQUARE, SQUARE), torch.Generator().manual_seed(0)
    return _usual(lambda: leading_pair(matrix, 16, generator)) / matrix.numel()


def _file(threads: int) -> Path | None:
    about = [machine.processor()[0], sorted(machine.processor()[1]), threads, native.describe()[0], machine.versions()]
    folder = folder_of("speeds")
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{key}.json"


def _read(file: Path | None) -> dict[str, float]:
    try:
        found = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(isinstance(s, float) and s >= 0 for s in found.values())
    return found if good else {}


def _usual(work: Callable[[], Any]) -> float:
    """The median of a few runs after one that is not counted: no run has the machine at its best throughout."""
    work()
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _group(rows: int, columns: int, rank: int, dtype: torch.dtype) -> Group:
    base = FrozenLinear(DenseWeight(torch.zeros(rows, columns, dtype=dtype)))
    if rank == 0:
        return Group([base])
    adapter = LoraAdapter(columns, rows, rank, float(rank), PlacedDropout(0.0, "", None))
    with torch.no_grad():
        adapter.A.zero_()
        adapter.B.zero_()
    return Group([LoraLinear(base, adapter)])


@torch.no_grad()
def _product(rows: int, columns: int, rank: int, tokens: int, dtype: torch.dtype, backward: bool) -> float:
    group = _group(rows, columns, rank, dtype)
    x, y = torch.zeros(tokens, columns, dtype=dtype), torch.zeros(tokens, rows, dtype=dtype)
    low = group.forward(x, y)
    if not backward:
        return _usual(lambda: group.forward(x, y))

    def back() -> None:
        low_d = group.backward_low(y)
        group.backward_adapters(y, low_d, x, low)
        group.backward_input(y, low_d, x)

    return _usual(back)


def _expert(hidden: int, inner: int, rank: int, tokens: int, dtype: torch.dtype, backward: bool) -> float:
    """Of as many experts as leave the cache, up to eight, each with its own tokens."""
    few = max(1, min(8, 2 * WEIGHTS // (hidden * inner)))

    def stack(rows: int, columns: int) -> nn.Module:
        base = FrozenStack(few, [([DenseWeight(torch.zeros(few * rows, columns, dtype=dtype))], slice(None))])
        if not rank:
            return base
        layer = put_on_experts(base, rank, float(rank))
        layer.adapter.start(torch.Generator())
        return layer

    kind = Kind(Halves("silu"), transposed=False, declared=True, scores_inputs=False)
    block = Experts(stack(2 * inner, hidden), stack(hidden, inner), kind)
    x = torch.zeros(few * tokens, hidden, dtype=dtype, requires_grad=True)
    scores, index = torch.ones(len(x), 1), torch.arange(len(x))[:, None] % few
    if not backward:
        with torch.no_grad():
            return _usual(lambda: block(x, index, scores)) / few
    times = []
    for _ in range(1 + TIMES):
        out = block(x, index, scores)
        began = time.perf_counter()
        out.backward(out.detach())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) / few


def _attention(heads: int, keys: int, dim: int, length: int, dtype: torch.dtype, backward: bool) -> float:
    """Seconds of max(LENGTHS) tokens; of few heads, where there are many alike."""
    share = heads // keys if heads % keys == 0 else 1
    few = max(1, min(keys, 8))
    q = torch.zeros(max(LENGTHS), few * share, dim, dtype=dtype)
    k, v = (torch.zeros(max(LENGTHS), few, dim, dtype=dtype) for _ in range(2))
    out, rules = torch.empty_like(q), Rules(dim**-0.5)
    documents = list(range(0, max(LENGTHS) + 1, length))
    lse = attend(q, k, v, documents, rules, out)
    if not backward:
        seconds = _usual(lambda: attend(q, k, v, documents, rules, out))
    else:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        seconds = _usual(lambda: attend_backward(out, q, k, v, out, lse, documents, rules, *grads))
    return seconds * heads / (few * share)


def _between(hidden: int, inner: int, query: int, keys: int, dtype: torch.dtype, backward: bool) -> float:
    def numbers(width: int) -> Tensor:
        return torch.zeros(TOKENS, width, dtype=dtype)

    x, y, gate, up, turned = numbers(hidden), numbers(hidden), numbers(inner), numbers(inner), numbers(query + keys)
    weight, scale = torch.ones(hidden), torch.ones(TOKENS)

    def there() -> None:
        for _ in range(2):
            parts.norm(x, weight, 1e-6, y)
        parts.gate(gate, up, "silu", gate)
        turned.mul_(1.0)
        x.add_(y)

    def back() -> None:
        for _ in range(2):
            parts.norm_backward(y, x, weight, scale, onto_TH=x)
            parts.norm(x, weight, 1e-6, y)
        parts.gate_backward(gate, gate, up, "silu")
        turned.mul_(1.0)
        x.add_(y)

    return _usual(back if backward else there)


def _gains(width: int, dtype: torch.dtype, backward: bool) -> float:
    y, kept, gain = torch.zeros(TOKENS, width, dtype=dtype), torch.zeros(TOKENS, width, dtype=dtype), torch.ones(width)
    if not backward:
        return _usual(lambda: multiply(y, gain))

    def back() -> None:
        kept.copy_(y)
        multiply_backward(y, kept, gain)

    return _usual(back)


def _stored(form: str) -> ops.Stored:
    """2 M weights of a format."""
    rows, columns = 512, 4096
    if form in ("NF4", "INT8"):
        values = torch.zeros(rows, columns)
        return ops.quantise_nf4(values) if form == "NF4" else ops.quantise_int8(values)
    block = BLOCK_TYPES[form]
    return ops.Stored(form, columns, torch.zeros(rows, columns // block.elements * block.bytes, dtype=torch.uint8))


def _unpack(form: str, dtype: torch.dtype) -> float:
    stored, out = _stored(form), torch.empty(512, 4096, dtype=dtype)
    return _usual(lambda: ops.unpack(stored, 0, out))


def _decode(form: str | None, rows: int, dtype: torch.dtype) -> float:
    x = torch.zeros(rows, 4096, dtype=dtype)
    if form is None:
        dense = torch.zeros(512, 4096, dtype=dtype)
        return _usual(lambda: product(x, dense))
    stored = _stored(form)
    return _usual(lambda: ops.matvec(stored, x))


def _quantise(form: str) -> float:
    values = torch.zeros(64, 4096)
    return _usual(lambda: ops.quantise_nf4(values) if form == "nf4" else ops.quantise_int8(values))


@torch.no_grad()
def _head(hidden: int, vocabulary: int, tokens: int, dtype: torch.dtype) -> float:
    weight, x = torch.zeros(vocabulary, hidden, dtype=dtype), torch.zeros(tokens, hidden, dtype=dtype)
    logits, targets = torch.zeros(tokens, vocabulary, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    gradient = torch.zeros(tokens, hidden)

    def work() -> None:
        product(x, weight, out=logits)
        entropy(logits, targets, 1.0, None, True)
        gradient.add_(product(logits, weight.T))

    return _usual(work)


def _disk(file: str) -> float:
    """Of the last 64 MB, once the system was told to forget them."""
    number = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(number).st_size
        count = min(size, 1 << 26)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, size - count, count, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        os.pread(number, count, size - count)
        return (time.perf_counter() - began) / count
    finally:
        os.close(number)


def _overhead(rank: int, dtype: torch.dtype) -> float:
    """One small group there and back; a layer has four."""
    group, tokens = _group(64, 64, rank, dtype), 8
    x, y = torch.zeros(tokens, 64, dtype=dtype), torch.zeros(tokens, 64, dtype=dtype)

    @torch.no_grad()
    def both() -> None:
        group._cast.clear()
        low = group.forward(x, y)
        low_d = group.backward_low(y)
        group.backward_adapters(y, low_d, x, low)
        group.backward_input(y, low_d, x)

    return _usual(both)
