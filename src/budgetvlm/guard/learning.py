"""What a finished request teaches a guard: scores, the level of its groups' margin, and the machine's speed.

What is learnt, and why, stands in `budgetvlm.guard.margin` and `budgetvlm.guard.speed`. Shapes: G stages. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from budgetvlm.guard.bounds import MOMENTS, Moment
from budgetvlm.guard.kernels import HIGHEST_LOG_MARGIN, LARGEST_STEP
from budgetvlm.guard.margin import Margin, Scores
from budgetvlm.guard.speed import StageSpeed

SCALE_RATE = 0.05  # share of the way that a scale goes towards one request's ratio
SLOWDOWN_RATE = 0.3  # the same of the recent slowdown
NUM_AGREEING = 4  # requests in a row that tell of a jump
JUMP = math.log(1.35)  # the smallest change of a log ratio that is a jump


def learn_margin(
    margin: Margin,
    groups: Sequence[int],
    scores: Mapping[Moment, float],
    missed: float | None = None,
    target: float = 0.0,
) -> None:
    """Learn from a finished request of the groups with these numbers.

    Args:
        scores: of the moments at which its setting was chosen.
        missed: from 0 to 1, where ``target`` may be missed on average; None: this is not judged.
    """
    for moment, score in scores.items():
        add_score(margin.scores, score, moment)
    if missed is None:
        return
    # An offset that leads nowhere further would only take long to come back.
    level = margin.level + sum(float(margin.offsets[group]) for group in groups)
    moves = margin.log_margin(groups) < HIGHEST_LOG_MARGIN if missed > 0 else level < margin.highest_level
    if moves:
        for group in groups:
            margin.offsets[group] += margin.rate * (target - missed)


def add_score(scores: Scores, score: float, moment: Moment = "overview") -> None:
    """Add a score; the oldest one makes room for it."""
    place, size = MOMENTS.index(moment), scores.window.shape[1]
    count, following = scores.counts[place].tolist()
    ascending, window = scores.ascending[place], scores.window[place]
    if count == size:
        count = _remove(ascending, window[following], count)
    i = int(ascending[:count].searchsorted(score, side="right"))
    ascending[i + 1 : count + 1] = ascending[i:count]
    ascending[i] = window[following] = score
    scores.counts[place] = count + 1, (following + 1) % size


def forget_scores(scores: Scores, number: int) -> None:
    """Drop the last scores, all but one at most: what they tell was the machine's new speed, not its noise."""
    for place in range(len(MOMENTS)):
        count, following = scores.counts[place].tolist()
        for _ in range(min(number, count - 1)):
            following = (following - 1) % scores.window.shape[1]
            count = _remove(scores.ascending[place], scores.window[place, following], count)
        scores.counts[place] = count, following


def _remove(ascending: np.ndarray, score: float, count: int) -> int:
    """Take a score out of ``count`` ascending ones; returns how many are left."""
    i = int(ascending[:count].searchsorted(score))
    ascending[i : count - 1] = ascending[i + 1 : count]
    return count - 1


def follow_speed(speed: StageSpeed, predicted_ms: np.ndarray, took_ms: np.ndarray) -> bool:
    """Learn the machine's speed from one request's times; whether the speed of any stage has jumped.

    Args:
        predicted_ms: of each stage by the profile, ``[G]``.
        took_ms: what each stage took, ``[G]``; one that took nothing teaches nothing.
    """
    learnt = [g for g in range(len(took_ms)) if took_ms[g] > 0 and predicted_ms[g] > 0]
    if not learnt:
        return False
    expected = float(sum(predicted_ms[g] * speed.scale[g] for g in learnt))
    ratio = math.log(float(sum(took_ms[g] for g in learnt)) / expected)
    pace = speed.pace
    pace[0] += SLOWDOWN_RATE * max(-LARGEST_STEP, min(ratio - pace[0], LARGEST_STEP))
    # All stages are learnt from, also behind one that has jumped.
    jumps = [_follow_stage(speed, g, math.log(float(took_ms[g] / predicted_ms[g]))) for g in learnt]
    if any(jumps):
        pace[0] = 0.0
    pace[1] = math.exp(pace[0]) * float(predicted_ms @ speed.scale) / float(predicted_ms @ speed.normal_scale)
    return any(jumps)


def _follow_stage(speed: StageSpeed, g: int, log_ratio: float) -> bool:
    """Learn one stage's ratio; whether its speed has jumped."""
    recent = speed.recent[g]
    recent.insert(0, log_ratio)
    del recent[NUM_AGREEING:]
    now = float(speed.log_scale[g])
    jumped = len(recent) == NUM_AGREEING and (min(recent) - now > JUMP or max(recent) - now < -JUMP)
    if jumped:
        now = (sum(recent) - min(recent) - max(recent)) / (NUM_AGREEING - 2)  # their median
        recent.clear()
    else:
        now += SCALE_RATE * max(-LARGEST_STEP, min(log_ratio - now, LARGEST_STEP))
    speed.log_scale[g], speed.scale[g] = now, math.exp(now)
    return jumped
