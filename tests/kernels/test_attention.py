"""Attention's kernels on every processor path against all scores written out (`plain.attention`), and its laws."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lorafit.kernels import native, plain
from lorafit.kernels.attention import Rules, attend, attend_backward

PATHS = [*native.paths(), None]  # None: the plain twin, through the same functions
DTYPES = (torch.float32, torch.bfloat16)
# fp32: sums of a few hundred products in another order. bf16: inputs of products and results are rounded to 8 bits.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
SHAPES = {  # documents, heads, key heads, dim
    "one token": ((0, 1), 2, 1, 20),
    "short": ((0, 7), 4, 2, 8),
    "odd bounds": ((0, 70, 71, 200), 4, 2, 64),
    "a key head each": ((0, 65, 192), 3, 3, 256),
    "one key head": ((0, 130, 260), 4, 1, 48),
    "long": ((0, 1100), 2, 1, 16),
}
RULES = {
    "plain": Rules(0.3),
    "window": Rules(0.3, window=50),
    "window of one": Rules(0.3, window=1),
    "softcap": Rules(0.9, softcap=2.0),
    "sinks": Rules(0.3, sinks_H=torch.tensor([0.5, -3.0, 4.0, 1.0])),
    "all": Rules(0.5, 33, 3.0, torch.tensor([0.5, -3.0, 4.0, 1.0])),
}


@pytest.fixture
def on_path(monkeypatch):
    def use(path: str | None) -> None:
        if path is None:
            monkeypatch.setattr(native, "library", lambda: None)
        else:
            native.use(path)

    yield use
    monkeypatch.undo()
    if native.paths():
        native.use(native.paths()[0])


def tensors(shape: str, dtype: torch.dtype, seed: int = 0) -> tuple[tuple[int, ...], list[Tensor]]:
    """(documents, [q, k, v, gradient of the output]); q, k and v lie in one wider row, as a product writes them."""
    documents, heads, key_heads, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(documents[-1], (heads + 2 * key_heads) * dim + 5, generator=generator).to(dtype)
    parts = row[:, :-5].split([heads * dim, key_heads * dim, key_heads * dim], dim=1)
    grad = torch.randn(documents[-1], heads, dim, generator=generator).to(dtype)
    return documents, [*(part.unflatten(1, (-1, dim)) for part in parts), grad]


def rules_for(name: str, heads: int) -> Rules:
    rules = RULES[name]
    return rules if rules.sinks_H is None else Rules(rules.scale, rules.window, rules.softcap, rules.sinks_H[:heads])


def run(documents, parts, rules) -> tuple[Tensor, ...]:
    """(output, logsumexp, dq, dk, dv)."""
    q, k, v, grad = parts
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = attend(q, k, v, documents, rules, out)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    attend_backward(grad, q, k, v, out, lse, documents, rules, *grads)
    return out, lse, *grads


def gap(found: Tensor, wanted: Tensor, unit: Tensor) -> float:
    """The error, relative to what is wanted; where that vanishes (one visible key), to `unit`."""
    largest = torch.maximum(wanted.float().norm(), unit.float().norm())
    return float((found.float() - wanted.float()).norm() / largest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_all_scores_written_out(path, dtype, shape, on_path):
    """With every rule, alone and together."""
    documents, parts = tensors(shape, dtype)
    for name in RULES:
        rules = rules_for(name, parts[0].shape[1])
        named = documents, rules.scale, rules.window, rules.softcap, rules.sinks_H
        out, lse = plain.attention(*parts[:3], *named)
        grads = plain.gradients(lambda *qkv, named=named: plain.attention(*qkv, *named)[0], parts[3], *parts[:3])
        on_path(path)
        for what, found, wanted in zip(
            ("out", "lse", "dq", "dk", "dv"), run(documents, parts, rules), (out, lse, *grads), strict=True
        ):
            assert gap(found, wanted, parts[3]) < TOLERANCE[dtype], f"{what} with {name}"


@pytest.mark.parametrize("path", native.paths())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_documents_bits_depend_on_it_alone(path, dtype, on_path):
    """What a document gets does not change by a bit with what lies before or behind it, nor with the threads."""
    on_path(path)
    documents, parts = tensors("odd bounds", dtype)
    rules = Rules(0.3)
    whole = run(documents, parts, rules)
    for start, end in itertools.pairwise(documents):
        alone = run((0, end - start), [x[start:end] for x in parts], rules)
        for which in (0, 2):  # dk and dv of shared keys are summed in an order that depends on the number of works
            assert torch.equal(whole[which][start:end], alone[which])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        again = run(documents, parts, rules)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[2], again[2])


@pytest.mark.parametrize("path", native.paths())
def test_nan_and_infinity_are_not_lost(path, on_path):
    """A bad value in q, k or v shows in the output and in the gradients of its document, and in no other's."""
    on_path(path)
    documents, clean = tensors("odd bounds", torch.float32)
    for which, value in itertools.product(range(3), (torch.nan, torch.inf)):
        parts = [x.clone() for x in clean]
        parts[which][100, 0, 3] = value
        found = run(documents, parts, Rules(0.3))
        assert not found[0][71:].isfinite().all()
        assert found[0][:71].isfinite().all()
        assert not all(grad[71:].isfinite().all() for grad in found[2:])


def test_memory_grows_with_the_tokens_not_with_their_square():
    """Room for one thread at 8 times the tokens is 8 times as much, and no more."""
    found = native.library()
    if found is None:
        pytest.fail("make test builds the library")
    sizes = []
    for tokens in (4096, 32768):
        bounds = torch.tensor([0, tokens])
        call = native.Attention(
            type=1, threads=1, tokens=tokens, documents=1, heads=9, key_heads=3, dim=64, bounds=bounds.data_ptr()
        )
        sizes.append(max(found.lorafit_attention_room(call, backward) for backward in (0, 1)))
    assert sizes[1] < 8.1 * sizes[0]
    assert sizes[1] < 32768 * 64 * 32


def test_documents_must_cover_the_sequence():
    """A fault of the caller, said at once."""
    _, parts = tensors("short", torch.float32)
    with pytest.raises(AssertionError, match="documents must cover"):
        attend(*parts[:3], (0, 5), Rules(0.3), torch.empty_like(parts[0]))
