"""Seconds of a run, from measured operations (speeds.py) and the token counts of its real packs.

    pack  = T (layers' products + what stands between + attention at the rows' length) + N head
            + experts that tokens go to, each with its share of them
            + for each layer computed twice, its way there once more
            + the file at the disk's speed, there and back, where a base is paged
            + unpacking, on each way through a layer, and what a layer costs however few its tokens
    step  = its packs + clipping and AdamW over P + DoRA's lengths
    run   = what has passed + loading + steps + evaluations + saves + report

The first steps refine it: what is left is scaled by what they took and what was predicted of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lorafit import machine
from lorafit.planning.memory import DTYPE_BYTES, Use, parameters, ranks_of, stored
from lorafit.planning.outline import DOWN, OUT, Layer, Outline
from lorafit.planning.speeds import Speeds

ADAM = 1.6e-9  # seconds a parameter of clipping, checking and AdamW: five passes over 16 bytes (measured)
SAVED_BYTES = 16  # of a parameter in a checkpoint, adapter and moments, and copied to be hashed
DISK = 3e8  # bytes a second that are written, synced and hashed (measured; a slow disk has less)
FIXED_SAVE = 0.05  # seconds
DECODED = 64  # tokens of each sample in the report
SAMPLES = 2  # times that they are made: base and adapter
DECODE_LAYER = 0.8e-3  # seconds of calls in a layer for one more token (measured)
DECODE_ADAPTER = 0.5e-3  # the same of a layer's adapters (measured)
DORA = 1.7  # times LoRA's layers where they are transformers' own (measured on SmolLM2)
LOAD = 0.4  # seconds to build a model however small it is (measured)
TOKEN = 8e-6  # seconds to hash a token of the vocabulary for the run's identity (measured)
CACHED = 3e-11  # seconds a byte to have pages again that are in the cache of the system (measured: 0.1 us a page)
REPORT = 0.3  # seconds: fingerprint, adapter, pages


@dataclass(frozen=True)
class Pack:
    """What a pack's time follows from: its tokens, trained ones, and the tokens of its mean row, weighed by tokens."""

    tokens: int
    trained: int
    length: float


@dataclass(frozen=True)
class Work:
    """All that a run does, in numbers."""

    steps: Sequence[Sequence[Pack]]
    """Packs of each optimizer step; of a long run, of the first ones, that stand for all."""
    count: int
    """Optimizer steps."""
    evaluation: Sequence[Pack] = ()
    evaluations: int = 0
    saves: int = 0
    samples: int = 0
    prompts: int = 0
    """Tokens of the samples' prompts."""
    looked: int = 0
    """Tokens that EVA's start looks at."""


@dataclass
class Clock:
    """The model of time for one model, its settings and this machine."""

    model: Outline
    use: Use
    speeds: Speeds
    _layers: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)

    def pack(self, pack: Pack, trains: bool = True) -> float:
        """Seconds of one pack; trains: with the way back."""
        total = pack.trained * self._head() * (0.55 if not trains else 1.5 if self.use.full or self.use.whole else 1.0)
        for index, layer in enumerate(self.model.layers):
            there, back, fixed = self._layer(layer, pack.length)
            again = there if index < self.use.checkpointed else 0.0
            passes = (3.0 if again else 2.0) if trains else 1.0
            total += pack.tokens * (there + (back + again if trains else 0.0)) + fixed * passes / 2
            there, back = self._experts(layer, pack.tokens)
            total += there * (passes - 1.0 if trains else 1.0) + (back if trains else 0.0)
        return total + self._unpack_head(pack, trains) + self._read(trains)

    def step(self, packs: Sequence[Pack]) -> float:
        """Seconds of one optimizer step."""
        return sum(map(self.pack, packs)) + ADAM * parameters(self.model, self.use) + self._lengths

    def steps(self, work: Work) -> float:
        """Seconds of all steps; a long run's first ones stand for the others."""
        return sum(map(self.step, work.steps)) / max(1, len(work.steps)) * work.count

    def evaluation(self, work: Work) -> float:
        """Seconds of one evaluation."""
        return sum(self.pack(pack, trains=False) for pack in work.evaluation)

    def save(self) -> float:
        """Seconds of one checkpoint."""
        return FIXED_SAVE + SAVED_BYTES * parameters(self.model, self.use) / DISK

    def load(self) -> float:
        """Seconds to build the model and store its weights as --base says."""
        total = LOAD + TOKEN * self.model.vocabulary
        for matrix in self.model.matrices:
            private, _ = stored(matrix, self.use.base, self.model, self.use.base)
            if private:
                total += matrix.weights * 1.2e-9  # read and written once
                total += matrix.weights * self.speeds.unpack(matrix.format) if self.model.quantised else 0.0
                total += matrix.weights * self.speeds.quantise(self.use.base) if self.use.base in ("nf4", "int8") else 0
        if self.use.init in ("pissa", "loftq"):
            total += self.speeds.start() * sum(m.weights for m in self.model.adapted(self.use.targets))
        return total

    def looking(self, work: Work) -> float:
        """Seconds of EVA's start: rows go through the model, and the inputs of each group of layers are decomposed."""
        if not work.looked:
            return 0.0
        rows = work.steps[0][0].length if work.steps and work.steps[0] else work.looked
        products = (product for layer in self.model.layers for product in _products(layer, self._ranks, 1))
        inputs = sum(columns for _, columns, ranks in products if ranks)
        decomposed = work.looked * inputs * self.speeds.inputs(self.use.rank)
        return self.pack(Pack(work.looked, 0, rows), trains=False) + decomposed

    def samples(self, work: Work) -> float:
        """Seconds of the report's answers."""
        if not work.samples:
            return 0.0
        layers, one = len(self.model.layers), len(self.model.layers) * DECODE_LAYER
        for m in (*(m for layer in self.model.layers for m in layer.matrices), self.model.output):
            form = self._form(m.format, m.columns)
            one += m.weights * m.active / m.experts * self.speeds.decode(form, work.samples)
        adapters = 0.0 if self.use.full else DECODED * layers * DECODE_ADAPTER
        asked = self.pack(Pack(work.prompts, work.samples, work.prompts / work.samples), trains=False)
        return SAMPLES * (asked + DECODED * one) + adapters

    def whole(self, work: Work) -> float:
        """Seconds from here to the end of the command: nothing is loaded yet."""
        return (
            self.load()
            + self.looking(work)
            + self.steps(work)
            + (work.evaluations + 2) * self.evaluation(work)  # the report measures base and adapter once more
            + work.saves * self.save()
            + self.samples(work)
            + REPORT
        )

    def _layer(self, layer: Layer, length: float) -> tuple[float, float, float]:
        """(seconds a token there, back, seconds however few) of one layer; equal layers are worked out once."""
        seen = min(length, 2 * layer.window) if layer.window else length
        key = self._alike[layer.matrices[0].path], round(seen / 8)
        if key not in self._layers:
            self._layers[key] = self._measured(layer, seen)
        return self._layers[key]

    @cached_property
    def _alike(self) -> dict[str, int]:
        """A number for each layer, by its first matrix: the same for layers of equal shapes and formats."""
        kinds: dict[object, int] = {}
        found = {}
        for layer in self.model.layers:
            kind = tuple((m.rows, m.columns, m.active, m.format, self._ranks.get(m.path)) for m in layer.matrices)
            found[layer.matrices[0].path] = kinds.setdefault((kind, layer.window), len(kinds))
        return found

    @cached_property
    def _lengths(self) -> float:
        """Seconds of DoRA's W A^T, once a step: a product of as many tokens as the rank."""
        if not self.use.dora:
            return 0.0
        matrices = self.model.adapted(self.use.targets)
        return sum(
            self._ranks[m.path] * self.speeds.product(m.rows, m.columns, 0, backward=False)
            + m.weights * (self.speeds.unpack(form) if (form := self._form(m.format, m.columns)) else 0.0)
            for m in matrices
        )

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return ranks_of(self.model, self.use.targets, self.use.rank, self.use.pattern)

    def _experts(self, layer: Layer, tokens: int) -> tuple[float, float]:
        """Seconds of a layer's experts there and back: of those that tokens go to, each with its share of them."""
        stack = layer.experts
        if stack is None:
            return 0.0, 0.0
        visited = min(stack.experts, tokens * stack.active)
        rank = self._ranks.get(stack.path, 0)
        each = stack.rows, stack.columns, rank, tokens * stack.active / visited
        there, back = (visited * self.speeds.expert(*each, backward) for backward in (False, True))
        return there, back + (there if self.use.full else 0.0)

    def _measured(self, layer: Layer, length: float) -> tuple[float, float, float]:
        there = back = fixed = 0.0
        times = 2 if self.use.pissa else 1
        for rows, columns, ranks in _products(layer, self._ranks, times):
            there += self.speeds.product(rows, columns, ranks, backward=False)
            back += self.speeds.product(rows, columns, ranks, backward=True)
            if self.use.full:  # the gradient of W, as large a product as the way there
                back += self.speeds.product(rows, columns, 0, backward=False)
        shape = layer.heads, layer.key_heads, layer.dim
        widths = self.model.hidden, layer.inner - layer.routed, layer.query, layer.keys
        there += self.speeds.attention(*shape, length, False) + self.speeds.between(*widths, False)
        back += self.speeds.attention(*shape, length, True) + self.speeds.between(*widths, True)
        fixed += self.speeds.overhead(times * self.use.rank if self._ranks else 0)
        for matrix in layer.matrices:
            form = self._form(matrix.format, matrix.columns)
            fixed += 2 * matrix.weights * self.speeds.unpack(form) if form else 0.0
        slower = DORA if self.use.dora and not self.model.fused else 1.0
        if self.use.dora and self.model.fused:
            for matrix in layer.matrices:
                if matrix.path in self._ranks:
                    there += self.speeds.gains(matrix.rows, backward=False)
                    back += self.speeds.gains(matrix.rows, backward=True)
        return slower * there, slower * back, slower * fixed

    def _form(self, form: str, columns: int) -> str | None:
        """The format that a layer's matrix is unpacked from just before its product; None: it is not."""
        base = self.use.base
        if base in DTYPE_BYTES:
            return None if base == self.use.compute else {"bf16": "BF16", "fp32": "F32"}[base]
        if base == "packed":
            return form
        return base.upper() if base == "int8" or columns % 64 == 0 else None

    def _head(self) -> float:
        return self.speeds.head(self.model.hidden, self.model.vocabulary)

    def _read(self, trains: bool) -> float:
        """A paged base is read from its file on the way there and on the way back."""
        if not self.use.paged or self.model.place is None:
            return 0.0
        layers = sum(matrix.file_bytes for layer in self.model.layers for matrix in layer.matrices)
        return (2 if trains else 1) * layers * (CACHED if self._stays_cached else self.speeds.disk(self.model.place))

    @cached_property
    def _stays_cached(self) -> bool:
        """Whether pages that are dropped stay in the system's cache; asked once, not for each pack."""
        return self.model.file_bytes < machine.available_memory()

    def _unpack_head(self, pack: Pack, trains: bool) -> float:
        head = self.model.output
        if self.use.base in DTYPE_BYTES or not self.model.quantised:
            return 0.0
        chunks = -(-pack.trained // self.use.chunk)
        return chunks * (2 if trains else 1) * head.weights * self.speeds.unpack(head.format)


def _products(layer: Layer, ranks: Mapping[str, int], times: int) -> list[tuple[int, int, int]]:
    """(rows, columns, ranks together) of a layer's products but for its experts'; those over one input are one."""
    groups: dict[tuple[str, int], list[int]] = {}
    for m in layer.matrices:
        if m.experts > 1:
            continue
        alone = m.name if m.name in (*DOWN, *OUT) else m.path.rpartition(".")[0]
        rows_ranks = groups.setdefault((alone, m.columns), [0, 0])
        rows_ranks[0] += m.rows
        rows_ranks[1] += times * ranks.get(m.path, 0)
    return [(rows, columns, together) for (_, columns), (rows, together) in groups.items()]


class Remaining:
    """What is left of a run, corrected by what its steps have taken so far."""

    def __init__(self, predicted: Sequence[float], count: int, others: float) -> None:
        """predicted: seconds of the first steps, that stand for all `count`; others: of evaluations and saves."""
        self._predicted, self._count, self._others = list(predicted) or [1.0], count, others
        self._ratios: list[tuple[float, float]] = []

    def seconds(self, step: int) -> float:
        """Seconds from the end of `step` (from 1) to the last one."""
        ratio = self.ratio
        mean = sum(self._predicted) / len(self._predicted)
        ahead = sum(self._predicted[step:]) if step < len(self._predicted) else 0.0
        ahead += mean * max(0, self._count - max(step, len(self._predicted)))
        return ratio * (ahead + self._others * (self._count - step) / max(1, self._count))

    @property
    def ratio(self) -> float:
        """Seconds that steps took, over those that were predicted of them; 1 before there are any."""
        took, said = (sum(column) for column in zip(*self._ratios, strict=True)) if self._ratios else (1.0, 1.0)
        return took / said if said else 1.0

    def took(self, step: int, seconds: float) -> None:
        """The measured seconds of `step`; the first warms up and does not count once there are others."""
        mean = sum(self._predicted) / len(self._predicted)
        said = self._predicted[step - 1] if step <= len(self._predicted) else mean
        if len(self._ratios) == 1 and step == 2:
            self._ratios.clear()
        self._ratios = [*self._ratios[-19:], (seconds, said)]
