"""Combining adapters: the definitions themselves, and PEFT's results where it defines the same."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from lorafit.adapter.combine import (
    LowRank,
    added,
    concatenated,
    dropped,
    generator,
    padded,
    scaled,
    ties,
    truncated,
)

OUT, IN = 24, 16


def update(seed: int, rank: int = 4, outputs: int = OUT, inputs: int = IN) -> LowRank:
    torch.manual_seed(seed)
    return LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank))


class Two(nn.Module):
    """Two linear layers for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.fixture
def theirs():
    """A PEFT model with adapters a (rank 4, scale 2) and b (rank 3, scale 1/3), and their updates of layer `first`."""
    model = peft.get_peft_model(Two(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["first", "second"]))
    torch.manual_seed(5)
    updates = []
    for name, scale in (("a", 2.0), ("b", 1 / 3)):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            nn.init.normal_(layer.lora_A[name].weight)
            nn.init.normal_(layer.lora_B[name].weight)
        layer = model.base_model.model.first
        updates.append(LowRank(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * scale))
    return model, updates


def peft_result(model, weights, **how) -> torch.Tensor:
    """PEFT's combined update of layer `first`."""
    combined = copy.deepcopy(model)
    combined.add_weighted_adapter(["a", "b"], list(weights), "c", **how)
    return combined.base_model.model.first.get_delta_weight("c").detach()


WEIGHTS = (0.7, -0.4)


def test_concatenated_is_the_sum_and_pefts_cat(theirs):
    """Factors side by side multiply to the weighted sum, which PEFT's `cat` gives too."""
    model, updates = theirs
    joined = concatenated([scaled(u, w) for u, w in zip(updates, WEIGHTS, strict=True)])
    assert joined.rank == 7
    torch.testing.assert_close(joined.dense(), added([u.dense() for u in updates], WEIGHTS))
    torch.testing.assert_close(joined.dense(), peft_result(model, WEIGHTS, combination_type="cat"))


@pytest.mark.parametrize("rank", [2, 5])
def test_truncated_sum_is_pefts_svd(theirs, rank):
    """The sum cut to a rank equals PEFT's `svd`, from the matrix and from the factors."""
    model, updates = theirs
    want = peft_result(model, WEIGHTS, combination_type="svd", svd_rank=rank)
    joined = concatenated([scaled(u, w) for u, w in zip(updates, WEIGHTS, strict=True)])
    for form in (joined, joined.dense()):
        found, share = truncated(form, rank)
        assert found.rank == rank
        assert 0 < share < 1
        torch.testing.assert_close(found.dense(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts(theirs, density):
    """TIES, then cut to a rank, equals PEFT's `ties_svd`."""
    model, updates = theirs
    want = peft_result(model, WEIGHTS, combination_type="ties_svd", svd_rank=IN, density=density)
    found = ties([u.dense() for u in updates], WEIGHTS, density)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_ties_by_hand():
    """One place at a time: the larger sum's sign is elected, and only values of that sign are averaged."""
    updates = [torch.tensor([[3.0, -1.0, 2.0, 0.1]]), torch.tensor([[-1.0, -2.0, 4.0, 0.2]])]
    # density 3/4 drops 0.1 and 0.2; signs +, -, +; at the first place only the first agrees
    want = torch.tensor([[3.0, -1.5, 3.0, 0.0]])
    torch.testing.assert_close(ties(updates, (1.0, 1.0), 0.75), want)


def test_dropping_keeps_the_mean():
    """DARE keeps a share `density` of the values, divided by it; over many draws the mean is the update."""
    matrix = update(1).dense()
    draws = torch.stack([dropped(matrix, 0.25, generator(seed, "layer")) for seed in range(2000)])
    assert ((draws == 0).float().mean() - 0.75).abs() < 0.01
    kept = draws[draws != 0] / matrix.expand_as(draws)[draws != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 4.0))
    # of 2000 draws the mean's standard error is |x| sqrt(3 / 2000); 5 of them
    assert ((draws.mean(0) - matrix).abs() <= 5 * matrix.abs() * (3 / 2000) ** 0.5).all()


def test_dropping_is_a_function_of_seed_and_place():
    """The same seed and place draw the same mask whatever came before; another place another one."""
    matrix = update(1).dense()
    first = dropped(matrix, 0.5, generator(3, "layer"))
    dropped(matrix, 0.5, generator(3, "other"))
    assert torch.equal(first, dropped(matrix, 0.5, generator(3, "layer")))
    assert not torch.equal(first, dropped(matrix, 0.5, generator(3, "other")))


def test_padding_changes_nothing():
    """Zeros up to a higher rank leave the product as it was, bit for bit."""
    small = update(2)
    assert padded(small, 9).rank == 9
    torch.testing.assert_close(padded(small, 9).dense(), small.dense(), rtol=0, atol=0)


def test_truncating_to_its_own_rank_loses_nothing():
    """A rank-4 update cut to 4 is itself and keeps all of its squared norm; cut to 3 it keeps the plain sum's share."""
    small = update(3)
    same, share = truncated(small.dense(), 4)
    assert share == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(same.dense(), small.dense(), rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(small.dense())
    _, share = truncated(small, 3)
    assert share == pytest.approx(float(values[:3].square().sum() / values.square().sum()), rel=1e-5)


def test_random_projection_is_near_the_exact_one():
    """With a spectrum that falls, the randomised factors keep as much as the exact ones to 1e-4, and never more."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(200, 120)).Q, torch.linalg.qr(torch.randn(150, 120)).Q
    matrix = U * (0.95 ** torch.arange(120)) @ V.T
    _, exact = truncated(matrix, 16, exact=True)
    found, share = truncated(matrix, 16, exact=False)
    assert exact - 1e-4 < share <= exact + 1e-6
    left = float((matrix - found.dense()).square().sum() / matrix.square().sum())
    assert left == pytest.approx(1 - share, abs=1e-4)


def test_an_update_of_zeros_stays_zero():
    """Nothing is divided by its norm."""
    found, share = truncated(torch.zeros(OUT, IN), 4)
    assert share == 1.0
    assert not found.dense().any()


def test_experts_are_combined_one_by_one():
    """A stack of updates is padded, joined and cut as each of its experts alone."""
    stacks = [LowRank(*(torch.stack(part) for part in zip(*(update(s, rank) for s in seeds), strict=True)))
              for seeds, rank in (((0, 1, 2), 4), ((3, 4, 5), 2))]  # fmt: skip
    joined = concatenated([padded(stacks[0], 6), scaled(stacks[1], 0.5)])
    found, _ = truncated(joined, 3)
    for expert in range(3):
        alone = [LowRank(stack.A[expert], stack.B[expert]) for stack in stacks]
        want, _ = truncated(concatenated([alone[0], scaled(alone[1], 0.5)]), 3)
        torch.testing.assert_close(found.dense()[expert], want.dense(), rtol=1e-4, atol=1e-5)
    matrices = [stack.dense() for stack in stacks]
    assert ties(matrices, (1.0, 2.0), 0.5).shape == matrices[0].shape
