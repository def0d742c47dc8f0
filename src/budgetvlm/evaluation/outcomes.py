"""What happens when policies choose: the accuracy and latency cells of the chosen settings.

Shapes: S samples, K settings, P budgets or prices, U runs (seeds) of one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from budgetvlm.evaluation.intervals import Bootstrap
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard, timed_rows
from budgetvlm.policies import Policy, States
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

# Names of the contenders that others are compared with.
LOOKUP, PREDICT, GROUP, ORACLE, BLIND = "lookup table", "predict + argmax", "group lookup", "oracle", "best blind mix"


@dataclass(frozen=True)
class Contender:
    """A policy under test, as one run or several whose outcomes are averaged (a seed drawn at random for a request).

    Attributes:
        priced: it takes a price and so has a frontier.
        charged_expected: it pays each setting's mean latency, so that hindsight cannot profit from timing noise.
    """

    name: str
    role: str
    runs: tuple[Policy, ...]
    note: str
    priced: bool = False
    charged_expected: bool = False


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """The data all contenders share. ``test`` and ``tuning`` hold samples measured at every setting.

    Without features only policies that read none can choose.
    """

    train: ProfileTable
    tuning: ProfileTable
    test: ProfileTable
    train_features: Features | None
    tuning_features: Features | None
    test_features: Features | None
    tuning_split: str
    left_out: int
    expected: SettingMeans
    guard: StaticGuard
    bootstrap: Bootstrap

    @property
    def measured(self) -> np.ndarray:
        """Settings that were measured, bool ``[K]``."""
        return self.expected.measured & self.guard.measured

    @cached_property
    def test_means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean accuracy and mean latency of each setting on the evaluated samples, float64 ``[K]`` each."""
        return self.test.accuracy.mean(axis=0, dtype=np.float64), self.test.latency_ms.mean(axis=0, dtype=np.float64)

    @cached_property
    def timed(self) -> np.ndarray:
        """Evaluated samples whose violations are counted, bool ``[S]``: those that were timed, or all if none was."""
        timed = timed_rows(self.test)
        return timed if timed.any() else np.ones_like(timed)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "train_samples": self.train.num_samples,
            "tuning_samples": self.tuning.num_samples,
            "evaluated_samples": self.test.num_samples,
            "evaluated_timed": int(timed_rows(self.test).sum()),
            "evaluated_images": self.bootstrap.num_images,
            "left_out_incomplete": self.left_out,
            "settings": int(self.measured.sum()),
        }


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Chosen settings ``[U, P, S]`` with their accuracy and latency in ms, float64 ``[U, P, S]``."""

    chosen: np.ndarray
    accuracy: np.ndarray
    latency_ms: np.ndarray

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
        over = self.latency_ms > budgets_ms[None, :, None]
        return over.mean(axis=0).T


def outcomes(contender: Contender, table: ProfileTable, requests: Sequence[States]) -> Outcomes:
    """Let every run of a contender choose for P lists of requests, each of them all S samples in order."""
    chosen = np.stack([[run.choose(states) for states in requests] for run in contender.runs])
    rows = np.arange(table.num_samples)
    latency = table.latency_ms.astype(np.float64)
    if contender.charged_expected:
        latency = np.broadcast_to(latency.mean(axis=0), latency.shape)
    return Outcomes(chosen, table.accuracy.astype(np.float64)[rows, chosen], latency[rows, chosen])
