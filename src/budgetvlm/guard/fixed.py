"""A guard whose bounds are the same for every request, and what any guard can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from budgetvlm.guard.bounds import NUM_ROWS, Bounds, Outcome, Request, Spent
from budgetvlm.guard.rule import Rule
from budgetvlm.knobs import KnobSpace


class Guard(Protocol):
    """Says how long a request may take at each setting.

    Attributes:
        knob_space: of the settings. rule: what it may do.
        own_ms: what a request takes beside the model's stages: features, controller, guard.
    """

    rule: Rule
    own_ms: float

    @property
    def knob_space(self) -> KnobSpace: ...
    @property
    def may_be_late(self) -> bool: ...
    def among(self, in_flight: int) -> Guard: ...
    def bounds_at_choice(self, request: Request, budget_ms: float, spent: Spent, known: np.ndarray) -> Bounds: ...
    def bounds_at_revision(self, chosen: Bounds, index: int, spent: Spent, known: np.ndarray) -> Bounds: ...
    def faster_settings(self, index: int) -> tuple[int, ...]: ...
    def update(self, index: int, decided_by: Sequence[Bounds], outcome: Outcome) -> None: ...
    def copy(self) -> Guard: ...
    def to_dict(self) -> Mapping[str, Any]: ...


class FixedGuard:
    """Bounds that a controller was trained with; nothing is learnt, revised, hurried or cut.

    Args:
        bounds_ms: of each setting, for the model alone, ``[K]``; infinity: never allowed; 0: not known, always allowed.
        own_ms: see `Guard`.
    """

    may_be_late = False

    def __init__(self, knob_space: KnobSpace, bounds_ms: np.ndarray, own_ms: float = 0.0) -> None:
        self.knob_space, self.own_ms = knob_space, own_ms
        self.rule = Rule(revises=False, cuts=False, hurries=False, learns=False)
        self._bounds_ms = np.asarray(bounds_ms, dtype=np.float64)

    def among(self, in_flight: int) -> FixedGuard:
        """Itself."""
        return self

    def bounds_at_choice(self, request: Request, budget_ms: float, spent: Spent, known: np.ndarray) -> Bounds:
        """The fixed bounds, and beside them the controller's own time and the waiting."""
        own_ms = self.own_ms + spent.waited_ms
        bounds = np.where(self._bounds_ms > 0, self._bounds_ms + own_ms, 0.0)
        times = np.zeros((NUM_ROWS, len(bounds)))
        times[:5] = bounds
        times[:3, ~known] = np.inf
        return Bounds(times, int(times[0].argmin()), spent=spent)

    def bounds_at_revision(self, chosen: Bounds, index: int, spent: Spent, known: np.ndarray) -> Bounds:
        """The same bounds."""
        return chosen

    def faster_settings(self, index: int) -> tuple[int, ...]:
        """None: answers are not hurried."""
        return ()

    def update(self, index: int, decided_by: Sequence[Bounds], outcome: Outcome) -> None:
        """Learn nothing."""

    def copy(self) -> FixedGuard:
        """Another one."""
        return FixedGuard(self.knob_space, self._bounds_ms, self.own_ms)

    def to_dict(self) -> Mapping[str, Any]:
        """Nothing: the bounds lie in the controller's checkpoint."""
        return {}
