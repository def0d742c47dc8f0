"""Policies on tables worked out by hand: which setting, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import Cheapest, Full, GroupLookup, LookupTable, Oracle, RandomFeasible, States
from budgetvlm.policies.predictor import PredictorConfig, fit_predictor
from budgetvlm.policies.setting_means import SettingMeans, argmax_cheapest
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"tiles": [1, 4], "depth": [2, 8]})
LATENCY = [10.0, 20.0, 25.0, 40.0]


def two_kinds(samples: int = 40) -> ProfileTable:
    """Kind "a" is right with many tiles (settings 2 and 3), kind "b" with all the depth (1 and 3)."""
    accuracy = np.tile(np.array([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=np.float32), (samples // 2, 1))
    return ProfileTable.from_arrays(
        SPACE,
        range(samples),
        accuracy,
        np.tile(np.array(LATENCY), (samples, 1)),
        groups={"kind": ("a", "b") * (samples // 2)},
    )


def features_of(table: ProfileTable) -> Features:
    """One image feature tells the kinds apart; the rest is noise."""
    kind = np.array([[1.0 if name == "a" else -1.0] for name in table.groups["kind"]])
    noise = np.random.default_rng(0).normal(size=(table.num_samples, 3))
    return Features(table.sample_ids, 100 + 5 * kind, noise)


def states(table: ProfileTable, budget: float, price: float = 0.0, features: Features | None = None) -> States:
    return States.under_budget(table, features, StaticGuard.fit(table.latency_ms), budget, price)


def test_expected_averages_leave_out_what_was_not_measured() -> None:
    accuracy = [[0, 1, 1, 1], [1, np.nan, 1, np.nan]]
    latency = [[10, 20, np.nan, 40], [30, 20, np.nan, 60]]
    expected = SettingMeans.fit(ProfileTable.from_arrays(SPACE, ["x", "y"], accuracy, latency))
    assert expected.accuracy.tolist() == [0.5, 1, 1, 1]
    assert expected.latency_ms[[0, 1, 3]].tolist() == [20, 20, 50] and expected.reference_ms == 50
    assert expected.measured.tolist() == [True, True, False, True]


def test_without_the_full_setting_there_is_no_reference() -> None:
    table = two_kinds()
    latency = table.latency_ms.copy()
    latency[:, :] = np.nan
    with pytest.raises(DataError, match="no latency was measured"):
        SettingMeans.fit(replace(table, latency_ms=latency))


def test_ties_go_to_the_cheapest_and_unknown_scores_are_never_chosen() -> None:
    feasible = np.ones((3, 3), dtype=bool)
    feasible[2, 1] = False
    score = np.array([[0.5, 0.5, 0.5], [np.nan, 0.1, 0.2], [0.1, 0.9, 0.2]])
    assert argmax_cheapest(score, feasible, np.array([30.0, 10.0, 20.0])).tolist() == [1, 2, 2]


def test_full_and_cheapest_ignore_the_budget() -> None:
    table = two_kinds()
    assert set(Full(SettingMeans.fit(table)).choose(states(table, 1.0))) == {3}
    assert set(Cheapest(SettingMeans.fit(table)).choose(states(table, 1000.0))) == {0}


@pytest.mark.parametrize(("budget", "chosen"), [(5.0, 0), (15.0, 0), (20.0, 1), (39.0, 1), (40.0, 3)])
def test_lookup_takes_the_best_setting_that_fits(budget: float, chosen: int) -> None:
    table = two_kinds()
    # Settings 1 and 2 are equally accurate, so that the cheaper one wins.
    assert set(LookupTable(SettingMeans.fit(table)).choose(states(table, budget))) == {chosen}


@pytest.mark.parametrize(("price", "chosen"), [(0.99, 3), (1.01, 1), (1.99, 1), (2.01, 0)])
def test_price_is_accuracy_for_one_reference_latency(price: float, chosen: int) -> None:
    # From setting 1 to 3: half a point for half the reference; from 0 to 1: half a point for a quarter of it.
    table = two_kinds()
    assert set(LookupTable(SettingMeans.fit(table)).choose(states(table, 1000.0, price))) == {chosen}


def test_random_draws_feasible_settings_alike() -> None:
    request = states(two_kinds(3000), 25.0)
    chosen = RandomFeasible(seed=1).choose(request)
    assert np.array_equal(chosen, RandomFeasible(seed=1).choose(request))
    share = np.bincount(chosen, minlength=4) / 3000
    assert share[3] == 0 and np.all(np.abs(share[:3] - 1 / 3) < 0.04)


def test_group_lookup_knows_the_kind_and_falls_back_on_the_lookup_table() -> None:
    train, test = two_kinds(), two_kinds(4)
    group = GroupLookup.fit(train, ("kind",))
    unknown = replace(test, groups={"kind": ("a", "b", "c", "c")})
    assert group.choose(states(unknown, 30.0)).tolist() == [2, 1, 1, 1]


def test_group_means_are_drawn_towards_the_overall_means() -> None:
    group = GroupLookup.fit(two_kinds(8), ("kind",), pseudo_samples=4)
    # Four samples of kind a with mean 1 at setting 2, four pseudo-samples of the overall mean .5.
    assert group.accuracy[0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_group_lookup_names_the_label_that_is_missing() -> None:
    with pytest.raises(DataError, match="no label difficulty; it has kind"):
        GroupLookup.fit(two_kinds(), ("kind", "difficulty"))


def test_oracle_takes_the_cheapest_right_setting_that_fits() -> None:
    table = two_kinds(4)
    oracle = Oracle(SettingMeans.fit(table))
    assert oracle.choose(states(table, 1000.0)).tolist() == [2, 1, 2, 1]
    assert oracle.choose(states(table, 20.0)).tolist() == [0, 1, 0, 1]


def test_predictor_learns_what_the_features_tell() -> None:
    train, test = two_kinds(200), two_kinds(40)
    config = PredictorConfig(hidden_dim=32, num_epochs=25, batch_size=50, lr=1e-2)
    policy = fit_predictor(train, features_of(train), test, features_of(test), config)
    assert policy.choose(states(test, 30.0, features=features_of(test))).tolist() == [2, 1] * 20
    predicted = policy.predict(features_of(test).image, features_of(test).language)
    assert np.abs(predicted - test.accuracy).mean() < 0.1


def test_predictor_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    table = two_kinds(40)
    config = PredictorConfig(hidden_dim=8, num_epochs=2)
    before = torch.get_rng_state()
    fits = [fit_predictor(table, features_of(table), table, features_of(table), config) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    one, two = (fit.predict(features_of(table).image, features_of(table).language) for fit in fits)
    assert np.array_equal(one, two)


def test_predictor_learns_from_measured_cells_only() -> None:
    table = two_kinds(200)
    accuracy = table.accuracy.copy()
    accuracy[::4, :] = np.nan
    holes = replace(table, accuracy=accuracy)
    config = PredictorConfig(hidden_dim=32, num_epochs=25, batch_size=50, lr=1e-2)
    policy = fit_predictor(holes, features_of(table), table, features_of(table), config)
    assert policy.choose(states(table, 30.0, features=features_of(table))).tolist() == [2, 1] * 100


def test_controller_chooses_its_likeliest_feasible_setting() -> None:
    table = two_kinds(4)
    controller = GRPOController(1, 3, knob_values=SPACE.to_dict(), latency_reference_ms=40.0, hidden_dim=8)
    with torch.no_grad():
        controller.heads.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]))  # likes tiles 4, depth 8
    policy = ControllerPolicy(controller)
    assert policy.choose(states(table, 1000.0, features=features_of(table))).tolist() == [3] * 4
    assert policy.choose(states(table, 30.0, features=features_of(table))).tolist() == [1] * 4


def test_policies_that_need_features_say_so() -> None:
    table = two_kinds(4)
    controller = GRPOController(1, 3, knob_values=SPACE.to_dict())
    with pytest.raises(DataError, match="none were given"):
        ControllerPolicy(controller).choose(states(table, 30.0))


def test_states_may_be_a_part_of_the_table_in_any_order() -> None:
    table = two_kinds(4)
    whole = states(table, 30.0, features=features_of(table))
    rows = np.array([3, 0])
    part = replace(
        whole,
        sample_index=rows,
        budget_ms=whole.budget_ms[rows],
        feasible=whole.feasible[rows],
        price=whole.price[rows],
    )
    assert Oracle(SettingMeans.fit(table)).choose(part).tolist() == [1, 2]
    assert part.image[:, 0].tolist() == [95.0, 105.0]


def test_requests_joined_and_taken_apart_are_the_same() -> None:
    table = two_kinds(4)
    one, two = states(table, 30.0), states(table, 1000.0, 0.5)
    both = States.joined([one, two])
    again = both.rows(slice(4, 8))
    assert both.budget_ms.tolist() == [30.0] * 4 + [1000.0] * 4 and both.table is table
    assert np.array_equal(again.feasible, two.feasible) and again.price.tolist() == [0.5] * 4
