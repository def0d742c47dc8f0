"""What a controller takes on average at each price, and the price at which that is a given mean budget.

The curve is measured on validation samples (`budgetvlm.controller.price_sweep`), none of which has a ceiling of its
own, and lies beside the controller. Where settings are few it is a staircase: no price gives a mean between two stairs,
and the solved price is that of the step, from which feedback mixes both. Times in ms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from budgetvlm._io import read_json, time_numbers, write_json
from budgetvlm.controller.checkpoint import PRICES
from budgetvlm.errors import CheckpointError, DataError

SCHEMA_VERSION = 1
NORMAL_95 = 1.96  # standard errors on each side of a mean


@dataclass(frozen=True)
class AtPrice:
    """Means over the validation samples at one price, with their standard errors over groups of samples."""

    price: float
    latency_ms: float
    latency_se: float
    accuracy: float
    accuracy_se: float

    def __str__(self) -> str:
        (latency, *ends), unit = time_numbers(*_interval(self.latency_ms, self.latency_se))
        right, worst, best = (f"{100 * share:.1f}" for share in _interval(self.accuracy, self.accuracy_se))
        return (
            f"price {self.price:.3g}, where validation samples took {latency} [{', '.join(ends)}] {unit} on average "
            f"and {right}% [{worst}, {best}] were right"
        )


@dataclass(frozen=True)
class PriceCurve:
    """What a controller takes at each price, from low to high prices, on a number of samples."""

    points: tuple[AtPrice, ...]
    num_samples: int

    @property
    def least_ms(self) -> float:
        """The least mean that any price gives."""
        return min(point.latency_ms for point in self.points)

    @property
    def most_ms(self) -> float:
        """The mean where time costs nothing."""
        return self.points[0].latency_ms

    def best_rate(self, own_ms: float = 0.0) -> AtPrice:
        """Where a millisecond buys the most right answers, if each takes ``own_ms`` beside the model."""
        return max(self.points, key=lambda point: point.accuracy / (point.latency_ms + own_ms))

    def solve(self, mean_ms: float) -> AtPrice:
        """The lowest price at which the mean is no more than this, between two points of the curve.

        At a mean above all others it is the lowest price, and at one below all of them the highest. Means between two
        points are those of a mix of both.
        """
        within = [point.latency_ms <= mean_ms for point in self.points]
        after = within.index(True) if any(within) else len(within) - 1
        if after == 0 or not any(within):
            return self.points[after]
        low, high = self.points[after - 1], self.points[after]
        share = (low.latency_ms - mean_ms) / (low.latency_ms - high.latency_ms)
        mixed = {name: (1 - share) * value + share * asdict(high)[name] for name, value in asdict(low).items()}
        return AtPrice(**mixed | {"price": float(low.price ** (1 - share) * high.price**share)})

    def save(self, controller: Path) -> None:
        """Write it into a controller's directory. Raises OutputError."""
        write_json(controller / PRICES, {"schema_version": SCHEMA_VERSION, **asdict(self)})


def load_price_curve(controller: Path) -> PriceCurve | None:
    """The curve beside a controller (its directory or a file in it), or None. Raises CheckpointError."""
    file = (controller if controller.is_dir() else controller.parent) / PRICES
    if not file.exists():
        return None
    try:
        document: dict[str, Any] = read_json(file)
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema version {document.get('schema_version')}, this version reads {SCHEMA_VERSION}")
        points = tuple(AtPrice(**point) for point in document["points"])
        _require_curve(points)
        return PriceCurve(points, document["num_samples"])
    except (DataError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not usable ({error}); remove it, or train again") from None


def _require_curve(points: tuple[AtPrice, ...]) -> None:
    """Raise ValueError for points that are no curve: a price would be solved from them and nobody would notice."""
    numbers = [number for point in points for number in asdict(point).values()]
    if not points or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("it has no points, or one whose numbers are not finite")
    prices = [point.price for point in points]
    if prices[0] <= 0 or prices != sorted(set(prices)) or min(point.latency_ms for point in points) <= 0:
        raise ValueError("its prices do not rise from above 0, or a mean latency is not above 0")


def _interval(mean: float, error: float) -> tuple[float, float, float]:
    """A mean and its 95% interval."""
    return mean, mean - NORMAL_95 * error, mean + NORMAL_95 * error
