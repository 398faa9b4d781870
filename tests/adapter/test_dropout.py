"""Dropout by place: the mask is a function of where a token stands, never of how it was packed."""

from __future__ import annotations

import torch

from lorafit.adapter.dropout import PlacedDropout, Places, mix

M64 = 2**64 - 1


def mix_by_hand(x: int) -> int:
    """splitmix64's finaliser in Python's integers."""
    x &= M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def masked(rows: list[int], positions: list[int], step: int = 3, features: int = 16) -> torch.Tensor:
    places = Places()
    places.set(7, step, torch.tensor(rows), torch.tensor(positions))
    layer = PlacedDropout(0.3, "layers.0.q_proj", places).train()
    return layer(torch.ones(1, len(rows), features))[0]


def test_mixing_equals_its_plain_twin():
    """int64 arithmetic that wraps gives splitmix64's unsigned values."""
    values = [0, 1, 5, 2**31, 2**62 + 12345, 2**63 - 1]
    got = [int(v) & M64 for v in mix(torch.tensor(values))]
    assert got == [mix_by_hand(v) for v in values]


def test_the_mask_follows_the_row_and_not_the_pack():
    """The same tokens in another order or pack are dropped alike."""
    together = masked([4, 4, 9, 9], [0, 1, 0, 1])
    assert torch.equal(masked([9, 9], [0, 1]), together[2:])
    assert torch.equal(masked([9, 9, 4, 4], [0, 1, 0, 1])[2:], together[:2])


def test_the_mask_changes_with_step_row_position_and_module():
    """No two places share a mask."""
    first = masked([4], [0], features=256)
    for other in (masked([5], [0], features=256), masked([4], [1], features=256), masked([4], [0], 4, 256)):
        assert not torch.equal(first, other)
    places = Places()
    places.set(7, 3, torch.tensor([4]), torch.tensor([0]))
    elsewhere = PlacedDropout(0.3, "layers.1.q_proj", places).train()(torch.ones(1, 256))
    assert not torch.equal(first, elsewhere)


def test_p_of_the_elements_are_dropped_and_the_rest_scaled():
    """Inverted dropout: about p zeros, the rest 1 / (1 - p), so the mean stays."""
    out = masked(list(range(400)), [0] * 400, features=500)
    assert abs((out == 0).float().mean().item() - 0.3) < 0.005
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.7))


def test_eval_mode_and_p_zero_are_the_identity():
    """Nothing is dropped outside training."""
    x = torch.randn(5, 8)
    assert torch.equal(PlacedDropout(0.5).eval()(x), x)
    assert torch.equal(PlacedDropout(0.0).train()(x), x)
