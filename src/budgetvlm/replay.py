"""What a guard would have done on requests that were measured at every setting, one after the other.

The clock of a replay is made of measured times, so that guards can be compared on the very same requests, also with the
one that knows every setting's time before it chooses. The guard learns from each request as it would at run time. A
request that runs out of time while it decodes is cut as the deadline would cut it; its tokens are taken to come at even
intervals, and a cut answer is right only if all that it lacks is the token that ends it.

Shapes: n requests, K settings. Times in ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.adaptive import Spent
from budgetvlm.answer import Cut
from budgetvlm.calibrate import Measured
from budgetvlm.controller.decision import best_within
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm.decoding import MARGIN


@dataclass(frozen=True)
class Replayed:
    """One request of a replay.

    Attributes:
        late: over its budget although a setting was allowed. cut: its answer was cut short.
        promised: a setting was allowed.
        accuracy: of what the guard let the controller choose. true_accuracy: had the guard known every time.
    """

    row: int
    budget_share: float
    late: bool
    cut: bool
    promised: bool
    accuracy: float
    true_accuracy: float
    latency_ms: float


def replay(
    model: AdaptiveVLM,
    measured: Measured,
    *,
    reference_ms: float,
    budget_shares: Sequence[float],
    num_requests: int,
    cut: Cut = "always",
    seed: int = 0,
    speed: Callable[[int], float] = lambda number: 1.0,
) -> list[Replayed]:
    """Replay requests in the order in which they were measured, over and over, with random budgets.

    Args:
        model: its guard learns on.
        reference_ms: the full setting's time; budgets are shares of it.
        cut: see `AdaptiveVLM.generate`.
        speed: number of the request -> how many times as long everything takes.
    """
    rng = np.random.default_rng(seed)
    shares = rng.choice(np.asarray(budget_shares, dtype=np.float64), size=num_requests)
    return [
        _replay(model, measured, number % len(measured), float(share), float(share) * reference_ms, speed(number), cut)
        for number, share in enumerate(shares)
    ]


def _replay(
    model: AdaptiveVLM, measured: Measured, row: int, share: float, budget_ms: float, speed: float, cut: Cut
) -> Replayed:
    guard, request = model.guard, measured.requests[row]
    assert guard is not None
    own_ms = speed * model.controller_ms
    # Each setting was run at its own moment, with an overview of its own that told of that moment's speed.
    overviews, images = (speed * times[row] for times in (measured.overview_ms, measured.image_ms))
    moments = [guard.bounds(request, budget_ms, Spent(ms, ms), model.known) for ms in overviews.tolist()]
    bounds_ms = np.array([moment.bounds_ms[k] for k, moment in enumerate(moments)])
    promised = bool((bounds_ms <= budget_ms).any())
    profiled_ms = max((budget_ms - guard.other_ms) / guard.bounds(request, budget_ms).slowdown, 1e-3)
    values = model.decider.values(measured.image[row], request.feature, profiled_ms, None)
    index = _best(values, bounds_ms, budget_ms)
    looks = [moments[index]]
    if guard.revises and promised:
        spent = [Spent(own_ms + ms, ms) for ms in images.tolist()]
        revised = [guard.revised(moments[k], k, spent[k], model.known) for k in range(len(spent))]
        here = np.isfinite(guard.revised(moments[index], index, spent[index], model.known).bounds_ms)
        later_ms = np.array([look.bounds_ms[k] for k, look in enumerate(revised)])
        index = _best(values, np.where(here, later_ms, np.inf), budget_ms)
        looks = [moments[index], revised[index]]
    in_time = model.known & (speed * measured.latency_ms[row] + own_ms <= budget_ms)
    stages = {name: speed * float(times[row, index]) for name, times in measured.stages_ms.items()}
    output = int(measured.output[row, index])
    made = output
    if guard.cuts and (cut == "always" or not (promised and guard.may_be_late)):
        made = _tokens_in_time(stages, own_ms, output, float(looks[-1].step_ms[index]), budget_ms)
    if made < output:
        stages["decode"] *= (made - 1) / (output - 1)
    total = sum(stages.values()) + own_ms
    was_cut = made < output
    guard.update(
        request,
        looks,
        index,
        stages,
        made,
        total,
        late=total > budget_ms,
        cut=was_cut,
        promised=promised,
    )
    return Replayed(
        row=row,
        budget_share=share,
        late=promised and total > budget_ms,
        cut=was_cut,
        promised=promised,
        accuracy=float(measured.accuracy[row, index]) if made >= output - 1 else 0.0,
        true_accuracy=float(measured.accuracy[row, _best(values, np.where(in_time, 0.0, bounds_ms), 0.0)]),
        latency_ms=total,
    )


def _best(values: np.ndarray, bounds_ms: np.ndarray, budget_ms: float) -> int:
    """The most valuable setting whose bound keeps the budget, or that with the smallest bound."""
    best = best_within(values, bounds_ms, budget_ms)
    return best if best >= 0 else int(bounds_ms.argmin())


def _tokens_in_time(
    stages_ms: dict[str, float], own_ms: float, output: int, expected_step_ms: float, budget_ms: float
) -> int:
    """How many of the answer's tokens `Decoder.decode` makes before its deadline."""
    if output < 2:
        return output
    step = stages_ms["decode"] / (output - 1)
    now = own_ms + sum(stages_ms.values()) - stages_ms["decode"]
    needed = MARGIN * expected_step_ms
    for made in range(1, output):
        if now + needed > budget_ms:
            return made
        now, needed = now + step, max(needed, MARGIN * step)
    return output
