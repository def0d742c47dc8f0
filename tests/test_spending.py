"""The mean latency is held at its budget by the price, on requests whose settings are planted."""

from __future__ import annotations

import numpy as np
import pytest

from budgetvlm.errors import ConfigError
from budgetvlm.guard.spending import HIGHEST_PRICE, LARGEST_DEBT, Spending, require_mean_budget

COST_MS = np.array([20.0, 40.0, 80.0, 120.0])
WINDOW = 500


def gain(random: np.random.Generator, count: int, difficulty: float) -> np.ndarray:
    """Predicted accuracy of each setting: harder questions gain more from slower settings, ``[count, 4]``."""
    steepness = random.gamma(2.0, difficulty, size=(count, 1))
    return 1 - np.exp(-COST_MS / 40 / steepness)


def spend(spending: Spending, accuracy: np.ndarray, random: np.random.Generator, slowdown: float = 1.0) -> np.ndarray:
    """Latency of each request, which takes up to a third more or less than the setting's mean."""
    took = []
    for row in accuracy:
        chosen = int(np.argmax(row - spending.price * COST_MS / COST_MS[-1]))
        took.append(slowdown * COST_MS[chosen] * random.uniform(0.67, 1.33))
        spending.add(took[-1])
    return np.array(took)


def windows(took: np.ndarray) -> np.ndarray:
    return np.convolve(took, np.full(WINDOW, 1 / WINDOW), mode="valid")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("budget_ms", [30.0, 50.0, 90.0])
def test_any_500_requests_meet_the_budget_whatever_the_first_price_is(budget_ms, start, seed):
    random = np.random.default_rng(seed)
    took = spend(Spending(budget_ms, start), gain(random, 1500, 0.7), random)
    assert np.abs(windows(took) / budget_ms - 1).max() < 0.03
    assert took.mean() == pytest.approx(budget_ms, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_holds_where_questions_become_harder_and_the_machine_slower(seed):
    random = np.random.default_rng(seed)
    spending = Spending(50.0, 0.1)
    parts = [(0.4, 1.0), (1.6, 1.0), (1.6, 1.4), (0.4, 0.8)]
    took = np.concatenate([spend(spending, gain(random, 700, hard), random, slow) for hard, slow in parts])
    assert np.abs(windows(took) / 50.0 - 1).max() < 0.03


def test_a_budget_that_nothing_meets_is_forgotten_as_soon_as_it_can_be_met():
    spending = Spending(50.0, 0.1)
    for _ in range(1000):
        spending.add(100.0)
    assert spending.debt == LARGEST_DEBT and spending.price == HIGHEST_PRICE
    for _ in range(100):
        spending.add(30.0)
    assert spending.price < HIGHEST_PRICE / 100


@pytest.mark.parametrize("budget_ms", [0, -1, float("nan"), float("inf")])
def test_a_budget_that_is_none(budget_ms):
    with pytest.raises(ConfigError, match="mean_budget_ms"):
        Spending(budget_ms, 0.1)


def test_the_least_possible_mean_is_named():
    require_mean_budget(20.0, 20.0)
    with pytest.raises(ConfigError, match=r"mean budget of 19 ms cannot be met: .* takes 20 ms on average"):
        require_mean_budget(19.0, 20.0)


@pytest.mark.parametrize(
    ("least_ms", "said"),
    [(100.4498, "Give 100.5 ms or more"), (20.0, "Give 20 ms or more"), (0.31234, "Give 0.313 ms or more"),
     (999.96, "Give 1.00 s or more"), (1003.2, "Give 1.01 s or more"), (12_345.6, "Give 12.4 s or more")],
)  # fmt: skip
def test_who_gives_the_least_that_was_named_is_not_refused_again(least_ms, said):
    with pytest.raises(ConfigError, match=said) as refused:
        require_mean_budget(least_ms * 0.9, least_ms)
    number, unit = str(refused.value).split("Give ")[1].split()[:2]
    require_mean_budget(float(number) * (1000.0 if unit == "s" else 1.0), least_ms)


def test_a_budget_of_nearly_nothing_is_not_called_zero():
    with pytest.raises(ConfigError, match=r"mean budget of 0.0001 ms cannot be met"):
        require_mean_budget(1e-4, 100.0)
