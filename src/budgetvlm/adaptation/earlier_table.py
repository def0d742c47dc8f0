"""A table of an earlier model, as far as it says something of a new one.

Shapes: S samples, B others, K settings of the new model, K2 of the earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.adaptation.related_accuracy import interpolation
from budgetvlm.errors import KnobSpaceError
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.predictor import PredictorConfig
from budgetvlm.policies.setting_means import column_means
from budgetvlm.policies.teachers import Teachers
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.table import ProfileTable

NETWORKS = 3  # that predict an earlier model's accuracies, beside a regression


@dataclass(frozen=True, eq=False)
class EarlierTable:
    """An earlier table, as far as it is to be learnt from.

    Attributes:
        table: its training and validation samples, without a gap. features: of these.
        measured: accuracies without predicted ones, ``[S, K2]``.
        weights: of its settings for each of the new model, ``[K, K2]``; what these leave open, ``[K, K]``.
        teachers: predict its accuracies.
    """

    table: ProfileTable
    features: Features
    measured: np.ndarray
    weights: np.ndarray
    left_open: np.ndarray
    teachers: Teachers

    @classmethod
    def of(cls, table: ProfileTable, features: Features, space: KnobSpace, seed: int = 0) -> EarlierTable:
        """Learn from a table with splits. Raises KnobSpaceError: it has other knobs than ``space``."""
        if table.knob_space.names != space.names:
            raise KnobSpaceError(
                f"an earlier table has the knobs {', '.join(table.knob_space.names)}, the labelled samples "
                f"{', '.join(space.names)}. Give tables of models with the same knobs."
            )
        rows = np.array(table.split) != "test"
        filled, measured = with_predictions(table, features).subset(rows), table.accuracy[rows].astype(np.float64)
        seeds = np.arange(NETWORKS)[None] + seed * NETWORKS
        features = features.aligned(filled.sample_ids)
        teachers = Teachers.fit(filled, features, PredictorConfig(), seeds)
        return cls(filled, features, measured, *interpolation(space, table.knob_space), teachers)

    def accuracy(self, features: Features) -> np.ndarray:
        """What this model is expected to score at the new model's settings, ``[B, K]``."""
        return np.asarray(self.teachers.values(features)[0] @ self.weights.T)

    @property
    def noise(self) -> np.ndarray:
        """Covariance of outcomes at the new model's settings, given the features, ``[K, K]``."""
        rest = self.measured - self.teachers.values(self.features)[0]
        known, rest = np.isfinite(rest).astype(np.float64), np.nan_to_num(rest)
        found = rest.T @ rest / np.maximum(known.T @ known, 1)
        values, vectors = np.linalg.eigh(found)  # pairs of cells that were seldom measured together may not fit
        carried = self.weights @ (vectors * values.clip(min=1e-3)) @ vectors.T @ self.weights.T
        np.fill_diagonal(carried, np.maximum(np.diag(carried), self.weights @ np.diag(found)))
        return np.asarray(carried)

    def surprise(self, sample_ids: Sequence[str]) -> np.ndarray:
        """How far what this model scored is from what was expected, ``[B, K]``; 0 where a sample is not among its."""
        rest = np.nan_to_num(self.measured - self.teachers.values(self.features)[0]) @ self.weights.T
        row_of = {name: row for row, name in enumerate(self.table.sample_ids)}
        out = np.zeros((len(sample_ids), len(self.weights)))
        for place, name in enumerate(sample_ids):
            if name in row_of:
                out[place] = rest[row_of[name]]
        return out

    def moved(self, few: ProfileTable) -> ProfileTable:
        """Its samples at the new model's settings: times moved to what those few took, accuracies not known yet."""
        logs = np.log(self.table.latency_ms.astype(np.float64)) @ self.weights.T
        there = column_means(logs)
        here = column_means(np.log(few.latency_ms.astype(np.float64)))
        shift = here - there
        shift = np.where(np.isfinite(shift), shift, np.nanmean(shift))
        latency = np.exp(logs + shift)

        def carried(values: np.ndarray) -> np.ndarray:
            return np.maximum(values @ self.weights.T, 0.0)

        share = latency / carried(self.table.latency_ms)
        return ProfileTable.from_arrays(
            few.knob_space,
            self.table.sample_ids,
            np.full(latency.shape, np.nan),
            latency,
            stages_ms={name: carried(ms) * share for name, ms in self.table.stages_ms.items()},
            tokens={name: carried(count) for name, count in self.table.tokens.items()},
            groups=self.table.groups,
            split=self.table.split,
        )
