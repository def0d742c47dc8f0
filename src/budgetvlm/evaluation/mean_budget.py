"""Accuracy at a mean budget, and mean latency at equal accuracy, against the best input-blind mix of settings.

Only the mean counts here; a request has no budget of its own, but may have a ceiling.

Each price gives a point (mean latency, mean accuracy), and choosing at random between neighbouring prices gives the
line between their points. The price of a mean budget is solved on the tuning split, and what it gives is measured on
the evaluated split: without feedback (`AtMeanBudget.spent_ms`), and where feedback has brought the mean to the budget.
At equal accuracy, prices are the vertices of the hull on the tuning split. The blind mix draws from the settings on the
hull of the training split.
Shapes: S samples, P prices or settings, V vertices, R resamples; the first of ``1 + R`` is the number itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.frontier import accuracy_at, latency_at, mixing_path
from budgetvlm.evaluation.intervals import ratio
from budgetvlm.evaluation.outcomes import (
    BEST_SETTING,
    BLIND,
    BLIND_NOTE,
    GROUP,
    ORACLE,
    PREDICT,
    Contender,
    Outcomes,
    outcomes,
)
from budgetvlm.evaluation.records import AtAccuracy, AtMeanBudget, Estimate, FrontierPoint
from budgetvlm.policies import LookupTable

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
        tuned_ms: mean latency of the points on the split that prices are solved on, ``[P]``.
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
        """Mean accuracy where the mean latency is a budget ``[1 + R]``; NaN where even the fastest point takes more."""
        return accuracy_at(self.latency_ms, self.accuracy, np.full(len(self.latency_ms), budget_ms))

    def solved(self, budget_ms: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean latency and accuracy, ``[1 + R]`` each, of the mix of two points that meets a budget where it was tuned.

        Beyond the ends it is that of the end.
        """
        reached = np.maximum.accumulate(self.tuned_ms)
        place = np.interp(budget_ms, reached, np.arange(len(reached)))
        mixed = np.maximum(0.0, 1.0 - np.abs(np.arange(len(reached)) - place))
        return self.latency_ms @ mixed, self.accuracy @ mixed

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
    """The frontiers of all contenders that take a price, and of the blind mix.

    Attributes:
        best: accuracy and mean latency ``[1 + R]`` of the best single setting at each mean budget.
    """

    data: EvaluationData
    frontiers: dict[str, Frontier]
    options: EvaluationOptions
    best_accuracy: np.ndarray
    best: dict[float, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def measure(
        cls, data: EvaluationData, options: EvaluationOptions, sweeps: Mapping[str, PriceSweep]
    ) -> MeanBudgetMetrics:
        """The frontiers of what the contenders chose at prices (`EvaluationData.at_prices`)."""
        frontiers = {BLIND: _blind(data, options)} | {name: _swept(data, sweep) for name, sweep in sweeps.items()}
        best_accuracy = data.bootstrap.mean(data.test.accuracy[:, data.best].astype(np.float64))
        best = {share: _best_setting(data, ms, options.ceiling) for share, ms in data.mean_budgets_ms.items()}
        return cls(data, frontiers, options, best_accuracy, best)

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
        frontier = self.frontiers[name]
        return tuple(
            self._within(share, frontier.accuracy_at(ms), *frontier.solved(ms), used=ms <= frontier.tuned_ms.max())
            for share, ms in self.data.mean_budgets_ms.items()
        )

    def best_setting(self) -> tuple[AtMeanBudget, ...]:
        """What the best single setting gives whose mean latency on the training samples is within each budget."""
        best = self.best.items()
        return tuple(self._within(share, accuracy, ms, accuracy, used=False) for share, (accuracy, ms) in best)

    def budget_ms(self, share: float) -> float:
        """The mean budget in ms with this share."""
        return self.data.mean_budgets_ms[share]

    def _within(
        self, share: float, accuracy: np.ndarray, spent_ms: np.ndarray, solved_accuracy: np.ndarray, *, used: bool
    ) -> AtMeanBudget:
        budget_ms = self.budget_ms(share)
        rivals = {name: self.frontiers[name].accuracy_at(budget_ms) for name in (BLIND, PREDICT, ORACLE)
                  if name in self.frontiers} | {BEST_SETTING: self.best[share][0]}  # fmt: skip
        over = {name: self._estimate(accuracy - other) for name, other in rivals.items()}
        return AtMeanBudget(
            share, budget_ms, self._estimate(accuracy), self._estimate(spent_ms),
            over[BLIND], over.get(PREDICT), over[BEST_SETTING], over.get(ORACLE),
            self._estimate(spent_ms / budget_ms - 1) if used else None, self._estimate(solved_accuracy),
        )  # fmt: skip

    def faster(self, name: str, other: str, share: float) -> Estimate | None:
        """One minus mean latency / another's, where both reach a share of the best setting's accuracy."""
        return self._estimate(self._saved(name, other, share))

    def notes(self) -> Iterator[str]:
        """Why shares of the visible saving are not given."""
        saved = self._saved(GROUP, BLIND, self.options.accuracy_shares[0])
        if saved is not None and np.isfinite(saved[0]) and not self.data.bootstrap.above(saved, LEAST_SAVING):
            found = self.data.bootstrap.estimate(saved)
            yield (
                f"No share of the visible saving is given: the {GROUP} saves {found.value:.0%} [{found.low:.0%}, "
                f"{found.high:.0%}] of the blind mix's time, not clearly anything."
            )

    def _at(self, name: str, share: float) -> AtAccuracy:
        latency = self._latency(name, share)
        saved, visible = self._saved(name, BLIND, share), self._saved(GROUP, BLIND, share)
        closed = None
        if saved is not None and visible is not None and self.data.bootstrap.above(visible, LEAST_SAVING):
            closed = ratio(saved, visible)
        return AtAccuracy(
            accuracy_share=share,
            target_accuracy=share * float(self.best_accuracy[0]),
            latency_ms=self._estimate(latency),
            reached_share=float(np.isfinite(latency[1:]).mean()),
            saved=self._estimate(saved),
            visible_saving_closed=self._estimate(closed),
            saved_vs_predict=self.faster(name, PREDICT, share),
        )

    def _latency(self, name: str, share: float) -> np.ndarray:
        return self.frontiers[name].latency_at(share * self.best_accuracy)

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


def _blind(data: EvaluationData, options: EvaluationOptions) -> Frontier:
    """The settings on the hull of the training means, as measured on the evaluated split.

    Under a ceiling it is the best setting of those that the ceiling allows, at each price.
    """
    if options.ceiling is not None:
        lookup = Contender(BLIND, "baseline", (LookupTable(data.means),), BLIND_NOTE)
        ask = partial(data.at_prices, options.swept, ceiling=options.ceiling)
        return _swept(data, PriceSweep(options.swept, outcomes(lookup, ask(tuning=True)), outcomes(lookup, ask())))
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
    return Frontier(sweep.prices, mean(found.sample_latency), mean(found.sample_accuracy), vertices, tuned_ms)


def _best_setting(data: EvaluationData, budget_ms: float, ceiling: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and latency ``[1 + R]`` of the best setting whose mean is within a budget and its bound in a ceiling."""
    means = data.means
    fits = means.latency_ms <= budget_ms * (1 + 1e-9)
    if ceiling is not None:
        fits &= data.guard.bounds_ms <= max(ceiling * means.reference_ms, data.guard.bounds_ms.min())
    k = int(np.argmax(np.where(fits, means.accuracy, -np.inf)))
    accuracy, latency = (data.bootstrap.mean(cells[:, k]) for cells in _cells(data))
    return accuracy, latency


def _cells(data: EvaluationData) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and latency of the evaluated samples at every setting, ``[S, K]`` each."""
    return data.test.accuracy.astype(np.float64), data.test.latency_ms.astype(np.float64)
