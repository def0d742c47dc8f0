import math

import pytest
import torch

from budgetvlm.controller.reward import constrained_reward, guide_reward
from budgetvlm.controller.training_options import RewardWeights
from budgetvlm.errors import ConfigError


def reward(accuracy, latency, budget, complexity, weights=RewardWeights()):  # noqa: B008 (frozen)
    numbers = (torch.tensor(float(x), dtype=torch.float64) for x in (accuracy, latency, budget, complexity))
    return guide_reward(*numbers, weights).item()


def test_the_default_weights_are_the_guides():
    assert RewardWeights() == RewardWeights(alpha=1.0, beta=0.5, gamma=10.0, delta=0.1, epsilon=0.05)


def test_exactly_at_the_budget_half_of_beta_is_lost():
    assert reward(1.0, 50.0, 50.0, 1.0) == pytest.approx(1.0 - 0.5 * 0.5 - 0.05)


def test_at_nine_tenths_of_the_budget_the_soft_penalty_already_costs_13_points():
    sigmoid = 1 / (1 + math.e)  # sigmoid(10 * (0.9 - 1)) = sigmoid(-1) = 0.2689
    assert reward(1.0, 45.0, 50.0, 0.5) == pytest.approx(1.0 - 0.5 * sigmoid + 0.1 * 0.1 - 0.05 * 0.5)
    assert 0.5 * sigmoid == pytest.approx(0.1345, abs=1e-4)


def test_a_budget_broken_by_half_costs_a_quarter_of_gamma():
    sigmoid = 1 / (1 + math.exp(-5))
    assert reward(1.0, 75.0, 50.0, 1.0) == pytest.approx(1.0 - 0.5 * sigmoid - 10.0 * 0.25 - 0.05)


def test_a_cheap_setting_beats_a_better_one_that_fits():
    """Why the constrained objective is the default: 15 points of accuracy lose against latency that was allowed."""
    dear, cheap = reward(0.85, 0.95, 1.0, 1.0), reward(0.70, 0.4, 1.0, 0.4)
    assert dear == pytest.approx(0.616, abs=1e-3)
    assert cheap == pytest.approx(0.739, abs=1e-3)


def test_units_cancel_and_no_limit_is_no_penalty():
    assert reward(0.7, 30.0, 50.0, 0.5) == pytest.approx(reward(0.7, 0.030, 0.050, 0.5))
    sigmoid = 1 / (1 + math.exp(10))
    assert reward(0.7, 30.0, math.inf, 0.5) == pytest.approx(0.7 - 0.5 * sigmoid + 0.1 - 0.025)


def test_each_weight_acts_on_its_own_term():
    none = RewardWeights(0.0, 0.0, 0.0, 0.0, 0.0)
    assert reward(0.7, 75.0, 50.0, 0.5, none) == 0.0
    assert reward(0.7, 75.0, 50.0, 0.5, RewardWeights(2.0, 0.0, 0.0, 0.0, 0.0)) == pytest.approx(1.4)
    assert reward(0.7, 75.0, 50.0, 0.5, RewardWeights(0.0, 0.0, 4.0, 0.0, 0.0)) == pytest.approx(-1.0)
    assert reward(0.7, 25.0, 50.0, 0.5, RewardWeights(0.0, 0.0, 0.0, 0.3, 0.0)) == pytest.approx(0.15)
    assert reward(0.7, 25.0, 50.0, 0.5, RewardWeights(0.0, 0.0, 0.0, 0.0, 0.4)) == pytest.approx(-0.2)


def test_the_constrained_reward_prices_latency_in_units_of_the_reference():
    accuracy = torch.tensor([[1.0, 0.5]])
    latency = torch.tensor([[40.0, 10.0]])
    price = torch.tensor([[0.2]])
    # 1 - 0.2 * 40/40 = 0.8; 0.5 - 0.2 * 10/40 = 0.45
    torch.testing.assert_close(constrained_reward(accuracy, latency, 40.0, price), torch.tensor([[0.8, 0.45]]))


def test_all_wrong_weights_are_named_at_once():
    with pytest.raises(ConfigError, match=r"beta=-1.*gamma=nan"):
        RewardWeights(beta=-1.0, gamma=math.nan)
