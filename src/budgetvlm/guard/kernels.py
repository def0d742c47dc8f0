"""Every loop that runs in a request, in plain Python; `budgetvlm._compiled` makes machine code of this whole file.

Between two requests lies a run of the model, and nothing of ours is in the caches then: a NumPy operation costs ten
times what it does in a loop. So each moment at which a setting is chosen is one call: `choose`, and `choose_again` once
the image is encoded. What they compute is specified in `budgetvlm.guard.specification` and `budgetvlm.decide`; a
property test holds both equal. All loops, and the constants that they read, stand in this one file, so that no machine
code can be older than the arithmetic it was made from.

Arguments: ``state``, ``request``, ``spent`` and ``forecast`` are records of `budgetvlm.guard.bounds`, ``network`` is
`budgetvlm.controller.value_network.NetworkWeights`, ``known`` marks the settings that may be chosen, bool ``[K]``. The
first two functions take records as plain tuples, which Numba passes in half the time. Shapes: G stages, K settings,
L answer lengths. Times in ms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from budgetvlm.guard.bounds import AIMED, ANSWER, BOUND, EXPECTED, NUM_ROWS, READ, REST, SAVING, STEP

# isort: split
from budgetvlm.guard.bounds import Forecast, GuardState, Request, Spent

# How far a bound lies above its prediction (`budgetvlm.guard.margin`).
LOWEST_LOG_MARGIN, HIGHEST_LOG_MARGIN = math.log(0.7), math.log(20.0)
BEYOND_SCORES = 5.0  # the log margin grows by this for a level of 1 below what the scores reach: 0.05 for 1 miss in 100
RELAXED_MARGIN_EXPONENT = 0.5  # of the margin is kept for an answer that is not hurried (`budgetvlm.guard.recourse`)
# How fast the machine is (`budgetvlm.guard.speed`).
OVERVIEW_RATE = 0.6  # share of the way that the recent slowdown goes towards the overview of the request itself
LARGEST_STEP = 0.2  # of a log ratio, so that one hiccup of the machine is not taken for its new speed
OVERLOADED = 2.0  # times as slow as when calibrated: the machine is under load, and requests are in other groups
LARGE_IMAGE = 2.0  # times as long as expected: an image that takes so long to prepare is a large one
# Requests whose budgets are of about one size are in one group.
BUDGET_RATIO = 1.25  # budgets this far apart are in different groups
SMALLEST_BUDGET_SHARE, LARGEST_BUDGET_SHARE = 0.05, 1.5  # of the full setting's time; beyond are the same groups
ONE = np.float32(1.0)  # a plain 1 would make doubles of what it is added to


# The two moments at which a setting is chosen


def choose(
    state: Any, request: Any, image_groups: Any, known: Any, budget_ms: float, spent: Any, network: Any,
    image: Any, language: Any,
) -> tuple[Any, int, Forecast, Any, int]:  # fmt: skip
    """Bounds of every setting, a controller's values, and the best setting that they allow.

    Args:
        image_groups: the image's group, and its group on an overloaded machine.
        image, language: features as the network takes them, float32.

    Returns:
        Times ``[8, K]`` (see `budgetvlm.guard.bounds.Bounds`), the fastest setting, the forecast, values ``[K]``, and
        the number of the best setting; -1 if none is allowed.
    """
    known_state, asked, taken = GuardState(*state), Request(*request), Spent(*spent)
    times, fastest, forecast = bounds_at_choice(known_state, asked, image_groups, known, budget_ms, taken)
    seen_ms = max((budget_ms - taken.waited_ms - known_state.account[0]) / forecast.slowdown, 1e-3)
    values = network_values(network, image, language, seen_ms)
    return times, fastest, forecast, values, best_allowed(values, times[BOUND], budget_ms)


def choose_again(
    state: Any, forecast: Any, index: int, known: Any, spent: Any, values: Any, budget_ms: float
) -> tuple[Any, int, int]:
    """Bounds once the image of setting ``index`` is encoded, and the best setting that they allow for these values.

    Returns:
        Times ``[8, K]``, the fastest setting, and the number of the best one; -1 if none is allowed.
    """
    times, fastest = bounds_at_revision(GuardState(*state), Forecast(*forecast), index, known, Spent(*spent))
    return times, fastest, best_allowed(values, times[BOUND], budget_ms)


# Bounds


def bounds_at_choice(
    state: Any, request: Any, image_groups: Any, known: Any, budget_ms: float, spent: Any
) -> tuple[Any, int, Forecast]:
    """See `budgetvlm.guard.specification.bounds_at_choice`."""
    expected, length = length_forecast(request.feature, state)
    expected, long_tokens = max(expected, 1.0), state.lengths[length]
    profiled, terms = time_terms(state, request)
    full_ms = terms[0, -1] + terms[1, -1] + (expected - 1) * terms[2, -1]
    full_profiled_ms = profiled[0, :, -1].sum() + (expected - 1) * profiled[1, :, -1].sum()
    # What the overview took tells how fast the machine is right now, and whether the image is a large one.
    done_ms, excess_ms = 0.0, 0.0
    if spent.image_ms > 0:  # the first setting shows the overview alone
        done_ms = terms[0, 0]
    if spent.prepared_ms > 0 and state.prepare_stage >= 0:
        usual_ms = state.scale[state.prepare_stage] * profiled[0, state.prepare_stage, 0]
        took_ms = spent.prepared_ms / math.exp(state.pace[0])
        if took_ms > LARGE_IMAGE * usual_ms:
            excess_ms = took_ms - usual_ms
            done_ms += excess_ms
            for k in range(terms.shape[1]):  # the whole image is read again to cut its tiles
                terms[0, k] += excess_ms * (2.0 if request.vision[k] > request.vision[0] else 1.0)
    pace = pace_after(state.pace[0], done_ms, spent.image_ms)
    # The request's groups and their margins.
    overloaded = int(state.pace[1] > OVERLOADED)
    fixed = state.group_table[overloaded]
    step = budget_step(budget_ms / full_ms) - budget_step(SMALLEST_BUDGET_SHARE)
    groups = fixed[0], image_groups[overloaded], fixed[len(fixed) - len(state.lengths) + length], fixed[1 + step]
    slowdown, large = pace * full_ms / full_profiled_ms, excess_ms > 0
    forecast = Forecast(slowdown, expected, long_tokens, groups, profiled, terms, large)
    margin, later_margin = math.exp(log_margin(state, groups, 0)), math.exp(log_margin(state, groups, 1))
    times, fastest = times_of(
        state, forecast, known, pace, 1.0, state.account[0] - pace * done_ms, spent.total_ms, margin, later_margin
    )
    if state.expected_only:
        times[BOUND] = times[EXPECTED]
        fastest = int(np.argmin(times[EXPECTED]))
    elif state.revises:
        aim(times, state.same_image)
    return times, fastest, forecast


def bounds_at_revision(state: Any, forecast: Any, index: int, known: Any, spent: Any) -> tuple[Any, int]:
    """See `budgetvlm.guard.specification.bounds_at_revision`."""
    possible, image_ms = np.zeros(len(known), dtype=np.bool_), 0.0
    for same in state.same_image:
        if (same == index).any():
            for k in same:
                possible[k] = known[k]
                image_ms += forecast.terms[0, k] / len(same)
    pace = pace_after(state.pace[0], image_ms, spent.image_ms)
    margin = math.exp(log_margin(state, forecast.groups, 1))
    return times_of(state, forecast, possible, pace, 0.0, 0.0, spent.total_ms, margin, margin)


def times_of(
    state: Any, forecast: Any, known: Any, pace: float, image_share: float, more_ms: float, taken_ms: float,
    margin: float, later_margin: float,
) -> tuple[Any, int]:  # fmt: skip
    """The times of `budgetvlm.guard.bounds.Bounds`, and the fastest setting.

    Args:
        pace: times as long as the terms say. image_share: 1: the image is yet to be encoded; 0: it is.
        more_ms: beside the model's own stages. taken_ms: by now.
        margin, later_margin: factors on the rest now, and on the answer once the image is encoded.
    """
    terms, out = forecast.terms, np.full((NUM_ROWS, len(known)), np.inf)
    expected, long_tokens = forecast.expected_tokens, forecast.long_tokens
    fastest, least = 0, np.inf
    for k in range(len(known)):
        image, first, step = image_share * pace * terms[0, k], pace * terms[1, k], pace * terms[2, k]
        answer = first + (long_tokens - 1) * step
        rest = image + answer + more_ms
        hurried = state.fastest_settings[k]
        saving = max(first - pace * terms[1, hurried], 0.0)
        saving += (long_tokens - 1) * max(step - pace * terms[2, hurried], 0.0)
        longer = (long_tokens - expected) * step
        if known[k]:
            out[BOUND, k] = taken_ms + upper_bound(margin, rest, saving, longer)
            out[AIMED, k] = taken_ms + image + more_ms + upper_bound(later_margin, answer, saving, longer)
            out[EXPECTED, k] = taken_ms + rest - longer
            if rest < least:
                fastest, least = k, rest
        out[REST, k], out[ANSWER, k], out[SAVING, k], out[STEP, k], out[READ, k] = rest, answer, saving, step, first
    return out, fastest


def upper_bound(margin: float, rest_ms: float, saving_ms: float, longer_ms: float) -> float:
    """See `budgetvlm.guard.specification.upper_bound`."""
    likely = min(margin, margin**RELAXED_MARGIN_EXPONENT) * (rest_ms - longer_ms)
    return max(margin * (rest_ms - saving_ms), likely)


def aim(times: Any, same_image: Any) -> None:
    """Lower bounds to what has to be kept where the choice will be revised: see `specification.reachable`."""
    for same in same_image:
        least = np.inf
        for k in same:
            least = min(least, times[BOUND, k])
        for k in same:
            times[BOUND, k] = min(times[BOUND, k], max(least, times[AIMED, k]))


def best_allowed(values: Any, bounds_ms: Any, budget_ms: float) -> int:
    """The most valuable setting whose bound a budget holds; -1 if there is none."""
    best = -1
    for k in range(len(values)):
        if bounds_ms[k] <= budget_ms and (best < 0 or values[k] > values[best]):
            best = k
    return best


# What a request is expected to take


def time_terms(state: Any, request: Any) -> tuple[Any, Any]:
    """Times of each stage by the profile ``[2, G, K]``, and what times are sums of ``[3, K]``: see `Forecast`."""
    weights, num_stages, num_settings = state.size_weights, len(state.scale), len(request.vision)
    profiled, terms = np.empty((2, num_stages, num_settings)), np.zeros((3, num_settings))
    for g in range(num_stages):
        scale, image_share = state.scale[g], state.image_stages[g]
        images = 1 + image_share * (request.images - 1)
        for k in range(num_settings):
            vision = request.vision[k]
            context = vision + request.language
            first = images * weights[0, g, k] + vision * weights[1, g, k]
            first += context * (weights[2, g, k] + context * weights[3, g, k])
            if vision > request.vision[0]:
                first += images * weights[6, g, k]
            step = weights[4, g, k] + context * weights[5, g, k]
            profiled[0, g, k], profiled[1, g, k] = first, step
            terms[0, k] += scale * image_share * first
            terms[1, k] += scale * (1 - image_share) * first
            terms[2, k] += scale * step
    return profiled, terms


def length_forecast(feature: Any, state: Any) -> tuple[float, int]:
    """The expected number of output tokens, and the number of a long answer's length among ``state.lengths``."""
    count = len(state.lengths)
    shares = np.empty(count)
    top, total, mean = -np.inf, 0.0, 0.0
    for i in range(count):
        shares[i] = state.length_bias[i]
        for j in range(len(feature)):
            shares[i] += state.length_weights[i, j] * feature[j]
        top = max(top, shares[i])
    for i in range(count):
        shares[i] = math.exp(shares[i] - top)
        total += shares[i]
        mean += shares[i] * state.lengths[i]
    number, below = 0, shares[0]
    while below < (1 - state.alpha / 2 - 1e-12) * total and number < count - 1:
        number += 1
        below += shares[number]
    return mean / total, number


def budget_step(share: float) -> int:
    """The number of a budget's group, from its share of the full setting's time."""
    share = max(SMALLEST_BUDGET_SHARE, min(share, LARGEST_BUDGET_SHARE))
    return round(math.log(share) / math.log(BUDGET_RATIO))


# Margin and pace


def log_margin(state: Any, groups: Any, moment: int) -> float:
    """log(bound / predicted time) from this moment on, for a request of these groups: see `Margin.log_margin`."""
    level = state.level
    for group in groups:
        level += state.group_offsets[group]
    count = state.score_counts[moment]
    found = score_quantile(state.sorted_scores[moment], count, min(level, state.highest_level))
    return max(LOWEST_LOG_MARGIN, min(found, HIGHEST_LOG_MARGIN))


def score_quantile(ascending: Any, count: int, level: float) -> float:
    """The (1 - level) quantile, at the rank (n + 1) (1 - level) of split conformal prediction; 0 without scores.

    Between ranks it is interpolated: the level is controlled, so that it can move in steps smaller than a score.
    """
    if count == 0:
        return 0.0
    rank = max((count + 1) * (1 - level) - 1, 0.0)
    if rank >= count - 1:
        return ascending[count - 1] + BEYOND_SCORES * max(1 / (count + 1) - level, 0.0)
    below = int(rank)
    share = rank - below
    return (1 - share) * ascending[below] + share * ascending[below + 1]


def pace_after(recent_slowdown: float, predicted_ms: float, took_ms: float) -> float:
    """Factor on predicted times, from a part of the request itself that is over; 0: none is."""
    if predicted_ms > 0 and took_ms > 0:
        difference = math.log(took_ms / predicted_ms) - recent_slowdown
        recent_slowdown += OVERVIEW_RATE * max(-LARGEST_STEP, min(difference, LARGEST_STEP))
    return math.exp(recent_slowdown)


# The controller's network


def network_values(network: Any, image: Any, language: Any, budget_ms: float) -> Any:
    """See `budgetvlm.controller.value_network.ValueNetwork.values`, float32 ``[K]``; ``network`` is its weights."""
    mean, scale, frequencies, embedding, first, first_bias, hidden, hidden_bias, heads, head_bias = network[:10]
    reference_ms, largest_budget_ms, largest_log_ratio, largest_score, least_log_ratio = (
        network[10],
        network[11],
        network[12],
        network[13],
        network[14],
    )
    state = np.empty(len(first), np.float32)
    for i in range(len(mean)):  # slices that are assigned to would take seconds to compile
        raw = image[i] if i < len(image) else language[i - len(image)]
        state[i] = min(max((raw - mean[i]) * scale[i], -largest_score), largest_score)
    ratio = math.log(min(budget_ms, largest_budget_ms) / reference_ms)
    ratio = max(least_log_ratio, min(ratio, largest_log_ratio))
    embed(frequencies, embedding, ratio, state[len(mean) :])
    now = first_bias.copy()
    add_product(first, state, now)
    for layer in range(len(hidden)):
        silu(now)
        after = hidden_bias[layer].copy()
        size = hidden.shape[2]
        for block in range(hidden.shape[1]):  # members of an ensemble are blocks on the diagonal
            start, end = block * size, (block + 1) * size
            add_product(hidden[layer, block], now[start:end], after[start:end])
        now = after
    silu(now)
    out = head_bias.copy()
    add_product(heads, now, out)
    return out


def embed(frequencies: Any, embedding: Any, log_ratio: float, out: Any) -> None:
    """Write the embedding of the budget's log ratio: a layer over its sines, its cosines, itself and 1."""
    count = len(frequencies)
    basis = np.empty(2 * count + 2, np.float32)
    for i in range(count):
        basis[i], basis[count + i] = math.sin(frequencies[i] * log_ratio), math.cos(frequencies[i] * log_ratio)
    basis[2 * count], basis[2 * count + 1] = log_ratio, 1.0
    for i in range(len(out)):
        out[i] = 0.0
    add_product(embedding, basis, out)
    silu(out)


def add_product(weight: Any, x: Any, out: Any) -> None:
    """Add the transpose of ``weight [D, N]`` times ``x [D]`` to ``out [N]``.

    Four rows at a time, so that ``out`` is read and written a quarter as often; they lie far apart, because memory is
    read ahead in several places at once, within a page each.
    """
    count, width = weight.shape
    n = count // 4
    for j in range(n):
        a, b, c, d = x[j], x[n + j], x[2 * n + j], x[3 * n + j]
        for i in range(width):
            out[i] += weight[j, i] * a + weight[n + j, i] * b + weight[2 * n + j, i] * c + weight[3 * n + j, i] * d
    for j in range(4 * n, count):
        for i in range(width):
            out[i] += weight[j, i] * x[j]


def silu(x: Any) -> None:
    """x / (1 + exp(-x)), in place."""
    for i in range(len(x)):
        x[i] = x[i] / (ONE + math.exp(-x[i]))
