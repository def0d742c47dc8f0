"""Latency bounds that depend on the input, for tables: fitted, calibrated, and taken only where they are worth it."""

from __future__ import annotations

from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.table import ProfileTable


def fit_guard(table: ProfileTable, features: Features | None, quantile: float = 0.95) -> StaticGuard:
    """The guard of training samples; ``features`` are those of the table's samples, or None."""
    return StaticGuard.fit_table(table, quantile)
