"""The latency model for one request at a time.

A request's predictions are sums of few terms: what the image takes, what reading the prompt takes, and one more token.
What follows from its size alone can be kept, so that a request only adds its stages up, as fast as they run now.

Shapes: G stages, K settings, M functions of size (`budgetvlm.guard.latency_model`). Times in ms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.guard.latency_model import LatencyModel


class Sized(NamedTuple):
    """What follows from a request's size alone.

    Attributes:
        times: of each stage as profiled: until the first token, then of each further one, ``[2 G, K]``.
        least, most: visual tokens at the settings with the fewest and the most.
        tiled: whether the image is more than its overview there, bool ``[K]``.
    """

    times: np.ndarray
    least: float
    most: float
    tiled: np.ndarray


class QuickLatency:
    """Times of all settings for one request, as profiled.

    Attributes:
        of_image: 1 for the image's stages, 0 for others, ``[G]``.
        overview: weights of the image's size where it is shown least, fixed and per visual token, ``[2, G]``.

    Args:
        image_stages: names of the stages that are the image's.
    """

    def __init__(self, model: LatencyModel, image_stages: Collection[str] = ()) -> None:
        # [M, G, K]: fixed, per visual token, per token of the context and of its square, per step, per step x context,
        # and for tiles.
        self._weights = np.ascontiguousarray(model.corrected_size.transpose(1, 0, 2))
        self.of_image = np.array([float(stage in image_stages) for stage in model.stages])
        self.overview = np.ascontiguousarray(self._weights[:2, :, 0])
        self._as_profiled = np.ones(len(model.stages))

    def size(self, vision: np.ndarray, language: float) -> Sized:
        """What follows from a request's size.

        Args:
            vision: visual tokens at each setting, float64 ``[K]``. language: the prompt's other tokens.
        """
        least, most = float(vision.min()), float(vision.max())
        return Sized(self._stages(vision, language), least, most, vision > least)

    def _stages(self, vision: np.ndarray, language: float) -> np.ndarray:
        fixed, each, token, square, step, step_token, tiles = self._weights
        context = vision + language
        first = fixed + vision * each + context * (token + context * square) + (vision > vision.min()) * tiles
        return np.concatenate([first, step + context * step_token])

    def total(self, vision: np.ndarray, language: float, output: float) -> np.ndarray:
        """The time of an answer of ``output`` tokens at each setting, ``[K]``."""
        image, first, step = terms_of(self.size(vision, language).times, self._as_profiled, self.of_image)[:3]
        out: np.ndarray = image + first + max(output - 1.0, 0.0) * step
        return out


@compiled
def terms_of(times: np.ndarray, factors: np.ndarray, of_image: np.ndarray) -> np.ndarray:
    """What times are sums of, ``[5, K]``.

    The image; the rest until the first token; each further token; and, as profiled, the time until the first token
    and of each further one.

    Args:
        times: see `Sized`.
        factors: how many times as long as profiled each stage takes, ``[G]``.
        of_image: see `QuickLatency`.
    """
    count, settings = len(factors), times.shape[1]
    out = np.zeros((5, settings))
    for g in range(count):
        image, rest = factors[g] * of_image[g], factors[g] * (1 - of_image[g])
        for k in range(settings):
            first, step = times[g, k], times[count + g, k]
            out[0, k] += image * first
            out[1, k] += rest * first
            out[2, k] += factors[g] * step
            out[3, k] += first
            out[4, k] += step
    return out


@compiled
def overview_of(weights: np.ndarray, factors: np.ndarray, of_image: np.ndarray, least: float) -> float:
    """The time of the image where it is shown least: that of its overview.

    Args:
        weights: `QuickLatency.overview`. least: visual tokens there.
        factors, of_image: see `terms_of`.
    """
    total = 0.0
    for g in range(len(factors)):
        total += factors[g] * of_image[g] * (weights[0, g] + least * weights[1, g])
    return total
