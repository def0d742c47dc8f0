"""Rivals and neighbours: they find what the features tell, and say how to install what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_policies import SPACE, features_of, states, two_kinds

from benchmarks.rivals.bandit import ContextualBandit, _examples
from benchmarks.rivals.simple import BestStatic, Greedy
from benchmarks.rivals.supervised import boosted_trees, logistic
from budgetvlm import _extras as extras
from budgetvlm.errors import KnobSpaceError, MissingExtraError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import LookupTable, Restricted, free_settings
from budgetvlm.policies.argmax_policy import FeatureScaler
from budgetvlm.policies.nearest import fit_nearest, nearest
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

METHODS = [fit_nearest, logistic, boosted_trees]


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request):
    return request.param


def fitted(method, table: ProfileTable):
    features = features_of(table)
    return method(table, features, table, features)


def test_they_learn_what_the_features_tell(method) -> None:
    table, test = two_kinds(400), two_kinds(40)
    request = states(test, 30.0, features=features_of(test))
    assert fitted(method, table).choose(request).tolist() == [2, 1] * 20


def test_cells_that_were_not_measured_are_left_out(method) -> None:
    table, test = two_kinds(400), two_kinds(40)
    accuracy = table.accuracy.copy()
    accuracy[::3, 1] = np.nan
    policy = fitted(method, replace(table, accuracy=accuracy))
    assert policy.choose(states(test, 30.0, features=features_of(test))).tolist() == [2, 1] * 20


def test_constant_accuracy_and_a_setting_without_any_leave_the_cheapest_choice(method) -> None:
    table = two_kinds(40)
    accuracy = np.full_like(table.accuracy, 0.5)
    accuracy[:, 1] = np.nan
    policy = fitted(method, replace(table, accuracy=accuracy))
    assert set(policy.choose(states(table, 30.0, price=0.01, features=features_of(table)))) == {0}


def test_three_samples_are_enough_for_an_answer(method) -> None:
    table = two_kinds(4).subset([0, 1, 2])
    chosen = fitted(method, table).choose(states(table, 1000.0, features=features_of(table)))
    assert chosen.shape == (3,)


def test_the_nearest_come_first_also_in_blocks(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x, examples = rng.normal(size=(50, 4)), rng.normal(size=(30, 4))
    distances = np.linalg.norm(x[:, None] - examples[None], axis=2)
    assert np.array_equal(nearest(x, examples, 7), distances.argsort(axis=1)[:, :7])
    monkeypatch.setattr("budgetvlm.policies.nearest.BLOCK_DISTANCES", 100)
    assert np.array_equal(nearest(x, examples, 30), distances.argsort(axis=1))


def test_each_distinct_sample_is_predicted_once() -> None:
    table = two_kinds(4)
    request = states(table, 30.0, features=features_of(table))
    twice = replace(
        request, sample_index=np.array([1, 0, 1]), budget_ms=np.full(3, 30.0), feasible=request.feasible[:3],
        price=np.zeros(3),
    )  # fmt: skip
    seen = []

    def predict(image: np.ndarray, language: np.ndarray) -> np.ndarray:
        seen.append(len(image))
        return image

    assert twice.by_sample(predict)[:, 0].tolist() == [95.0, 105.0, 95.0]
    assert seen == [2]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda module: False)
    table = two_kinds(10)
    with pytest.raises(MissingExtraError, match=r"pip install vowpalwabbit"):
        ContextualBandit.fit(table, features_of(table))


def test_the_bandit_learns_from_one_answer_a_sample() -> None:
    pytest.importorskip("vowpalwabbit")
    table, test = two_kinds(400), two_kinds(40)
    policy = ContextualBandit.fit(table, features_of(table), seed=0)
    chosen = policy.choose(states(test, 30.0, features=features_of(test)))
    assert (chosen == np.array([2, 1] * 20)).mean() > 0.9


def test_the_bandit_never_tries_what_was_not_measured() -> None:
    table = two_kinds(10)
    accuracy = table.accuracy.copy()
    accuracy[:, 2] = np.nan
    lines = list(_examples(replace(table, accuracy=accuracy), ["shared |c b:1"] * 10, np.array([0, 1, 3]), 0))
    assert len(lines) == 40
    assert all("s2" not in line for example in lines for line in example)
    assert all(sum(":0.333333 " in line for line in example) == 1 for example in lines)


def test_best_static_counts_late_answers_as_wrong() -> None:
    table = two_kinds()
    expected, guard = SettingMeans.fit(table), StaticGuard.fit(table.latency_ms)
    # The full setting is right twice as often as setting 1, and fits one of three budgets.
    assert BestStatic.fit(expected, guard, np.array([21.0, 22.0, 41.0])).setting == 1
    assert BestStatic.fit(expected, guard, np.array([41.0, 42.0, 21.0])).setting == 3
    assert BestStatic.fit(expected, guard, np.array([1.0])).setting == 0


@pytest.mark.parametrize(("budget", "chosen"), [(10.0, 0), (20.0, 1), (25.0, 2), (39.0, 2), (40.0, 3), (5.0, 0)])
def test_greedy_raises_the_first_knob_first(budget: float, chosen: int) -> None:
    table = two_kinds(2)
    greedy = Greedy.of(SPACE, SettingMeans.fit(table), order=("tiles", "depth"))
    assert greedy.choose(states(table, budget)).tolist() == [chosen] * 2


def test_greedy_takes_depth_before_width_and_knows_foreign_knobs() -> None:
    from budgetvlm.knobs import KnobSpace

    space = KnobSpace({"top_k": [1, 2], "extra": [1, 2], "num_active_blocks": [1, 2], "max_crops": [1, 2]})
    greedy = Greedy(space, (), np.ones(16)).of(space, SettingMeans(np.ones(16), np.ones(16), 1.0))
    assert greedy.order == ("max_crops", "num_active_blocks", "top_k", "extra")


def test_a_restricted_policy_moves_its_knobs_only() -> None:
    table = two_kinds()
    free = free_settings(SPACE, ("tiles",))
    assert free.tolist() == [False, True, False, True]  # depth stays at 8
    policy = Restricted(LookupTable(SettingMeans.fit(table)), free, np.array([10.0, 20.0, 25.0, 40.0]))
    assert set(policy.choose(states(table, 1000.0))) == {3}
    assert set(policy.choose(states(table, 30.0))) == {1}
    assert set(policy.choose(states(table, 15.0))) == {0}  # nothing of its own fits: the cheapest that is allowed


def test_a_restricted_policy_of_an_unknown_knob_is_refused() -> None:
    with pytest.raises(KnobSpaceError, match="no knob colour"):
        free_settings(SPACE, ("colour",))


def test_features_that_never_vary_do_not_blow_up() -> None:
    features = Features(("a", "b"), np.ones((2, 3)), np.array([[1.0], [3.0]]))
    assert FeatureScaler.fit(features).of(features).tolist() == [[0, 0, 0, -1], [0, 0, 0, 1]]
