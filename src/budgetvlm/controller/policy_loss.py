"""What one update sees, and the protocol of a loss that takes the place of GRPO's in the trainer.

Shapes: A samples, B states, G drawn settings, K settings, F standardised features, C functions of a budget or price.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from budgetvlm.controller.grpo import NEVER


@dataclass(frozen=True)
class Batch:
    """B states ready for an update.

    Attributes:
        features: of the samples that they are of, encoded, ``[A, F]``.
        sample: which of these a state is of, ascending int64 ``[B]``.
        basis: of budgets and prices, ``[B, 2, C]``.
        offset: price term, and `NEVER` where not allowed, ``[B, K]``.
        rewards: ``[B, K]``.
    """

    features: Tensor
    sample: Tensor
    basis: Tensor
    offset: Tensor
    rewards: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """So many states at a time; the last may be fewer."""
        samples, parts = self.sample.tolist(), (t.split(size) for t in (self.basis, self.offset, self.rewards))
        for start, *others in zip(range(0, len(samples), size), *parts, strict=True):
            of = slice(start, start + size)
            first, last = samples[start], samples[of][-1]
            yield Batch(self.features[first : last + 1], self.sample[of] - first, *others)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def encoded(self) -> Tensor:
        """Features of each state, ``[B, F]``."""
        return self.features.index_select(0, self.sample)

    @property
    def allowed(self) -> Tensor:
        """Settings that may be chosen, bool ``[B, K]``."""
        return self.offset > NEVER / 2

    @property
    def ranked(self) -> Tensor:
        """Rewards ``[B, K]``, -inf where not allowed."""
        return self.rewards.masked_fill(~self.allowed, -torch.inf)


class PolicyLoss(Protocol):
    """A loss, and the tensors that are trained beside the controller."""

    @property
    def parameters(self) -> list[Tensor]: ...

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor: ...
