"""A setting may be revised once the image is encoded: how many crops it got is then fixed, everything else is not.

Encoding is the first half of a request's work, and how long it took is known before the language model starts. So a
setting may be aimed at where its time is only expected to be kept, as long as the cheapest one with the same image is
sure to: if encoding turns out slow, the choice falls back on less (two-stage optimisation with recourse).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import numpy as np

from budgetvlm.knobs import KnobSpace

IMAGE_KNOB = "max_crops"


class SameImage:
    """Which settings of a knob space show the model the same image: those that differ in other knobs alone."""

    def __init__(self, space: KnobSpace) -> None:
        self._sizes = space.sizes
        self._others = tuple(axis for axis, name in enumerate(space.names) if name != IMAGE_KNOB)
        image = [axis for axis in range(len(space.names)) if axis not in self._others]
        self._number = space.value_indices[:, image[0]] if image else np.zeros(len(space), dtype=np.int64)

    def of(self, index: int | np.ndarray) -> np.ndarray:
        """Settings with the image of these ones ``[...]``, bool ``[..., K]``."""
        out: np.ndarray = self._number == self._number[index][..., None]
        return out

    def least(self, times: np.ndarray) -> np.ndarray:
        """The least time among those with the same image, of every setting, ``[..., K]``."""
        lead = times.shape[:-1]
        axes = tuple(len(lead) + axis for axis in self._others)
        grid = times.reshape(*lead, *self._sizes)
        least = grid.min(axis=axes, keepdims=True) if axes else grid
        out: np.ndarray = np.broadcast_to(least, grid.shape).reshape(times.shape)
        return out

    def reachable(self, bounds: np.ndarray, aimed: np.ndarray) -> np.ndarray:
        """The budget from which a setting may be chosen, ``[..., K]``.

        Args:
            bounds: that its time stays below, ``[..., K]``.
            aimed: at which it is expected to be among those allowed when the choice is revised, ``[..., K]``.
        """
        out: np.ndarray = np.minimum(bounds, np.maximum(self.least(bounds), aimed))
        return out
