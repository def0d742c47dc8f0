"""What one update sees, and the protocol of a loss that takes the place of GRPO's in the trainer.

Shapes: M members, A samples, B states, G drawn settings, K settings, F standardised features, C functions of a budget
or price.
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
    """B states of M members, ready for an update; `of_member` leaves out the first dimension.

    Attributes:
        features: standardised features of the samples that occur, ``[M, A, F]``.
        sample: row of each state's sample in them, ascending, int64 ``[B]``; the same for all members.
        basis: what the network reads of budgets and prices, ``[M, B, 2, C]``.
        offset: price term of each setting's logit, and about `NEVER` where the setting is not allowed, ``[M, B, K]``.
        rewards: ``[M, B, K]``.
    """

    features: Tensor
    sample: Tensor
    basis: Tensor
    offset: Tensor
    rewards: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` states; the last one may be smaller."""
        samples = self.sample.tolist()
        parts = (tensor.split(size, dim=1) for tensor in (self.basis, self.offset, self.rewards))
        for start, *others in zip(range(0, len(samples), size), *parts, strict=True):
            states = slice(start, start + size)
            first, last = samples[start], samples[states][-1]
            yield Batch(self.features[:, first : last + 1], self.sample[states] - first, *others)

    def of_member(self, member: int) -> Batch:
        """One member's states: ``[A, F]``, ``[B]``, ``[B, 2, C]``, ``[B, K]`` and ``[B, K]``."""
        others = (tensor[member] for tensor in (self.basis, self.offset, self.rewards))
        return Batch(self.features[member], self.sample, *others)

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def encoded(self) -> Tensor:
        """Standardised features of each state, ``[..., B, F]``."""
        return self.features.index_select(-2, self.sample)

    @property
    def allowed(self) -> Tensor:
        """Settings that may be chosen, bool ``[..., B, K]``."""
        return self.offset > NEVER / 2

    @property
    def ranked(self) -> Tensor:
        """Rewards ``[..., B, K]``, -inf where the setting is not allowed."""
        return self.rewards.masked_fill(~self.allowed, -torch.inf)


class PolicyLoss(Protocol):
    """A loss in place of GRPO's, for a single controller."""

    @property
    def parameters(self) -> list[Tensor]:
        """Tensors that are trained beside the controller."""
        ...

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        """The loss to minimise, a scalar.

        Args:
            batch: of one member.
            log_policy: log-probability of every setting, ``[B, K]``.
            settings, old_log_probs: drawn settings ``[B, G]`` and the log-probabilities they were drawn with; None
                where nothing is drawn.
        """
        ...
