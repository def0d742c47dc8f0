"""How an image stands in a prompt, before it is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ImageLayout:
    """How one image stands in the prompt at one `max_crops`.

    Attributes:
        ids: its token ids; the family's placeholder stands for each visual token.
        visual: which of ``ids`` are visual tokens; None: all of them.
        grid: rows and columns of its tiles or patches; (0, 0) where it is not cut.
        size: height and width of the image in pixels.
        order: for each visual token, the index of its feature; None: they are in the features' order.
        lead: text in front of its first token.
    """

    ids: tuple[int, ...]
    visual: tuple[bool, ...] | None = None
    grid: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    order: tuple[int, ...] | None = None
    lead: str = ""

    @classmethod
    def of(cls, ids: Iterable[int], placeholder: int, grid: tuple[int, int], size: tuple[int, int]) -> ImageLayout:
        """Make the layout of ids of which those that are the placeholder's are visual tokens."""
        ids = tuple(ids)
        return cls(ids, tuple(i == placeholder for i in ids), grid, size)

    @cached_property
    def is_visual(self) -> tuple[bool, ...]:
        """For each of ``ids``, whether it is a visual token."""
        return (True,) * len(self.ids) if self.visual is None else self.visual

    @cached_property
    def num_visual(self) -> int:
        """V, the number of visual tokens."""
        return sum(self.is_visual)
