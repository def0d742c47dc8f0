"""What may still be changed of a setting when a request is under way.

**Its compute, once the image is encoded.** How many crops it got is then fixed, everything else is not. Encoding is the
first half of a request's work, and how long it took is known before the language model starts. So a setting may be
aimed at where its time is only expected to be kept, as long as the cheapest one with the same image is sure to: if
encoding turns out slow, the choice falls back on less (two-stage optimisation with recourse).

**The pace of its answer, block by block and token by token.** What reading the prompt wrote into the cache can be read
on with fewer experts and by fewer blocks, and reading can go on so from any block. So a setting may be chosen whose
whole answer is only expected to be in time, as long as it is sure to be with all of it made in a hurry.

The bounds that follow are in `budgetvlm.guard.specification`. Shapes: K settings.
"""

from __future__ import annotations

import numpy as np

from budgetvlm.knobs import KnobSpace, Setting

IMAGE_KNOB = "max_crops"


class Hurry:
    """The settings at which an answer may go on, where finishing as planned would be late.

    All knobs but the image's go down to their lowest values, one after the other in the order of the space. They never
    go up again: a block that was skipped lacks the keys and values of the tokens that it did not see.

    Attributes:
        steps: for each setting the numbers of those, each faster than the one before; maybe none.
        fastest: the last of them, or the setting itself where there is none, int64 ``[K]``.
    """

    def __init__(self, space: KnobSpace) -> None:
        self.steps = tuple(_faster(space, setting) for setting in space.settings)
        self.fastest = np.array([steps[-1] if steps else k for k, steps in enumerate(self.steps)], dtype=np.int64)


def _faster(space: KnobSpace, setting: Setting) -> tuple[int, ...]:
    now, out = dict(setting), []
    for name in space.names:
        lowest = space.values(name)[0]
        if name != IMAGE_KNOB and now[name] != lowest:
            now[name] = lowest
            out.append(space.index(now))
    return tuple(out)


class SameImage:
    """Which settings of a knob space show the model the same image: those that differ in other knobs alone.

    Attributes:
        members: the settings of each image, int64 ``[images, K / images]``: each has as many as any other.
    """

    def __init__(self, space: KnobSpace) -> None:
        image = space.names.index(IMAGE_KNOB) if IMAGE_KNOB in space.names else None
        number = np.zeros(len(space), dtype=np.int64) if image is None else space.value_indices[:, image]
        self._same = number == number[:, None]
        self.members = np.argsort(number, kind="stable").reshape(number.max() + 1, -1).astype(np.int64)

    def of(self, index: int | np.ndarray) -> np.ndarray:
        """Settings with the image of these ones ``[...]``, bool ``[..., K]``."""
        out: np.ndarray = self._same[index]
        return out
