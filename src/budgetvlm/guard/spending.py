"""Holds the mean latency of requests at a budget, by the price of a millisecond.

Each request adds what it took beyond the budget to a debt, a virtual queue as in drift-plus-penalty control (Neely
2010), and the log of the price moves with the debt: a system that has spent too much buys accuracy only where it is
cheap, until the debt is paid; one that has time left spends it. Over any T requests the mean differs from the budget by
(change of the debt) / T, whatever the requests are, as long as some price meets the budget. The first requests move the
price further than later ones do, so that a wrong first price is soon left.
"""

from __future__ import annotations

import math
import threading

from budgetvlm._io import ROUNDING, time_text, time_text_up
from budgetvlm.errors import ConfigError

PATIENCE = 5.0  # budgets of debt that multiply the price by e
FIRST_PATIENCE, NUM_FIRST = 1.0, 40  # the same at the first request, and over how many it grows
SETTLING_RATE = 0.02  # share of the debt that moves the price once more with each request, until it is paid
LARGEST_CHANGE = 3.0  # of the price's log by one request, which may be an outlier
LOWEST_PRICE, HIGHEST_PRICE = 1e-4, 100.0  # beyond them no setting changes any more
LARGEST_DEBT = 20.0  # budgets; one that nothing meets builds up no more than this


class Spending:
    """See the module. Threads may share it.

    Attributes:
        price: accuracy for one latency of the full setting, for the next request.
        debt: what finished requests took beyond the budget, in budgets; negative: less.

    Args:
        mean_budget_ms: what requests may take on average.
        start_price: accuracy for one latency of the full setting, to begin with.
        settled: the start was solved for this budget, so that already the first requests move it as little as later
            ones do.

    Raises:
        ConfigError: a budget that is not a positive number of ms.
    """

    def __init__(self, mean_budget_ms: float, start_price: float, *, settled: bool = False) -> None:
        require_mean_budget(mean_budget_ms)
        self.mean_budget_ms = float(mean_budget_ms)
        self.price = _limited(start_price, LOWEST_PRICE, HIGHEST_PRICE)
        self.debt = 0.0
        self._count = NUM_FIRST if settled else 0
        self._lock = threading.Lock()

    def add(self, latency_ms: float) -> None:
        """Count a finished request."""
        over = latency_ms / self.mean_budget_ms - 1.0
        with self._lock:
            self.debt = _limited(self.debt + over, -LARGEST_DEBT, LARGEST_DEBT)
            patience = FIRST_PATIENCE + (PATIENCE - FIRST_PATIENCE) * min(self._count / NUM_FIRST, 1.0)
            change = _limited(over / patience, -LARGEST_CHANGE, LARGEST_CHANGE) + SETTLING_RATE * self.debt / PATIENCE
            self.price = _limited(self.price * math.exp(change), LOWEST_PRICE, HIGHEST_PRICE)
            self._count += 1


def require_mean_budget(mean_budget_ms: float, least_ms: float = 0.0) -> None:
    """Raise ConfigError for one that is not a positive number of ms, or below the least possible mean."""
    if not 0 < mean_budget_ms < math.inf:
        raise ConfigError(f"mean_budget_ms={mean_budget_ms!r} is not a positive number of ms; give one, such as 50")
    if mean_budget_ms < least_ms * (1 - ROUNDING):
        raise ConfigError(
            f"a mean budget of {mean_budget_ms:g} ms cannot be met: even the cheapest setting takes "
            f"{time_text(least_ms)} on average. Give {time_text_up(least_ms)} or more"
        )


def _limited(number: float, least: float, most: float) -> float:
    return max(least, min(number, most))
