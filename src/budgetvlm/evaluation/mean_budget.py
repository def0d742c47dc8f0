"""Accuracy at a mean budget, and mean latency at equal accuracy, against the best input-blind mix of settings.

No request has a budget of its own here; only the mean counts.

Each price gives a point (mean latency, mean accuracy), and choosing at random between neighbouring prices gives the
line between their points. Which prices are worth choosing from (the hull's vertices) is picked on the tuning split,
for the blind mix of settings on the training split; what they give is measured on the evaluated split.
Shapes: S samples, P prices or settings, V vertices, R resamples; the first of ``1 + R`` is the number itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.frontier import accuracy_at, latency_at, mixing_path
from budgetvlm.evaluation.intervals import ratio
from budgetvlm.evaluation.outcomes import BLIND, GROUP, PREDICT, Outcomes
from budgetvlm.evaluation.records import AtAccuracy, AtMeanBudget, Estimate, FrontierPoint

LEAST_SAVING = 1e-3  # of a bound, below which a share of it means nothing


@dataclass(frozen=True)
class PriceSweep:
    """What a contender's choices at P prices, from high to low, gave on the tuning and on the evaluated samples."""

    prices: tuple[float, ...]
    tuning: Outcomes
    test: Outcomes


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points ``[1 + R, P]`` on the evaluated split (price None: a setting), and the vertices ``[V]`` among them.

    Attributes:
        tuned_ms: mean latency of the vertices on the split that they were picked on, ``[V]``.
    """

    prices: tuple[float | None, ...]
    latency_ms: np.ndarray
    accuracy: np.ndarray
    vertices: np.ndarray
    tuned_ms: np.ndarray

    def latency_at(self, target: np.ndarray) -> np.ndarray:
        """Mean latency at an accuracy ``[1 + R]``, in each resample at its own; NaN where it is not reached."""
        return latency_at(self.latency_ms[:, self.vertices], self.accuracy[:, self.vertices], target)

    def accuracy_at(self, budget_ms: float) -> np.ndarray:
        """Greatest mean accuracy within a mean budget ``[1 + R]``; NaN where even the fastest point takes more."""
        return accuracy_at(self.latency_ms[:, self.vertices], self.accuracy[:, self.vertices], budget_ms)

    def spent_ms(self, budget_ms: float) -> np.ndarray:
        """Mean latency on the evaluated split ``[1 + R]`` of the mix that meets a budget where it was tuned.

        Beyond the ends of the path it is that of the end.
        """
        place = np.interp(budget_ms, self.tuned_ms, np.arange(len(self.tuned_ms)))
        low = int(place)
        high = min(low + 1, len(self.tuned_ms) - 1)
        ends = self.latency_ms[:, self.vertices[[low, high]]]
        return ends @ np.array([low + 1 - place, place - low])

    def points(self, reference_ms: float) -> tuple[FrontierPoint, ...]:
        """All points in the order of the prices; a price is also given in points of accuracy per ms."""
        rank = {int(p): place for place, p in enumerate(self.vertices)}
        found = zip(self.prices, self.latency_ms[0].tolist(), self.accuracy[0].tolist(), strict=True)
        return tuple(
            FrontierPoint(price, None if price is None else price * 100.0 / reference_ms, ms, accuracy, rank.get(p))
            for p, (price, ms, accuracy) in enumerate(found)
        )


@dataclass(frozen=True, eq=False)
class MeanBudgetMetrics:
    """The frontiers of all contenders that take a price, and of the blind mix."""

    data: EvaluationData
    frontiers: dict[str, Frontier]
    options: EvaluationOptions
    full_accuracy: np.ndarray

    @classmethod
    def measure(
        cls, data: EvaluationData, options: EvaluationOptions, sweeps: Mapping[str, PriceSweep]
    ) -> MeanBudgetMetrics:
        """The frontiers of what the contenders chose without a budget (`EvaluationData.at_prices`)."""
        frontiers = {BLIND: _blind(data)} | {name: _swept(data, sweep) for name, sweep in sweeps.items()}
        full = data.bootstrap.mean(data.test.accuracy[:, -1].astype(np.float64))
        return cls(data, frontiers, options, full)

    def frontier(self, name: str) -> tuple[FrontierPoint, ...]:
        """All points, by price from high to low, or for the blind mix its vertices by latency."""
        return self.frontiers[name].points(self.data.means.reference_ms) if name in self.frontiers else ()

    def at_accuracy(self, name: str) -> tuple[AtAccuracy, ...]:
        """One record for each target; none for a contender without a frontier."""
        return tuple(self._at(name, share) for share in self.options.accuracy_shares) if name in self.frontiers else ()

    def at_mean_budget(self, name: str) -> tuple[AtMeanBudget, ...]:
        """One record for each mean budget; none for a contender without a frontier."""
        if name not in self.frontiers:
            return ()
        return tuple(self._within(name, share) for share in self.options.mean_budgets)

    def best_setting(self) -> tuple[AtMeanBudget, ...]:
        """What the best single setting gives whose mean latency on the training samples is within each budget."""
        found = []
        for share in self.options.mean_budgets:
            budget_ms, means = self.budget_ms(share), self.data.means
            fits = np.where(means.latency_ms <= budget_ms * (1 + 1e-9), means.accuracy, -np.inf)
            k = int(np.argmax(fits))
            accuracy, latency = (self.data.bootstrap.mean(cells[:, k]) for cells in _cells(self.data))
            found.append(self._record(share, accuracy, latency))
        return tuple(found)

    def budget_ms(self, share: float) -> float:
        """The mean budget in ms at a share of the way from the cheapest setting's mean latency to the slowest's."""
        means = self.data.means.latency_ms[self.data.guard.measured]
        return float(means.min() + share * (means.max() - means.min()))

    def _within(self, name: str, share: float) -> AtMeanBudget:
        frontier, budget_ms = self.frontiers[name], self.budget_ms(share)
        return self._record(share, frontier.accuracy_at(budget_ms), frontier.spent_ms(budget_ms))

    def _record(self, share: float, accuracy: np.ndarray, spent_ms: np.ndarray) -> AtMeanBudget:
        budget_ms = self.budget_ms(share)
        over = [
            accuracy - self.frontiers[other].accuracy_at(budget_ms) if other in self.frontiers else None
            for other in (BLIND, PREDICT)
        ]
        return AtMeanBudget(share, budget_ms, *map(self._estimate, (accuracy, spent_ms, *over)))

    def faster(self, name: str, other: str, share: float) -> Estimate | None:
        """One minus mean latency / another's, where both reach a share of the full setting's accuracy."""
        return self._estimate(self._saved(name, other, share))

    def _at(self, name: str, share: float) -> AtAccuracy:
        latency = self._latency(name, share)
        saved, visible = self._saved(name, BLIND, share), self._saved(GROUP, BLIND, share)
        closed = None
        if saved is not None and visible is not None and visible[0] > LEAST_SAVING:
            closed = ratio(saved, visible)
        return AtAccuracy(
            accuracy_share=share,
            target_accuracy=share * float(self.full_accuracy[0]),
            latency_ms=self._estimate(latency),
            reached_share=float(np.isfinite(latency[1:]).mean()),
            saved=self._estimate(saved),
            visible_saving_closed=self._estimate(closed),
            saved_vs_predict=self.faster(name, PREDICT, share),
        )

    def _latency(self, name: str, share: float) -> np.ndarray:
        return self.frontiers[name].latency_at(share * self.full_accuracy)

    def _saved(self, name: str, other: str, share: float) -> np.ndarray | None:
        """One minus the ratio of two contenders' latencies; None where one has no frontier."""
        if not {name, other} <= set(self.frontiers):
            return None
        return 1 - ratio(self._latency(name, share), self._latency(other, share))

    def _estimate(self, number: np.ndarray | None) -> Estimate | None:
        """None where the number is not defined or the target was not reached."""
        if number is None or not np.isfinite(number[0]):
            return None
        return self.data.bootstrap.estimate(number)


def _blind(data: EvaluationData) -> Frontier:
    """The settings on the hull of the training means, as measured on the evaluated split."""
    hull = mixing_path(data.means.latency_ms, data.means.accuracy)
    accuracy, latency = (cells[:, hull] for cells in _cells(data))
    mean = data.bootstrap.mean
    tuned_ms = data.means.latency_ms[hull]
    return Frontier((None,) * len(hull), mean(latency), mean(accuracy), np.arange(len(hull)), tuned_ms)


def _swept(data: EvaluationData, sweep: PriceSweep) -> Frontier:
    """A contender at every price; the vertices are picked on the tuning split."""
    tuned, found = sweep.tuning, sweep.test
    tuned_ms = tuned.sample_latency.mean(axis=0)
    vertices = mixing_path(tuned_ms, tuned.sample_accuracy.mean(axis=0))
    mean = data.bootstrap.mean
    return Frontier(sweep.prices, mean(found.sample_latency), mean(found.sample_accuracy), vertices, tuned_ms[vertices])


def _cells(data: EvaluationData) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and latency of the evaluated samples at every setting, ``[S, K]`` each."""
    return data.test.accuracy.astype(np.float64), data.test.latency_ms.astype(np.float64)
