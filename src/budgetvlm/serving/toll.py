"""What a millisecond costs while others wait, as the price that requests are answered at.

A request that keeps a replica for one more millisecond delays everyone who waits and everyone who comes before the
queue is empty. Its price is what they lose by it, as the toll of a busy road is (Pigou 1920; Naor 1969). Accuracy grows
about as the logarithm of the time that a request may take, so one that has t ms to spare loses about ``worth / t`` with
each. Those who wait are known, and as many are expected to come as were there lately on average. So the price is

    worth * (sum over those who wait of reference / spare  +  its recent mean, with those under way) / replicas,

in accuracy for one latency of the full setting; the mean counts nobody while a replica is free, because who comes then
is not delayed. It is never below the controller's own price, and never above that at
which a millisecond buys the most right answers: to hurry further gains less than to serve fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the server's own process does without PyTorch
    from budgetvlm.controller.price_curve import PriceCurve

MEMORY = 30.0  # latencies of the full setting over which the recent mean is taken
MOST_PRESSING = 4.0  # of reference / spare: one that is nearly late has not much more to lose


@dataclass(frozen=True)
class Worth:
    """What time is worth to a controller.

    Attributes:
        reference_ms: latency of the full setting, on this machine.
        default_price: where nobody waits.
        highest_price: at which a millisecond buys the most right answers.
        worth: accuracy that a request gains where it may take e times as long; 0: the price is always the default.
        pace: mean time at the highest price / mean time of the fastest setting.
    """

    reference_ms: float
    default_price: float = 0.01
    highest_price: float = 3.0
    worth: float = 1 / 3
    pace: float = 1.25

    @classmethod
    def of(cls, curve: PriceCurve | None, reference_ms: float, default_price: float, own_ms: float = 0.0) -> Worth:
        """From a controller's price curve; without one, about what the bundled controller's curve says.

        ``own_ms``: what a request takes beside the model.
        """
        if curve is None or curve.most_ms <= curve.least_ms:
            return cls(reference_ms, default_price)
        best, fastest = curve.best_rate(own_ms), min(curve.points, key=lambda point: point.latency_ms)
        gained = (curve.points[0].accuracy - fastest.accuracy) / math.log(curve.most_ms / curve.least_ms)
        pace = (best.latency_ms + own_ms) / (fastest.latency_ms + own_ms)
        return cls(reference_ms, default_price, best.price, max(gained, 0.0), pace)

    def fixed(self, price: float) -> Worth:
        """The same price whoever waits."""
        return replace(self, default_price=price, highest_price=price, worth=0.0)


class Toll:
    """See the module. The clock is handed in, in seconds."""

    def __init__(self, worth: Worth) -> None:
        self.worth = worth
        self._mean = self._pressure = self._at_s = 0.0

    def pressing(self, spare_s: Iterable[float]) -> float:
        """The sum of reference / spare over requests with so much time to spare."""
        reference_s = self.worth.reference_ms / 1e3
        return sum(min(reference_s / spare, MOST_PRESSING) if spare > 0 else MOST_PRESSING for spare in spare_s)

    def note(self, spare_s: Iterable[float], now_s: float) -> None:
        """Count who is there from now on, waiting or under way, with so much time to spare."""
        self._mean = self._mean_at(now_s)
        self._at_s, self._pressure = now_s, self.pressing(spare_s)

    def price(self, spare_s: Iterable[float], replicas: int, now_s: float) -> float:
        """What is paid by a request that starts now, where others wait on with this to spare."""
        delayed = self.pressing(spare_s) + self._mean_at(now_s)
        asked = self.worth.worth * delayed / max(replicas, 1)
        return max(self.worth.default_price, min(asked, self.worth.highest_price))

    def _mean_at(self, now_s: float) -> float:
        passed = max(now_s - self._at_s, 0.0) * 1e3
        kept = math.exp(-passed / (MEMORY * self.worth.reference_ms))
        return kept * self._mean + (1 - kept) * self._pressure
