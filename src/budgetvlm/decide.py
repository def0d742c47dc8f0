"""A setting for a request in one compiled call at each moment: the guard's bounds, the controller's values, the best.

Between two moments the model runs and empties the caches; then a call costs some 10 microseconds before it does
anything, and so does every other thing that is done for the first time. Shapes: K settings. Times in ms.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.controller.decision import best_within, values_of
from budgetvlm.guard.bounds import Groups, look, look_again

_ARGUMENTS = tuple(signature(look).parameters)[1:]  # beside the budget
LOOKS_AT, ACCOUNT = len(_ARGUMENTS), _ARGUMENTS.index("account")


@compiled
def choose(
    image: np.ndarray, language: np.ndarray, budget_ms: float, waited_ms: float, *others: Any
) -> tuple[np.ndarray, float, int, tuple[float, int], Groups, np.ndarray, bool, np.ndarray, int]:
    """What `look` says, then the values of a controller ``[K]`` and the best setting by both, as `best_within`.

    Args:
        image, language: as `values_of` takes them.
        waited_ms: of the budget, before the request began.
        others: what `look` takes beside the budget, and then what `values_of` takes beside a state and a budget; side
            by side, because arrays in tuples take longer to pass.
    """
    times, slowdown, fastest, lengths, groups, terms, large = look(budget_ms, *others[:LOOKS_AT])
    seen = seen_ms(budget_ms - waited_ms, others[ACCOUNT][0], slowdown)
    values = values_of(image, language, seen, *others[LOOKS_AT:])
    return times, slowdown, fastest, lengths, groups, terms, large, values, best_within(values, times[0], budget_ms)


@compiled
def choose_again(values: np.ndarray, budget_ms: float, *others: Any) -> tuple[np.ndarray, int, int]:
    """What `look_again` says of the others, and then the best setting for these values ``[K]``."""
    times, fastest = look_again(*others)
    return times, fastest, best_within(values, times[0], budget_ms)


@compiled
def seen_ms(left_ms: float, own_ms: float, slowdown: float) -> float:
    """What a controller is told of a budget: as it would be on the machine that was profiled, for the model.

    Args:
        left_ms: of the budget. own_ms: what comes beside the model's own stages.
        slowdown: see `Bounds`.
    """
    return max((left_ms - own_ms) / slowdown, 1e-3)
