"""What is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.table import SPLITS

PRICES = (0.0, *np.geomspace(0.005, 10.0, 40).tolist())


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated.

    Attributes:
        split: the split that is reported.
        budget_shares: budgets as shares of the full setting's median latency on the training samples.
        room_range: budgets within it are averaged into one number (room closed).
        price: of latency while under a budget, in accuracy per reference latency; the same for all policies.
        prices: the sweep without a budget.
        accuracy_shares: targets of the second face, as shares of the full setting's accuracy.
        labels: group labels of the group lookup; it is left out where the table lacks one.
        guard_quantile: of the training latencies, the bound of each setting.
        resamples, level: of the bootstrap intervals.
        seed: of the predictor, the random policy and the bootstrap.

    Raises:
        ConfigError: anything of it cannot work; all problems at once.
    """

    split: str = "test"
    budget_shares: tuple[float, ...] = (0.35, 0.5, 0.6, 0.7, 0.85, 1.0)
    room_range: tuple[float, float] = (0.5, 0.85)
    price: float = 0.01
    prices: tuple[float, ...] = PRICES
    accuracy_shares: tuple[float, ...] = (0.98, 0.95, 0.9)
    labels: tuple[str, ...] = ("kind", "difficulty")
    guard_quantile: float = 0.95
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("this evaluation cannot be done: " + "; ".join(problems))

    @property
    def room_shares(self) -> tuple[float, ...]:
        """The budgets that are averaged: those within `room_range`, or all where there is none."""
        low, high = self.room_range
        return tuple(share for share in self.budget_shares if low <= share <= high) or self.budget_shares


def _problems(options: EvaluationOptions) -> Iterator[str]:
    if options.split not in SPLITS or options.split == "train":
        yield f"split={options.split!r} is not test or validation"
    if not options.budget_shares or not all(0 < share < np.inf for share in options.budget_shares):
        yield f"budgets {list(options.budget_shares)} are not positive shares of the full setting's latency"
    if not all(0 <= price < np.inf for price in (options.price, *options.prices)) or not options.prices:
        yield "prices must be 0 or more"
    if not all(0 < share <= 1 for share in options.accuracy_shares):
        yield f"accuracy shares {list(options.accuracy_shares)} are not within (0, 1]"
    if not 0 < options.guard_quantile <= 1:
        yield f"guard_quantile={options.guard_quantile} is outside (0, 1]"
    if options.resamples < 1 or not 0 < options.level < 1:
        yield f"resamples={options.resamples} must be 1 or more and level={options.level} within (0, 1)"
