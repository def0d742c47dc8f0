"""Mean latency at equal accuracy, without a budget for each request, against the best input-blind mix of settings.

Each price gives a point (mean latency, mean accuracy), and choosing at random between neighbouring prices gives the
line between their points. Which prices are worth choosing from (the hull's vertices) is picked on the tuning split,
for the blind mix of settings on the training split; what they give is measured on the evaluated split.
Shapes: S samples, P prices or settings, V vertices, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.frontier import latency_at, mixing_path
from budgetvlm.evaluation.intervals import Bootstrap, Resampled
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
    """Points ``[P]`` on the evaluated split (None: a setting without a price), and the vertices ``[V]`` among them."""

    prices: tuple[float | None, ...]
    latency_ms: Resampled
    accuracy: Resampled
    vertices: np.ndarray

    @classmethod
    def of(
        cls,
        bootstrap: Bootstrap,
        prices: Sequence[float | None],
        latency_ms: np.ndarray,
        accuracy: np.ndarray,
        vertices: np.ndarray,
    ) -> Frontier:
        """The frontier from accuracy and latency of each evaluated sample ``[S, P]``."""
        return cls(tuple(prices), bootstrap.mean(latency_ms), bootstrap.mean(accuracy), vertices)

    def latency_at(self, target: Resampled) -> Resampled:
        """Mean latency at an accuracy, in each resample at the resample's own; NaN where it is not reached."""
        ms, accuracy = self.latency_ms[self.vertices], self.accuracy[self.vertices]
        return Resampled(
            latency_at(ms.value, accuracy.value, target.value),
            latency_at(ms.resamples, accuracy.resamples, target.resamples),
        )

    def points(self, reference_ms: float) -> tuple[FrontierPoint, ...]:
        """All points in the order of the prices; a price is also given in points of accuracy per ms."""
        rank = {int(p): place for place, p in enumerate(self.vertices)}
        found = zip(self.prices, self.latency_ms.value.tolist(), self.accuracy.value.tolist(), strict=True)
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
    full_accuracy: Resampled

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
        closed = saved / visible if saved and visible and visible.value > LEAST_SAVING else None
        return AtAccuracy(
            accuracy_share=share,
            target_accuracy=share * float(self.full_accuracy.value),
            latency_ms=self._estimate(latency),
            reached_share=float(np.isfinite(latency.resamples).mean()),
            saved=self._estimate(saved),
            visible_saving_closed=self._estimate(closed),
            saved_vs_predict=self.faster(name, PREDICT, share),
        )

    def _latency(self, name: str, share: float) -> Resampled:
        return self.frontiers[name].latency_at(share * self.full_accuracy)

    def _saved(self, name: str, other: str, share: float) -> Resampled | None:
        """One minus the ratio of two contenders' latencies; None where one has no frontier."""
        if not {name, other} <= set(self.frontiers):
            return None
        return self._latency(name, share).saved_over(self._latency(other, share))

    def _estimate(self, number: Resampled | None) -> Estimate | None:
        """None where the number is not defined or the target was not reached."""
        if number is None or not np.isfinite(number.value):
            return None
        return self.data.bootstrap.estimate(number)


def _blind(data: EvaluationData) -> Frontier:
    """The settings on the hull of the training means, as measured on the evaluated split."""
    hull = mixing_path(data.means.latency_ms, data.means.accuracy)
    latency, accuracy = data.test.latency_ms[:, hull], data.test.accuracy[:, hull]
    return Frontier.of(data.bootstrap, (None,) * len(hull), latency, accuracy, np.arange(len(hull)))


def _swept(data: EvaluationData, sweep: PriceSweep) -> Frontier:
    """A contender at every price; the vertices are picked on the tuning split."""
    tuned, found = sweep.tuning, sweep.test
    vertices = mixing_path(tuned.sample_latency.mean(axis=0), tuned.sample_accuracy.mean(axis=0))
    return Frontier.of(data.bootstrap, sweep.prices, found.sample_latency, found.sample_accuracy, vertices)
