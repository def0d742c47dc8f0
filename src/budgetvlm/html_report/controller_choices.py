"""What controllers choose for the evaluated samples, by budget and by group of samples.

Shapes: S samples, P budgets, U controllers, K settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.evaluation.outcomes import Contender, Outcomes, outcomes
from budgetvlm.features import Features
from budgetvlm.policies import Policy
from budgetvlm.table import ProfileTable


@dataclass(frozen=True, eq=False)
class ControllerChoices:
    """The chosen settings and their outcomes.

    Attributes:
        table: the evaluated samples.
        shares: budgets as shares of the full setting's latency, ``P`` of them.
        budgets_ms: the same in ms, float64 ``[P]``.
        outcomes: settings, accuracies and latencies, each ``[U, P, S]``.
        timed: samples whose latency was measured, bool ``[S]``.
        groups: readable groups such as "kind: read" with their samples, bool ``[S]``.
    """

    table: ProfileTable
    shares: tuple[float, ...]
    budgets_ms: np.ndarray
    outcomes: Outcomes
    timed: np.ndarray
    groups: dict[str, np.ndarray]

    @property
    def middle(self) -> int:
        """The index of the budget in the middle."""
        return len(self.shares) // 2


def choices_of(
    table: ProfileTable, features: Features, policies: Mapping[str, Policy], options: EvaluationOptions
) -> ControllerChoices:
    """Let controllers choose as in `budgetvlm.evaluation.evaluator`."""
    data = EvaluationData.of(table, features, options)
    contender = Contender("controller", "controller", tuple(policies.values()), "")
    groups = {
        f"{label}: {name}": np.array(data.test.groups[label]) == name
        for label, names in readable_labels(data.test).items()
        for name in names
    }
    shares = options.budget_shares
    chosen = outcomes(contender, data.under_budgets(shares, options.price))
    return ControllerChoices(data.test, shares, data.budgets_ms(shares), chosen, data.timed, groups)


def mean_accuracy(choices: ControllerChoices, rows: np.ndarray) -> list[float]:
    """Mean accuracy of some samples over the controllers, for each budget."""
    return [float(a) for a in choices.outcomes.sample_accuracy[rows].mean(axis=0)]


def late_share(choices: ControllerChoices, rows: np.ndarray) -> list[float | None]:
    """Share of the timed requests that exceeded each budget; None where no request was timed."""
    counted = rows & choices.timed
    if not counted.any():
        return [None] * len(choices.shares)
    return [float(v) for v in choices.outcomes.sample_violations(choices.budgets_ms)[counted].mean(axis=0)]


def value_shares(choices: ControllerChoices, knob: str, rows: np.ndarray, budget: int) -> list[float]:
    """How often each value of a knob is chosen for some samples under one budget."""
    space = choices.table.knob_space
    column, count = space.names.index(knob), len(space.values(knob))
    chosen = space.value_indices[choices.outcomes.chosen[:, budget][:, rows].reshape(-1), column]
    return [float(v) for v in np.bincount(chosen, minlength=count) / max(len(chosen), 1)]
