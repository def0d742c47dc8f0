"""What an evaluation found, as frozen records that become one JSON document.

All accuracies are shares (0 to 1), all times are in ms. What is not reached or not defined is None.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 2
SUFFIXES = {"bound": " (bound)", "labels": " (true labels)"}  # of the names of policies that know more than a request


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
    """What one policy gains, averaged over the budgets where adapting can pay.

    Attributes:
        accuracy_gain: accuracy minus the lookup table's.
        room_closed: the gain as a share of the oracle's (hindsight, partly luck). It and the next are None where what
            they are a share of is not clearly above zero.
        visible_room_closed: the gain as a share of the group lookup's, which knows the true labels.
        vs_predict: accuracy minus that of predict + argmax.
        violation_rate: share of the requests over their budget. violations_vs_lookup: that minus the lookup table's.
    """

    accuracy_gain: Estimate
    room_closed: Estimate | None
    visible_room_closed: Estimate | None
    vs_predict: Estimate | None
    violation_rate: Estimate
    violations_vs_lookup: Estimate


@dataclass(frozen=True)
class OnDataset:
    """One policy on the evaluated samples of one data set, mean over the room budgets.

    ``vs_own``: paired difference in accuracy from a controller of the data set's own; None where there is none.
    """

    dataset: str
    samples: int
    accuracy: Estimate
    vs_own: Estimate | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """What a policy does at one price, without a budget.

    ``vertex`` is its place on the path that was picked on the tuning split; None where it does not lie on it.
    """

    price: float | None
    price_points_per_ms: float | None
    latency_ms: float
    accuracy: float
    vertex: int | None


@dataclass(frozen=True)
class AtAccuracy:
    """Mean latency where a policy reaches a share of the best setting's accuracy; None where it does not.

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
class AtMeanBudget:
    """One policy at one budget on the mean latency, which it spends by mixing neighbouring prices (or settings).

    Attributes:
        budget_share: see `EvaluationOptions.mean_budgets`.
        accuracy: where the mean latency on the evaluated samples is the budget, as feedback makes it at run time; None
            where even the least is more.
        spent_ms: mean latency there of the mix that meets the budget on the tuning split, without feedback.
        vs_blind, vs_predict, vs_setting, vs_oracle: paired difference in accuracy from the best blind mix, from predict
            + argmax, from the best single setting, from the oracle.
        missed: ``spent_ms`` / the budget, less one; None where the policy makes no use of so much time.
        solved_accuracy: that of the same mix.
    """

    budget_share: float
    budget_ms: float
    accuracy: Estimate | None
    spent_ms: Estimate | None
    vs_blind: Estimate | None
    vs_predict: Estimate | None
    vs_setting: Estimate | None = None
    vs_oracle: Estimate | None = None
    missed: Estimate | None = None
    solved_accuracy: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """What any report says about one policy; see `Contender` for its role.

    ``on_dataset``: of each data set, where there are several.
    """

    name: str
    role: str
    runs: int
    note: str
    at_budget: tuple[AtBudget, ...] = ()
    room: Room | None = None
    at_accuracy: tuple[AtAccuracy, ...] = ()
    at_mean_budget: tuple[AtMeanBudget, ...] = ()
    on_dataset: tuple[OnDataset, ...] = ()

    @property
    def full_name(self) -> str:
        """The name as tables and pictures show it."""
        return f"{self.name}{SUFFIXES.get(self.role, '')}"

    @property
    def knows_more(self) -> bool:
        """Whether it knows what no request tells, so that it does not compete."""
        return self.role in SUFFIXES

    @property
    def first_latency(self) -> Estimate | None:
        """Mean latency at the first accuracy target; None where it is not reached or the policy takes no price."""
        return self.at_accuracy[0].latency_ms if self.at_accuracy else None


@dataclass(frozen=True, kw_only=True)
class PolicyResult(PolicyFigures):
    """Everything that an evaluation found about one policy."""

    frontier: tuple[FrontierPoint, ...] = ()

    @property
    def vertices(self) -> tuple[FrontierPoint, ...]:
        """The path of the frontier, from the lowest latency to the highest accuracy on the tuning split."""
        on_path = (point for point in self.frontier if point.vertex is not None)
        return tuple(sorted(on_path, key=lambda point: point.vertex or 0))


@dataclass(frozen=True, kw_only=True)
class HeldOutReport:
    """What reports of an evaluation and of a comparison have in common.

    Attributes:
        split: where policies were measured.
        unit: what a unit is called whose samples are drawn together for the intervals: "image", "document", "sample".
        counts: numbers of samples by split and of units, of evaluated samples left out as incomplete, and of those
            that were timed; violations are counted over the timed ones (over all if none was).
        latency_reference_ms: the full setting's median latency on the training samples.
        full_accuracy: of the full setting on the evaluated split.
        best_setting, best_accuracy: the most accurate setting on the training samples, and its accuracy on the
            evaluated split; accuracy targets are shares of it. The setting is None where it is the full one.
        room_budget_shares: the budgets that `Room` averages over.
        notes: sentences about what the figures cannot say.
    """

    split: str
    unit: str
    counts: dict[str, int]
    latency_reference_ms: float
    full_accuracy: float
    best_setting: dict[str, Any] | None
    best_accuracy: float
    room_budget_shares: tuple[float, ...]
    notes: tuple[str, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def accuracy_of(self) -> str:
        """Whose accuracy the targets are shares of."""
        return "the full setting's" if self.best_setting is None else "the best setting's"

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; NaN becomes None, and of a single data set nothing is said apart."""

        def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in pairs if name != "on_dataset" or value}

        document: dict[str, Any] = plain(dataclasses.asdict(self, dict_factory=fields))
        return document


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(HeldOutReport):
    """The whole evaluation.

    Attributes:
        tuning_split: where hulls were picked and training was stopped.
        statics: latency and accuracy of every measured setting on the evaluated split.
    """

    tuning_split: str
    knobs: dict[str, list[int | float]]
    guard: dict[str, Any]
    statics: tuple[FrontierPoint, ...]
    policies: tuple[PolicyResult, ...]

    def policy(self, name: str) -> PolicyResult | None:
        """The result of this name, if there is one."""
        return next((result for result in self.policies if result.name == name), None)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: tuples become lists, keys strings, and NaN and infinity None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def build(kind: Any, value: Any) -> Any:
    """Convert a value of a JSON document into a field's type; None becomes NaN where a number is expected.

    Raises:
        ValueError: a record lacks a field; the message names both.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and type(None) in arguments:
        return None if value is None else build(arguments[0], value)
    if dataclasses.is_dataclass(kind):
        needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in needed if name not in value]
        if missing:
            raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")  # type: ignore[union-attr]
        hints = typing.get_type_hints(kind)
        known = {name: build(hint, value[name]) for name, hint in hints.items() if name in value}
        return kind(**known)  # type: ignore[operator]
    if origin is tuple:
        return tuple(build(arguments[0], item) for item in value)
    return (math.nan if value is None else float(value)) if kind is float else value
