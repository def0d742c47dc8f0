"""Vowpal Wabbit's contextual bandit: it learns from the answer of the one setting tried, as a live system would.

Each pass over the training samples tries one setting a sample at random, and the bandit sees its cost and the
probability of trying it alone. Mathematics: Bietti, Agarwal and Langford 2021, "A Contextual Bandit Bake-off"
(importance-weighted regression). Needs `pip install vowpalwabbit`. Shapes: B states, K settings, D inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from budgetvlm import _extras
from budgetvlm.errors import MissingExtraError
from budgetvlm.features import Features
from budgetvlm.policies import States
from budgetvlm.policies.argmax_policy import FeatureScaler
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

PASSES = 4  # settings tried for each sample
COMMAND = "--cb_adf --cb_type mtr --interactions ca --quiet --noconstant -b 20"


@dataclass(frozen=True, eq=False)
class ContextualBandit:
    """Chooses the feasible setting with the least predicted cost (one minus accuracy) plus price times mean latency."""

    means: SettingMeans
    scaler: FeatureScaler
    workspace: Any
    tried: np.ndarray
    name: str = "contextual bandit"

    @classmethod
    def fit(cls, train: ProfileTable, features: Features, seed: int = 0) -> ContextualBandit:
        """Learn online, in random order. Raises MissingExtraError without vowpalwabbit."""
        if not _extras.installed("vowpalwabbit"):
            raise MissingExtraError(
                "vowpalwabbit is not installed, and without it there is no such policy; pip install vowpalwabbit"
            )
        from vowpalwabbit import Workspace

        means, scaler = SettingMeans.fit(train), FeatureScaler.fit(features)
        settings = np.flatnonzero(np.isfinite(means.accuracy))
        workspace = Workspace(f"{COMMAND} --random_seed {seed}")
        for lines in _examples(train, _context(scaler.of(features)), settings, seed):
            workspace.learn(lines)
        return cls(means, scaler, workspace, settings)

    def choose(self, states: States) -> np.ndarray:
        return self.means.choose(-states.by_sample(self._costs), states.feasible, states.price)

    def _costs(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> predicted costs ``[B, K]``, NaN for settings never tried."""
        actions = _actions(self.tried)
        costs = np.full((len(image), len(self.means.accuracy)), np.nan)
        for row, context in enumerate(_context(self.scaler(image, language))):
            costs[row, self.tried] = self.workspace.predict([context, *actions])
        return costs


def _examples(train: ProfileTable, contexts: list[str], settings: np.ndarray, seed: int) -> Iterator[list[str]]:
    """One multi-line example for each pass and sample: the context and every setting, one of them with its cost."""
    rng = np.random.default_rng(seed)
    lines = _actions(settings)
    for _ in range(PASSES):
        for sample in rng.permutation(train.num_samples):
            known = np.flatnonzero(np.isfinite(train.accuracy[sample, settings]))
            if not len(known):
                continue
            action = int(rng.choice(known))
            cost = 1.0 - float(train.accuracy[sample, settings[action]])
            labelled = f"{action}:{cost:.4f}:{1 / len(known):.6f} {lines[action]}"
            yield [contexts[sample], *lines[:action], labelled, *lines[action + 1 :]]


def _context(inputs: np.ndarray) -> list[str]:
    """Standardised inputs ``[B, D]`` as shared lines, a constant among them."""
    return ["shared |c b:1 " + " ".join(f"{i}:{value:.4f}" for i, value in enumerate(row) if value) for row in inputs]


def _actions(settings: np.ndarray) -> list[str]:
    return [f"|a s{setting}" for setting in settings]
