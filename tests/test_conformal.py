"""Calibration of the whole procedure: the promise holds for the setting that is chosen, on every kind of noise."""

import numpy as np
import pytest

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.guard.conformal import FACTORS, Calls, Revising, choose_factor, losses, samples_needed
from budgetvlm.guard.recourse import SameImage
from budgetvlm.knobs import KnobSpace

TIMES = np.array([10.0, 20.0, 30.0, 45.0, 60.0])
ALIKE = np.full(40, 20.0)  # many settings of one price leave a policy much to choose from
ALPHA = 0.1


def requests(count, rng, tail, times=TIMES):
    """(values, predicted, measured, budgets) of a policy that likes just the settings whose time is predicted too low.

    Noise is Student's t with ``tail`` degrees of freedom on the logarithm: 2 has no variance. The prediction errs by
    another factor for each request and setting, and the policy can see it (values grow with the error).
    """
    error = 0.4 * rng.standard_normal((count, len(times)))
    measured = times * np.exp(0.1 * rng.standard_t(tail, (count, len(times))) + error)
    budgets = rng.uniform(0.8 * times.min(), 1.5 * times.max() + 10, (count, 3))
    values = np.repeat((np.linspace(0, 0.5, len(times)) + 2 * error)[:, None, :], 3, axis=1)
    return values, np.tile(times, (count, 1)), measured, budgets


def violation_rate(factor, values, predicted, measured, budgets):
    """Share of requests over budget at this factor; those for which nothing is allowed are none."""
    allowed = factor * predicted[:, None, :] <= budgets[:, :, None]
    chosen = np.where(allowed, values, -np.inf).argmax(axis=2)
    over = np.take_along_axis(measured, chosen, axis=1) > budgets
    return (over & allowed.any(axis=2)).mean()


SAME = SameImage(KnobSpace({"max_crops": [1, 4], "top_k": [1, 2, 3]}))
ENCODE, ANSWER = np.repeat([5.0, 20.0], 3), np.tile([8.0, 16.0, 30.0], 2)


def requests_in_two_parts(count, rng, tail, saved=0.0):
    """As `requests`: (values, rest when chosen, time, budgets, spent, what is known when the choice is revised).

    Args:
        saved: share of answering that hurrying saves; the time is then that in a hurry.
    """
    slow = np.exp(0.15 * rng.standard_t(tail, (count, 6)))
    image = ENCODE * slow
    measured = image + (1 - saved) * ANSWER * slow * np.exp(0.1 * rng.standard_t(tail, (count, 6)))
    budgets = rng.uniform(12, 80, (count, 3))
    values = np.repeat(rng.uniform(size=(count, 1, 6)), 3, axis=1)
    predicted = np.tile(ENCODE + ANSWER, (count, 1))
    rest = ANSWER * image / ENCODE
    factors = np.exp(0.7 * np.log(FACTORS))
    answer = np.tile(ANSWER, (count, 1))
    return values, predicted, measured, budgets, 0.0, Revising(SAME, answer, image, rest, factors, saved * rest)


def revised_violation_rate(saved, factor, values, predicted, measured, budgets, spent, revising):
    """Written out one request at a time: choose, encode the image, choose again among what shares it."""
    late, later = 0, factor**0.7
    for i, p in np.ndindex(budgets.shape):
        # Sure to be kept in a hurry, and expected to be without.
        bounds = np.maximum(factor * (predicted[i] - saved * ANSWER), min(factor, 1) * predicted[i])
        answer = ANSWER * max(later * (1 - saved), min(later, 1))
        budget, value, aimed = budgets[i, p], values[i, p], predicted[i] - ANSWER + answer
        safe = np.repeat([bounds[:3].min(), bounds[3:].min()], 3)
        allowed = (bounds <= budget) | ((safe <= budget) & (aimed <= budget))
        if not allowed.any():
            continue
        image = int(np.where(allowed, value, -np.inf).argmax()) // 3
        ones = np.arange(3 * image, 3 * image + 3)
        left = revising.spent_ms[i, ones] + revising.rest_ms[i, ones] * max(later * (1 - saved), min(later, 1))
        kept = left <= budget
        k = ones[np.where(kept, value[ones], -np.inf).argmax() if kept.any() else left.argmin()]
        late += measured[i, k] > budget
    return late / budgets.size


def losses_of(values, predicted, measured, budgets, spent=0.0, revising=None, saving_ms=0.0, **cut):
    return losses(Calls(values, budgets, predicted, spent, saving_ms, 0.0, revising), measured, **cut)


@pytest.mark.parametrize(("tail", "saved"), [(2, 0.0), (5, 0.0), (2, 0.3)])
def test_the_promise_holds_over_200_seeds_when_choices_are_revised_and_answers_hurried(tail, saved):
    rates = []
    for seed in range(200):
        rng = np.random.default_rng([tail, seed])
        known = requests_in_two_parts(60, rng, tail, saved)
        factor = choose_factor(losses_of(*known, saving_ms=saved * np.tile(ANSWER, (60, 1))), ALPHA)
        rates.append(revised_violation_rate(saved, factor, *requests_in_two_parts(80, rng, tail, saved)))
    assert np.mean(rates) <= ALPHA + 2 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) > ALPHA / 4


@pytest.mark.parametrize(("tail", "times"), [(2, TIMES), (5, TIMES), (2, ALIKE)])
def test_the_promise_holds_over_200_seeds(tail, times):
    rates = []
    for seed in range(200):
        rng = np.random.default_rng([tail, seed])
        factor = choose_factor(losses_of(*requests(60, rng, tail, times)), ALPHA)
        rates.append(violation_rate(factor, *requests(400, rng, tail, times)))
    standard_error = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) <= ALPHA + 2 * standard_error
    assert np.mean(rates) > ALPHA / 3  # and it is no empty promise


def test_a_bound_that_holds_for_each_fixed_setting_does_not_hold_for_the_chosen_one():
    """Each setting alone stays below its 90% quantile in 90% of the requests; the policy finds the other 10%."""
    rng = np.random.default_rng(0)
    _, predicted, measured, _ = requests(2000, rng, 5, ALIKE)
    factor = np.quantile(measured / predicted, 1 - ALPHA)
    assert violation_rate(factor, *requests(2000, rng, 5, ALIKE)) > 2 * ALPHA


def test_losses_of_one_request_by_hand():
    """Two settings predicted at 10 and 20 ms that take 10 and 40 ms, budget 30 ms: the second is liked and too slow.

    It is allowed up to a factor of 1.5; after that the first is chosen, which keeps the budget.
    """
    loss = losses_of(
        np.array([[[0.1, 0.9]]]), np.array([[10.0, 20.0]]), np.array([[10.0, 40.0]]), np.array([[30.0]])
    )  # fmt: skip
    np.testing.assert_array_equal(loss[0], FACTORS <= 1.5)


@pytest.mark.parametrize(("first_ms", "cost"), [(29.0, 0.2), (31.0, 1.0)])
def test_an_answer_that_is_cut_short_costs_less_than_one_that_is_late(first_ms, cost):
    """As above; up to its first token the slow setting takes 29 ms, which is in time, or 31 ms."""
    loss = losses_of(
        np.array([[[0.1, 0.9]]]), np.array([[10.0, 20.0]]), np.array([[10.0, 40.0]]), np.array([[30.0]]),
        first_ms=np.array([[5.0, first_ms]]), cut_cost=0.2,
    )  # fmt: skip
    np.testing.assert_array_equal(loss[0], cost * (FACTORS <= 1.5))


def test_a_loss_never_grows_with_the_factor_even_if_violations_come_back():
    """At a large factor only the cheap setting is left, and it is the one that breaks the budget."""
    loss = losses_of(np.array([[[0.1, 0.9]]]), np.array([[10.0, 20.0]]), np.array([[99.0, 20.0]]), np.array([[30.0]]))
    np.testing.assert_array_equal(loss[0], FACTORS <= 3.0)


def test_the_smallest_factor_that_will_do():
    loss = np.zeros((19, len(FACTORS)))
    assert choose_factor(loss, 0.05) == FACTORS[0]
    loss[0, :100] = 1.0  # one of 19 calibration requests is over: (1 + 1) / 20 is too many
    assert choose_factor(loss, 0.05) == FACTORS[100]
    assert choose_factor(loss, 0.1) == FACTORS[0]
    loss = np.zeros((20, len(FACTORS)))
    loss[0, :100] = 1.0  # the request to come counts as well: 2 of 21 are too many, though 1 of 20 would do
    assert choose_factor(loss, 0.05) == FACTORS[100]


def test_too_few_requests_say_how_many_it_takes():
    assert [samples_needed(alpha) for alpha in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    with pytest.raises(DataError, match=r"18 calibration requests .* takes 19 .* can promise is 0.0526"):
        choose_factor(np.zeros((18, len(FACTORS))), 0.05)


def test_rates_and_models_that_cannot_work():
    with pytest.raises(ConfigError, match=r"alpha=1\.5"):
        samples_needed(1.5)
    with pytest.raises(DataError, match="does not fit this machine"):
        choose_factor(np.ones((99, len(FACTORS))), 0.05)
