"""What a benchmark says: figures with their spread, the target beside them, met or missed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        name, unit: what it is.
        median, low, high: over the runs; low and high are the smallest and the largest.
        runs: how many there were.
        at_most, at_least: the target, if there is one.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int
    at_most: float | None = None
    at_least: float | None = None

    @classmethod
    def of(
        cls, name: str, unit: str, values: Sequence[float], at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """From the value of each run."""
        low, high = min(values), max(values)
        return cls(name, unit, statistics.median(values), low, high, len(values), at_most, at_least)

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the target; None where there is none."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return None if self.at_least is None else self.median >= self.at_least

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "met": self.met}

    def __str__(self) -> str:
        target = f"at least {self.at_least or 0:g}" if self.at_most is None else f"at most {self.at_most:g}"
        verdict = "" if self.met is None else f"  {target:16} {'pass' if self.met else 'MISS'}"
        spread = f"{_short(self.low)} to {_short(self.high)}" if self.runs > 1 else ""
        return f"  {self.name:58} {_short(self.median):>9} {self.unit:10} {spread:22}{verdict}".rstrip()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def timed_s(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times_us(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each call, sorted."""
    return sorted(timed_s(call) * 1e6 for call in calls)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of sorted values lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
