"""The latency model for one request at a time.

A request's predictions are sums of few terms: what the image takes, what reading the prompt takes, and one more token.
What follows from its size alone is kept, so that a request only adds its stages up, as fast as they run now.

Shapes: G stages, K settings, M functions of size (`budgetvlm.latency`). Times in ms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.latency import LatencyModel

SIZES_KEPT = 256  # of requests: images are of few sizes, questions of few lengths


class _Sized(NamedTuple):
    """What follows from a request's size alone.

    Attributes:
        times: of each stage as profiled: until the first token, then of each further one, ``[2 G, K]``.
        least, most: visual tokens at the settings with the fewest and the most.
    """

    times: np.ndarray
    least: float
    most: float


class QuickLatency:
    """Times of all settings for one request.

    Args:
        image_stages: names of the stages that are the image's.
    """

    def __init__(self, model: LatencyModel, image_stages: Collection[str] = ()) -> None:
        # [M, G, K]: fixed, per visual token, per token of the context and of its square, per step, per step x context,
        # and for tiles.
        self._weights = np.ascontiguousarray(model.corrected_size.transpose(1, 0, 2))
        self._image = np.array([float(stage in image_stages) for stage in model.stages])
        self._overview = np.ascontiguousarray(self._weights[:2, :, 0])
        self._at = np.empty(len(model.stages))
        self._kept: dict[tuple[bytes, float], _Sized] = {}
        self.scale(np.ones(len(model.stages)))

    def scale(self, factors: np.ndarray) -> None:
        """From now on a stage takes so many times as long as in the profile, float64 ``[G]``, and not copied."""
        self._factors = factors

    def size(self, vision: np.ndarray, language: float) -> _Sized:
        """What follows from a request's size.

        Args:
            vision: visual tokens at each setting, float64 ``[K]``. language: the prompt's other tokens.
        """
        key = vision.tobytes(), language
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= SIZES_KEPT:
                self._kept.clear()
            self._kept[key] = found = _Sized(self._stages(vision, language), float(vision.min()), float(vision.max()))
        return found

    def _stages(self, vision: np.ndarray, language: float) -> np.ndarray:
        fixed, each, token, square, step, step_token, tiles = self._weights
        context = vision + language
        first = fixed + vision * each + context * (token + context * square) + (vision > vision.min()) * tiles
        return np.concatenate([first, step + context * step_token])

    def terms(self, sized: _Sized) -> np.ndarray:
        """Times as scaled, ``[5, K]``.

        The image; the rest until the first token; each further token; and, as profiled, the time until the first token
        and of each further one.
        """
        return _terms(sized.times, self._factors, self._image)

    def total(self, vision: np.ndarray, language: float, output: float) -> np.ndarray:
        """The time of an answer of ``output`` tokens at each setting, ``[K]``."""
        image, first, step = self.terms(self.size(vision, language))[:3]
        out: np.ndarray = image + first + max(output - 1.0, 0.0) * step
        return out

    def request(self, sized: _Sized) -> tuple[np.ndarray, tuple[float, float, float, float, float], float]:
        """`terms`; those of the full setting; the time of the image where it is shown least: that of its overview."""
        return _request(sized.times, self._factors, self._image, self._overview, sized.least)

    def stages_at(self, sized: _Sized, index: int, output: float) -> np.ndarray:
        """The time of each stage at one setting, as profiled, ``[G]``; the next call writes into the same array."""
        _stages_at(sized.times, index, max(output - 1.0, 0.0), self._at)
        return self._at


@compiled
def _terms(times: np.ndarray, factors: np.ndarray, of_image: np.ndarray) -> np.ndarray:
    """See `QuickLatency.terms`; ``of_image`` is 1 for the image's stages, ``[G]``."""
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
def _request(
    times: np.ndarray, factors: np.ndarray, of_image: np.ndarray, overview: np.ndarray, least: float
) -> tuple[np.ndarray, tuple[float, float, float, float, float], float]:
    """See `QuickLatency.request`: all at once, because numbers out of arrays cost more than the sums."""
    out = _terms(times, factors, of_image)
    full = out[:, -1]
    return out, (full[0], full[1], full[2], full[3], full[4]), _overview_ms(overview, factors, of_image, least)


@compiled
def _overview_ms(weights: np.ndarray, factors: np.ndarray, of_image: np.ndarray, least: float) -> float:
    """From the fixed parts and those of each visual token, ``[2, G]``."""
    total = 0.0
    for g in range(len(factors)):
        total += factors[g] * of_image[g] * (weights[0, g] + least * weights[1, g])
    return total


@compiled
def _stages_at(times: np.ndarray, index: int, steps: float, out: np.ndarray) -> None:
    for g in range(len(out)):
        out[g] = times[g, index] + steps * times[len(out) + g, index]
