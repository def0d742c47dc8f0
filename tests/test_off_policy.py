"""Estimates of other policies: numbers worked out by hand, exact means over all possible choices, bounds that hold."""

import math

import numpy as np
import pytest

from budgetvlm.feedback.confidence_bounds import lower_bound, normal_interval
from budgetvlm.feedback.off_policy import ScoredLog, doubly_robust, floored, gain, ips, snips, unsupported

# Three requests, two settings. The target takes the second setting, the first one half of the time, the first.
LOG = ScoredLog(np.array([1.0, 0.5, 1.0]), np.array([1, 0, 0]), np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]))
TARGET = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
PREDICTED = np.array([[0.2, 0.6], [0.4, 0.8], [0.5, 0.9]])
# Weights of what was chosen: 1 / 0.5 = 2, 0.5 / 0.25 = 2, 1 / 1 = 1.


@pytest.mark.parametrize(
    ("outcomes", "by_hand"),
    [
        (ips(LOG, TARGET), [2.0, 1.0, 1.0]),
        (ips(LOG, TARGET, most=1.5), [1.5, 0.75, 1.0]),
        # predicted of the target: 0.6, (0.4 + 0.8) / 2 = 0.6, 0.5; beside it 2 (1 - 0.6), 2 (0.5 - 0.4), 1 - 0.5
        (doubly_robust(LOG, TARGET, PREDICTED), [1.4, 0.8, 1.0]),
        (doubly_robust(LOG, TARGET, PREDICTED, most=1.5), [1.2, 0.75, 1.0]),
        # the baseline is at most 0.5 / weight: 0.25 of setting 1; 0.25 and 0.75; 0.5
        (floored(LOG, TARGET, PREDICTED, depth=0.5)[0], [2 * 0.75 + 0.25, 2 * 0.25 + (0.25 + 0.75) / 2, 1.0]),
    ],
)
def test_outcomes_are_those_worked_out_by_hand(outcomes, by_hand):
    assert outcomes.tolist() == pytest.approx(by_hand)


def test_the_self_normalised_estimate_is_the_weighted_mean_and_its_spread_that_of_a_quotient():
    outcomes = snips(LOG, TARGET)
    assert outcomes.mean() == pytest.approx((2 * 1 + 2 * 0.5 + 1 * 1) / 5) == pytest.approx(0.8)
    assert outcomes.tolist() == pytest.approx([0.8 + 2 * 0.2 * 3 / 5, 0.8 - 2 * 0.3 * 3 / 5, 0.8 + 0.2 * 3 / 5])


def test_choices_that_were_never_made_are_counted():
    assert unsupported(LOG, TARGET) == 0.0
    assert unsupported(LOG, np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])) == pytest.approx(0.2)


def random_world(seed, settings=4, size=30):
    """Logging probabilities (some of them 0), scores of every setting, a baseline, and two policies."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(settings), size) * (rng.random((size, settings)) < 0.8)
    probabilities[:, 0] += 0.05
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    truth, predicted = rng.random((2, size, settings))
    policies = np.eye(settings)[rng.integers(0, settings, (2, size))]
    return probabilities, truth, predicted, *policies


def expected(outcomes_of, probabilities, truth):
    """The exact mean of outcomes over all that could have been chosen."""
    settings = range(probabilities.shape[1])
    chosen = [np.full(len(truth), k) for k in settings]
    made = [outcomes_of(ScoredLog(truth[:, k], chosen[k], probabilities)) for k in settings]
    return sum(probabilities[:, k] * made[k] for k in settings)


@pytest.mark.parametrize("seed", range(5))
def test_outcomes_are_right_on_average_wherever_the_target_was_tried_and_low_where_it_was_not(seed):
    probabilities, truth, predicted, candidate, present = random_world(seed)
    tried, tried_before = ((probabilities * policy).sum(axis=1) > 0 for policy in (candidate, present))
    worth = (candidate * truth).sum(axis=1)
    for outcomes in (ips, lambda log, target: doubly_robust(log, target, predicted)):
        found = expected(lambda log, made=outcomes: made(log, candidate), probabilities, truth)
        assert found[tried] == pytest.approx(worth[tried])
    low = expected(lambda log: floored(log, candidate, predicted)[0], probabilities, truth)
    assert low[tried] == pytest.approx(worth[tried]) and (low <= worth + 1e-9).all()
    more = worth - (present * truth).sum(axis=1)
    found = expected(lambda log: gain(log, candidate, present, predicted)[0], probabilities, truth)
    assert found[tried & tried_before] == pytest.approx(more[tried & tried_before]) and (found <= more + 1e-9).all()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_outcome_is_below_its_floor_and_equal_policies_gain_exactly_nothing(seed, depth):
    probabilities, truth, predicted, candidate, present = random_world(seed)
    for chosen in range(probabilities.shape[1]):
        possible = probabilities[:, chosen] > 0
        log = ScoredLog(truth[:, chosen].round(), np.full(len(truth), chosen), probabilities)
        outcomes, floor = gain(log, candidate, present, predicted, depth)
        assert (outcomes[possible] >= floor - 1e-9).all()
        outcomes, floor = floored(log, candidate, predicted, depth)
        assert -depth - 1e-9 <= floor <= outcomes[possible].min() + 1e-9
        assert not gain(log, present, present, predicted, depth)[0].any()


def test_an_interval_for_one_look_is_that_of_the_central_limit_theorem():
    low, high = normal_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    half = 1.959964 * math.sqrt(1 / 3) / 2
    assert (low, high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))


def test_a_bound_of_a_certain_mean_comes_close_to_it_and_no_outcome_says_nothing():
    assert 0.98 < lower_bound(np.full(2000, 1.0), 0.0) < 1.0
    assert lower_bound(np.array([]), -1.0) == -1.0


def test_a_bound_does_not_depend_on_the_order_and_is_surer_where_more_may_be_wrong():
    outcomes = np.random.default_rng(0).random(300)
    assert lower_bound(outcomes, 0.0) == pytest.approx(lower_bound(np.sort(outcomes), 0.0), abs=1e-6)
    assert lower_bound(outcomes, 0.0, alpha=0.01) < lower_bound(outcomes, 0.0, alpha=0.2) < outcomes.mean()


def test_looking_often_does_not_spoil_the_bound():
    """Outcomes as explored requests give: mostly 0, seldom large. A bound for one look fails at one of many."""
    rng, looks, wrong, wrong_normal = np.random.default_rng(1), range(80, 801, 80), 0, 0
    for _ in range(40):
        outcomes = np.where(rng.random(800) < 0.05, 4.0, 0.0) - np.where(rng.random(800) < 0.2, 1.0, 0.0)  # mean 0
        wrong += any(lower_bound(outcomes[:n], -1.0, alpha=0.1) > 0 for n in looks)
        wrong_normal += any(normal_interval(outcomes[:n], 0.8)[0] > 0 for n in looks)
    assert wrong <= 4 < wrong_normal


def test_a_gain_that_is_there_is_found():
    rng = np.random.default_rng(2)
    outcomes = np.where(rng.random(3000) < 0.05, 8.0, 0.0) - np.where(rng.random(3000) < 0.2, 1.0, 0.0)  # mean 0.2
    assert 0.0 < lower_bound(outcomes, -1.0) < 0.2
