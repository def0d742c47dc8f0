"""What an evaluation found: frozen records, one JSON document, tables for people.

All accuracies are shares (0 to 1), all times ms. "Not reached" and "not defined" are None.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SettingShare:
    """How often a setting was chosen, as a share of the requests."""

    setting: dict[str, Any]
    share: float


@dataclass(frozen=True)
class AtBudget:
    """One policy under one budget. ``vs_lookup`` is the paired difference in accuracy from the lookup table."""

    budget_share: float
    budget_ms: float
    accuracy: Estimate
    vs_lookup: Estimate
    mean_ms: Estimate
    p50_ms: float
    p95_ms: float
    violation_rate: Estimate
    settings: tuple[SettingShare, ...]


@dataclass(frozen=True)
class Room:
    """One policy over the budgets where adapting can pay, as means over them.

    Attributes:
        accuracy_gain: accuracy minus the lookup table's.
        room_closed: the gain as a share of the oracle's (hindsight, partly luck).
        visible_room_closed: the gain as a share of the group lookup's.
        vs_predict: accuracy minus that of predict + argmax.
        violation_rate, violations_vs_lookup: latency above the budget.
    """

    accuracy_gain: Estimate
    room_closed: Estimate | None
    visible_room_closed: Estimate | None
    vs_predict: Estimate | None
    violation_rate: Estimate
    violations_vs_lookup: Estimate


@dataclass(frozen=True)
class FrontierPoint:
    """One price, without a budget. ``vertex``: its place on the path picked on the tuning split, None if not on it."""

    price: float | None
    price_points_per_ms: float | None
    latency_ms: float
    accuracy: float
    vertex: int | None


@dataclass(frozen=True)
class AtAccuracy:
    """Mean latency where a policy reaches a share of the full setting's accuracy; None where it does not.

    Attributes:
        reached_share: share of the resamples in which the target was reached; intervals are over these.
        saved: one minus latency / that of the best input-blind mix.
        visible_saving_closed: ``saved`` as a share of the group lookup's.
        saved_vs_predict: one minus latency / that of predict + argmax.
    """

    accuracy_share: float
    target_accuracy: float
    latency_ms: Estimate | None
    reached_share: float
    saved: Estimate | None
    visible_saving_closed: Estimate | None
    saved_vs_predict: Estimate | None


@dataclass(frozen=True)
class PolicyResult:
    """All that was found of one policy. ``role``: "controller", "run" (one of several), "baseline" or "bound"."""

    name: str
    role: str
    runs: int
    note: str
    at_budget: tuple[AtBudget, ...] = ()
    room: Room | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    at_accuracy: tuple[AtAccuracy, ...] = ()

    @property
    def vertices(self) -> tuple[FrontierPoint, ...]:
        """The path of the frontier, from cheap to dear on the tuning split."""
        on_path = (point for point in self.frontier if point.vertex is not None)
        return tuple(sorted(on_path, key=lambda point: point.vertex or 0))


@dataclass(frozen=True)
class EvaluationReport:
    """The whole evaluation.

    Attributes:
        split, tuning_split: where policies were measured, and where hulls were picked and training was stopped.
        counts: samples and images by split, how many evaluated samples were left out as incomplete, and how many were
            timed; violations are counted over these (over all if none was), the rest has predicted latencies.
        latency_reference_ms: the full setting's median latency on the training samples.
        full_accuracy: of the full setting on the evaluated split.
        room_budget_shares: the budgets that `Room` averages over.
        statics: latency and accuracy of every measured setting on the evaluated split.
    """

    split: str
    tuning_split: str
    counts: dict[str, int]
    latency_reference_ms: float
    full_accuracy: float
    room_budget_shares: tuple[float, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    knobs: dict[str, list[int | float]]
    guard: dict[str, Any]
    statics: tuple[FrontierPoint, ...]
    policies: tuple[PolicyResult, ...]
    schema_version: int = SCHEMA_VERSION

    def policy(self, name: str) -> PolicyResult | None:
        """The result of this name, if there is one."""
        return next((result for result in self.policies if result.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; NaN becomes None."""
        document: dict[str, Any] = plain(dataclasses.asdict(self))
        return document

    def table(self) -> str:
        """All tables as plain text."""
        from budgetvlm.evaluation.text_tables import plain_text

        return plain_text(self)

    def plot(self, path: str | Path) -> None:
        """Draw both faces into a PNG file. Raises OutputError if it cannot be written."""
        from budgetvlm.evaluation.plots import plot_evaluation

        plot_evaluation(self, path)


def plain(value: Any) -> Any:
    """A value with tuples as lists, keys as strings and None for NaN and infinity: what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
