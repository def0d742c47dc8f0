"""Which groups a request belongs to: those of its kind share a part of the margin.

It is in four at a time: that of all requests; by the size of its image, or the number of several; by its budget, as a
share of the full setting's time; by the length of its answer. While the machine is overloaded it is in others of the
same kinds, so that what is learnt then does not stay when the load has gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from budgetvlm.guard.kernels import BUDGET_RATIO, LARGEST_BUDGET_SHARE, SMALLEST_BUDGET_SHARE, budget_step
from budgetvlm.guard.margin import Margin


class Groups:
    """The numbers of the groups, as a margin counts them.

    Attributes:
        table: of all, of each step of budgets, of each answer length, int64 ``[2, 1 + steps + L]``; the second row is
            of an overloaded machine.

    Args:
        lengths: answer lengths in tokens, ``[L]``.
    """

    def __init__(self, margin: Margin, lengths: Sequence[float]) -> None:
        steps = range(budget_step(SMALLEST_BUDGET_SHARE), budget_step(LARGEST_BUDGET_SHARE) + 1)
        names = [
            "all",
            *(f"budget about {BUDGET_RATIO**step:.2f} x full" for step in steps),
            *(f"up to {length:.0f} output tokens" for length in lengths),
        ]
        self._margin = margin
        self.table = np.array([self._numbers(name) for name in names], dtype=np.int64).T.copy()

    def of_image(self, most_tokens: float, images: float = 1.0) -> tuple[int, int]:
        """The groups of images that can get this many visual tokens: usually, and on an overloaded machine.

        Requests of several images, and those of none, are of one group for each number of them.
        """
        one = f"image of up to {most_tokens:.0f} visual tokens"
        return self._numbers(one if images == 1 else f"{images:.0f} images")

    def _numbers(self, name: str) -> tuple[int, int]:
        return self._margin.number(name), self._margin.number(f"{name}, slowed down")
