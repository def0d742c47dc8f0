"""Predict each setting's accuracy with scikit-learn, then take the best affordable one.

Logistic regression and boosted trees; the strength of the former is picked on the validation split. Cells that were
not measured are left out. Shapes: S samples, B states, K settings, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features
from budgetvlm.policies.argmax_policy import ArgmaxPolicy, FeatureScaler
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

Predict = Callable[[np.ndarray], np.ndarray]  # [B, D] -> [B, K], or [B] for one setting
FitColumn = Callable[[np.ndarray, np.ndarray], Predict | None]  # inputs [n, D] and accuracies [n] of one setting
INVERSE_STRENGTH = (0.001, 0.01, 0.1)  # scikit-learn's C
TREES, LEAVES, LEAST_LEAF, STEP, COMPONENTS = 150, 8, 20, 0.05, 48
FEWEST_FOR_STOPPING = 50  # fewer samples than this are too few to hold some out for early stopping


@dataclass(frozen=True, eq=False)
class Examples:
    """Standardised inputs ``[S, D]`` and accuracies ``[S, K]`` of both splits, and the mean accuracies ``[K]``."""

    x: np.ndarray
    y: np.ndarray
    held_out_x: np.ndarray
    held_out_y: np.ndarray
    prior: np.ndarray

    def loss(self, predict: Predict) -> float:
        """Mean squared error over the measured validation cells; infinity where there are none."""
        error = np.square(predict(self.held_out_x) - self.held_out_y)
        return float(np.nanmean(error)) if np.isfinite(error).any() else np.inf


def logistic(train: ProfileTable, features: Features, validation: ProfileTable, held_out: Features) -> ArgmaxPolicy:
    """One logistic regression for each setting."""
    return _fitted(_regressions, "logistic + argmax", train, features, validation, held_out)


def boosted_trees(
    train: ProfileTable, features: Features, validation: ProfileTable, held_out: Features
) -> ArgmaxPolicy:
    """Boosted trees for each setting, with squared error."""
    return _fitted(_boosted, "boosted trees + argmax", train, features, validation, held_out)


def _fitted(
    method: Callable[[Examples], Predict],
    name: str,
    train: ProfileTable,
    features: Features,
    validation: ProfileTable,
    held_out: Features,
) -> ArgmaxPolicy:
    means, scaler = SettingMeans.fit(train), FeatureScaler.fit(features)
    prior = np.nan_to_num(means.accuracy, nan=0.0)  # a setting without measurements is never feasible
    accuracy, held_out_accuracy = (table.accuracy.astype(np.float64) for table in (train, validation))
    predict = method(Examples(scaler.of(features), accuracy, scaler.of(held_out), held_out_accuracy, prior))
    return ArgmaxPolicy(means, lambda image, language: predict(scaler(image, language)), name)


def _regressions(examples: Examples) -> Predict:
    """The strength with the least error on the validation split."""
    return min((_logistic_columns(examples, strength) for strength in INVERSE_STRENGTH), key=examples.loss)


def _logistic_columns(examples: Examples, strength: float) -> Predict:
    from sklearn.linear_model import LogisticRegression

    def fit(x: np.ndarray, y: np.ndarray) -> Predict | None:
        weight = np.concatenate([y, 1 - y])  # an accuracy of .3 is three tenths of a right answer
        label = np.repeat([1, 0], len(y))
        some = weight > 0
        if len(np.unique(label[some])) < 2:
            return None
        model = LogisticRegression(C=strength, max_iter=300)
        model.fit(np.concatenate([x, x])[some], label[some], sample_weight=weight[some])
        return lambda rows: np.asarray(model.predict_proba(rows)[:, 1])

    return _columns(examples, fit)


def _boosted(examples: Examples) -> Predict:
    """Boosted trees on the leading principal components: with all inputs one setting takes minutes."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingRegressor

    components = min(COMPONENTS, *examples.x.shape)
    pca = PCA(components, random_state=0).fit(examples.x) if components < examples.x.shape[1] else None

    def reduced(x: np.ndarray) -> np.ndarray:
        return x if pca is None else np.asarray(pca.transform(x))

    def fit(x: np.ndarray, y: np.ndarray) -> Predict | None:
        if np.ptp(y) == 0:
            return None
        stopping = {"validation_fraction": 0.15, "n_iter_no_change": 10} if len(y) >= FEWEST_FOR_STOPPING else {}
        model = HistGradientBoostingRegressor(
            learning_rate=STEP, max_iter=TREES, max_leaf_nodes=LEAVES, min_samples_leaf=LEAST_LEAF,
            early_stopping=bool(stopping), random_state=0, **stopping,
        ).fit(reduced(x), y)  # fmt: skip
        return lambda rows: np.asarray(model.predict(reduced(rows)))

    return _columns(examples, fit)


def _columns(examples: Examples, fit: FitColumn) -> Predict:
    """One model for each setting, fitted on its measured cells; the training mean where it has nothing to learn."""
    models = []
    for column in range(examples.y.shape[1]):
        known = ~np.isnan(examples.y[:, column])
        models.append(fit(examples.x[known], examples.y[known, column]) if known.any() else None)

    def predict(x: np.ndarray) -> np.ndarray:
        columns = [
            np.full(len(x), prior) if model is None else model(x)
            for model, prior in zip(models, examples.prior, strict=True)
        ]
        return np.stack(columns, axis=1)

    return predict
