"""The data that training draws from, and the states it draws: a sample, a budget and a price. All are tensors.

Shapes: S samples, K settings, N states of one epoch, M members of an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.training_options import StatePlan

NO_LIMIT_MS = math.inf


@dataclass(frozen=True)
class MeasuredOutcomes:
    """A profile table as tensors ``[S, K]``: accuracy and latency in ms, both 0 where ``measured`` (bool) is False."""

    accuracy: Tensor
    latency_ms: Tensor
    measured: Tensor

    @classmethod
    def from_arrays(
        cls, accuracy: np.ndarray, latency_ms: np.ndarray, device: str | torch.device = "cpu"
    ) -> MeasuredOutcomes:
        """Build it from ``[S, K]`` arrays with NaN for what was not measured."""
        measured = ~(np.isnan(accuracy) | np.isnan(latency_ms))

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.where(measured, values, 0.0).astype(np.float32)).to(device)

        return cls(tensor(accuracy), tensor(latency_ms), torch.from_numpy(measured).to(device))

    def __len__(self) -> int:
        return len(self.accuracy)


@dataclass(frozen=True)
class TrainingData:
    """Measured outcomes of S samples, and raw features that hold theirs.

    Attributes:
        outcomes: ``[S, K]``.
        image, language: raw features ``[F, Di]`` and ``[F, Dl]``. A large training keeps no standardised copy of
            them, because it would dominate the memory.
        rows: row of each sample in the features, int64 ``[S]``; None means that they are in the same order.
        bounds_ms: latency bounds of each sample, ``[S, K]``; None: they depend on no input.
    """

    outcomes: MeasuredOutcomes
    image: Tensor
    language: Tensor
    rows: Tensor | None = None
    bounds_ms: Tensor | None = None


@dataclass(frozen=True)
class TrainingStates:
    """N states for each of M members, ``[M, N]`` each.

    Attributes:
        sample: row of the outcomes, int64. budget_ms: infinity means no limit. price: accuracy for one full latency.
    """

    sample: Tensor
    budget_ms: Tensor
    price: Tensor

    @classmethod
    def stacked(cls, members: Sequence[TrainingStates]) -> TrainingStates:
        """States of several members side by side."""
        fields = ("sample", "budget_ms", "price")
        return cls(*(torch.cat([getattr(states, name) for states in members]) for name in fields))

    def __len__(self) -> int:
        return self.sample.shape[1]

    def __getitem__(self, states: slice | Tensor) -> TrainingStates:
        return TrainingStates(self.sample[:, states], self.budget_ms[:, states], self.price[:, states])


def draw_states(
    plan: StatePlan, outcomes: MeasuredOutcomes, reference_ms: float, generator: torch.Generator
) -> TrainingStates:
    """Draw one member's states of an epoch; there are N = S x number of factors, S counting samples with a measurement.

    Samples come in random order, each with all its states, so that an update passes over its features once.
    """
    rows = outcomes.measured.any(dim=1).nonzero()[:, 0]
    factors = torch.tensor(plan.budget_factors)
    weights = outcomes.measured[rows].float().cpu()
    setting = torch.multinomial(weights, len(factors), replacement=True, generator=generator)
    latency = outcomes.latency_ms[rows].cpu().gather(1, setting)
    order = torch.randperm(len(rows), generator=generator)
    budget = (latency * factors)[order].reshape(-1)
    sample = rows.cpu()[order].repeat_interleave(len(factors))
    draws = torch.rand(5, len(sample), generator=generator)
    low, high = plan.wide_range
    wide = (low + (high - low) * draws[1]) * reference_ms
    budget = torch.where(draws[0] < plan.wide_share, wide, budget)
    low, high = plan.price_range
    priced = draws[2] < plan.price_share
    price = torch.where(priced, low * (high / low) ** draws[3], torch.full_like(budget, plan.default_price))
    budget = torch.where(priced & (draws[4] < 0.5), torch.full_like(budget, NO_LIMIT_MS), budget)
    device = outcomes.accuracy.device
    return TrainingStates(*(column[None].to(device) for column in (sample, budget, price)))
