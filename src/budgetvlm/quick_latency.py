"""The latency model for one request at a time: the times of all settings as rows of one small matrix.

A request's predictions are sums of few rows: what the image takes, what reading the prompt takes, and one more token.
So each is a row of coefficients, and all of them together are one product. Stages are scaled by another one, in front.

Shapes: G stages, K settings, M functions of size (`budgetvlm.latency`). Times in ms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from budgetvlm.latency import LatencyModel

SIZES_KEPT = 256  # of requests: images are of few sizes, questions of few lengths
TERMS = 4  # of `QuickLatency.terms`: the image, the rest until the first token, each further token, and one


class _Sized(NamedTuple):
    """What follows from a request's size alone.

    Attributes:
        times: of each stage as profiled: until the first token, then of each further one; the last row is one,
            ``[2 G + 1, K]``.
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
        self._image = np.array([stage in image_stages for stage in model.stages])
        self._overview = self._weights[:2, :, 0].copy()
        self._kept: dict[tuple[bytes, float], _Sized] = {}
        self.scale(np.ones(len(model.stages)))

    def scale(self, factors: np.ndarray) -> None:
        """From now on a stage takes so many times as long as in the profile, ``[G]``."""
        count = len(factors)
        self._rows = np.zeros((TERMS + 2, 2 * count + 1))
        self._rows[0, :count] = factors * self._image
        self._rows[1, :count] = factors * ~self._image
        self._rows[2, count:-1] = factors
        self._rows[3, -1] = 1.0
        self._rows[4, :count] = self._rows[5, count:-1] = 1.0
        self._overview_fixed, self._overview_each = self._overview.dot(self._rows[0, :count]).tolist()

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
        count = len(fixed)
        out = np.empty((2 * count + 1, len(vision)))
        out[:count] = fixed + vision * each + context * (token + context * square) + (vision > vision.min()) * tiles
        out[count:-1] = step + context * step_token
        out[-1] = 1.0
        return out

    def terms(self, sized: _Sized) -> np.ndarray:
        """Times as scaled, ``[TERMS + 2, K]``.

        The image; the rest until the first token; each further token; one; and, as profiled, the time until the first
        token and of each further one.
        """
        return self._rows.dot(sized.times)

    def total(self, vision: np.ndarray, language: float, output: float) -> np.ndarray:
        """The time of an answer of ``output`` tokens at each setting, ``[K]``."""
        image, first, step = self.terms(self.size(vision, language))[:3]
        out: np.ndarray = image + first + max(output - 1.0, 0.0) * step
        return out

    def overview_ms(self, sized: _Sized) -> float:
        """The time of the image where it is shown least: that of its overview."""
        return float(self._overview_fixed + sized.least * self._overview_each)

    def stages_at(self, sized: _Sized, index: int, output: float) -> list[float]:
        """The time of each stage at one setting, as profiled, ``[G]``."""
        column = sized.times[:, index].tolist()
        count, steps = len(column) // 2, max(output - 1.0, 0.0)
        return [first + steps * step for first, step in zip(column[:count], column[count:-1], strict=True)]
