"""Which budgets leave a choice, and others where none of the usual ones does."""

from __future__ import annotations

import numpy as np
import pytest

from budgetvlm.policies.budget_grid import BUDGET_SHARES, grid_with_choice, said_of_choice, share_with_choice

ALIKE = np.array([[10.0, 20.0, 40.0]])
BY_INPUT = np.array([[10.0, 20.0, 40.0], [10.0, 50.0, 60.0], [30.0, 50.0, 60.0], [10.0, 20.0, np.inf]])


@pytest.mark.parametrize(
    ("bounds", "budget", "expected"),
    [
        (ALIKE, 9.0, [1, 0, 0]),
        (ALIKE, 10.0, [1, 1, 0]),
        (ALIKE, 39.0, [1, 1, 1]),
        (BY_INPUT, 20.0, [1, 0.75, 0.5]),
        (BY_INPUT, 1e9, [1, 1, 1]),
    ],
)
def test_how_many_samples_have_a_choice(bounds, budget, expected):
    assert share_with_choice(bounds, [budget])[0].tolist() == expected


@pytest.mark.parametrize(
    ("shares", "bounds", "said"),
    [
        ((2.0, 4.0), ALIKE, None),
        (
            (0.5, 1.0, 2.0, 4.0), ALIKE,
            "at 0.5 no setting's bound is within the budget, so every request gets the cheapest setting; at 1 one "
            "setting alone is allowed; at 2, 4 there is a choice.",
        ),
        ((0.5,), ALIKE, "cheapest setting; no budget leaves a choice."),
        ((2.0, 6.0), BY_INPUT, "at 2 (for 50% of the samples), 6 there is a choice."),
        ((1.0,), ALIKE[:, :1], "at 1 one setting alone is allowed; no budget leaves a choice."),
    ],
)  # fmt: skip
def test_what_is_said_of_it(shares, bounds, said):
    found = said_of_choice(shares, bounds, 10.0)
    assert found is None if said is None else found.endswith(said)


@pytest.mark.parametrize(
    ("shares", "bounds", "reference_ms", "expected"),
    [
        (BUDGET_SHARES, ALIKE, 40.0, BUDGET_SHARES),  # a choice from 0.5 x 40 ms on
        (BUDGET_SHARES, ALIKE, 10.0, (2.0, 2.4, 2.8, 3.2, 3.6, 4.0)),  # 20 to 40 ms
        ((0.1, 0.2), ALIKE, 10.0, (0.1, 0.2)),  # somebody's own
        (BUDGET_SHARES, ALIKE[:, :1], 5.0, BUDGET_SHARES),  # one setting: there is no choice anywhere
        (BUDGET_SHARES, np.array([[10.0, 20.0]]), 9.0, (2.223,)),  # rounded up, so that the bound is within it
    ],
)
def test_others_take_the_place_of_usual_budgets_without_a_choice(shares, bounds, reference_ms, expected):
    assert grid_with_choice(shares, bounds, reference_ms) == pytest.approx(expected)
