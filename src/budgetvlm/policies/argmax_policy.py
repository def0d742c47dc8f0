"""The policy that follows from predicted accuracies: the best setting that is affordable and worth its latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.states import States

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class ArgmaxPolicy:
    """Chooses the feasible setting with the largest predicted accuracy minus price times mean latency.

    Attributes:
        means: of the training samples.
        predict: features ``[B, Di]``, ``[B, Dl]`` -> predicted accuracy of every setting, ``[B, K]``.
    """

    means: SettingMeans
    predict: Predict
    name: str

    def choose(self, states: States) -> np.ndarray:
        return self.means.choose(states.by_sample(self.predict), states.feasible, states.price)
