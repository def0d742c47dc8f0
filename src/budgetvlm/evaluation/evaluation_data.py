"""The samples, averages, guard and resamples that all contenders of an evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.intervals import Bootstrap
from budgetvlm.features import Features
from budgetvlm.guard.input_bounds import fit_guard
from budgetvlm.guard.spending import require_mean_budget
from budgetvlm.guard.static import StaticGuard, timed_rows
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.table import ProfileTable

HELD_OUT = 0.15  # of the training units, where the table has no validation split


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """One table, split into the parts that an evaluation needs.

    Without features only policies that read none can choose.

    Attributes:
        train: the samples that policies are fitted on. test: the evaluated ones, measured at every setting.
        tuning: the samples that hulls are picked and early stopping is done on, measured at every setting; they are
            the validation split, or the training split where there is none or it is the evaluated one.
        left_out: number of evaluated samples that lack a measurement.
        means, guard: of the training samples; the guard allows no setting without both measurements.
        test_bounds_ms, tuning_bounds_ms: the guard's bounds of these samples, see `StaticGuard.bounds_of`; those of all
            policies.
        mean_budgets_ms: budgets on the mean latency, each with its share (`EvaluationOptions.mean_budgets`).
    """

    train: ProfileTable
    tuning: ProfileTable
    test: ProfileTable
    train_features: Features | None
    tuning_features: Features | None
    test_features: Features | None
    tuning_split: str
    left_out: int
    means: SettingMeans
    guard: StaticGuard
    test_bounds_ms: np.ndarray
    tuning_bounds_ms: np.ndarray
    bootstrap: Bootstrap
    mean_budgets_ms: dict[float, float]

    @classmethod
    def of(cls, table: ProfileTable, features: Features | None, options: EvaluationOptions) -> EvaluationData:
        """Split a table.

        Raises:
            DataError: a split or the features of a sample are missing, or no sample was measured at every setting.
            ConfigError: a mean budget below what the cheapest setting takes.
        """
        tuning_split = _tuning_split(table, options.split)
        learnt = with_predictions(table, features, evaluated=options.split)
        train = learnt.subset("train")
        means = SettingMeans.fit(train)
        train_features = features and features.aligned(train.sample_ids)
        guard = _guard_of_measured(means, fit_guard(table.subset("train"), train_features, options.guard_quantile))
        evaluated = table.subset(options.split)
        test = complete_rows(evaluated, guard.measured)
        tuning = complete_rows(learnt.subset(tuning_split), guard.measured)
        test_features = features and features.aligned(test.sample_ids)
        tuning_features = features and features.aligned(tuning.sample_ids)
        return cls(
            train=train,
            tuning=tuning,
            test=test,
            train_features=train_features,
            tuning_features=tuning_features,
            test_features=test_features,
            tuning_split=tuning_split,
            left_out=evaluated.num_samples - test.num_samples,
            means=means,
            guard=guard,
            test_bounds_ms=guard.bounds_of(test_features),
            tuning_bounds_ms=guard.bounds_of(tuning_features),
            bootstrap=Bootstrap.draw(test.units, options.resamples, options.level, options.seed),
            mean_budgets_ms=_mean_budgets(means.latency_ms[guard.measured], options),
        )

    @cached_property
    def test_means(self) -> SettingMeans:
        """Means of each setting on the evaluated samples."""
        return SettingMeans.fit(self.test)

    @property
    def best(self) -> int:
        """The most accurate setting on the training samples, of those that were measured."""
        return self.means.best

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the full setting on the evaluated samples."""
        return float(self.test_means.accuracy[self.means.full])

    @cached_property
    def timed(self) -> np.ndarray:
        """Evaluated samples whose violations are counted, bool ``[S]``: those that were timed, or all if none was."""
        timed = timed_rows(self.test)
        return timed if timed.any() else np.ones_like(timed)

    def budgets_ms(self, shares: Sequence[float]) -> np.ndarray:
        """Budgets in ms from shares of the full setting's median latency, ``[P]``."""
        return np.array(shares) * self.means.reference_ms

    def under_budgets(self, shares: Sequence[float], price: float) -> list[States]:
        """Every evaluated sample once under each budget, P lists of requests."""
        data = self.test, self.test_features, self.guard
        return [States.under_budget(*data, b, price, self.test_bounds_ms) for b in self.budgets_ms(shares)]

    def at_prices(self, prices: Sequence[float], *, tuning: bool = False, ceiling: float | None = None) -> list[States]:
        """Every evaluated (or tuning) sample once at each price, P lists of requests.

        ``ceiling``: of each request, as a share of the full setting's median latency; None: it has none.
        """
        table, features = (self.tuning, self.tuning_features) if tuning else (self.test, self.test_features)
        if ceiling is None:
            return [States.unlimited(table, features, self.guard, price) for price in prices]
        ceiling_ms, bounds_ms = (
            ceiling * self.means.reference_ms,
            self.tuning_bounds_ms if tuning else self.test_bounds_ms,
        )
        return [States.under_budget(table, features, self.guard, ceiling_ms, price, bounds_ms) for price in prices]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of samples, units and settings."""
        return {
            "train_samples": self.train.num_samples,
            "tuning_samples": self.tuning.num_samples,
            "evaluated_samples": self.test.num_samples,
            "evaluated_timed": int(timed_rows(self.test).sum()),
            "evaluated_units": self.bootstrap.num_units,
            "left_out_incomplete": self.left_out,
            "settings": int(self.guard.measured.sum()),
        }


def complete_rows(table: ProfileTable, measured: np.ndarray) -> ProfileTable:
    """The samples at which all settings of ``measured`` (bool ``[K]``) were measured: a fair comparison needs them.

    Raises:
        DataError: there is none.
    """
    known = np.isfinite(table.accuracy) & np.isfinite(table.latency_ms)
    rows = known[:, measured].all(axis=1)
    if not rows.any():
        raise DataError(
            f"none of the {table.num_samples} samples has all {int(measured.sum())} settings measured, so policies "
            "cannot be compared; profile the missing settings"
        )
    return table if rows.all() else table.subset(rows)


def learning_part(table: ProfileTable, seed: int = 0) -> ProfileTable:
    """Training and validation samples; the latter are taken from the training units where there are none.

    Raises:
        DataError: there are no training samples, or they share a single unit.
    """
    split = np.array(table.split)
    train = table.subset("train")
    if (split == "validation").any():
        return table.subset(split != "test")
    try:
        return train.with_splits({"train": 1 - HELD_OUT, "validation": HELD_OUT}, seed)
    except ConfigError as error:
        raise DataError(
            f"there is no validation split and none can be held out of {train.num_samples} training samples ({error}); "
            "profile more samples"
        ) from error


def _mean_budgets(latency_ms: np.ndarray, options: EvaluationOptions) -> dict[float, float]:
    """Share -> ms; a share is that of the way from the least to the most of the settings' mean latencies ``[K]``."""
    least, most = float(latency_ms.min()), float(latency_ms.max())
    if options.mean_budget_ms is None:
        return {share: least + share * (most - least) for share in options.mean_budgets}
    for mean_budget_ms in options.mean_budget_ms:
        require_mean_budget(mean_budget_ms, least)
    return {(ms - least) / max(most - least, 1e-9): ms for ms in options.mean_budget_ms}


def _tuning_split(table: ProfileTable, split: str) -> str:
    present = table.split or ()
    if table.split is not None and split not in present:
        sides = ", ".join(sorted(set(present)))
        raise DataError(
            f"no {split} samples to evaluate on; this table has: {sides}. Choose another --split, or prepare the data "
            "again with --test_split 0.2, which holds some out."
        )
    return "validation" if "validation" in present and split != "validation" else "train"


def _guard_of_measured(means: SettingMeans, guard: StaticGuard) -> StaticGuard:
    """The guard without the settings that lack an accuracy."""
    measured = means.measured & guard.measured
    if not measured.any():
        raise DataError(
            "no setting has both accuracy and latency measured on the training samples; profile both and prepare again"
        )
    return replace(guard, bounds_ms=np.where(measured, guard.bounds_ms, np.inf))
