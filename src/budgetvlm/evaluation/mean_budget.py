"""Mean latency at equal accuracy, without a budget for each request, against the best input-blind mix of settings.

Each price gives a point (mean latency, mean accuracy), and choosing at random between neighbouring prices gives the
line between their points. Which prices are worth choosing from (the hull's vertices) is picked on the tuning split,
for the blind mix of settings on the training split; what they give is measured on the evaluated split.
Shapes: S samples, P prices or settings, V vertices, R resamples; the first of ``1 + R`` is the number itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.frontier import latency_at, mixing_path
from budgetvlm.evaluation.intervals import ratio
from budgetvlm.evaluation.outcomes import BLIND, GROUP, PREDICT, Outcomes
from budgetvlm.evaluation.records import AtAccuracy, Estimate, FrontierPoint

LEAST_SAVING = 1e-3  # of a bound, below which a share of it means nothing


@dataclass(frozen=True)
class PriceSweep:
    """What a contender's choices at P prices, from high to low, gave on the tuning and on the evaluated samples."""

    prices: tuple[float, ...]
    tuning: Outcomes
    test: Outcomes


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points ``[1 + R, P]`` on the evaluated split (price None: a setting), and the vertices ``[V]`` among them."""

    prices: tuple[float | None, ...]
    latency_ms: np.ndarray
    accuracy: np.ndarray
    vertices: np.ndarray

    def latency_at(self, target: np.ndarray) -> np.ndarray:
        """Mean latency at an accuracy ``[1 + R]``, in each resample at its own; NaN where it is not reached."""
        return latency_at(self.latency_ms[:, self.vertices], self.accuracy[:, self.vertices], target)

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
    accuracy_shares: tuple[float, ...]
    full_accuracy: np.ndarray

    @classmethod
    def measure(
        cls, data: EvaluationData, accuracy_shares: Sequence[float], sweeps: Mapping[str, PriceSweep]
    ) -> MeanBudgetMetrics:
        """The frontiers of what the contenders chose without a budget (`EvaluationData.at_prices`)."""
        frontiers = {BLIND: _blind(data)} | {name: _swept(data, sweep) for name, sweep in sweeps.items()}
        full = data.bootstrap.mean(data.test.accuracy[:, -1].astype(np.float64))
        return cls(data, frontiers, tuple(accuracy_shares), full)

    def frontier(self, name: str) -> tuple[FrontierPoint, ...]:
        """All points, by price from high to low, or for the blind mix its vertices by latency."""
        return self.frontiers[name].points(self.data.means.reference_ms) if name in self.frontiers else ()

    def at_accuracy(self, name: str) -> tuple[AtAccuracy, ...]:
        """One record for each target; none for a contender without a frontier."""
        return tuple(self._at(name, share) for share in self.accuracy_shares) if name in self.frontiers else ()

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
    latency, accuracy = data.test.latency_ms[:, hull], data.test.accuracy[:, hull]
    mean = data.bootstrap.mean
    return Frontier((None,) * len(hull), mean(latency), mean(accuracy), np.arange(len(hull)))


def _swept(data: EvaluationData, sweep: PriceSweep) -> Frontier:
    """A contender at every price; the vertices are picked on the tuning split."""
    tuned, found = sweep.tuning, sweep.test
    vertices = mixing_path(tuned.sample_latency.mean(axis=0), tuned.sample_accuracy.mean(axis=0))
    mean = data.bootstrap.mean
    return Frontier(sweep.prices, mean(found.sample_latency), mean(found.sample_accuracy), vertices)
