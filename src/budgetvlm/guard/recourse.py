"""What may still be changed of a setting when a request is under way.

**Its compute, once the image is encoded.** How many crops it got is then fixed, everything else is not. Encoding is the
first half of a request's work, and how long it took is known before the language model starts. So a setting may be
aimed at where its time is only expected to be kept, as long as the cheapest one with the same image is sure to: if
encoding turns out slow, the choice falls back on less (two-stage optimisation with recourse).

**The pace of its answer, block by block and token by token.** What reading the prompt wrote into the cache can be read
on with fewer experts and by fewer blocks, and reading can go on so from any block. So a setting may be chosen whose
whole answer is only expected to be in time, as long as it is sure to be with all of it made in a hurry.

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.knobs import KnobSpace, Setting

IMAGE_KNOB = "max_crops"
UNHURRIED = 0.5  # of the log margin is kept for an answer that is not hurried


class Hurry:
    """At which settings an answer may go on, where finishing as planned would be late.

    All knobs but the image's go down to their least values, one after the other in the order of the space. They never
    go up again: a block that was skipped lacks the keys and values of the tokens that it did not see.

    Attributes:
        steps: for each setting the numbers of those, each quicker than the one before; maybe none.
        last: the quickest, which may be the setting itself, int64 ``[K]``.
    """

    def __init__(self, space: KnobSpace) -> None:
        self.steps = tuple(_quicker(space, setting) for setting in space.settings)
        self.last = np.array([steps[-1] if steps else k for k, steps in enumerate(self.steps)])


def _quicker(space: KnobSpace, setting: Setting) -> tuple[int, ...]:
    now, out = dict(setting), []
    for name in space.names:
        least = space.values(name)[0]
        if name != IMAGE_KNOB and now[name] != least:
            now[name] = least
            out.append(space.index(now))
    return tuple(out)


@compiled
def bound_of(factor: Any, rest_ms: Any, saving_ms: Any, longer_ms: Any) -> Any:
    """The bound on a rest of which hurrying can save something: sure to be kept in a hurry, likely to be without.

    Numbers or arrays of one shape; without a saving it is factor times the rest.

    Args:
        rest_ms: with a long answer. saving_ms: what hurrying saves of that.
        longer_ms: what a long answer takes beyond one of the expected length.
    """
    likely = np.minimum(factor, factor**UNHURRIED) * (rest_ms - longer_ms)
    return np.maximum(factor * (rest_ms - saving_ms), likely)


class SameImage:
    """Which settings of a knob space show the model the same image: those that differ in other knobs alone.

    Attributes:
        members: the settings of each image, int64 ``[images, K / images]``: each has as many as any other.
    """

    def __init__(self, space: KnobSpace) -> None:
        image = space.names.index(IMAGE_KNOB) if IMAGE_KNOB in space.names else None
        number = np.zeros(len(space), dtype=np.int64) if image is None else space.value_indices[:, image]
        self._same = number == number[:, None]
        self.members = np.argsort(number, kind="stable").reshape(number.max() + 1, -1)

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
        rows = bounds.reshape(-1, bounds.shape[-1]), aimed.reshape(-1, bounds.shape[-1])
        return np.stack([reachable_of(*row, self.members) for row in zip(*rows, strict=True)]).reshape(bounds.shape)


@compiled
def reachable_of(bounds: np.ndarray, aimed: np.ndarray, members: np.ndarray) -> np.ndarray:
    """See `SameImage.reachable`, ``[K]``; ``members`` are the settings of each image, ``[images, K / images]``."""
    out = np.empty_like(bounds)
    for same in members:
        least = bounds[same[0]]
        for k in same:
            least = min(least, bounds[k])
        for k in same:
            out[k] = min(bounds[k], max(least, aimed[k]))
    return out
