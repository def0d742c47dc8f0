"""The margin of bounds: a quantile of recent scores whose level is controlled."""

import itertools
import json
import math

import numpy as np
import pytest

from budgetvlm.guard.kernels import HIGHEST_LOG_MARGIN, LOWEST_LOG_MARGIN
from budgetvlm.guard.learning import add_score, forget_scores, learn_margin
from budgetvlm.guard.margin import MAX_GROUPS, Margin

GROUPS = ("short", "tight")


def q(margin, groups=GROUPS, moment="overview"):
    return margin.log_margin([margin.number(group) for group in groups], moment)


def judge(margin, missed, target=0.05):
    learn_margin(margin, tuple(margin.number(group) for group in GROUPS), {}, float(missed), target)


def scores(count=1000, spread=0.1, seed=0):
    return spread * np.random.default_rng(seed).standard_normal(count)


def started(alpha, given, q=None):
    return Margin.start(alpha, {"overview": given, "image": given / 2}, q)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_it_begins_with_the_quantile_of_the_scores(alpha):
    given = scores(5000)
    assert started(alpha, given).log_margin() == pytest.approx(np.quantile(given, 1 - alpha), abs=0.03)


@pytest.mark.parametrize("q", [-0.1, 0.05, 0.15, 0.3, 0.8])
def test_it_begins_with_the_q_that_calibration_found(q):
    margin = started(0.05, scores(), q)
    least = np.quantile(scores(), 1 - 8 * 0.05)  # more than eight times alpha of the scores are never above
    assert margin.log_margin() == pytest.approx(max(q, least), abs=0.01)


def test_misses_raise_it_and_hits_lower_it_for_their_groups_alone():
    margin = started(0.05, scores())
    before = q(margin)
    judge(margin, True)
    assert q(margin) > q(margin, ("short", "ample")) > before == q(margin, ("long", "ample"))
    for _ in range(100):
        judge(margin, False)
    assert q(margin) < before


def test_misses_raise_it_also_beyond_all_scores_up_to_a_limit_from_which_it_comes_back():
    margin, found = started(0.05, scores()), []
    for _ in range(2000):
        judge(margin, True)
        found.append(q(margin))
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] == HIGHEST_LOG_MARGIN
    for _ in range(50):
        judge(margin, False)
    assert q(margin) < HIGHEST_LOG_MARGIN


def test_hits_lower_it_down_to_a_limit_from_which_it_comes_back():
    margin = started(0.05, scores())
    for _ in range(5000):
        judge(margin, False)
    low = q(margin)
    assert low > LOWEST_LOG_MARGIN
    judge(margin, True)
    assert q(margin) > low


def test_a_noisy_spell_is_followed_and_forgotten():
    margin = started(0.05, scores())
    before = margin.log_margin()
    for score in scores(200, 0.6, seed=1):
        add_score(margin.scores, score)
    assert margin.log_margin() > 4 * before
    for score in scores(100, 0.1, seed=2):
        add_score(margin.scores, score)
    assert margin.log_margin() == pytest.approx(before, rel=0.4)


def test_scores_that_told_of_another_speed_are_dropped():
    margin = started(0.05, scores())
    before = margin.log_margin()
    for _ in range(4):
        add_score(margin.scores, 2.3)
    forget_scores(margin.scores, 4)
    assert margin.log_margin() == pytest.approx(before, abs=0.02)


def test_each_moment_has_scores_of_its_own_and_the_level_in_common():
    margin = started(0.05, scores())
    assert q(margin, moment="image") == pytest.approx(q(margin) / 2)
    for score in scores(100, 0.6, seed=1):
        add_score(margin.scores, score, "image")
    assert q(margin, moment="image") > 2 * q(margin)
    before = q(margin, moment="image")
    judge(margin, True)
    assert q(margin, moment="image") > before


def test_factors_of_both_moments_belong_together_by_their_level():
    margin = started(0.05, scores())
    q = np.array([-0.1, 0.0, 0.1, 0.2, 0.6])
    np.testing.assert_allclose(np.log(margin.image_factors(np.exp(q)))[:4], q[:4] / 2, atol=0.01)
    assert (np.diff(margin.image_factors(np.geomspace(0.01, 50, 100))) >= 0).all()


def test_without_scores_the_bound_is_the_predicted_time():
    margin = Margin(0.05)
    assert q(margin) == 0.0
    forget_scores(margin.scores, 4)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_the_share_that_misses_follows_the_target_whatever_the_scores_are(alpha):
    """Scores jump about without any law; the rate is alpha all the same."""
    rng, margin = np.random.default_rng(3), started(alpha, scores())
    missed = []
    for number in range(6000):
        score = 0.1 * rng.standard_t(3) + 0.3 * math.sin(number / 50) + 0.4 * (number % 1000 > 500)
        missed.append(score > q(margin))
        add_score(margin.scores, score)
        judge(margin, missed[-1], alpha)
    assert np.mean(missed) == pytest.approx(alpha, rel=0.35)


@pytest.mark.parametrize(("alpha", "cost"), [(0.01, 0.2), (0.05, 1.0), (0.2, 1.0)])
def test_answers_cut_short_count_less_where_hardly_any_may_be_late(alpha, cost):
    """Of ten answers above their bound one is late and nine are cut: what they cost follows the target."""
    rng, margin = np.random.default_rng(4), started(alpha, scores())
    assert margin.cut_cost == pytest.approx(cost)
    costs = []
    for score in 0.1 * rng.standard_t(3, size=8000):
        over = score > q(margin)
        costs.append(float(over) * (1.0 if rng.random() < 0.1 else margin.cut_cost))
        add_score(margin.scores, score)
        judge(margin, costs[-1], alpha)
    assert np.mean(costs) == pytest.approx(alpha, rel=0.2)


def test_a_group_keeps_its_number_and_very_many_share_the_last():
    margin = Margin(0.05)
    numbers = [margin.number(str(number)) for number in range(MAX_GROUPS + 5)]
    assert numbers == [*range(MAX_GROUPS), *[MAX_GROUPS - 1] * 5]
    assert margin.number("7") == 7
    learn_margin(margin, tuple(numbers[-2:]), {}, 1.0, 0.05)
    assert set(margin.group_offsets) == {str(number) for number in range(MAX_GROUPS - 1, MAX_GROUPS + 5)}


def test_it_survives_json():
    margin = started(0.05, scores(), 0.3)
    judge(margin, True)
    again = Margin.from_dict(0.05, json.loads(json.dumps(margin.to_dict())))
    assert q(again) == q(margin) and again.to_dict() == margin.to_dict()
