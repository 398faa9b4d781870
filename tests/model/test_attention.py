"""Attention over packed documents against a softmax written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lorafit.kernels import plain
from lorafit.model.attention import document_attention


def by_hand(q, k, v, documents, window):
    """Every head, every query, every visible key, one at a time."""
    heads, length, width = q.shape[1:]
    shared = heads // k.shape[1]
    out = torch.zeros(1, length, heads, v.shape[-1])
    for start, end in pairwise(documents):
        for h in range(heads):
            for i in range(start, end):
                first = start if window is None else max(start, i - window + 1)
                scores = torch.stack([q[0, h, i] @ k[0, h // shared, j] for j in range(first, i + 1)])
                scores /= math.sqrt(width)
                weights = torch.softmax(scores, 0)
                out[0, i, h] = sum(w * v[0, h // shared, first + n] for n, w in enumerate(weights))
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("documents", [(0, 12), (0, 5, 6, 12)])
def test_each_document_attends_to_itself_causally(documents, window):
    """Grouped queries, windows shorter and longer than the documents, documents of one token."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    got, _ = document_attention(None, q, k, v, None, 1 / math.sqrt(8), window, documents)
    assert torch.allclose(got, by_hand(q, k, v, documents, window), atol=1e-5)


def test_without_documents_each_batch_row_is_causal():
    """A plain batch is one document per row."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 7, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    got, _ = document_attention(None, q, k, v, None, 1 / math.sqrt(8))
    for row in range(3):
        part = [t[row : row + 1] for t in (q, k, v)]
        assert torch.allclose(got[row : row + 1], by_hand(*part, (0, 7), None), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_newest_query_sees_the_cached_keys_of_its_window(window):
    """Decoding: the newest token attends to the keys of its window, whatever more the cache hands over."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    got, _ = document_attention(None, q[:, :, -1:], k, v, None, 1 / math.sqrt(8), window)
    assert torch.allclose(got[0, 0], by_hand(q, k, v, (0, 7), window)[0, -1], atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_newest_query_sees_no_column_that_its_row_has_not_filled(window):
    """Rows that begin at different columns of the cache: each gets what it gets alone, whatever lies before it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 7, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    starts = (0, 6, 4)
    visible = torch.arange(7) >= torch.tensor(starts)[:, None]
    got, _ = document_attention(None, q[:, :, -1:], k, v, None, 1 / math.sqrt(8), window, visible_BS=visible)
    for row, start in enumerate(starts):
        part = [t[row : row + 1, :, start:] for t in (q, k, v)]
        assert torch.allclose(got[row, 0], by_hand(*part, (0, 7 - start), window)[0, -1], atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("documents", [(0, 12), (0, 5, 6, 12)])
def test_sinks_get_their_gradient(documents, window):
    """gpt-oss's sinks, trained: their gradient, and those of q, k and v, are the written-out softmax's in fp64."""
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    sinks, weights = torch.randn(4, requires_grad=True), torch.randn(12, 4, 8)
    got, _ = document_attention(None, *given, None, 1 / math.sqrt(8), window, documents, s_aux=sinks)
    ours = torch.autograd.grad((got[0] * weights).sum(), [*given, sinks])
    wide = [tensor.detach().double().requires_grad_() for tensor in (*given, sinks)]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in wide[:3])
    out, _ = plain.attention(q, k, v, documents, 1 / math.sqrt(8), window, sinks_H=wide[3])
    for mine, exact in zip(ours, torch.autograd.grad((out * weights).sum(), wide), strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()
