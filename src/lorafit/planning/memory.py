"""Memory of a training run by part, in bytes, from numbers alone.

    peak = libraries + data + weights + adapters + gradients + optimizer + activations + attention + head + scratch
         + casts,   or what loading needs, where that is more; a save writes one tensor at a time

P trainable parameters, T tokens of the largest pack, N trained ones among them, r rank, H width, V vocabulary,
L layers, s bytes of the compute dtype. Each formula follows what the named file allocates; none is fitted to a
published total. What is measured is said: the libraries' own memory.

    weights       as stored, see `weights`; pages of a mapped file count as far as they are read
    adapters      4 P (A0 and B0 of PiSSA too), and s P cast for a pack    adapter/lora.py, adapter/group.py
    gradients     4 P     optimizer  8 P (AdamW's two moments)             training/optim.py
    activations   T (kept layers x kept + checkpointed layers x H s + what goes round)      model/layer.py, buffers.py
    attention     of each thread a document's keys and values, and a tile  native/attention.h
    head          C V s, C tokens' logits, and hidden states of T and N    training/loss.py
    scratch       the largest matrix that is unpacked at a time            frozen/weight.py, adapter/group.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from lorafit.adapter.attach import by_pattern
from lorafit.frozen.weight import BLOCK_WEIGHTS
from lorafit.planning.outline import DOWN, FLOAT_BYTES, NF4_BITS, OUT, Layer, Matrix, Outline
from lorafit.training.loss import BLOCK_WEIGHTS as HEAD_WEIGHTS
from lorafit.training.loss import CHUNK_BYTES
from lorafit.training.sample import PACK

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
WARM = {"bf16": 90_000_000, "fp32": 220_000_000}
"""What torch, MKL and oneDNN take once they compute in this dtype: code made for the 64 newest shapes, tables, stacks
(measured)."""
TILE = 64  # queries and keys of a tile in native/attention.h
FEW = 4  # documents times key heads, per thread, below which gradients of keys are summed up behind (kernels/attention)
OPTIMIZER = 8  # bytes of a parameter: AdamW's two moments
UNFUSED = 2  # how much more of a token transformers' own layers keep than ours (measured on Llama: 1.9)
DORA = 3.8  # the same with DoRA in transformers' own, which keep outputs with and without it (measured: 3.8)
SEEN_BY_ALL = dict.fromkeys(("limit", "tokens", "trained", "longest", "chunk", "checkpointed", "evaluated"), 1)
BEHIND = 2  # layers of a paged base that are in memory: this one and the one before; the next is in the system's cache


@dataclass(frozen=True)
class Use:
    """The settings and lengths that memory follows from."""

    base: str
    compute: str
    rank: int
    targets: tuple[str, ...]
    limit: int
    """Tokens that a pack may have: --micro-batch-tokens."""
    tokens: int
    """T: of the largest pack in training."""
    trained: int
    """N: of them, those whose loss is computed."""
    longest: int
    """Tokens of the longest row."""
    chunk: int
    """Tokens whose logits are alive at once."""
    checkpointed: int = 0
    threads: int = 1
    paged: bool = False
    """Whether a mapped base is read layer by layer and dropped behind."""
    adapter_bytes: int = 4
    """Of a trainable parameter."""
    full: bool = False
    """--method full: every weight is trained, and rank is 0."""
    dora: bool = False
    """Whether outputs of products have gains, whose gradients need them."""
    init: str = "default"
    """How adapters start. Of PiSSA they have the start that they are measured from beside them, and twice the rank in
    products; of EVA rows run through the model before the first step."""
    pattern: tuple[tuple[str, int], ...] = ()
    """--rank-pattern."""
    bias: str = "none"
    whole: tuple[str, ...] = ()
    """--modules-to-save: embedding and head trained whole."""
    rows: int = 0
    """Tokens whose rows of embedding and head are trained."""
    evaluated: int = 0
    """Tokens of the largest pack in evaluation, where no layer keeps anything."""

    @property
    def pissa(self) -> bool:
        return self.init == "pissa"

    @property
    def size(self) -> int:
        """s"""
        return DTYPE_BYTES[self.compute]


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the moment of the peak; their sum is what VmHWM will show."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def private(self) -> int:
        """Without pages of mapped files, which the system may take back."""
        return self.total - self.parts.get("weights_mapped", 0)


def predict(model: Outline, use: Use, *, libraries: int, data: int) -> Memory:
    """Memory by part. libraries, data: bytes that interpreter, libraries and rows have now, before the model."""
    parts = training(model, use)
    held = {"libraries": libraries, "data": data}
    first = Memory(
        {**held, "weights_mapped": parts["weights_mapped"], "loading": loading(model, use.base, use.compute)}
    )
    moment = casts(model, use) if not use.full else 0  # weights are saved as they lie
    trained = model.ends if use.full else whole(model, use)
    moment += 4 * max((m.weights for m in trained), default=0)  # embedding and head have one more gradient for a moment
    later = Memory({**held, "libraries": libraries + WARM[use.compute], **parts, "moment": moment})
    return max(later, first, key=lambda one: one.total)


def training(model: Outline, use: Use) -> dict[str, int]:
    """The parts of a training step."""
    private, mapped = weights(model, use.base, use.compute)
    trainable = parameters(model, use)
    return {
        "weights_mapped": paged(model, mapped) if use.paged else mapped,
        "weights_private": private,
        "adapters": 0 if use.full else use.adapter_bytes * (trainable + started(model, use)),
        "gradients": use.adapter_bytes * trainable,
        "optimizer": OPTIMIZER * trainable,
        "activations": activations(model, use),
        "attention": attention(model, use),
        "head": head(model, use),
        "scratch": scratch(model, use),
    }


def parameters(model: Outline, use: Use) -> int:
    """P: of adapters and of what is trained beside them; all weights with --method full."""
    if use.full:
        return model.parameters
    return lora(model, use.targets, use.rank, use.pattern) + _beside(model, use)


@cache
def lora(model: Outline, targets: tuple[str, ...], rank: int, pattern: tuple[tuple[str, int], ...] = ()) -> int:
    """The sum of r (I + O) over the adapted matrices; of experts, over each of them."""
    ranks = ranks_of(model, targets, rank, pattern)
    return sum(ranks[m.path] * m.experts * (m.rows + m.columns) for m in model.adapted(targets))


@cache
def ranks_of(
    model: Outline, targets: tuple[str, ...], rank: int, pattern: tuple[tuple[str, int], ...] = ()
) -> dict[str, int]:
    """The rank of each adapted matrix by path, as `attach` gives them. Raises ConfigError as it does."""
    paths = [m.path for m in model.adapted(targets)]
    return {path: int(r) for path, r in by_pattern("--rank-pattern", paths, dict(pattern), rank).items()}


def whole(model: Outline, use: Use) -> list[Matrix]:
    """The matrices that are trained whole; of a tied pair the one that there is."""
    wanted = {"embed_tokens" if model.head is None and name == "lm_head" else name for name in use.whole}
    return [m for m in model.ends if any(f".{m.path}".endswith(f".{name}") for name in wanted)]


def _beside(model: Outline, use: Use) -> int:
    """What is trained beside A and B: whole matrices, tokens' rows (of a tied pair once), biases, DoRA's magnitudes."""
    adapted = model.adapted(use.targets)
    biased = {"all": model.biases.values(), "lora_only": [model.biases.get(m.path, 0) for m in adapted]}
    magnitudes = sum(m.rows for m in adapted) if use.dora else 0
    rows = use.rows * sum(m.columns for m in model.tables)
    return sum(m.weights for m in whole(model, use)) + rows + sum(biased.get(use.bias, [])) + magnitudes


def started(model: Outline, use: Use) -> int:
    """Numbers that are kept of the start: PiSSA's A0 and B0."""
    return lora(model, use.targets, use.rank, use.pattern) if use.pissa else 0


def casts(model: Outline, use: Use) -> int:
    """s P where products run in another dtype than adapters are kept in; of PiSSA's the differences too."""
    count = parameters(model, use) + started(model, use)
    return use.size * count if use.adapter_bytes != use.size else 0


@cache
def weights(model: Outline, base: str, compute: str) -> tuple[int, int]:
    """(private, mapped) bytes of the frozen weights, as model/load.py stores them."""
    private, mapped = model.vectors * DTYPE_BYTES[compute], 0
    for matrix, how in _kinds(model, base):
        own, shared = stored(matrix, how, model, base)
        private, mapped = private + own, mapped + shared
    if model.fused and _is_view(model, base):  # matrices over one input are copied, so that they lie together
        private += sum(FLOAT_BYTES[m.format] * m.weights for m in _together(model))
    return private, mapped


@cache
def loading(model: Outline, base: str, compute: str) -> int:
    """The most that is held while weights stream in: what is there already, and one tensor in fp32 and as it is
    stored, with its pages of the file."""
    most = before = model.vectors * DTYPE_BYTES[compute]
    for matrix, how in _kinds(model, base):
        own, _ = stored(matrix, how, model, base)
        if own:
            most = max(most, before + own + (4 * matrix.weights + matrix.file_bytes if model.quantised else 0))
        before += own
    return most


def _kinds(model: Outline, base: str) -> list[tuple[Matrix, str]]:
    """Each matrix and how it is stored: as base says, or `kept` outside of layers, where base has fewer bits."""
    linear = {m.path for layer in model.layers for m in layer.matrices}
    return [(m, base if m.path in linear or base in DTYPE_BYTES else "kept") for m in model.matrices]


def _is_view(model: Outline, base: str) -> bool:
    """Whether a Hugging Face folder's tensors are used where they lie in the mapped file: they have this dtype."""
    return model.on_disk and not model.mapped and {"bf16": "BF16", "fp32": "F32"}.get(base) == model.embedding.format


def _together(model: Outline) -> list[Matrix]:
    return [m for layer in model.layers for m in layer.matrices if m.name not in (*DOWN, *OUT)]


def stored(matrix: Matrix, how: str, model: Outline, base: str) -> tuple[int, int]:
    """(private, mapped) bytes of one matrix; how: a base, or `kept` for embedding and head, which stay as they are."""
    if _is_view(model, how):
        return 0, matrix.file_bytes
    if how in DTYPE_BYTES:
        return matrix.weights * DTYPE_BYTES[how], 0
    if model.mapped and (how in ("packed", "kept") or matrix.format == base.upper()):
        return 0, matrix.file_bytes
    if how == "nf4" and matrix.columns % 64 == 0:
        return math.ceil(matrix.weights * NF4_BITS / 8), 0
    if how == "int8":
        return matrix.weights + 4 * matrix.experts * matrix.rows, 0
    return matrix.weights * 2, 0


def paged(model: Outline, mapped: int) -> int:
    """Mapped bytes that are in memory when layers are dropped behind: some layers, and the head; of an embedding that
    is nothing else only a few rows are read."""
    layers = [sum(m.file_bytes for m in layer.matrices) for layer in model.layers]
    rows = 0 if model.head is None else model.embedding.file_bytes
    return min(mapped, mapped - rows - sum(layers) + BEHIND * max(layers, default=0))


def activations(model: Outline, use: Use) -> int:
    """T (what kept layers keep + the inputs of the others + what goes round).

    The layers computed twice are the first ones. When one of them is computed again the others' activations are free,
    and it writes into their buffers.
    """
    each, around = _of_layers(
        model, replace(use, limit=1, tokens=1, trained=1, longest=1, chunk=1, checkpointed=0, evaluated=0)
    )
    first, rest = each[: use.checkpointed], each[use.checkpointed :]
    kept = max(sum(rest), *first) if first else sum(rest)
    ends = 3 * model.hidden * use.size  # the embedding's rows, the last norm's output, its gradient
    trains = use.tokens * (kept + len(first) * model.hidden * use.size + around + ends)
    alone = max(use.evaluated, PACK if use.init == "eva" else 0)
    return max(trains, alone * (max(each, default=0) + around + ends))


@cache
def _of_layers(model: Outline, use: Use) -> tuple[list[int], int]:
    """(what each layer keeps of a token, the most that goes round); use: without what a token does not see."""
    each = [layer_bytes(model, layer, use) for layer in model.layers]
    return each, max((round_bytes(layer, model.hidden, use) for layer in model.layers), default=0)


def layer_bytes(model: Outline, layer: Layer, use: Use) -> int:
    """What one layer keeps of a token for its backward pass (model/layer.py, `Kept`).

    Its input and its middle, 2 H; what q, k, v, gate and up give; attention's output; where the halves are normed,
    2 H more; with DoRA also those of o_proj and down_proj that have it; of each adapter h, r numbers; in fp32 a root
    for each norm, and a logsumexp for each head.
    """
    out = sum(m.columns for m in layer.matrices if m.name in OUT) or layer.query
    halves = 4 if layer.normed else 2
    ranks = ranks_of(model, use.targets, use.rank, use.pattern)
    low = sum(ranks.get(m.path, 0) * m.active for m in layer.matrices) * (2 if use.pissa else 1)
    width = halves * model.hidden + layer.outputs + out
    if use.dora and model.fused and not layer.normed:
        width += sum(m.rows for m in layer.matrices if m.name in (*DOWN, *OUT) and m.path in ranks)
    times = 1 if model.fused else DORA if use.dora else UNFUSED
    return round(width * times + low) * use.size + 4 * (halves + layer.heads)


def round_bytes(layer: Layer, hidden: int, use: Use) -> int:
    """Buffers of a token that go round from layer to layer: at most four of width H at once (six where halves are
    normed, five with DoRA), one of the MLP's width, the gradients of q, k, v and of attention's output, q and k where
    they are normed; with DoRA gate and up as they were."""
    width = (6 if layer.normed else 5 if use.dora else 4) * hidden + layer.inner * (3 if use.dora else 1)
    width += layer.query + 2 * layer.keys + layer.query + (layer.query + layer.keys if layer.head_norms else 0)
    return width * use.size


def attention(model: Outline, use: Use) -> int:
    """Of each thread: keys, values, their transposes and gradients of the longest document, and a tile's scores."""

    def room(layer: Layer) -> int:
        keys, tiles = use.longest * layer.dim, 2 * TILE * TILE * 4 + 12 * TILE * max(TILE, layer.dim) * use.size
        threads = use.threads * (keys * (4 * use.size + 2 * 4) + tiles)
        few = layer.key_heads * max(1, use.tokens // max(1, use.longest)) < FEW * use.threads
        shared = layer.heads > layer.key_heads
        return threads + (layer.heads * use.tokens * 2 * layer.dim * 4 if few and shared else 0)

    return max((room(layer) for layer in model.layers), default=0)


def head(model: Outline, use: Use) -> int:
    """C V s of logits, C H of their gradient in fp32 and its product, N H s of hidden states and their gradient, and
    T H s of the gradient of all."""
    most = max(1, min(use.chunk, CHUNK_BYTES // (model.vocabulary * use.size)))
    chunk = math.ceil(use.trained / max(1, math.ceil(use.trained / most)))
    states = 3 * use.trained + use.tokens
    return chunk * (model.vocabulary * use.size + model.hidden * (4 + use.size)) + states * model.hidden * use.size


def scratch(model: Outline, use: Use) -> int:
    """The largest block of weights that is unpacked at once: a group of matrices over one input, or a part of the
    head. Nothing where weights are stored as products take them."""
    return 0 if use.base == use.compute else _largest(model, use.base) * use.size


@cache
def _largest(model: Outline, base: str) -> int:
    groups = [size for layer in model.layers for size in _groups(layer.matrices)]
    heads = 0 if base in ("nf4", "int8") and not model.mapped else min(HEAD_WEIGHTS, model.output.weights)
    return min(BLOCK_WEIGHTS, max([*groups, heads]))


def _groups(matrices: Iterable[Matrix]) -> list[int]:
    """Weights of the groups that are one product: matrices with the same input, or alone where they are too large."""
    apart: list[int] = []
    sums: dict[str, int] = {}
    for matrix in matrices:
        one = matrix.rows * matrix.columns
        if matrix.name in (*DOWN, *OUT) or matrix.experts > 1:
            apart.append(one)
        else:
            parent = matrix.path.rpartition(".")[0]
            sums[parent] = sums.get(parent, 0) + one
            apart.append(one)
    return [*apart, *(size for size in sums.values() if size <= BLOCK_WEIGHTS)]
