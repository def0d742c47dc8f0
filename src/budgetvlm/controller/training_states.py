"""The states that training draws: which sample, which budget, which price. All tensors, nothing per row.

Shapes: S samples, K settings, N states of one epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.training_options import StatePlan

NO_LIMIT_MS = math.inf


@dataclass(frozen=True)
class Outcomes:
    """A table as tensors ``[S, K]``: ``accuracy`` and ``latency_ms``, float, 0 where not ``measured`` (bool)."""

    accuracy: Tensor
    latency_ms: Tensor
    measured: Tensor

    @classmethod
    def from_arrays(cls, accuracy: np.ndarray, latency_ms: np.ndarray, device: str | torch.device = "cpu") -> Outcomes:
        """From ``[S, K]`` arrays with NaN for what was not measured."""
        measured = ~(np.isnan(accuracy) | np.isnan(latency_ms))

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.where(measured, values, 0.0).astype(np.float32)).to(device)

        return cls(tensor(accuracy), tensor(latency_ms), torch.from_numpy(measured).to(device))

    def __len__(self) -> int:
        return len(self.accuracy)


@dataclass(frozen=True)
class States:
    """N states, ``[N]`` each: ``sample`` (row of the table, int64), ``budget_ms`` (inf: no limit), ``price``."""

    sample: Tensor
    budget_ms: Tensor
    price: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: slice | Tensor) -> States:
        return States(self.sample[rows], self.budget_ms[rows], self.price[rows])


def draw_states(plan: StatePlan, outcomes: Outcomes, reference_ms: float, generator: torch.Generator) -> States:
    """One epoch of states, N = S x number of factors, S being the samples with a measured cell.

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
    return States(sample.to(device), budget.to(device), price.to(device))
