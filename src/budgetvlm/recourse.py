"""A setting may be revised once the image is encoded: how many crops it got is then fixed, everything else is not.

Encoding is the first half of a request's work, and how long it took is known before the language model starts. So a
setting may be aimed at where its time is only expected to be kept, as long as the cheapest one with the same image is
sure to: if encoding turns out slow, the choice falls back on less (two-stage optimisation with recourse).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.knobs import KnobSpace

IMAGE_KNOB = "max_crops"


class SameImage:
    """Which settings of a knob space show the model the same image: those that differ in other knobs alone."""

    def __init__(self, space: KnobSpace) -> None:
        image = space.names.index(IMAGE_KNOB) if IMAGE_KNOB in space.names else None
        number = np.zeros(len(space), dtype=np.int64) if image is None else space.value_indices[:, image]
        self._same = number == number[:, None]
        # Settings by image: each has as many as any other.
        self._members = np.argsort(number, kind="stable").reshape(number.max() + 1, -1)

    def of(self, index: int | np.ndarray) -> np.ndarray:
        """Settings with the image of these ones ``[...]``, bool ``[..., K]``."""
        out: np.ndarray = self._same[index]
        return out

    def reachable(self, bounds: np.ndarray, aimed: np.ndarray) -> np.ndarray:
        """The budget from which a setting may be chosen, ``[..., K]``.

        Args:
            bounds: that its time stays below, ``[..., K]``.
            aimed: at which it is expected to be among those allowed when the choice is revised, ``[..., K]``.
        """
        if bounds.ndim == 1:
            return _reachable(bounds, aimed, self._members)
        rows = bounds.reshape(-1, bounds.shape[-1]), aimed.reshape(-1, bounds.shape[-1])
        return np.stack([_reachable(*row, self._members) for row in zip(*rows, strict=True)]).reshape(bounds.shape)


@compiled
def _reachable(bounds: np.ndarray, aimed: np.ndarray, members: np.ndarray) -> np.ndarray:
    """See `SameImage.reachable`, ``[K]``; ``members`` are the settings of each image, ``[images, K / images]``."""
    out = np.empty_like(bounds)
    for same in members:
        least = bounds[same[0]]
        for k in same:
            least = min(least, bounds[k])
        for k in same:
            out[k] = min(bounds[k], max(least, aimed[k]))
    return out
