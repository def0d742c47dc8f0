"""What the controller starts from: networks and a ridge regression, as far as held-out samples trust them.

The regression is better where groups are few, the networks where samples are many and what counts is bent. Half of
each is as good as the better one nearly everywhere, so only clear evidence moves the weights away from that. A network
that held-out samples do not trust counts for less or for nothing, and without any evidence the start is the settings'
means.
Shapes: M controllers, B states, V validation samples, K settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features
from budgetvlm.policies.argmax_policy import ArgmaxPolicy
from budgetvlm.policies.evidence import clearly_positive, squared_error, trust
from budgetvlm.policies.predictor import PredictorConfig, fit_predictors
from budgetvlm.policies.ridge import Ridge
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable


@dataclass(frozen=True, eq=False)
class Teachers:
    """Fitted teachers of M controllers.

    Attributes:
        means: mean accuracy of each setting on the training samples, ``[K]``.
        networks: those of the first controller, then those of the second, and so on.
        ridge: fitted on training and validation samples.
        weights: of the regression and of the networks' mean, ``[M, 2]``; what is left to 1 is the means'.
    """

    means: np.ndarray
    networks: Sequence[ArgmaxPolicy]
    ridge: Ridge
    weights: np.ndarray

    @classmethod
    def fit(cls, table: ProfileTable, features: Features, config: PredictorConfig, seeds: np.ndarray) -> Teachers:
        """Fit a network for each seed ``[M, number of networks]``, and one regression for all.

        ``table``: training and validation samples alone, told apart by their split.
        """
        train, validation = (table.subset(side) for side in ("train", "validation"))
        known, held_out = (features.aligned(side.sample_ids) for side in (train, validation))
        means = np.nan_to_num(SettingMeans.fit(train).accuracy)
        networks = fit_predictors(train, known, validation, held_out, config, seeds.reshape(-1).tolist())
        regressed = Ridge.fit(train, known, checked=False).predict(held_out.image, held_out.language)
        ridge = Ridge.fit(table, features.aligned(table.sample_ids))
        weights = [
            _weights(ridge.tells_settings_apart, regressed, predicted, means, validation)
            for predicted in _by_controller(networks, held_out, len(seeds))
        ]
        return cls(means, networks, ridge, np.array(weights))

    def values(self, features: Features) -> np.ndarray:
        """What each controller is to know of some samples, float64 ``[M, B, K]``."""
        regressed = self.ridge.predict(features.image, features.language)
        predicted = _by_controller(self.networks, features, len(self.weights))
        of_ridge, of_networks = (column[:, None, None] for column in self.weights.T)
        values: np.ndarray = self.means + of_ridge * (regressed - self.means) + of_networks * (predicted - self.means)
        return values


def _by_controller(networks: Sequence[ArgmaxPolicy], features: Features, controllers: int) -> np.ndarray:
    """Mean prediction of each controller's networks, ``[M, B, K]``."""
    predicted = np.stack([network.predict(features.image, features.language) for network in networks])
    mean: np.ndarray = predicted.reshape(controllers, -1, *predicted.shape[1:]).mean(axis=1)
    return mean


def _weights(
    learnt: bool, regressed: np.ndarray, predicted: np.ndarray, means: np.ndarray, validation: ProfileTable
) -> tuple[float, float]:
    """The weights of a regression and of a network by their predictions ``[V, K]``."""
    accuracy, group = validation.accuracy.astype(np.float64), validation.units
    share = trust(predicted, means, accuracy, group)
    if not learnt or not share:
        return float(learnt), share

    def errors(of_ridge: float, of_network: float) -> np.ndarray:
        mixed = means + of_ridge * (regressed - means) + of_network * (predicted - means)
        return squared_error(mixed, accuracy)

    half = (1.0 - share / 2, share / 2)
    for alone in ((0.0, share), (1.0, 0.0)):
        if clearly_positive(errors(*half) - errors(*alone), group):
            return alone
    return half
