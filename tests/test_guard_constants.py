"""The constants that the promise of docs/guarantee.md depends on, each by what it does, worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_adaptive import SPACE, STAGES, asked, bounded, guard

from budgetvlm.errors import DataError
from budgetvlm.guard.bounds import Outcome, Spent
from budgetvlm.guard.conformal import FACTORS, choose_factor
from budgetvlm.guard.kernels import budget_step, length_forecast, pace_after, score_quantile
from budgetvlm.guard.learning import add_score
from budgetvlm.guard.margin import Margin

K = len(SPACE) - 1  # the full setting


def learnt_from(*, late=False, beside_ms=0.5, count=1):
    """A guard after promised requests at the full setting, which take ``beside_ms`` beside the model's stages."""
    made, request = guard(hurries=False), asked(0)
    stages = {name: float(times[0, K]) for name, times in STAGES.items()}
    total = sum(stages.values()) + beside_ms
    for _ in range(count):
        chosen = bounded(made, request, 130.0)
        made.update(K, [chosen], Outcome(stages, 4, total, late, False, True))
    return made


@pytest.mark.parametrize(("alpha", "kept"), [(0.2, 100), (0.05, 100), (0.01, 200)])
def test_a_quantile_is_of_the_last_hundred_scores_or_more_for_a_small_alpha(alpha, kept):
    margin = Margin(alpha)
    for score in range(500):
        add_score(margin.scores, float(score))
    assert margin.to_dict()["scores"]["overview"] == list(range(500 - kept, 500))


def test_the_quantile_counts_the_request_to_come_and_grows_beyond_the_scores():
    four = np.arange(4.0)
    assert score_quantile(four, 4, 0.4) == pytest.approx(2.0)  # rank 5 x 0.6 - 1, counted from 0
    assert score_quantile(four, 4, 0.5) == pytest.approx(1.5)
    assert score_quantile(four, 4, 0.1) == pytest.approx(3.0 + 5.0 * (1 / 5 - 0.1))
    assert score_quantile(four, 4, 0.9) == 0.0
    assert Margin.start(0.05, {"overview": np.arange(100) / 100, "image": four}).log_margin() == pytest.approx(0.9495)


@pytest.mark.parametrize(("score", "factor"), [(-9.0, 0.7), (9.0, 20.0)])
def test_a_factor_has_limits(score, factor):
    assert math.exp(Margin(0.05, {"overview": [score] * 100}).log_margin()) == pytest.approx(factor)


def test_an_offset_moves_by_a_fifth_of_alpha_towards_85_percent_of_alpha():
    offsets = learnt_from(late=True).margin.group_offsets
    assert len(offsets) == 4
    assert list(offsets.values()) == pytest.approx([0.2 * 0.05 * (0.85 * 0.05 - 1.0)] * 4)


def test_credit_for_late_answers_begins_at_one_and_ends_at_ten():
    assert learnt_from(count=100).credit == pytest.approx(1.0 + 100 * 0.05)
    assert learnt_from(count=210).credit == pytest.approx(10.0)


def test_what_is_beside_the_model_is_followed_by_a_twentieth():
    assert learnt_from(beside_ms=1.5).own_ms == pytest.approx(0.5 + 0.05 * (1.5 - 0.5))


def test_the_overview_moves_the_slowdown_by_60_percent_of_a_limited_step():
    assert pace_after(0.1, 10.0, 10.0 * math.exp(0.2)) == pytest.approx(math.exp(0.1 + 0.6 * 0.1))
    assert pace_after(0.0, 10.0, 1000.0) == pytest.approx(math.exp(0.6 * 0.2))


def test_budgets_within_a_quarter_share_a_group_up_to_limits():
    assert [budget_step(share) for share in (1 / 1.25, 1.0, 1.1, 1.25)] == [-1, 0, 0, 1]
    assert budget_step(0.01) == budget_step(0.05) == -13
    assert budget_step(9.0) == budget_step(1.5) == 2


@pytest.mark.parametrize(("slowdown", "group"), [(1.0, "all"), (1.9, "all"), (2.1, "all, slowed down")])
def test_a_machine_twice_as_slow_is_overloaded_and_its_requests_are_in_other_groups(slowdown, group):
    made = guard(hurries=False)
    made.speed.pace[1] = slowdown
    assert bounded(made, asked(0), 100.0).forecast.groups[0] == made.margin.number(group)


@pytest.mark.parametrize(("times", "large"), [(1.0, False), (1.6, False), (2.5, True)])
def test_an_image_that_takes_twice_as_long_to_prepare_is_a_large_one(times, large):
    prepared, encoded = times * STAGES["preprocess"][0, 0], STAGES["vision"][0, 0]
    spent = Spent(prepared + encoded, prepared + encoded, prepared)
    assert bounded(guard(hurries=False), asked(0), 100.0, spent).forecast.large == large


@pytest.mark.parametrize(("alpha", "number"), [(0.05, 2), (0.1, 1), (0.3, 0)])
def test_a_long_answer_is_one_that_all_but_half_of_alpha_are_below(alpha, number):
    """Nine in ten answers have 1 token, 7 in a hundred have 2, the others 3."""
    state = SimpleNamespace(
        lengths=np.array([1.0, 2.0, 3.0]), length_bias=np.log([0.9, 0.07, 0.03]), length_weights=np.zeros((3, 1)),
        alpha=alpha,
    )  # fmt: skip
    expected, long = length_forecast(np.zeros(1), state)
    assert expected == pytest.approx(0.9 + 0.14 + 0.09) and long == number


def test_calibration_looks_for_factors_from_a_quarter_to_64():
    assert choose_factor(np.zeros((19, len(FACTORS))), 0.05) == pytest.approx(0.25)
    with pytest.raises(DataError, match="even 64 times"):
        choose_factor(np.ones((19, len(FACTORS))), 0.05)
    assert np.diff(np.log(FACTORS)).max() < 0.014
