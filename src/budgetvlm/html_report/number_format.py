"""Numbers of the report as text. Shares come as 0 to 1 and times in ms; "–" stands for what is not known."""

from __future__ import annotations

import math

from budgetvlm.evaluation.records import AtAccuracy, Estimate

UNKNOWN = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}%"


def milliseconds(time_ms: float | None) -> str:
    """A time, with three digits below one millisecond."""
    return UNKNOWN if time_ms is None else f"{time_ms:.3g} ms" if time_ms < 1 else f"{time_ms:.1f} ms"


def decimal(value: float | None, digits: int = 1) -> str:
    """A number with a fixed number of digits after the point."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:+.{digits}f}"


def share_closed(estimate: Estimate | None) -> str:
    """The part of a gain that a policy reaches, in percent."""
    return UNKNOWN if estimate is None else percent(estimate.value, 0)


def interval_points(estimate: Estimate | None) -> str:
    """The interval of a difference in accuracy, in points."""
    return "" if estimate is None else f"[{signed(100 * estimate.low)}, {signed(100 * estimate.high)}]"


def points(estimate: Estimate | None) -> str:
    """A difference in accuracy and its interval, in points; unknown where a policy is compared with itself."""
    if estimate is None or estimate.low == estimate.high == 0:
        return UNKNOWN
    return f"{signed(100 * estimate.value)} {interval_points(estimate)}"


def plus_minus(estimate: Estimate) -> str:
    """An accuracy in percent with half the width of its interval."""
    return f"{100 * estimate.value:.1f} ±{50 * (estimate.high - estimate.low):.1f}"


def reached_time(at: AtAccuracy) -> str:
    """The mean latency at an accuracy and the time saved, as far as another policy is there to compare with."""
    if at.latency_ms is None:
        return "not reached"
    text = milliseconds(at.latency_ms.value)
    itself = at.saved is None or at.saved.low == at.saved.high == 0
    return text if itself or at.saved is None else f"{text} ({signed(-100 * at.saved.value, 0)}%)"
