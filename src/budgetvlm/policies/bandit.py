"""Vowpal Wabbit's contextual bandit: learns from the answer of the one setting that was tried, as a live system would.

Each pass over the training samples tries one setting a sample at random, and the bandit sees its cost and the
probability of trying it alone. Mathematics: Bietti, Agarwal and Langford 2021, "A Contextual Bandit Bake-off"
(importance-weighted regression). Shapes: B states, K settings, D inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from budgetvlm._extras import require
from budgetvlm.features import Features
from budgetvlm.policies.inputs import Inputs
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.states import States
from budgetvlm.table import ProfileTable

PASSES = 4  # settings tried for each sample
COMMAND = "--cb_adf --cb_type mtr --interactions ca --quiet --noconstant -b 20"


@dataclass(frozen=True, eq=False)
class ContextualBandit:
    """Least predicted cost (one minus accuracy) plus price times mean latency, among the feasible settings."""

    expected: SettingMeans
    inputs: Inputs
    workspace: Any
    tried: np.ndarray
    name: str = "contextual bandit"

    @classmethod
    def fit(cls, train: ProfileTable, features: Features, seed: int = 0) -> ContextualBandit:
        """Learn online, in random order. Raises MissingExtraError without vowpalwabbit."""
        require("vowpalwabbit", "vw", "such policy")
        from vowpalwabbit import Workspace

        expected, inputs = SettingMeans.fit(train), Inputs.fit(features)
        settings = np.flatnonzero(np.isfinite(expected.accuracy))
        workspace = Workspace(f"{COMMAND} --random_seed {seed}")
        for lines in _examples(train, _context(inputs.of(features)), settings, seed):
            workspace.learn(lines)
        return cls(expected, inputs, workspace, settings)

    def choose(self, states: States) -> np.ndarray:
        return self.expected.choose(-states.by_sample(self._costs), states.feasible, states.price)

    def _costs(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> predicted costs ``[B, K]``, NaN for settings never tried."""
        actions = _actions(self.tried)
        costs = np.full((len(image), len(self.expected.accuracy)), np.nan)
        for row, context in enumerate(_context(self.inputs(image, language))):
            costs[row, self.tried] = self.workspace.predict([context, *actions])
        return costs


def _examples(train: ProfileTable, contexts: list[str], settings: np.ndarray, seed: int) -> Iterator[list[str]]:
    """One multi-line example a sample and pass: the context, and every setting, one of them with its cost."""
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
