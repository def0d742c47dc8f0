"""What another policy would have been worth on served requests, from the scores of the settings that were chosen.

Each estimator gives one number for each request; their mean is the estimate, and their spread says how sure it is.
Shapes: N scored requests, K settings. Probabilities of settings sum to 1 in each row.

Sources: Horvitz and Thompson 1952 (IPS); Swaminathan and Joachims 2015 (SNIPS); Dudík, Langford and Li 2011 (doubly
robust); Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro 2022 (a baseline so clipped that outcomes have a floor).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

DEPTH = 5.0  # of the floor of outcomes: the tightest bounds of those tried on the bundled model's table


class ScoredLog(NamedTuple):
    """Requests whose answers were scored.

    Attributes:
        scores: 0..1, ``[N]``.
        chosen: numbers of their settings, ``[N]``.
        probabilities: with which each setting was chosen, ``[N, K]``.
    """

    scores: np.ndarray
    chosen: np.ndarray
    probabilities: np.ndarray

    def of_chosen(self, of_settings: np.ndarray) -> np.ndarray:
        """What an array ``[N, K]`` says of the settings that were chosen, ``[N]``."""
        out: np.ndarray = of_settings[np.arange(len(self.chosen)), self.chosen]
        return out


def importance(log: ScoredLog, target: np.ndarray) -> np.ndarray:
    """How much more probable each setting is by the target ``[N, K]`` than it was; 0 where it was never chosen."""
    return np.divide(target, log.probabilities, out=np.zeros(target.shape), where=log.probabilities > 0)


def unsupported(log: ScoredLog, target: np.ndarray) -> float:
    """The share of the target's choices that were never made, and of which nothing can be known."""
    return float(np.where(log.probabilities > 0, 0.0, target).sum(axis=1).mean())


def ips(log: ScoredLog, target: np.ndarray, most: float = math.inf) -> np.ndarray:
    """Inverse propensity scoring, ``[N]``: scores by weight.

    Args:
        most: of a weight; less variance for some bias.
    """
    return np.minimum(log.of_chosen(importance(log, target)), most) * log.scores


def snips(log: ScoredLog, target: np.ndarray) -> np.ndarray:
    """Self-normalised inverse propensity scoring, ``[N]``: its mean is the estimate, its spread that of the estimate.

    The estimate is sum(w r) / sum(w); around it, it changes with a request like w (r - estimate) / mean(w).
    """
    weight = log.of_chosen(importance(log, target))
    estimate = (weight * log.scores).sum() / weight.sum()
    out: np.ndarray = estimate + weight * (log.scores - estimate) / weight.mean()
    return out


def doubly_robust(log: ScoredLog, target: np.ndarray, predicted: np.ndarray, most: float = math.inf) -> np.ndarray:
    """What a predictor expects of the target, corrected by what it got wrong where a score is known, ``[N]``.

    Args:
        predicted: score of every setting, ``[N, K]``.
        most: of a weight.
    """
    weight = np.minimum(log.of_chosen(importance(log, target)), most)
    out: np.ndarray = (target * predicted).sum(axis=1) + weight * (log.scores - log.of_chosen(predicted))
    return out


def floored(
    log: ScoredLog, target: np.ndarray, predicted: np.ndarray, depth: float = DEPTH
) -> tuple[np.ndarray, float]:
    """Doubly robust outcomes ``[N]`` and their floor; the mean is the target's value, or less where unsupported.

    Args:
        depth: the baseline of a setting of weight w is ``min(predicted, depth / w)``: any baseline leaves the mean
            alone, and of this one no outcome is below -depth. A deeper floor takes more of the variance away.
    """
    return _outcomes(log, target, predicted, depth)


def gain(
    log: ScoredLog, candidate: np.ndarray, present: np.ndarray, predicted: np.ndarray, depth: float = DEPTH
) -> tuple[np.ndarray, float]:
    """What a candidate is worth beyond the present policy ``[N]``, and a floor of these outcomes.

    Where both choose alike the outcome is 0. With d = (candidate - present) / probability, it is d (score - baseline)
    of the chosen setting and the baseline's own difference. ``depth``: see `floored`.
    """
    return _outcomes(log, candidate - present, predicted, depth)


def _outcomes(log: ScoredLog, target: np.ndarray, predicted: np.ndarray, depth: float) -> tuple[np.ndarray, float]:
    """Outcomes for probabilities ``[N, K]`` or differences of them, and the least that each log could have given."""
    weights, tried = importance(log, target), log.probabilities > 0
    most = np.divide(depth, weights, out=np.full(weights.shape, math.inf), where=weights > 0)
    baseline = np.minimum(np.clip(predicted, 0.0, 1.0), most)
    baseline[~tried] = target[~tried] < 0  # never tried: the candidate's may be worth nothing, the present's everything
    expected = (target * baseline).sum(axis=1)
    least = np.where(tried, np.minimum(weights * -baseline, weights * (1.0 - baseline)), math.inf).min(axis=1)
    outcomes = log.of_chosen(weights * (log.scores[:, None] - baseline)) + expected
    return outcomes, float((least + expected).min(initial=0.0))
