"""What every setting would have scored, from a controller's own expectations and the scores of what was chosen.

A Gaussian process learns where the scores differ from what the controller expected. Requests are alike whose image and
question are, settings whose knobs are, so that a score says a little about other requests and about other settings.
How much can be learnt at all is found by the likelihood of the scores (empirical Bayes; Rasmussen and Williams 2006,
chapter 5); where the scores are what was expected, nothing is.
Shapes: N requests, M scored ones of them, K settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from budgetvlm.controller.network import GRPOController
from budgetvlm.feedback.served_log import ServedLog

AMPLITUDES = (0.003, 0.01, 0.03, 0.1, 0.3)  # variance of what is learnt
REACHES = (0.1, 0.3, 1.0)  # of a score, in median squared distances
NOISES = (0.05, 0.1, 0.2)  # variance of one score around its mean
DIRECTIONS = 16  # of a feature, in which requests are compared
LEAST_EVIDENCE = 3.0  # in nats, by which having learnt has to explain the scores better
MOST_SCORES = 1000  # the newest; what is learnt takes their number to the third power


class Likeness(NamedTuple):
    """How alike requests are by one of their features: by distance in the directions in which those of a log vary most.

    Attributes:
        layer: standardises the feature. center ``[F]`` and directions ``[F, R]``: of the log's.
        scale: the median squared distance in it.
    """

    layer: nn.Module
    center: np.ndarray
    directions: np.ndarray
    scale: float

    @classmethod
    def of(cls, layer: nn.Module, raw: np.ndarray) -> Likeness:
        """Likeness by raw features ``[M, D]`` of a log."""
        inputs = _standardised(layer, raw)
        center = inputs.mean(axis=0)
        directions = np.linalg.svd(inputs - center, full_matrices=False)[2][:DIRECTIONS].T
        places = (inputs - center) @ directions
        distances = _squared_distances(places, places)
        return cls(layer, center, directions, float(np.median(distances[distances > 0])) if distances.any() else 1.0)

    def distances(self, raw: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Squared distances between raw features ``[N, D]`` and ``[M, D]`` as shares of the median, ``[N, M]``."""
        one, other = ((_standardised(self.layer, x) - self.center) @ self.directions for x in (raw, others))
        return _squared_distances(one, other) / self.scale


@dataclass(frozen=True, eq=False)
class OutcomeModel:
    """What was learnt beyond a controller's expectations.

    Attributes:
        expects: the controller. seen: the scored requests ``[M]``.
        likeness: by image and by question.
        reach: how far a score reaches, in median squared distances.
        weights: of the scores, ``[M]``; zeros: nothing was learnt.
        evidence: by how many nats the scores are likelier than by the controller's expectations alone.
    """

    expects: GRPOController
    seen: ServedLog
    likeness: tuple[Likeness, Likeness] | None
    reach: float
    weights: np.ndarray
    evidence: float

    @classmethod
    def fit(cls, log: ServedLog, expects: GRPOController) -> OutcomeModel:
        """Learn from the scores of a log; without any, nothing."""
        scored = log.scored
        seen = scored.rows(np.arange(len(scored))[-MOST_SCORES:])
        if not len(seen):
            return cls(expects, seen, None, 1.0, np.zeros(0), 0.0)
        residual = seen.scores - seen.as_scored_log.of_chosen(seen.values_by(expects))
        likeness = Likeness.of(expects.image_input, seen.image), Likeness.of(expects.lang_input, seen.language)
        settings = _of_settings(expects)[np.ix_(seen.chosen, seen.chosen)]
        distances = _distances(likeness, seen, seen)
        nothing = max(_likelihood(residual, np.full(len(seen), noise)) for noise in NOISES)
        found = max(
            (_learnt(_kernel(distances, reach) * settings, residual, reach) for reach in REACHES), key=itemgetter(0)
        )
        evidence, reach, weights = found[0] - nothing, *found[1:]
        return cls(expects, seen, likeness, reach, weights * (evidence > LEAST_EVIDENCE), evidence)

    @property
    def learnt(self) -> bool:
        """Whether scores say anything that the controller did not expect."""
        return bool(self.weights.any())

    def predict(self, log: ServedLog) -> np.ndarray:
        """The expected score of every setting, ``[N, K]``."""
        if self.likeness is None or not self.learnt:
            return np.clip(log.values_by(self.expects), 0.0, 1.0)
        by_request = _kernel(_distances(self.likeness, log, self.seen), self.reach) * self.weights
        correction = by_request @ _of_settings(self.expects)[self.seen.chosen]
        return np.clip(log.values_by(self.expects) + correction, 0.0, 1.0)


def _learnt(kernel: np.ndarray, residual: np.ndarray, reach: float) -> tuple[float, float, np.ndarray]:
    """The likelihood of residuals ``[M]`` at the best variances, the reach, and the weights of the residuals there."""
    values, vectors = np.linalg.eigh(kernel)
    values, rotated = values.clip(min=0.0), vectors.T @ residual
    likelihood, amplitude, noise = max(
        (_likelihood(rotated, amplitude * values + noise), amplitude, noise)
        for amplitude in AMPLITUDES
        for noise in NOISES
    )
    return likelihood, reach, amplitude * (vectors @ (rotated / (amplitude * values + noise)))


@torch.no_grad()
def _standardised(layer: nn.Module, raw: np.ndarray) -> np.ndarray:
    out: np.ndarray = layer(torch.from_numpy(raw)).double().numpy()
    return out


def _squared_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Between all rows of two arrays, ``[N, M]``."""
    squares = np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1) - 2 * one @ other.T
    out: np.ndarray = squares.clip(min=0.0)
    return out


def _distances(likeness: tuple[Likeness, Likeness], one: ServedLog, other: ServedLog) -> tuple[np.ndarray, np.ndarray]:
    """By image and by question, ``[N, M]`` each."""
    return likeness[0].distances(one.image, other.image), likeness[1].distances(one.language, other.language)


def _kernel(distances: tuple[np.ndarray, np.ndarray], reach: float) -> np.ndarray:
    """How alike requests are, 1 at most: whatever they are, by either feature, and by both, ``[N, M]``."""
    by_image, by_language = (np.exp(-distance / reach) for distance in distances)
    out: np.ndarray = (1 + by_image) * (1 + by_language) / 4
    return out


def _of_settings(controller: GRPOController) -> np.ndarray:
    """How alike settings are, 1 at most: by a factor e for the whole range of each knob, ``[K, K]``."""
    space = controller.knob_space
    steps = np.abs(space.value_indices[:, None] - space.value_indices[None]) / np.maximum(np.array(space.sizes) - 1, 1)
    out: np.ndarray = np.exp(-steps.sum(axis=2))
    return out


def _likelihood(rotated: np.ndarray, variances: np.ndarray) -> float:
    """Logarithm of the density of residuals in the kernel's directions, but for a constant."""
    return float(-0.5 * (np.square(rotated) / variances + np.log(variances)).sum())
