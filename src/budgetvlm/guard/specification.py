"""What the guard says of a request, specified in NumPy: the time of every setting, and a bound on it.

A bound is e + m u. Here e is what the request has taken already, u the predicted rest with an answer as long as all
but a share alpha / 2 are expected to be, on this machine as fast as it is now (`budgetvlm.guard.speed`), and m the
margin (`budgetvlm.guard.margin`). Where a choice will be revised, or an answer can be hurried, less has to be certain
(`budgetvlm.guard.recourse`). `budgetvlm.guard.kernels` computes the same in compiled loops; a property test holds both
equal. Calibration, replays and evaluation use this file.

Shapes: G stages, K settings, L answer lengths; leading dimensions ``...`` broadcast where a function says so. In ms.
"""

from __future__ import annotations

import math

import numpy as np

from budgetvlm.guard.bounds import Bounds, Forecast, GuardState, Request, Spent
from budgetvlm.guard.kernels import (
    LARGE_IMAGE,
    OVERLOADED,
    RELAXED_MARGIN_EXPONENT,
    SMALLEST_BUDGET_SHARE,
    budget_step,
    log_margin,
    pace_after,
)


def bounds_at_choice(
    state: GuardState, request: Request, image_groups: tuple[int, int], known: np.ndarray, budget_ms: float,
    spent: Spent,
) -> Bounds:  # fmt: skip
    """Bounds when a setting is chosen.

    Args:
        image_groups: the image's group, and its group on an overloaded machine.
        known: settings that may be chosen, bool ``[K]``.
        spent: by now; where an overview was encoded, it tells how fast the machine is.
    """
    # How long the answer will be, and what each part of the work takes at the speed of the last requests.
    expected, length = expected_length(state, request.feature)
    long_tokens = float(state.lengths[length])
    profiled_ms = first, step = stage_times(state, request)
    of_image = state.image_stages[:, None]
    terms = np.stack(
        [(by_stage * state.scale[:, None]).sum(0) for by_stage in (of_image * first, (1 - of_image) * first, step)]
    )
    full_ms = float(terms[0, -1] + terms[1, -1] + (expected - 1) * terms[2, -1])
    full_profiled_ms = float(first[:, -1].sum() + (expected - 1) * step[:, -1].sum())

    # What the overview took tells how fast the machine is right now, and whether the image is a large one.
    overview_ms = float(terms[0, 0]) if spent.image_ms > 0 else 0.0  # the first setting shows the overview alone
    excess_ms = large_image_excess(state, first, spent.prepared_ms)
    terms[0] += excess_ms * np.where(request.vision > request.vision[0], 2.0, 1.0)  # it is read again to cut tiles
    overview_ms += excess_ms
    pace = pace_after(float(state.pace[0]), overview_ms, spent.image_ms)

    # The margins of the groups that the request belongs to.
    overloaded = int(state.pace[1] > OVERLOADED)
    table = state.group_table[overloaded]
    of_budget = 1 + budget_step(budget_ms / full_ms) - budget_step(SMALLEST_BUDGET_SHARE)
    of_length = len(table) - len(state.lengths) + length
    groups = int(table[0]), image_groups[overloaded], int(table[of_length]), int(table[of_budget])
    margin, later_margin = (math.exp(log_margin(state, groups, moment)) for moment in (0, 1))

    slowdown = pace * full_ms / full_profiled_ms
    forecast = Forecast(slowdown, expected, long_tokens, groups, profiled_ms, terms, excess_ms > 0)
    more_ms = float(state.account[0]) - pace * overview_ms  # beside the stages; what is over need not be done again
    times = times_of(state, forecast, known, pace, 1.0, more_ms, spent.total_ms, margin, later_margin)
    return _ruled(state, times, known, forecast, spent)


def bounds_at_revision(state: GuardState, chosen: Bounds, index: int, known: np.ndarray, spent: Spent) -> Bounds:
    """Bounds once the image of a setting is encoded; settings with another image are out of reach.

    Args:
        chosen: the bounds that setting ``index`` was chosen by.
        spent: with the whole image's encoding, which tells how fast the machine is.
    """
    forecast = chosen.forecast
    same = state.same_image[(state.same_image == index).any(axis=1)][0]
    # What this image was expected to take, by all settings that show it: the pace does not depend on which was chosen.
    pace = pace_after(float(state.pace[0]), float(forecast.terms[0, same].mean()), spent.image_ms)
    margin = math.exp(log_margin(state, forecast.groups, 1))
    possible = known & np.isin(np.arange(len(known)), same)
    times = times_of(state, forecast, possible, pace, 0.0, 0.0, spent.total_ms, margin, margin)
    return Bounds(times, _fastest(times[3], possible), forecast, spent, "image")


def times_of(
    state: GuardState, forecast: Forecast, known: np.ndarray, pace: float, image_share: float, more_ms: float,
    taken_ms: float, margin: float, later_margin: float,
) -> np.ndarray:  # fmt: skip
    """The times of `Bounds`, ``[8, K]``.

    Args:
        pace: how many times as long as the forecast's terms everything takes.
        image_share: 1: the image is yet to be encoded; 0: it is.
        more_ms: beside the model's own stages. taken_ms: by now.
        margin, later_margin: factors on the rest now, and on the answer once the image is encoded.
    """
    image, first, step = pace * forecast.terms
    more_steps = forecast.long_tokens - 1
    longer = (forecast.long_tokens - forecast.expected_tokens) * step
    answer = first + more_steps * step
    to_answer = image_share * image + more_ms
    hurried = state.fastest_settings
    saving = np.maximum(first - first[hurried], 0) + more_steps * np.maximum(step - step[hurried], 0)
    bound = taken_ms + upper_bound(margin, to_answer + answer, saving, longer)
    aimed = taken_ms + to_answer + upper_bound(later_margin, answer, saving, longer)
    expected = taken_ms + to_answer + answer - longer
    allowed = (np.where(known, ms, np.inf) for ms in (bound, aimed, expected))
    return np.stack([*allowed, to_answer + answer, answer, saving, step, first])


def upper_bound(
    margin: float | np.ndarray, rest_ms: np.ndarray, saving_ms: np.ndarray | float, longer_ms: np.ndarray | float
) -> np.ndarray:
    """The bound on a rest: sure to be kept in a hurry, likely to be without. Arguments broadcast.

    Args:
        margin: factor on predicted times.
        rest_ms: with a long answer. saving_ms: what hurrying saves of that.
        longer_ms: what a long answer takes beyond one of the expected length.
    """
    likely = np.minimum(margin, margin**RELAXED_MARGIN_EXPONENT) * (rest_ms - longer_ms)
    out: np.ndarray = np.maximum(margin * (rest_ms - saving_ms), likely)
    return out


def reachable(bounds_ms: np.ndarray, aimed_ms: np.ndarray, same_image: np.ndarray) -> np.ndarray:
    """The budget from which a setting may be chosen if the choice will be revised, ``[..., K]``.

    Some setting with the same image has to be sure to keep it, and this one has to be expected to be allowed then.

    Args:
        bounds_ms: that its time stays below, ``[..., K]``.
        aimed_ms: at which it is expected to be allowed when the choice is revised, ``[..., K]``.
        same_image: the settings of each image, ``[images, K / images]``.
    """
    out = np.empty(np.broadcast_shapes(bounds_ms.shape, aimed_ms.shape))
    for members in same_image:
        surest = bounds_ms[..., members].min(axis=-1, keepdims=True)
        out[..., members] = np.minimum(bounds_ms[..., members], np.maximum(surest, aimed_ms[..., members]))
    return out


def best_allowed(values: np.ndarray, bounds_ms: np.ndarray, budget_ms: np.ndarray | float) -> np.ndarray:
    """The most valuable setting whose bound keeps the budget, -1 where there is none, int64 ``[...]``.

    Args:
        values, bounds_ms: of every setting, ``[..., K]``. budget_ms: ``[...]``.
    """
    allowed = bounds_ms <= np.asarray(budget_ms)[..., None]
    best = np.where(allowed, values, -np.inf).argmax(axis=-1)
    out: np.ndarray = np.where(allowed.any(axis=-1), best, -1)
    return out


def stage_times(state: GuardState, request: Request) -> np.ndarray:
    """What each stage takes by the profile: until the first token, and for each further one, ``[2, G, K]``."""
    fixed, each, token, square, step, step_token, tiles = state.size_weights
    vision, context = request.vision, request.vision + request.language
    images = np.where(state.image_stages > 0, request.images, 1.0)[:, None]
    first = images * (fixed + (vision > vision[0]) * tiles) + vision * each + context * token + context**2 * square
    return np.stack([first, step + context * step_token])


def large_image_excess(state: GuardState, first_ms: np.ndarray, prepared_ms: float) -> float:
    """What preparing the overview took beyond the usual, where it took so long that the image must be large, else 0."""
    stage = state.prepare_stage
    if prepared_ms <= 0 or stage < 0:
        return 0.0
    usual_ms = float(state.scale[stage] * first_ms[stage, 0])
    took_ms = prepared_ms / math.exp(float(state.pace[0]))
    return took_ms - usual_ms if took_ms > LARGE_IMAGE * usual_ms else 0.0


def expected_length(state: GuardState, feature: np.ndarray) -> tuple[float, int]:
    """The expected number of output tokens, and the number of a long answer's length among ``state.lengths``."""
    logits = state.length_weights @ feature.astype(np.float64) + state.length_bias
    shares = np.exp(logits - logits.max())
    below = (shares / shares.sum()).cumsum()
    number = int((below < 1 - state.alpha / 2 - 1e-12).sum().clip(max=len(below) - 1))
    return max(float(shares @ state.lengths / shares.sum()), 1.0), number


def _ruled(state: GuardState, times: np.ndarray, known: np.ndarray, forecast: Forecast, spent: Spent) -> Bounds:
    """The bounds as the guard's rule has them (`budgetvlm.guard.rule`)."""
    fastest = _fastest(times[3], known)
    if state.expected_only:
        times[0] = times[2]
        fastest = int(times[2].argmin())
    elif state.revises:
        times[0] = reachable(times[0], times[1], state.same_image)
    return Bounds(times, fastest, forecast, spent)


def _fastest(rest_ms: np.ndarray, known: np.ndarray) -> int:
    return int(np.where(known, rest_ms, np.inf).argmin())
