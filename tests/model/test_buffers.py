"""Buffers that go round."""

from __future__ import annotations

import torch

from lorafit.model.buffers import expect, free_bytes, give, take, taken


def test_what_is_given_back_is_taken_again():
    """The same memory, also for fewer rows; another width or dtype gets its own; None and strangers are left alone."""
    like = torch.empty(0)
    a = take(10, 7, like)
    place, before = a.data_ptr(), taken()
    give(a, None, torch.empty(10, 7))
    assert taken() == before - 1
    b = take(4, 7, like)
    assert (b.data_ptr(), b.shape, b.is_contiguous()) == (place, (4, 7), True)
    c, d = take(4, 7, like), take(4, 7, like.bfloat16())
    assert len({x.data_ptr() for x in (b, c, d)}) == 3
    give(b, c, d)
    give(b)  # given already
    first, second = take(4, 7, like), take(4, 7, like)
    assert first.data_ptr() != second.data_ptr()
    give(first, second)


def test_buffers_are_made_for_the_longest_pack():
    """What is expected is made at once, so that a longer pack needs no new memory."""
    like = torch.empty(0)
    expect(50)
    try:
        a = take(3, 11, like)
    finally:
        expect(0)
    give(a)
    size = free_bytes()
    b = take(50, 11, like)
    assert b.data_ptr() == a.data_ptr()
    give(b)
    assert free_bytes() == size
