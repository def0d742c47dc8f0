"""What a finished request teaches a guard: scores, the level of its groups' margin, and the machine's speed.

What is learnt, and why, stands in `budgetvlm.guard.margin` and `budgetvlm.guard.speed`. Shapes: G stages. Times in ms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import mul

from budgetvlm.guard.bounds import MOMENTS, Moment
from budgetvlm.guard.kernels import HIGHEST_LOG_MARGIN, LARGEST_STEP
from budgetvlm.guard.margin import Margin, Scores
from budgetvlm.guard.speed import MOST_IN_FLIGHT, StageSpeed

SCALE_RATE = 0.05  # share of the way that a scale goes towards one request's ratio
SLOWDOWN_RATE = 0.3  # the same of the recent slowdown
LOAD_RATE = 0.1  # the same of what a number of requests in flight adds
LARGEST_LOAD_STEP = 1.0  # of the first ratios; were it small, other parts would learn the load first
NUM_AGREEING = 4  # requests in a row that tell of a jump
JUMP = math.log(1.35)  # the smallest change of a log ratio that is a jump


def learn_margin(
    margin: Margin,
    groups: Sequence[int],
    scores: Mapping[Moment, float | None],
    missed: float | None = None,
    target: float = 0.0,
) -> None:
    """Learn from a finished request of the groups with these numbers.

    Args:
        scores: of the moments at which its setting was chosen; None: there is none.
        missed: from 0 to 1, where ``target`` may be missed on average; None: this is not judged.
    """
    for moment, score in scores.items():
        if score is not None:
            add_score(margin.scores, score, moment)
    if missed is None:
        return
    # An offset that leads nowhere further would only take long to come back.
    level = margin.level + sum(map(margin.offsets.item, groups))
    moves = margin.log_margin(groups) < HIGHEST_LOG_MARGIN if missed > 0 else level < margin.highest_level
    if moves:
        for group in groups:
            margin.offsets[group] += margin.rate * (target - missed)


def add_score(scores: Scores, score: float, moment: Moment = "overview") -> None:
    """Add a score; the oldest one makes room for it."""
    place = MOMENTS.index(moment)
    arrived = scores.arrived[place]
    if len(arrived) == arrived.maxlen:
        _take_out(scores, place, arrived.popleft())
    row, count = scores.ascending[place], len(arrived)
    at = bisect_left(row, score, 0, count)
    row[at + 1 : count + 1] = row[at:count]
    row[at] = score
    arrived.append(score)
    scores.counts[place] = count + 1


def forget_scores(scores: Scores, number: int) -> None:
    """Drop the last scores, all but one at most: what they tell was the machine's new speed, not its noise."""
    for place, arrived in enumerate(scores.arrived):
        for _ in range(min(number, len(arrived) - 1)):
            _take_out(scores, place, arrived.pop())


def _take_out(scores: Scores, place: int, score: float) -> None:
    """Take a score, which has just left, out of the sorted ones."""
    row, count = scores.ascending[place], len(scores.arrived[place])
    at = bisect_left(row, score, 0, count + 1)
    row[at:count] = row[at + 1 : count + 1]
    scores.counts[place] = count


def follow_load(
    speed: StageSpeed, predicted_ms: Sequence[float], took_ms: Sequence[float], among: int
) -> Sequence[float]:
    """Learn how much others in flight lengthen a request; returns what its stages would take alone, ``[G]``.

    The mean of the first ratios, and from then on `LOAD_RATE` of the way towards each.
    """
    number = min(among, MOST_IN_FLIGHT)
    scaled_ms = sum(map(mul, predicted_ms, speed.scale.tolist()))
    if number <= 1 or not (scaled_ms > 0 and sum(took_ms) > 0):
        return took_ms
    log_load, counts = speed.load
    before = speed.log_load(number)
    counts[number] += 1
    beyond = math.log(sum(took_ms) / scaled_ms) - float(speed.pace[0]) - before
    rate = max(LOAD_RATE, 1 / float(counts[number]))
    log_load[number] = before + rate * max(-LARGEST_LOAD_STEP, min(beyond, LARGEST_LOAD_STEP))
    return [ms / math.exp(log_load[number]) for ms in took_ms]


def follow_speed(speed: StageSpeed, predicted_ms: Sequence[float], took_ms: Sequence[float]) -> bool:
    """Learn the machine's speed from one request's times; whether the speed of any stage has jumped.

    Args:
        predicted_ms: of each stage by the profile, ``[G]``.
        took_ms: what each stage took, ``[G]``; one that took nothing teaches nothing.
    """
    learnt = [g for g, took in enumerate(took_ms) if took > 0 and predicted_ms[g] > 0]
    if not learnt:
        return False
    log_scale, scale, pace = speed.log_scale.tolist(), speed.scale.tolist(), speed.pace
    ratio = math.log(sum(took_ms[g] for g in learnt) / sum(predicted_ms[g] * scale[g] for g in learnt))
    slowdown = float(pace[0])
    slowdown += SLOWDOWN_RATE * max(-LARGEST_STEP, min(ratio - slowdown, LARGEST_STEP))
    # All stages are learnt from, also behind one that has jumped.
    jumped = False
    for g in learnt:
        log_scale[g], jumps = _followed(speed.recent[g], log_scale[g], math.log(took_ms[g] / predicted_ms[g]))
        scale[g], jumped = math.exp(log_scale[g]), jumped or jumps
    speed.log_scale[:], speed.scale[:] = log_scale, scale
    slowdown = 0.0 if jumped else slowdown
    here, usual = (sum(map(mul, predicted_ms, factors)) for factors in (scale, speed.normal_scale))
    pace[:] = slowdown, math.exp(slowdown) * here / usual
    return jumped


def _followed(recent: list[float], log_scale: float, log_ratio: float) -> tuple[float, bool]:
    """A stage's scale after one more ratio, and whether its speed has jumped."""
    recent.insert(0, log_ratio)
    del recent[NUM_AGREEING:]
    if len(recent) == NUM_AGREEING and (min(recent) - log_scale > JUMP or max(recent) - log_scale < -JUMP):
        median = (sum(recent) - min(recent) - max(recent)) / (NUM_AGREEING - 2)
        recent.clear()
        return median, True
    return log_scale + SCALE_RATE * max(-LARGEST_STEP, min(log_ratio - log_scale, LARGEST_STEP)), False
