"""The static guard: bounds, masks, documents."""

from __future__ import annotations

import json

import numpy as np
import pytest

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable


def test_bounds_are_quantiles_of_measured_cells() -> None:
    latency = np.array([[10.0, 100.0], [20.0, np.nan], [30.0, 200.0]])
    guard = StaticGuard.fit(latency, quantile=0.5)
    assert guard.bounds_ms.tolist() == [20.0, 150.0]


def test_a_budget_on_the_bound_is_enough_and_just_below_is_not() -> None:
    guard = StaticGuard(np.array([10.0, 20.0, 40.0]))
    assert guard.feasible(np.array([9.99, 10.0, 39.9, 40.0])).tolist() == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_a_budget_below_everything_allows_only_the_smallest_bound() -> None:
    guard = StaticGuard(np.array([20.0, 10.0, 40.0]))
    assert guard.feasible_or_cheapest(np.array([1.0, 25.0])).tolist() == [[False, True, False], [True, True, False]]


def test_a_setting_without_measurements_is_never_allowed() -> None:
    guard = StaticGuard.fit(np.array([[10.0, np.nan], [12.0, np.nan]]))
    assert guard.measured.tolist() == [True, False]
    assert guard.feasible(np.array([1e9, np.inf])).tolist() == [[True, False], [True, False]]


def test_calibrated_on_one_half_it_holds_on_the_other() -> None:
    rng = np.random.default_rng(0)
    latency = rng.lognormal(mean=[2.0, 3.0], sigma=0.3, size=(4000, 2))
    guard = StaticGuard.fit(latency[:2000], quantile=0.95)
    violations = (latency[2000:] > guard.bounds_ms).mean(axis=0)
    assert np.all(np.abs(violations - 0.05) < 0.02)


def test_the_record_of_a_guard_is_json_and_says_which_bounds_were_taken() -> None:
    record = StaticGuard(np.array([10.0, np.inf]), quantile=0.9, why="the input tells nothing").to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "schema_version": 1, "bounds_ms": [10.0, None], "quantile": 0.9, "why": "the input tells nothing"
    }  # fmt: skip


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"positive numbers.*quantile=1\.5"):
        StaticGuard(np.array([1.0, -2.0]), quantile=1.5)


@pytest.mark.parametrize("latency", [np.zeros((0, 3)), np.full((2, 2), np.nan), np.ones(3)])
def test_nothing_measured_is_an_error(latency: np.ndarray) -> None:
    with pytest.raises(DataError):
        StaticGuard.fit(latency)


def table_of(latency: np.ndarray, source: list[str]) -> ProfileTable:
    groups = {"latency_source": source} if source else {}
    return ProfileTable.from_arrays(
        KnobSpace({"depth": [1, 2]}), range(len(latency)), np.ones_like(latency), latency, groups=groups
    )


def test_predicted_latencies_do_not_narrow_the_bounds_where_enough_was_timed() -> None:
    latency = np.where(np.arange(100)[:, None] < 30, 50.0, 10.0) * np.ones((1, 2))
    source = ["measured"] * 30 + ["predicted"] * 70
    assert StaticGuard.fit_table(table_of(latency, source), 0.5).bounds_ms.tolist() == [50.0, 50.0]
    assert StaticGuard.fit_table(table_of(latency, []), 0.5).bounds_ms.tolist() == [10.0, 10.0]
    assert StaticGuard.fit_table(table_of(latency[20:], source[20:]), 0.5).bounds_ms.tolist() == [10.0, 10.0]


def test_quantile_outside_the_unit_interval_is_an_error() -> None:
    with pytest.raises(ConfigError, match="quantile=95"):
        StaticGuard.fit(np.ones((2, 2)), quantile=95)
