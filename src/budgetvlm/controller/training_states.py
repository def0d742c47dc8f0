"""The states that training draws: which sample, which budget, which price. All tensors, nothing per row.

Shapes: S samples, K settings, N states of one epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetvlm.errors import ConfigError

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


@dataclass(frozen=True)
class StatePlan:
    """How states are drawn.

    Attributes:
        budget_factors: every sample gets one state a factor; its budget is factor x the sample's latency at a
            measured setting drawn at random.
        wide_share: share of the states that get a budget drawn uniformly from ``wide_range`` x the reference latency
            instead. Most settings are cheap, so without it large budgets would be rare.
        default_price: the price of an ordinary state.
        price_share: share of the states that get a price drawn log-uniformly from ``price_range`` instead; half of
            these have no budget, so that one controller serves both faces of the trade.

    Raises:
        ConfigError: numbers that cannot work.
    """

    budget_factors: tuple[float, ...] = (0.8, 1.0, 1.2)
    wide_share: float = 0.5
    wide_range: tuple[float, float] = (0.3, 1.3)
    default_price: float = 0.01
    price_share: float = 0.4
    price_range: tuple[float, float] = (0.01, 1.0)

    def __post_init__(self) -> None:
        problems = []
        if not self.budget_factors or not all(0 < factor < math.inf for factor in self.budget_factors):
            problems.append(f"budget_factors={self.budget_factors!r} must be positive numbers, one at least")
        if not 0 <= self.default_price < math.inf:
            problems.append(f"default_price={self.default_price!r} must be 0 or more")
        for name in ("wide_share", "price_share"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)!r} must be between 0 and 1")
        for name in ("wide_range", "price_range"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
                problems.append(f"{name}={ends!r} must be two positive numbers, the smaller first")
        if problems:
            raise ConfigError("states cannot be drawn like this: " + "; ".join(problems))

    def draw(self, outcomes: Outcomes, reference_ms: float, generator: torch.Generator) -> States:
        """One epoch of states, N = S x number of factors, S being the samples with a measured cell.

        Samples come in random order, each with all its states, so that an update passes over its features once.
        """
        rows = outcomes.measured.any(dim=1).nonzero()[:, 0]
        factors = torch.tensor(self.budget_factors)
        weights = outcomes.measured[rows].float().cpu()
        setting = torch.multinomial(weights, len(factors), replacement=True, generator=generator)
        latency = outcomes.latency_ms[rows].cpu().gather(1, setting)
        order = torch.randperm(len(rows), generator=generator)
        budget = (latency * factors)[order].reshape(-1)
        sample = rows.cpu()[order].repeat_interleave(len(factors))
        draws = torch.rand(5, len(sample), generator=generator)
        low, high = self.wide_range
        wide = (low + (high - low) * draws[1]) * reference_ms
        budget = torch.where(draws[0] < self.wide_share, wide, budget)
        low, high = self.price_range
        priced = draws[2] < self.price_share
        price = torch.where(priced, low * (high / low) ** draws[3], torch.full_like(budget, self.default_price))
        budget = torch.where(priced & (draws[4] < 0.5), torch.full_like(budget, NO_LIMIT_MS), budget)
        device = outcomes.accuracy.device
        return States(sample.to(device), budget.to(device), price.to(device))
