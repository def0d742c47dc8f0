"""Which settings a sweep measures."""

from collections import Counter

import numpy as np
import pytest

from budgetvlm.errors import ConfigError, KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.measure.setting_sampling import STRATEGIES, choose_settings, parse_settings

SPACE = KnobSpace({"max_crops": [1, 2, 4, 12], "top_k": [2, 4, 8], "num_active_blocks": [2, 4, 6, 8]})


def numbers(settings):
    return [SPACE.index(s) for s in settings]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_strategy_gives_distinct_settings_in_order_with_both_ends(strategy, seed):
    wanted = len(SPACE) if strategy == "full" else 12
    chosen = choose_settings(SPACE, strategy, wanted, seed)
    assert len(chosen) == wanted
    assert numbers(chosen) == sorted(set(numbers(chosen)))
    assert chosen[0] == SPACE.cheapest and chosen[-1] == SPACE.full
    assert chosen == choose_settings(SPACE, strategy, wanted, seed)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "full"])
def test_any_number_of_settings_can_be_had(strategy):
    for wanted in (2, 3, 5, len(SPACE) - 1, len(SPACE)):
        assert len(choose_settings(SPACE, strategy, wanted)) == wanted


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "full"])
def test_another_seed_draws_other_settings(strategy):
    assert len({choose_settings(SPACE, strategy, 12, seed) for seed in range(5)}) > 1


def test_full_is_all():
    assert choose_settings(SPACE) == SPACE.settings


def test_a_third_by_default():
    assert len(choose_settings(SPACE, "lhs")) == 16
    assert len(choose_settings(KnobSpace({"a": [1, 2, 3]}), "lhs")) == 3


def test_balanced_takes_each_value_equally_often():
    """12 settings: each of 4 values of a knob 3 times, each of 3 values 4 times, give or take one."""
    for seed in range(5):
        chosen = choose_settings(SPACE, "balanced", 12, seed)
        for name in SPACE.names:
            counts = Counter(s[name] for s in chosen)
            assert set(counts) == set(SPACE.values(name))
            assert max(counts.values()) - min(counts.values()) <= 2


def test_stratified_has_no_gap_in_complexity():
    order = np.argsort(SPACE.complexity, kind="stable").tolist()
    for seed in range(5):
        ranks = sorted(order.index(i) for i in numbers(choose_settings(SPACE, "stratified", 12, seed)))
        stratum = (len(SPACE) - 2) / 10
        assert max(np.diff(ranks)) <= 2 * stratum


def test_boundary_begins_with_the_corners():
    corners = [s for s in SPACE.settings if all(s[n] in (SPACE.values(n)[0], SPACE.values(n)[-1]) for n in SPACE.names)]
    assert list(choose_settings(SPACE, "boundary", 8)) == corners
    assert set(corners) < set(choose_settings(SPACE, "boundary", 9))


def test_lhs_spreads_over_each_knob():
    for seed in range(5):
        chosen = choose_settings(SPACE, "lhs", 12, seed)
        for name in SPACE.names:
            assert set(Counter(s[name] for s in chosen)) == set(SPACE.values(name))


def test_an_explicit_list_is_taken_and_gets_both_ends():
    listed = parse_settings(SPACE, "4,4,6; 1,2,8;")
    assert [tuple(s.values()) for s in listed] == [(1, 2, 2), (1, 2, 8), (4, 4, 6), (12, 8, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("4,4", "is no setting"), ("4,5,6", "top_k=5.0 is outside"), ("a,4,6", "'a' .* is not a number")],
)
def test_an_explicit_list_that_is_none(text, message):
    with pytest.raises(KnobSpaceError, match=message):
        parse_settings(SPACE, text)


@pytest.mark.parametrize(
    ("strategy", "wanted", "message"),
    [
        ("latin", None, "choose from full, balanced"),
        ("lhs", 1, "choose 2 to 48"),
        ("lhs", 49, "choose 2 to 48"),
        ("full", 5, "leave num_settings out"),
    ],
)
def test_what_cannot_be_drawn(strategy, wanted, message):
    with pytest.raises(ConfigError, match=message):
        choose_settings(SPACE, strategy, wanted)


def test_a_space_of_one_setting():
    assert choose_settings(KnobSpace({"a": [1]}), "lhs") == KnobSpace({"a": [1]}).settings
