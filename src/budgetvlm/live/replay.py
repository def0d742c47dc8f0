"""What a guard would have done on requests that were measured at every setting, one after the other.

The clock of a replay is made of measured times, so that guards can be compared on the very same requests, also with the
one that knows every setting's time before it chooses. The guard learns from each request as it would at run time; how
fast the machine is it follows through the runs of all settings, because in service one request follows the other as
closely as these did. A request that runs out of time is hurried and cut as the deadline would do it. In a hurry each
block and each token takes as much less as predicted, but what it took beyond their median stays: a stall is no shorter.
What a hurried or cut answer says, the model is asked: it answers again, by the clock of the replay.

Shapes: n requests, K settings. Times in ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from budgetvlm.answer import cuts, deadline_of
from budgetvlm.decide import Cut, seen_budget_ms
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Bounds, Outcome, Spent
from budgetvlm.guard.learning import follow_speed
from budgetvlm.guard.specification import best_allowed
from budgetvlm.guard.speed import SpeedSnapshot
from budgetvlm.knobs import Setting
from budgetvlm.live.calibration import Measured
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM, Deadline
from budgetvlm.vlm.decoding import Pace
from budgetvlm.vlm.protocol import RecordingClock


@dataclass(frozen=True)
class Replayed:
    """One request of a replay.

    Attributes:
        late: it went over its budget although a setting was allowed.
        cut: its answer was cut short.
        hurried: some of its tokens were made at a quicker setting.
        promised: a setting was allowed.
        accuracy: of what the guard let the controller choose.
        true_accuracy: the same, had the guard known every time.
    """

    late: bool
    cut: bool
    hurried: bool
    promised: bool
    accuracy: float
    true_accuracy: float


def replay(
    model: AdaptiveVLM,
    task: Task,
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
    run = _Replay(model, task, measured, cut)
    rng = np.random.default_rng(seed)
    shares = rng.choice(np.asarray(budget_shares, dtype=np.float64), size=num_requests)
    return [
        run.request(number % len(measured), share, reference_ms, speed(number))
        for number, share in enumerate(shares.tolist())
    ]


class _Replay:
    """One replay: a model whose guard learns on, and what was measured."""

    def __init__(self, model: AdaptiveVLM, task: Task, measured: Measured, cut: Cut) -> None:
        assert isinstance(model.guard, AdaptiveGuard)
        self._model, self._task, self._guard, self._measured, self._cut = model, task, model.guard, measured, cut
        self._accuracies: dict[tuple[Any, ...], float] = {}  # of the answers that were made once more

    def request(self, row: int, share: float, reference_ms: float, speed: float) -> Replayed:
        """One request, from which the guard learns."""
        guard, measured, budget_ms = self._guard, self._measured, share * reference_ms
        # Each setting was run at its own moment, of whose speed its own overview and the runs before it told.
        moments = self._moments(row, budget_ms, speed)
        chosen = self._choose(row, budget_ms, speed, moments)
        answered = self._answer(row, chosen, budget_ms, speed)
        outcome = answered.outcome
        now = guard.speed.snapshot()
        guard.speed.restore(moments[chosen.index].speed)
        guard.update(chosen.index, chosen.decided_by, outcome)
        guard.speed.restore(now)
        accuracy = float(measured.accuracy[row, chosen.index])
        if answered.deadline and (outcome.cut or answered.hurried):
            accuracy = self._accuracy(row, self._model.settings[chosen.index], answered.deadline, answered.readings)
        return Replayed(
            late=chosen.promised and outcome.late,
            cut=outcome.cut,
            hurried=answered.hurried,
            promised=chosen.promised,
            accuracy=accuracy,
            true_accuracy=float(measured.accuracy[row, chosen.true_index]),
        )

    def _moments(self, row: int, budget_ms: float, speed: float) -> list[_Moment]:
        """What the guard knew and said when each setting of a row was run; its speed follows through all runs."""
        model, guard, measured = self._model, self._guard, self._measured
        request, own_ms = measured.requests[row], speed * model.own_ms
        found: dict[int, _Moment] = {}
        for k in measured.order[row].tolist():
            times = measured.overview_ms, measured.prepared_ms, measured.image_ms
            overview_ms, prepared_ms, image_ms = (speed * float(ms[row, k]) for ms in times)
            spent = Spent(overview_ms, overview_ms, prepared_ms)
            bounds = guard.bounds_at_choice(request, budget_ms, spent, model.known)
            revised = guard.bounds_at_revision(bounds, k, Spent(own_ms + image_ms, image_ms), model.known)
            found[k] = _Moment(guard.speed.snapshot(), bounds, revised)
            stages = {name: speed * float(ms[row, k]) for name, ms in measured.stages_ms.items()}
            first_ms, step_ms = bounds.forecast.profiled_ms[:, :, k]
            predicted_ms = (first_ms + (float(measured.output[row, k]) - 1) * step_ms).tolist()
            follow_speed(guard.speed, predicted_ms, guard.speed.by_stage(stages))
        return [found[k] for k in range(len(found))]

    def _choose(self, row: int, budget_ms: float, speed: float, moments: Sequence[_Moment]) -> _Chosen:
        """As `AdaptiveVLM.generate` does, where every setting's bounds are of the moment at which it was run."""
        model, guard, measured = self._model, self._guard, self._measured
        request = measured.requests[row]
        # The bounds of each setting, as its own moment has them, and what the controller is told of the budget.
        bounds_ms, rest_ms = _own([moment.bounds for moment in moments])
        slowdown = moments[measured.order[row][0]].bounds.slowdown
        seen_ms = seen_budget_ms(budget_ms, guard.own_ms, slowdown)
        values = model.network.values(measured.image[row], request.feature, seen_ms, None)
        index = _best(values, bounds_ms, budget_ms, rest_ms)
        promised = bool((bounds_ms <= budget_ms).any())
        # The choice of a guard that knows every time.
        true_ms = np.where(model.known, speed * (measured.latency_ms[row] + model.own_ms), np.inf)
        true_index = _best(values, true_ms, budget_ms, rest_ms)
        decided_by = [moments[index].bounds]
        if guard.rule.revises and promised:
            here = np.isfinite(moments[index].revised.bounds_ms)
            later_ms, later_rest_ms = _own([moment.revised for moment in moments])
            index = _best(values, np.where(here, later_ms, np.inf), budget_ms, later_rest_ms)
            decided_by = [moments[index].bounds, moments[index].revised]
        return _Chosen(index, decided_by, promised, true_index)

    def _answer(self, row: int, chosen: _Chosen, budget_ms: float, speed: float) -> _Answered:
        """Read and decode by the clock of the replay."""
        model, measured, index = self._model, self._measured, chosen.index
        setting = model.settings[index]
        stages = {name: speed * float(times[row, index]) for name, times in measured.stages_ms.items()}
        depth = _depth(model.vlm, setting)
        blocks_ms, tokens_ms = (speed * took for took in _steps_ms(measured, row, index, depth))
        before_ms = speed * model.own_ms + sum(stages.values()) - stages["prefill"] - stages["decode"]
        clock = _Clock(before_ms)
        cut = cuts(self._cut, chosen.promised, self._guard.may_be_late)
        deadline = deadline_of(
            model.guard, model.settings.__getitem__, chosen.decided_by[-1], index, budget_ms / 1e3, cut=cut
        )
        pace = _pace(model.vlm, setting, deadline._replace(clock=clock.read)) if deadline else None
        if pace and deadline and deadline.read_ms:
            clock.now_ms += stages["prefill"] - float(blocks_ms.sum())  # before the first block
            _read(pace, clock, blocks_ms)
        else:
            clock.now_ms += stages["prefill"]
        stages["prefill"] = clock.now_ms - before_ms
        tokens = _decode(pace, clock, tokens_ms)
        stages["decode"] = clock.now_ms - before_ms - stages["prefill"]
        outcome = Outcome(
            stages,
            tokens,
            clock.now_ms,
            late=clock.now_ms > budget_ms,
            cut=tokens < int(measured.output[row, index]),
            promised=chosen.promised,
            saved_ms=pace.saved_ms if pace else {},
        )
        return _Answered(outcome, bool(pace and pace.hurried), deadline, clock.readings)

    def _accuracy(self, row: int, setting: Setting, deadline: Deadline, readings: Sequence[float]) -> float:
        """That of the answer under this deadline, whose clock shows these times; each such answer is made once."""
        key = row, setting, deadline, tuple(readings)
        if key not in self._accuracies:
            sample = self._measured.samples[row]
            step = readings[-1] - readings[-2] if len(readings) > 1 else 0.0
            later = itertools.count(readings[-1] + step, step)  # it may have more tokens than it was taken to have
            shown = deadline._replace(clock=itertools.chain(readings, later).__next__)
            answer = self._model.vlm.generate(
                sample.load_image(), sample.question, setting,
                max_new_tokens=self._task.max_new_tokens, deadline=shown,
            )  # fmt: skip
            self._accuracies[key] = self._task.score(answer.text, sample)
        return self._accuracies[key]


@dataclass(frozen=True)
class _Moment:
    """When one setting was run: the machine's speed as the guard knew it, and the bounds, also with its image."""

    speed: SpeedSnapshot
    bounds: Bounds
    revised: Bounds


@dataclass(frozen=True)
class _Chosen:
    """Which setting, by which bounds, whether any was allowed, and which one had the guard known every time."""

    index: int
    decided_by: list[Bounds]
    promised: bool
    true_index: int


@dataclass(frozen=True)
class _Answered:
    """How it went, whether it was hurried, the deadline it had, and what the clock showed meanwhile."""

    outcome: Outcome
    hurried: bool
    deadline: Deadline | None
    readings: list[float]


def _own(moments: Sequence[Bounds]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds and predicted rests of every setting, each as its own moment has them, ``[K]``."""
    bounds, rests = ([getattr(one, name)[k] for k, one in enumerate(moments)] for name in ("bounds_ms", "rest_ms"))
    return np.array(bounds), np.array(rests)


def _best(values: np.ndarray, bounds_ms: np.ndarray, budget_ms: float, rest_ms: np.ndarray) -> int:
    """The most valuable setting whose bound keeps the budget, or the fastest of those that may be chosen."""
    best = int(best_allowed(values, bounds_ms, budget_ms))
    return best if best >= 0 else int(np.where(np.isfinite(bounds_ms), rest_ms, np.inf).argmin())


def _steps_ms(measured: Measured, row: int, index: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """What each block took to read and each further token to be made, ``[blocks]`` and ``[tokens - 1]``."""
    tokens = int(measured.output[row, index])
    if measured.steps_ms is not None:
        steps = measured.steps_ms[row][index]
        return steps[:blocks], steps[blocks:]
    read, decoded = (float(measured.stages_ms[stage][row, index]) for stage in ("prefill", "decode"))
    return np.full(blocks, read / blocks), np.full(tokens - 1, decoded / max(tokens - 1, 1))


def _hurried_ms(took_ms: np.ndarray, step: int, share: float) -> float:
    """What one of these steps would have taken at a setting that takes this share of the time; a stall stays one."""
    usual = float(min(took_ms[step], np.median(took_ms)))
    return usual * share + float(took_ms[step]) - usual


class _Clock(RecordingClock):
    """A clock that stands still unless it is moved."""

    def __init__(self, now_ms: float) -> None:
        super().__init__(lambda: self.now_ms / 1e3)
        self.now_ms = now_ms


def _read(pace: Pace, clock: _Clock, blocks_ms: np.ndarray) -> None:
    """Read at this pace, where each block took so long as planned."""
    for step, block in enumerate(sorted(pace.blocks[0])):
        if pace.reads(clock.read(), block):
            clock.now_ms += _hurried_ms(blocks_ms, step, pace.block_ms[pace.level] / pace.block_ms[0])
    pace.has_read()


def _decode(pace: Pace | None, clock: _Clock, tokens_ms: np.ndarray) -> int:
    """How many of the answer's tokens `Decoder.decode` makes at this pace, where each further one took so long."""
    made, now_s = 1, clock.read()
    while made <= len(tokens_ms) and (pace is None or pace.next(now_s, made)):
        share = pace.steps_ms[pace.level] / pace.steps_ms[0] if pace else 1.0
        clock.now_ms += _hurried_ms(tokens_ms, made - 1, share)
        made, now_s = made + 1, clock.read()
    return made


def _pace(vlm: VLM, setting: Setting, deadline: Deadline) -> Pace:
    """The pace of an answer that is given at this setting."""
    return Pace(deadline, [vlm.active_blocks(_depth(vlm, one)) for one in (setting, *deadline.settings)])


def _depth(vlm: VLM, setting: Setting) -> int:
    return int(setting.get("num_active_blocks", vlm.num_total_blocks))
