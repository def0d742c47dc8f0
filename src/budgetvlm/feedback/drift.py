"""Whether served requests are still those that a controller was trained for: by their features, and by their scores.

Features: the controller standardises them by their means and spreads in training, so those of like requests have mean
0. A mean of the newest requests that differs by more than chance explains is drift, by the central limit theorem and
Bonferroni's inequality over the features, which need not be independent. Scores: on average an answer should be worth
what the controller expects of its setting. A bound on the difference that leaves out what any controller may be wrong
by is drift (`budgetvlm.feedback.confidence_bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from budgetvlm.feedback.confidence_bounds import lower_bound

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController

WINDOW = 500  # of the newest requests, and of the newest scored ones
FEWEST = 100  # requests that say anything of their features
ALPHA = 0.001  # a false alarm in a thousand windows of requests that nothing changed about
LEAST_SHIFT = 0.1  # in standard deviations; a smaller one matters to no choice
TOLERANCE = 0.05  # of the mean score: by this much a controller may be wrong on requests that it was trained for


@dataclass(frozen=True)
class Drift:
    """What of it was found.

    Attributes:
        features: whether the requests changed. shift: of the feature that changed most, in standard deviations.
        requests: how many were looked at; too few say nothing.
        accuracy: whether answers are worth less or more than expected. difference: score less expectation, on average;
            None without scores. scores: how many there were.
    """

    features: bool
    shift: float
    requests: int
    accuracy: bool
    difference: float | None
    scores: int

    def __bool__(self) -> bool:
        return self.features or self.accuracy

    @property
    def said(self) -> list[str]:
        """One sentence for each of both that drifted."""
        sentences = []
        if self.features:
            sentences.append(
                f"the last {self.requests} requests differ from those that the controller was trained on: a feature's "
                f"mean moved by {self.shift:.2f} standard deviations"
            )
        if self.accuracy and self.difference is not None:
            sentences.append(
                f"the last {self.scores} scores are {abs(self.difference):.2f} "
                f"{'above' if self.difference > 0 else 'below'} what the controller expected"
            )
        return sentences


def drift_of(log: Any, controller: GRPOController) -> Drift:
    """Look at the newest requests of a log, and at the newest scored ones, with the eyes of a controller."""
    newest = log.rows(np.arange(len(log))[-WINDOW:])
    standardised = _standardised(newest, controller)
    shift, expected = shifted(standardised, _num_trained_on(controller))
    scored = log.scored
    scored = scored.rows(np.arange(len(scored))[-WINDOW:])
    residuals = np.empty(0)
    if len(scored):
        values = np.clip(scored.values_by(controller), 0.0, 1.0)
        residuals = scored.scores - scored.as_scored_log.of_chosen(values)
    difference = float(residuals.mean()) if len(residuals) else None
    enough = len(newest) >= FEWEST
    return Drift(
        enough and shift > max(LEAST_SHIFT, expected), shift, len(newest), misjudged(residuals), difference, len(scored)
    )


def shifted(standardised: np.ndarray, trained_on: int) -> tuple[float, float]:
    """The largest shift of a feature's mean from 0, and the largest that chance explains for that one.

    Args:
        standardised: features ``[N, F]``, whose means 0 and spreads 1 are those of others.
        trained_on: how many others.
    """
    from scipy.stats import norm

    if len(standardised) < 2:
        return 0.0, 0.0  # no spread is known, and JSON knows no NaN
    means, spreads = np.abs(standardised.mean(axis=0)), standardised.std(axis=0, ddof=1)
    errors = np.sqrt(np.square(spreads) / len(standardised) + np.minimum(1.0, np.square(spreads)) / trained_on)
    explained = norm.isf(ALPHA / 2 / standardised.shape[1]) * errors
    most = int((means - explained).argmax())
    return float(means[most]), float(explained[most])


def misjudged(residuals: np.ndarray) -> bool:
    """Whether scores less expectations ``[N]`` are on average surely further from 0 than what is tolerated."""
    bounds = (lower_bound(sign * residuals, -1.0, ALPHA / 2) for sign in (1.0, -1.0))
    return len(residuals) > 0 and any(bound > TOLERANCE for bound in bounds)


def _standardised(log: Any, controller: GRPOController) -> np.ndarray:
    """What a controller makes of features of image and question, ``[N, F]``; those that never varied are left out."""
    import torch

    with torch.no_grad():
        layers = (controller.image_input, log.image), (controller.lang_input, log.language)
        out: np.ndarray = np.concatenate([layer(torch.from_numpy(raw)).numpy() for layer, raw in layers], axis=1)
    return out.astype(np.float64)


def _num_trained_on(controller: GRPOController) -> int:
    """On how many samples; each has a digest of its own and one of its image."""
    return len(controller.trained_on.samples.get("train", ())) // 2 or WINDOW
