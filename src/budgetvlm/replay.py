"""What a guard would have done on requests that were measured at every setting, one after the other.

The clock of a replay is made of measured times, so that guards can be compared on the very same requests, also with the
one that knows every setting's time before it chooses. The guard learns from each request as it would at run time; how
fast the machine is it follows through the runs of all settings, because in service one request follows the other as
closely as these did. A request that runs out of time is hurried and cut as the deadline would do it; its blocks are
taken to read and its tokens to come at even intervals, a hurried answer to be right if it is right with all tokens
after the first made as its last one, or, where already reading was hurried, at that setting altogether, and a cut
answer only if all that it lacks is the token that ends it.

Shapes: n requests, K settings. Times in ms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.adaptive import AdaptiveGuard
from budgetvlm.answer import Cut
from budgetvlm.bounds import Bounds, Spent
from budgetvlm.calibrate import Measured
from budgetvlm.controller.decision import best_within
from budgetvlm.errors import DataError
from budgetvlm.runtime import AdaptiveVLM, cuts
from budgetvlm.speed import StageSpeed
from budgetvlm.vlm.decoding import Pace


@dataclass(frozen=True)
class Replayed:
    """One request of a replay.

    Attributes:
        late: over its budget although a setting was allowed. cut: its answer was cut short. hurried: some of its
            tokens were made at a quicker setting.
        promised: a setting was allowed.
        accuracy: of what the guard let the controller choose. true_accuracy: had the guard known every time.
    """

    row: int
    budget_share: float
    late: bool
    cut: bool
    hurried: bool
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

    Raises:
        DataError: the guard hurries, but hurried answers were not measured.
    """
    assert model.guard is not None
    if model.guard.hurries and measured.hurried is None:
        raise DataError("the guard hurries answers; measure them in a hurry as well (`measure(..., hurried=True)`)")
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
    # Each setting was run at its own moment, of whose speed its own overview and the runs before it told.
    speeds, last = _speeds(guard, measured, row, speed)
    moments, revised = _looks(model, measured, row, budget_ms, speed, speeds)
    bounds_ms, rest_ms = _own(moments)
    promised = bool((bounds_ms <= budget_ms).any())
    profiled_ms = max((budget_ms - guard.other_ms) / guard.bounds(request, budget_ms).slowdown, 1e-3)
    values = model.decider.values(measured.image[row], request.feature, profiled_ms, None)
    index = _best(values, bounds_ms, budget_ms, rest_ms)
    looks = [moments[index]]
    if guard.revises and promised:
        here, (bounds_ms, rest_ms) = np.isfinite(revised[index].bounds_ms), _own(revised)
        index = _best(values, np.where(here, bounds_ms, np.inf), budget_ms, rest_ms)
        looks = [moments[index], revised[index]]
    true_ms = np.where(model.known, speed * measured.latency_ms[row] + own_ms, np.inf)
    stages = {name: speed * float(times[row, index]) for name, times in measured.stages_ms.items()}
    output = int(measured.output[row, index])
    deadline = model.deadline(looks[-1], index, budget_ms / 1e3, cut=cuts(guard, cut, promised))
    settings = model.controller.knob_space.settings
    pace = Pace.of(model.vlm, settings[index], deadline) if deadline else None
    now_ms = own_ms + sum(stages.values()) - stages["prefill"] - stages["decode"]
    if pace and deadline and deadline.read_ms:
        stages["prefill"] = _read(pace, now_ms, stages["prefill"])
    now_ms, read_at = now_ms + stages["prefill"], pace.rung if pace else 0
    steps_ms = [speed * _step_ms(measured, looks[-1], row, k) for k in (index, *guard.quicker(index))]
    made, stages["decode"] = _decode(pace, now_ms, output, steps_ms)
    total = now_ms + stages["decode"]
    guard.speed = speeds[index]
    was_cut, rung = made < output, pace.rung if pace and pace.hurried else 0
    guard.update(
        looks,
        index,
        stages,
        made,
        total,
        late=total > budget_ms,
        cut=was_cut,
        promised=promised,
        saved_ms=pace.saved_ms if pace else None,
    )
    guard.speed = last
    right = measured.accuracy[row, index]
    if read_at:
        right = measured.accuracy[row, guard.quicker(index)[rung - 1]]
    elif rung and measured.hurried is not None:
        right = measured.hurried[rung - 1, row, index]
    return Replayed(
        row=row,
        budget_share=share,
        late=promised and total > budget_ms,
        cut=was_cut,
        hurried=rung > 0,
        promised=promised,
        accuracy=float(right) if made >= output - 1 else 0.0,
        true_accuracy=float(measured.accuracy[row, _best(values, true_ms, budget_ms, _own(moments)[1])]),
        latency_ms=total,
    )


def _own(looks: Sequence[Bounds]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds and predicted rests of every setting, each as its own look has them, ``[K]``."""
    bounds, rests = ([getattr(look, name)[k] for k, look in enumerate(looks)] for name in ("bounds_ms", "rest_ms"))
    return np.array(bounds), np.array(rests)


def _best(values: np.ndarray, bounds_ms: np.ndarray, budget_ms: float, rest_ms: np.ndarray) -> int:
    """The most valuable setting whose bound keeps the budget, or the fastest of those that may be chosen."""
    best = best_within(values, bounds_ms, budget_ms)
    return best if best >= 0 else int(np.where(np.isfinite(bounds_ms), rest_ms, np.inf).argmin())


def _speeds(guard: AdaptiveGuard, measured: Measured, row: int, speed: float) -> tuple[list[StageSpeed], StageSpeed]:
    """The machine's speed when each of a row's settings was run, as all runs before it tell, and after the last one."""
    now, profiled = copy.deepcopy(guard.speed), guard.profiled(measured.requests[row])
    found = [now] * measured.latency_ms.shape[1]
    for k in measured.order[row].tolist():
        found[k] = copy.deepcopy(now)
        stages = {name: speed * float(times[row, k]) for name, times in measured.stages_ms.items()}
        now.follow(profiled, k, float(measured.output[row, k]), stages)
    return found, now


def _looks(
    model: AdaptiveVLM, measured: Measured, row: int, budget_ms: float, speed: float, speeds: Sequence[StageSpeed]
) -> tuple[list[Bounds], list[Bounds]]:
    """What the guard says of a request when each setting was run: as it is chosen, and with its image encoded."""
    guard, own_ms = model.guard, speed * model.controller_ms
    assert guard is not None
    moments, revised, usual = [], [], guard.speed
    for k, guard.speed in enumerate(speeds):
        overview_ms, image_ms = (speed * float(ms[row, k]) for ms in (measured.overview_ms, measured.image_ms))
        moments.append(guard.bounds(measured.requests[row], budget_ms, Spent(overview_ms, overview_ms), model.known))
        revised.append(guard.revised(moments[k], k, Spent(own_ms + image_ms, image_ms), model.known))
    guard.speed = usual
    return moments, revised


def _step_ms(measured: Measured, look: Bounds, row: int, index: int) -> float:
    """A decoding step of a setting as measured, or, where its answer was a single token, as predicted."""
    steps = float(measured.output[row, index]) - 1
    return float(measured.stages_ms["decode"][row, index]) / steps if steps > 0 else float(look.step_ms[index])


def _read(pace: Pace, now_ms: float, prefill_ms: float) -> float:
    """What reading takes at this pace, where it took ``prefill_ms`` as planned."""
    took_ms = 0.0
    for block in sorted(pace.blocks[0]):
        if pace.reads((now_ms + took_ms) / 1e3, block):
            took_ms += prefill_ms / len(pace.blocks[0]) * pace.block_ms[pace.rung] / pace.block_ms[0]
    pace.has_read()
    return took_ms


def _decode(pace: Pace | None, now_ms: float, output: int, steps_ms: list[float]) -> tuple[int, float]:
    """How many of the answer's tokens `Decoder.decode` makes at this pace, and what it takes.

    Args:
        steps_ms: a step at the answer's own setting and at each that it may be hurried at.
    """
    made, took_ms = 1, 0.0
    while made < output and (pace is None or pace.next((now_ms + took_ms) / 1e3, made)):
        step_ms = steps_ms[pace.rung if pace else 0]
        if pace:
            pace.took(step_ms)
        made, took_ms = made + 1, took_ms + step_ms
    return made, took_ms
