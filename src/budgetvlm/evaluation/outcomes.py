"""What happens when policies choose: the accuracy and latency cells of the chosen settings.

Shapes: S samples, P budgets or prices, U runs (seeds) of one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.policies import Policy, States
from budgetvlm.table import ProfileTable

# Names of the contenders that others are compared with.
LOOKUP, PREDICT, GROUP, ORACLE, BLIND = "lookup table", "predict + argmax", "group lookup", "oracle", "best blind mix"
BEST_SETTING, OWN = "best single setting", "own controllers"
BEST_SETTING_NOTE = "the most accurate on the training samples of those whose mean latency there is within the budget"
OWN_NOTE = "one controller for each data set, which sees no other; no request tells which it is of"
BLIND_NOTE = "settings drawn at random, whatever the input; picked on the training samples"


@dataclass(frozen=True)
class Contender:
    """A policy under test, as one run or several whose outcomes are averaged (as if each request drew a seed).

    Attributes:
        role: "controller", "run" (one of the controller's), "baseline", "labels" (knows the true ones) or "bound".
        priced: whether it takes a price and so has a frontier.
        charged_expected: whether it pays each setting's mean latency, so that hindsight cannot profit from timing
            noise.
    """

    name: str
    role: str
    runs: tuple[Policy, ...]
    note: str
    priced: bool = False
    charged_expected: bool = False


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of the choices for U runs, P budgets or prices and S samples, all ``[U, P, S]``.

    Attributes:
        chosen: settings, int. accuracy: of the chosen cells.
        latency_ms: what is charged for them. measured_ms: what they took, by which they are late.
    """

    chosen: np.ndarray
    accuracy: np.ndarray
    latency_ms: np.ndarray
    measured_ms: np.ndarray

    @classmethod
    def look_up(cls, table: ProfileTable, chosen: np.ndarray, charged_expected: bool = False) -> Outcomes:
        """The cells of the settings chosen ``[U, P, S]`` for the S samples of a table."""
        rows = np.arange(table.num_samples)
        latency = table.latency_ms.astype(np.float64)
        measured = latency[rows, chosen]
        charged = latency.mean(axis=0)[chosen] if charged_expected else measured
        return cls(chosen, table.accuracy.astype(np.float64)[rows, chosen], charged, measured)

    @property
    def sample_accuracy(self) -> np.ndarray:
        """Mean over the runs, ``[S, P]``."""
        return self.accuracy.mean(axis=0).T

    @property
    def sample_latency(self) -> np.ndarray:
        """Mean over the runs in ms, ``[S, P]``."""
        return self.latency_ms.mean(axis=0).T

    def sample_violations(self, budgets_ms: np.ndarray) -> np.ndarray:
        """Share of the runs whose latency exceeds the budget ``[P]``, ``[S, P]``."""
        over = self.measured_ms > budgets_ms[None, :, None]
        return over.mean(axis=0).T


def outcomes(contender: Contender, requests: Sequence[States]) -> Outcomes:
    """Let every run of a contender choose for P lists of requests, each about all S samples of one table in order."""
    chosen = np.stack([[run.choose(states) for states in requests] for run in contender.runs])
    return Outcomes.look_up(requests[0].table, chosen, contender.charged_expected)
