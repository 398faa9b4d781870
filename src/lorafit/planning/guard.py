"""Keeping a run inside its memory: looked at after every step, lowered before the kernel kills it.

What a step takes again in the next one has been taken once it is over, but for the adapters' casts. So less than those
and a hundredth of the budget left means that it may not go on as it is: packs of half as many tokens, down to
the longest row's, and then every layer computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit import machine
from lorafit.config import TrainConfig

SPARE = 0.01  # of the budget, for what nobody counts
NEAR = 0.8  # of the budget: a run that is predicted to need more is rehearsed before step 1


@dataclass(frozen=True)
class Guard:
    """Watches one run; sizes in bytes."""

    budget: int
    given: bool
    """Whether the budget is --memory's; else it is what the machine has free, whoever takes it."""
    predicted: int
    moment: int
    """What is taken for a moment in each step, and free between them."""
    growth: int
    """What the optimizer takes up in step 1."""
    longest: int
    """Tokens of the longest row, which is a pack at least."""
    layers: int

    @property
    def rehearses(self) -> bool:
        """Whether the largest pack is run once before step 1, so that a lack of memory shows at once."""
        return self.predicted > NEAR * self.budget

    def lacks(self, before: bool = False) -> int:
        """Bytes that are missing now, 0 where nothing is; before: step 1 is still to come."""
        left = machine.available_memory()
        if self.given:
            left = min(left, self.budget - machine.memory_bytes())
        wanted = self.moment + round(SPARE * self.budget) + (self.growth if before else 0)
        return max(0, wanted - left)

    def lowered(self, config: TrainConfig) -> TrainConfig | None:
        """The settings that need less, None where there are none."""
        tokens = int(config.micro_batch_tokens or 1)
        if tokens > self.longest:
            return replace(config, micro_batch_tokens=max(self.longest, tokens // 2))
        if (config.checkpointed_layers or 0) < self.layers:
            return replace(config, checkpointing="all", checkpointed_layers=self.layers)
        return None
