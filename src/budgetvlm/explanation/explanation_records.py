"""What an explanation says about one request, as frozen records; budgets, times and bounds are in ms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class BudgetContext:
    """One budget, as the guard and the controller see it.

    Attributes:
        budget_ms: of the request.
        seen_ms: what the controller is told, on the clock of the profiled machine.
        bounds_ms: of every setting ``[K]``.
    """

    budget_ms: float
    seen_ms: float
    bounds_ms: np.ndarray

    @property
    def allowed(self) -> np.ndarray:
        """The settings that the budget allows, bool ``[K]``."""
        allowed: np.ndarray = np.isfinite(self.bounds_ms) & (self.bounds_ms <= self.budget_ms)
        return allowed


@dataclass(frozen=True)
class RankedSetting:
    """A setting for this request.

    Attributes:
        predicted_accuracy: the controller's value, kept within 0 to 1.
        bound_ms: None where the controller has no bounds.
        measured_accuracy: mean accuracy of the validation samples for which the controller predicts most nearly the
            same at this setting; None without data.
    """

    setting: dict[str, float]
    index: int
    predicted_accuracy: float
    bound_ms: float | None
    allowed: bool
    measured_accuracy: float | None = None


@dataclass(frozen=True)
class Attribution:
    """How much each part of the input raises the chosen value over the mean of the other allowed ones, in accuracy.

    Attributes:
        image, question, budget: the contributions of the three parts.
        baseline: the difference for an average input.
        gap: what the integral misses; the five numbers add up to the difference for this request.
    """

    image: float
    question: float
    budget: float
    baseline: float
    gap: float

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of all contributions, whatever their direction."""
        sizes = {"image": abs(self.image), "question": abs(self.question), "budget": abs(self.budget)}
        total = sum(sizes.values())
        return {name: size / total if total > 0 else 0.0 for name, size in sizes.items()}


@dataclass(frozen=True)
class NearestCase:
    """A training sample that looks alike to the controller.

    Attributes:
        similarity: mean cosine of the standardised image and question features, -1 to 1.
        accuracy: measured at the setting that was chosen for the request; None where it was not measured.
        cheapest_right: the setting with the least latency among those that were right on it; None if none was.
    """

    sample_id: str
    similarity: float
    labels: dict[str, str]
    accuracy: float | None
    cheapest_right: dict[str, float] | None


@dataclass(frozen=True)
class Explanation:
    """Why a setting is chosen for one request.

    Attributes:
        feasible: whether the budget allows any setting. allowed, settings: how many it allows, of how many.
        choice, next_best: the chosen setting, and the next allowed ones by value.
        budgets: what would be chosen at other budgets, by their factor of this one.
        without: what would be chosen if one part of the input said nothing.
        parts: which part of the input mattered; None where the budget leaves no choice.
        nearest: the most similar training cases; empty without data.
    """

    budget_ms: float
    feasible: bool
    allowed: int
    settings: int
    choice: RankedSetting
    next_best: tuple[RankedSetting, ...]
    budgets: dict[float, RankedSetting]
    without: dict[str, RankedSetting]
    parts: Attribution | None
    nearest: tuple[NearestCase, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The explanation as a JSON document."""
        document = asdict(self)
        document["budgets"] = [
            {"factor": factor, "budget_ms": factor * self.budget_ms, **asdict(ranked)}
            for factor, ranked in self.budgets.items()
        ]
        if self.parts is not None:
            document["parts"]["shares"] = self.parts.shares
        return document
