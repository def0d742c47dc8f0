"""What controllers choose for the evaluated samples, by budget and by group, and which samples to show.

Shapes: S samples, P budgets, U controllers, K settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluation_data
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.evaluation.outcomes import Contender, Outcomes, outcomes
from budgetvlm.features import Features
from budgetvlm.policies import Policy, States
from budgetvlm.policies.setting_means import column_means
from budgetvlm.table import ProfileTable


@dataclass(frozen=True, eq=False)
class Choices:
    """The settings chosen, and what came of them.

    Attributes:
        table: the evaluated samples.
        shares, budgets_ms: ``[P]``.
        found: settings ``[U, P, S]`` with their accuracies and latencies.
        timed: samples whose latency was measured, bool ``[S]``.
    """

    table: ProfileTable
    shares: tuple[float, ...]
    budgets_ms: np.ndarray
    found: Outcomes
    timed: np.ndarray

    @classmethod
    def of(
        cls, table: ProfileTable, features: Features, policies: Mapping[str, Policy], options: EvaluationOptions
    ) -> Choices:
        """Let controllers choose as `budgetvlm.evaluation.evaluator` does."""
        bench = evaluation_data(table, features, options)
        budgets = np.array(options.budget_shares) * bench.expected.reference_ms
        requests = [
            States.under_budget(bench.test, bench.test_features, bench.guard, float(b), options.price) for b in budgets
        ]
        contender = Contender("controller", "controller", tuple(policies.values()), "")
        return cls(bench.test, options.budget_shares, budgets, outcomes(contender, bench.test, requests), bench.timed)

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Readable groups of samples: "kind: read" -> rows, bool ``[S]``."""
        return {
            f"{label}: {name}": np.array(self.table.groups[label]) == name
            for label, names in readable_labels(self.table).items()
            for name in names
        }

    def accuracy(self, rows: np.ndarray) -> list[float]:
        """Mean over the controllers and some samples, ``[P]``."""
        return [float(a) for a in self.found.sample_accuracy[rows].mean(axis=0)]

    def late(self, rows: np.ndarray) -> list[float | None]:
        """Share of their timed requests that took longer than the budget, ``[P]``; None where none was timed."""
        counted = rows & self.timed
        if not counted.any():
            return [None] * len(self.shares)
        return [float(v) for v in self.found.sample_violations(self.budgets_ms)[counted].mean(axis=0)]

    def values(self, knob: str, rows: np.ndarray, budget: int) -> list[float]:
        """How often each value of a knob is chosen for some samples under one budget."""
        space = self.table.knob_space
        column, count = space.names.index(knob), len(space.values(knob))
        chosen = space.value_indices[self.found.chosen[:, budget][:, rows].reshape(-1), column]
        return [float(v) for v in np.bincount(chosen, minlength=count) / max(len(chosen), 1)]

    def middle(self) -> int:
        """The budget in the middle of the grid."""
        return len(self.shares) // 2


@dataclass(frozen=True)
class Picked:
    """A sample to show: its row and why."""

    row: int
    why: str


def pick_examples(table: ProfileTable, each: int = 3) -> list[Picked]:
    """Easy samples (right at most settings, the cheapest too) and hard ones (right only at dear ones), then hopeless.

    Of every kind several images, from different groups where there are labels.

    Args:
        table: complete rows.
        each: samples of each sort.
    """
    right = table.accuracy >= 0.5
    cost = np.nan_to_num(column_means(table.latency_ms), nan=np.inf)
    cheapest = int(cost.argmin())
    least = np.where(right, cost[None, :], np.inf).min(axis=1)  # what the cheapest right setting costs
    share = right.mean(axis=1)
    solved = np.isfinite(least)
    easy = [int(i) for i in np.lexsort((np.arange(len(share)), -share)) if right[i, cheapest]]
    hard = [
        int(i) for i in np.lexsort((share, -np.where(solved, least, -np.inf))) if solved[i] and not right[i, cheapest]
    ]
    never = [int(i) for i in np.flatnonzero(~solved)]
    sorts = (("easy", easy, each), ("hard", hard, each), ("never right", never, max(1, each // 3)))
    return [Picked(row, why) for why, rows, count in sorts for row in _varied(table, rows, count)]


def _varied(table: ProfileTable, rows: Sequence[int], count: int) -> list[int]:
    """The first of ``rows`` with images and labels that were not taken yet; any, where these run out."""
    labels = list(readable_labels(table))
    images = table.groups.get("image_id", table.sample_ids)
    taken: list[int] = []
    for strict in (True, False):
        for row in rows:
            seen_images = {images[other] for other in taken}
            seen = {tuple(table.groups[name][other] for name in labels) for other in taken}
            own = tuple(table.groups[name][row] for name in labels)
            new = images[row] not in seen_images and (own not in seen or not labels) if strict else row not in taken
            if len(taken) < count and new:
                taken.append(row)
    return taken
