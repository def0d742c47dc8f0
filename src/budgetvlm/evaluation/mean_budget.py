"""The second face: mean latency at equal accuracy, without a budget, against the best input-blind mix of settings.

Each price gives a point (mean latency, mean accuracy); drawing between neighbouring prices at random gives the line
between them. Which prices are worth drawing from (the hull's vertices) is picked on the tuning split, and for the
blind mix of settings on the training split; what they give is measured on the evaluated split.
Shapes: S samples, P prices or settings, V vertices, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.frontier import latency_at, mixing_path
from budgetvlm.evaluation.outcomes import BLIND, GROUP, PREDICT, Contender, EvaluationData, Outcomes, outcomes
from budgetvlm.evaluation.records import AtAccuracy, Estimate, FrontierPoint
from budgetvlm.features import Features
from budgetvlm.policies import States
from budgetvlm.table import ProfileTable


@dataclass(frozen=True, eq=False)
class Path:
    """One frontier: points ``[P]`` on the evaluated split, the hull's vertices among them, and these resampled."""

    prices: tuple[float | None, ...]
    latency_ms: np.ndarray
    accuracy: np.ndarray
    vertices: np.ndarray
    latency_RV: np.ndarray
    accuracy_RV: np.ndarray

    def latency_at(self, target: float, target_R: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean latency at an accuracy, and in each resample at the resample's accuracy ``[R]``; NaN: not reached."""
        value = latency_at(self.latency_ms[self.vertices], self.accuracy[self.vertices], target)
        return float(value), latency_at(self.latency_RV, self.accuracy_RV, target_R)


@dataclass(frozen=True, eq=False)
class MeanBudgetMetrics:
    """The frontiers of all priced contenders and of the blind mix."""

    bench: EvaluationData
    paths: dict[str, Path]
    accuracy_shares: tuple[float, ...]
    full_accuracy: float
    full_accuracy_R: np.ndarray

    @classmethod
    def measure(
        cls,
        bench: EvaluationData,
        contenders: Sequence[Contender],
        prices: Sequence[float],
        accuracy_shares: Sequence[float],
        progress: Callable[[str], None],
    ) -> MeanBudgetMetrics:
        """Sweep the prices with every priced contender."""
        paths = {BLIND: _blind(bench)}
        for contender in contenders:
            if contender.priced:
                progress(f"without a budget: {contender.name}")
                paths[contender.name] = _swept(bench, contender, sorted(prices, reverse=True))
        full = bench.test.accuracy[:, -1].astype(np.float64)
        return cls(bench, paths, tuple(accuracy_shares), float(full.mean()), bench.bootstrap.means(full))

    def frontier(self, name: str) -> tuple[FrontierPoint, ...]:
        """All points, by price from high to low, or for the blind mix its vertices by latency."""
        path = self.paths.get(name)
        if path is None:
            return ()
        rank = {int(p): place for place, p in enumerate(path.vertices)}
        per_ms = 100.0 / self.bench.expected.reference_ms
        return tuple(
            FrontierPoint(
                price,
                None if price is None else price * per_ms,
                float(path.latency_ms[p]),
                float(path.accuracy[p]),
                rank.get(p),
            )
            for p, price in enumerate(path.prices)
        )

    def at_accuracy(self, name: str) -> tuple[AtAccuracy, ...]:
        """One record a target; nothing for a contender without a frontier."""
        if name not in self.paths:
            return ()
        return tuple(self._at(name, share) for share in self.accuracy_shares)

    def _at(self, name: str, share: float) -> AtAccuracy:
        mine = self._latency(name, share)
        assert mine is not None
        saved = self._saved(mine, self._latency(BLIND, share))
        visible = self._ratio(saved, self._saved(self._latency(GROUP, share), self._latency(BLIND, share)))
        return AtAccuracy(
            accuracy_share=share,
            target_accuracy=share * self.full_accuracy,
            latency_ms=self._estimate(mine),
            reached_share=float(np.isfinite(mine[1]).mean()),
            saved=self._estimate(saved),
            visible_saving_closed=self._estimate(visible),
            saved_vs_predict=self._estimate(self._saved(mine, self._latency(PREDICT, share))),
        )

    def faster(self, name: str, other: str, share: float) -> Estimate | None:
        """One minus mean latency / another's, where both reach a share of the full setting's accuracy."""
        return self._estimate(self._saved(self._latency(name, share), self._latency(other, share)))

    def _latency(self, name: str, share: float) -> tuple[float, np.ndarray] | None:
        path = self.paths.get(name)
        return path.latency_at(share * self.full_accuracy, share * self.full_accuracy_R) if path else None

    @staticmethod
    def _saved(
        mine: tuple[float, np.ndarray] | None, other: tuple[float, np.ndarray] | None
    ) -> tuple[float, np.ndarray] | None:
        """One minus mine / other, paired by resample."""
        return (1 - mine[0] / other[0], 1 - mine[1] / other[1]) if mine and other else None

    @staticmethod
    def _ratio(
        part: tuple[float, np.ndarray] | None, whole: tuple[float, np.ndarray] | None
    ) -> tuple[float, np.ndarray] | None:
        """A saving as a share of another; None where the other saves next to nothing."""
        if part is None or whole is None or not whole[0] > 1e-3:
            return None
        return part[0] / whole[0], part[1] / np.where(whole[1] > 0, whole[1], np.nan)

    def _estimate(self, number: tuple[float, np.ndarray] | None) -> Estimate | None:
        """None where the number is not defined or the target was not reached."""
        if number is None or not np.isfinite(number[0]):
            return None
        low, high = self.bench.bootstrap.interval(number[1])
        return Estimate(number[0], float(low), float(high))


def _blind(bench: EvaluationData) -> Path:
    """The settings on the hull of the training means, as measured on the evaluated split."""
    hull = mixing_path(bench.expected.latency_ms, bench.expected.accuracy)
    accuracy, latency = bench.test.accuracy[:, hull], bench.test.latency_ms[:, hull].astype(np.float64)
    return _path(bench, (None,) * len(hull), accuracy.astype(np.float64), latency, np.arange(len(hull)))


def _swept(bench: EvaluationData, contender: Contender, prices: Sequence[float]) -> Path:
    """A contender at every price; vertices picked on the tuning split."""
    tuned = _sweep(bench, contender, bench.tuning, bench.tuning_features, prices)
    latency, accuracy = tuned.sample_latency.mean(axis=0), tuned.sample_accuracy.mean(axis=0)
    found = _sweep(bench, contender, bench.test, bench.test_features, prices)
    vertices = mixing_path(latency, accuracy)
    return _path(bench, tuple(prices), found.sample_accuracy, found.sample_latency, vertices)


def _sweep(
    bench: EvaluationData, contender: Contender, table: ProfileTable, features: Features | None, prices: Sequence[float]
) -> Outcomes:
    return outcomes(contender, table, [States.unlimited(table, features, bench.guard, price) for price in prices])


def _path(
    bench: EvaluationData,
    prices: tuple[float | None, ...],
    accuracy: np.ndarray,
    latency_ms: np.ndarray,
    vertices: np.ndarray,
) -> Path:
    """From accuracy and latency of each sample ``[S, P]`` to a frontier."""
    return Path(
        prices,
        latency_ms.mean(axis=0),
        accuracy.mean(axis=0),
        vertices,
        bench.bootstrap.means(latency_ms[:, vertices]),
        bench.bootstrap.means(accuracy[:, vertices]),
    )
