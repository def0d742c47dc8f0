"""Numbers of the report as text. Shares come as 0 to 1 and times in ms; "–" stands for what is not known."""

from __future__ import annotations

import math

from budgetvlm._io import time_text
from budgetvlm.evaluation.records import Estimate
from budgetvlm.evaluation.text_tables import UNKNOWN


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}%"


def milliseconds(time_ms: float | None) -> str:
    """A time with its unit."""
    return UNKNOWN if time_ms is None else time_text(time_ms)


def decimal(value: float | None, digits: int = 1) -> str:
    """A number with a fixed number of digits after the point."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:+z.{digits}f}"


def interval_points(estimate: Estimate | None) -> str:
    """The interval of a difference in accuracy, in points."""
    return "" if estimate is None else f"[{signed(100 * estimate.low)}, {signed(100 * estimate.high)}]"
