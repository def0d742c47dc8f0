"""Latency bounds that depend on the input, for tables: fitted, calibrated, and taken only where they are worth it.

The logarithm of each setting's latency is regressed on the features. A bound lies some spreads above the prediction; a
setting's spread is a high quantile of what the prediction misses. How many spreads is calibrated with the choice in
the loop, because a bound that holds for each fixed setting need not hold for the chosen one: each sample is predicted
by a fit that has not seen its unit, the setting that is best on average is chosen among those that the bounds allow at
a range of budgets, and of these choices no more than the promised share may be late, and no more than with one bound a
setting. So both can be compared at equal lateness, and the bounds that know the input are taken only if clearly more
choices are right in time (cross-conformal prediction, Vovk 2015, with the risk of Angelopoulos et al. 2022).

Shapes: S samples, D features, R inputs of the regression, K settings, P budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from budgetvlm.features import Features
from budgetvlm.features.directions import principal_directions
from budgetvlm.guard.static import InputBounds, StaticGuard, timed_rows
from budgetvlm.table import ProfileTable

FOLDS = 5
LEAST_SAMPLES, MOST_SAMPLES = 100, 4000  # that are timed; more are thinned, because this is to take about a second
PENALTIES = 100.0, 1000.0  # of the squared slopes on standardised inputs, in samples: the first that helps is taken
SPREADS = np.arange(40, -1, -1) / 10  # above the prediction, the most cautious first
BUDGET_SHARES = (0.35, 0.5, 0.6, 0.7, 0.85, 1.0)  # of the full setting's median latency
NUM_BETWEEN = 6  # further budgets, from the smallest pooled bound to the largest
JUST_ABOVE = 1 + 1e-6  # so that a bound of equal latencies is within the budget that equals it
TIE = 0.01  # accuracy given for one latency of the full setting, so that equals are told apart
SURE = 2.0  # standard errors, of a gain that counts


def fit_guard(table: ProfileTable, features: Features | None, quantile: float = 0.95) -> StaticGuard:
    """The guard of training samples, with bounds for each input where those allow more at no more late choices.

    Args:
        features: of the table's samples, in this order; None: the bounds depend on no input.
        quantile: of the latencies that a bound exceeds; the rest is the share of choices that may be late.

    Raises:
        DataError: nothing was measured. ConfigError: a quantile outside (0, 1].
    """
    pooled = StaticGuard.fit_table(table, quantile)
    timed = np.flatnonzero(timed_rows(table))
    if features is None or len(timed) < LEAST_SAMPLES:
        few = (
            f"{len(timed)} training samples were timed at every setting, and bounds for each input need {LEAST_SAMPLES}"
        )
        return replace(pooled, why=f"{SAME}: {few if features is not None else 'there are no features'}")
    sample = table.subset(timed).thinned(MOST_SAMPLES)
    given = features.aligned(sample.sample_ids)
    trial = _Trial.of(sample, pooled)
    if trial.unit.max() + 1 < FOLDS:
        return replace(pooled, why=f"{SAME}: the training samples are of fewer than {FOLDS} {sample.unit_name}s")
    inputs = _Inputs.of(np.hstack([given.image, given.language]).astype(np.float64))
    log_ms = np.log(sample.latency_ms.astype(np.float64))
    for penalty in PENALTIES:
        found, spreads = trial.compare(inputs.values, log_ms, penalty)
        if spreads is not None:
            own = _Regression.fit(inputs.values, log_ms, quantile, penalty).bounds(inputs, spreads)
            return replace(pooled, by_input=own, why=f"latency bounds depend on the input: {found}")
    return replace(pooled, why=f"{SAME}: {found}")


SAME = "latency bounds are the same for every input"


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Standardised inputs of the regression ``[S, R]``: (features - ``center`` ``[D]``) @ ``weight`` ``[D, R]``."""

    values: np.ndarray
    center: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, raw: np.ndarray) -> _Inputs:
        center, scale = raw.mean(axis=0), raw.std(axis=0)
        varies = scale > 1e-6 * (1.0 + np.abs(raw).max(axis=0))
        unit = np.where(varies, 1.0 / np.where(varies, scale, 1.0), 0.0)
        values = (raw - center) * unit
        directions = principal_directions(values)
        return cls(values @ directions, center, unit[:, None] * directions)


@dataclass(frozen=True, eq=False)
class _Regression:
    """Log latency as a linear function of the inputs, within the range of its training.

    Attributes:
        slopes: ``[R, K]``. mean, spread: ``[K]``. low, high: of predictions, ``[K]``; infinity: never measured.
    """

    slopes: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, inputs: np.ndarray, log_ms: np.ndarray, quantile: float, penalty: float) -> _Regression:
        """Ridge regression ``[S, R]`` -> ``[S, K]``: a slope that all settings share, and what each differs from it.

        A setting with few samples so follows the others. NaN cells are left out.
        """
        known = np.isfinite(log_ms)
        mean = np.where(known, log_ms, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        rest = np.where(known, log_ms - mean, 0.0)
        some = known.any(axis=1)
        shared = _ridge(inputs[some], rest[some].sum(axis=1)[:, None] / known[some].sum(axis=1)[:, None], penalty)
        slopes = np.repeat(shared, len(mean), axis=1)
        for columns in _alike(known):
            rows = known[:, columns[0]]
            slopes[:, columns] += _ridge(inputs[rows], rest[np.ix_(rows, columns)] - inputs[rows] @ shared, penalty)
        predicted = inputs @ slopes + mean
        missed = np.where(known, log_ms - predicted, np.nan)
        measured = known.any(axis=0)
        spread, low, high = np.zeros_like(mean), np.full_like(mean, np.inf), np.full_like(mean, np.inf)
        spread[measured] = np.maximum(np.nanquantile(missed[:, measured], quantile, axis=0), 0.0)
        low[measured], high[measured] = predicted.min(axis=0)[measured], predicted.max(axis=0)[measured]
        return cls(slopes, mean, spread, low, high)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Log latencies, ``[S, R]`` -> ``[S, K]``."""
        return (inputs @ self.slopes + self.mean).clip(self.low, self.high)

    def bounds(self, inputs: _Inputs, spreads: float) -> InputBounds:
        """Bounds that many spreads above the predictions, for raw features."""
        above = spreads * self.spread
        return InputBounds(
            inputs.center, inputs.weight @ self.slopes, self.mean + above, self.low + above, self.high + above
        )


def _ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Slopes ``[R, T]`` from ``[S, R]`` to ``[S, T]``."""
    gram = inputs.T @ inputs + penalty * np.eye(inputs.shape[1])
    slopes: np.ndarray = np.linalg.solve(gram, inputs.T @ targets)
    return slopes


def _alike(known: np.ndarray) -> Iterator[np.ndarray]:
    """Columns of ``[S, K]`` that were measured on the same samples: one regression serves them all."""
    _, number = np.unique(known, axis=1, return_inverse=True)
    for own in range(number.max() + 1):
        columns = np.flatnonzero(number.reshape(-1) == own)
        if known[:, columns[0]].any():
            yield columns


@dataclass(frozen=True, eq=False)
class _Played:
    """What became of the choices at every budget, ``[S, P]``: right in time, late (NaN: not measured), allowed."""

    right: np.ndarray
    late: np.ndarray
    allowed: np.ndarray


@dataclass(frozen=True, eq=False)
class _Trial:
    """Samples on which bounds are tried.

    Attributes:
        table: the samples. pooled: the guard with one bound a setting. unit: number of each sample's unit, ``[S]``.
        order: settings, the best on average first, ``[K]``. budgets_ms: ``[P]``; the usual ones are left out where they
            leave no choice, as an evaluation does.
    """

    table: ProfileTable
    pooled: StaticGuard
    unit: np.ndarray
    order: np.ndarray
    budgets_ms: np.ndarray

    @classmethod
    def of(cls, table: ProfileTable, pooled: StaticGuard) -> _Trial:
        bounds = pooled.bounds_ms[pooled.measured]
        full_ms = table.latency_ms[:, -1]
        reference_ms = float(np.median(full_ms[np.isfinite(full_ms)])) if np.isfinite(full_ms).any() else bounds.max()
        known = np.isfinite(table.accuracy) & np.isfinite(table.latency_ms)
        count = np.maximum(known.sum(axis=0), 1)
        accuracy, latency = (np.where(known, x, 0.0).sum(axis=0) / count for x in (table.accuracy, table.latency_ms))
        worth = np.where(known.any(axis=0), accuracy - TIE * latency / reference_ms, -np.inf)
        usual = np.multiply(BUDGET_SHARES, reference_ms)
        leaves_choice = (bounds <= usual.max()).sum() > 1
        between = np.linspace(bounds.min(), bounds.max(), NUM_BETWEEN)
        budgets = JUST_ABOVE * np.concatenate([usual, between] if leaves_choice else [between])
        unit = np.unique(table.units, return_inverse=True)[1]
        return cls(table, pooled, unit, np.argsort(-worth, kind="stable"), budgets)

    def compare(self, inputs: np.ndarray, log_ms: np.ndarray, penalty: float) -> tuple[str, float | None]:
        """What was found, in words, and how many spreads bounds for each input lie above predictions; None: no gain."""
        predicted, spread, pooled_ms = self._held_out(inputs, log_ms, penalty)
        before = self.play(pooled_ms)
        kept = None
        for spreads in SPREADS:
            after = self.play(np.exp(predicted + spreads * spread))
            if self._keeps(after, before):
                kept = spreads, after
            elif kept:
                break
        if kept is None:
            return "bounds for each input would be exceeded more often", None
        spreads, after = kept
        gain, error = self._gain(after, before)
        both = ~np.isnan(after.late + before.late)
        late, late_before = after.late[both].mean(), before.late[both].mean()
        found = (
            f"on {self.unit.max() + 1} training {self.table.unit_name}s, held out in turn, bounds for each input "
            f"change what is right in time by {100 * gain:+.1f} ± {100 * SURE * error:.1f} points, with "
            f"{late:.1%} late instead of {late_before:.1%}"
        )
        return found, float(spreads) if gain > SURE * error else None

    def _held_out(
        self, inputs: np.ndarray, log_ms: np.ndarray, penalty: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictions, spreads and pooled bounds by fits that have not seen a sample's unit, ``[S, K]`` each."""
        fold = np.random.default_rng(0).permutation(self.unit.max() + 1)[self.unit] % FOLDS
        predicted, spread, pooled_ms = (np.empty_like(log_ms) for _ in range(3))
        for number in range(FOLDS):
            own, others = fold == number, fold != number
            fitted = _Regression.fit(inputs[others], log_ms[others], self.pooled.quantile, penalty)
            predicted[own], spread[own] = fitted.predict(inputs[own]), fitted.spread
            pooled_ms[own] = StaticGuard.fit(self.table.latency_ms[others], self.pooled.quantile).bounds_ms
        return predicted, spread, pooled_ms

    def play(self, bounds_ms: np.ndarray) -> _Played:
        """Choose for every sample at every budget with these bounds ``[S, K]``, as the lookup table does."""
        allowed = bounds_ms[:, None, self.order] <= self.budgets_ms[:, None]
        some = np.asarray(allowed.any(axis=2))
        chosen = np.where(some, self.order[allowed.argmax(axis=2)], self.pooled.cheapest)
        rows = np.arange(len(chosen))[:, None]
        latency, accuracy = self.table.latency_ms[rows, chosen], self.table.accuracy[rows, chosen]
        late = np.where(np.isnan(latency) | np.isnan(accuracy), np.nan, latency > self.budgets_ms)
        return _Played(np.where(late == 0, accuracy, late * 0), late, some)

    def _keeps(self, after: _Played, before: _Played) -> bool:
        """Whether no more choices are late than is promised of those allowed, and no more than before in all."""
        promised = ~np.isnan(after.late) & after.allowed
        late = after.late[promised].sum() / len(self.budgets_ms)  # in samples: the budgets of one are not independent
        kept = late + 1 <= (1 - self.pooled.quantile) * (promised.sum() / len(self.budgets_ms) + 1)
        return bool(kept and np.nansum(after.late - before.late) <= 0)

    def _gain(self, after: _Played, before: _Played) -> tuple[float, float]:
        """Mean of what is more often right in time, and its standard error, where a unit's samples belong together."""
        gain = after.right - before.right
        known = ~np.isnan(gain)
        mean = float(gain[known].mean())
        sums = np.bincount(self.unit, np.where(known, gain - mean, 0.0).sum(axis=1))
        return mean, float(np.sqrt((sums**2).sum()) / known.sum())
