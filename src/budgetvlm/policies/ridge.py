"""Predict each setting's accuracy by ridge regression: hard to beat where groups of samples are few.

A choice needs the differences between settings, and they are shrunk together; the mean over the settings is shrunk
apart. How strongly is found by cross-validation over groups, and where no strength is clearly better than the
settings' means, the prediction is these means. Shapes: S samples, B states, D features, K settings, L strengths; J = K
targets, which are the mean over the settings and K - 1 differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features
from budgetvlm.features.directions import principal_directions
from budgetvlm.policies.argmax_policy import FeatureScaler
from budgetvlm.policies.evidence import clearly_positive
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

STRENGTHS = np.append(np.geomspace(1.0, 1e5, 16), np.inf)  # in samples: a feature's mean square is 1
NUM_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted regression: the settings' mean accuracies ``[K]`` and weights ``[D, K]`` of standardised features."""

    means: np.ndarray
    scaler: FeatureScaler
    weights: np.ndarray

    @classmethod
    def fit(cls, train: ProfileTable, features: Features, *, checked: bool = True) -> Ridge:
        """Regress the accuracies of a table; cells that were not measured say nothing about differences.

        ``checked``: learn nothing unless that is clearly better than the settings' means.
        """
        means, scaler = np.nan_to_num(SettingMeans.fit(train).accuracy), FeatureScaler.fit(features)
        x = scaler.of(features).astype(np.float64)
        residual = _filled(train.accuracy.astype(np.float64) - means)
        directions = principal_directions(x)
        _, group = np.unique(np.asarray(train.units), return_inverse=True)
        return cls(means, scaler, directions @ _weights(x @ directions, residual, group.reshape(-1), checked))

    @property
    def tells_settings_apart(self) -> bool:
        """Whether any difference between settings depends on the input."""
        return bool(np.ptp(self.weights, axis=1).max() > 1e-9)

    def predict(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> accuracies ``[B, K]``."""
        predicted: np.ndarray = self.means + self.scaler(image, language) @ self.weights
        return predicted


def _filled(residual: np.ndarray) -> np.ndarray:
    """Residuals ``[S, K]`` with the mean of their row for NaN, and 0 where a row has none."""
    known = ~np.isnan(residual)
    total = np.where(known, residual, 0.0).sum(axis=1, keepdims=True)
    return np.where(known, residual, total / np.maximum(known.sum(axis=1, keepdims=True), 1))


def _weights(x: np.ndarray, residual: np.ndarray, group: np.ndarray, checked: bool) -> np.ndarray:
    """Weights ``[D, K]`` for features ``[S, D]`` whose means are 0."""
    num_settings = residual.shape[1]
    rotation = np.linalg.qr(np.column_stack([np.ones(num_settings), np.eye(num_settings)[:, 1:]]))[0]
    target = residual @ rotation
    held_out = _held_out_errors(x, target, group % NUM_FOLDS)
    weights = np.zeros((x.shape[1], num_settings))
    for columns in (slice(0, 1), slice(1, None)):
        strength = STRENGTHS[_best(held_out[:, :, columns].sum(axis=2), group, checked)]
        if np.isfinite(strength):
            gram = x.T @ x + strength * np.eye(x.shape[1])
            weights[:, columns] = np.linalg.solve(gram, x.T @ target[:, columns])
    return weights @ rotation.T


def _held_out_errors(x: np.ndarray, target: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Squared errors of each strength on samples that it was not fitted on, ``[L, S, J]``."""
    errors = np.tile(np.square(target), (len(STRENGTHS), 1, 1))
    gram, product = x.T @ x, x.T @ target
    for number in np.unique(fold):
        rows = fold == number
        values, vectors = np.linalg.eigh(gram - x[rows].T @ x[rows])
        rotated = vectors.T @ (product - x[rows].T @ target[rows])
        inputs = x[rows] @ vectors
        for place, strength in enumerate(STRENGTHS[:-1]):
            predicted = inputs @ (rotated / (values.clip(min=0.0) + strength)[:, None])
            errors[place, rows] = np.square(target[rows] - predicted)
    return errors


def _best(errors: np.ndarray, group: np.ndarray, checked: bool) -> int:
    """The strength with the least error ``[L, S]``; the last, which learns nothing, if ``checked`` and not clear."""
    best = int(errors.mean(axis=1).argmin())
    return best if not checked or clearly_positive(errors[-1] - errors[best], group) else len(STRENGTHS) - 1
