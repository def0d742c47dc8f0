"""What an evaluation measures, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.policies.budget_grid import BUDGET_SHARES

MEAN_BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)  # from the cheapest setting's mean latency to the slowest's
PRICE_SWEEP = (0.0, *np.geomspace(0.005, 10.0, 40).tolist())


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        split: the split that is reported.
        budget_shares: budgets as shares of the full setting's median latency on the training samples; where the usual
            ones leave nobody a choice, others are taken from the bounds.
        room_range: the budgets within this range are averaged into one number (room closed).
        price: accuracy given for one latency of the full setting while under a budget, the same for all policies.
        prices: the prices that are swept without a budget.
        mean_budgets: budgets on the mean latency, as shares of the way from the cheapest setting's mean latency on the
            training samples to the slowest's.
        mean_budget_ms: budgets on the mean latency in ms, in place of these shares.
        ceiling: what each request may take beside a mean budget and at equal accuracy, as a share of the full setting's
            median latency; None: whatever it takes.
        accuracy_shares: targets for the mean latency at equal accuracy, as shares of the accuracy of the setting that
            is best on the training samples, usually the full one.
        labels: labels that define the groups of the group lookup, as far as the table has them; where it has
            none, the group lookup is left out.
        guard_quantile: the quantile of the training latencies that bounds each setting.
        resamples: number of bootstrap resamples.
        level: of the bootstrap intervals.
        seed: seeds the predictor, the random policy and the bootstrap.

    Raises:
        ConfigError: some options cannot work; the message lists all of them.
    """

    split: str = "test"
    budget_shares: tuple[float, ...] = BUDGET_SHARES
    room_range: tuple[float, float] = (0.5, 0.85)
    price: float = 0.01
    prices: tuple[float, ...] = PRICE_SWEEP
    mean_budgets: tuple[float, ...] = MEAN_BUDGETS
    mean_budget_ms: tuple[float, ...] | None = None
    ceiling: float | None = None
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
        """The budgets that are averaged: those within `room_range`, or all of them if none is."""
        low, high = self.room_range
        return tuple(share for share in self.budget_shares if low <= share <= high) or self.budget_shares

    @property
    def swept(self) -> tuple[float, ...]:
        """The prices that are swept, from high to low."""
        return tuple(sorted(self.prices, reverse=True))


def _problems(options: EvaluationOptions) -> Iterator[str]:
    if options.split not in ("test", "validation"):
        yield f"split={options.split!r} is not test or validation"
    if not options.budget_shares or not all(0 < share < np.inf for share in options.budget_shares):
        yield f"budgets {list(options.budget_shares)} are not positive shares of the full setting's latency"
    if not all(0 <= price < np.inf for price in (options.price, *options.prices)) or not options.prices:
        yield "prices must be 0 or more"
    if not all(0 <= share <= 1 for share in options.mean_budgets):
        yield (
            f"mean budgets {list(options.mean_budgets)} are not shares of the way from the cheapest setting's mean "
            "latency (0) to the slowest's (1)"
        )
    if not all(0 < ms < np.inf for ms in options.mean_budget_ms or ()):
        yield f"mean budgets {list(options.mean_budget_ms or ())} are not positive numbers of ms"
    if options.ceiling is not None and not 0 < options.ceiling < np.inf:
        yield f"ceiling={options.ceiling} is not a positive share of the full setting's latency"
    if not all(0 < share <= 1 for share in options.accuracy_shares):
        yield f"accuracy shares {list(options.accuracy_shares)} are not within (0, 1]"
    if not 0 < options.guard_quantile <= 1:
        yield f"guard_quantile={options.guard_quantile} is outside (0, 1]"
    if options.resamples < 1 or not 0 < options.level < 1:
        yield f"resamples={options.resamples} must be 1 or more and level={options.level} within (0, 1)"
