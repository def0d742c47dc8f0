"""The one place where knob values exist: numbering, look-up, and no nearest match."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetvlm.errors import KnobSpaceError
from budgetvlm.knobs import KnobSpace, Setting

SPACE = KnobSpace({"max_crops": [1, 4, 12], "top_k": [2, 8]})


def test_the_last_knob_varies_fastest():
    assert [tuple(setting.values()) for setting in SPACE.settings] == [(1, 2), (1, 8), (4, 2), (4, 8), (12, 2), (12, 8)]
    assert SPACE.value_indices.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert (SPACE.num_settings, len(SPACE), SPACE.sizes) == (6, 6, (3, 2))


def test_ends_of_the_space():
    assert str(SPACE.cheapest) == "max_crops=1, top_k=2"
    assert str(SPACE.full) == "max_crops=12, top_k=8"


def test_complexity_is_the_mean_share_of_the_largest_value():
    by_hand = [(1 / 12 + 1 / 4) / 2, (1 / 12 + 1) / 2, (1 / 3 + 1 / 4) / 2, (1 / 3 + 1) / 2, (1 + 1 / 4) / 2, 1]
    np.testing.assert_allclose(SPACE.complexity, by_hand)


values = st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True).map(sorted)
spaces = st.dictionaries(st.sampled_from(["a", "b", "c"]), values, min_size=1).map(KnobSpace)


@given(spaces)
def test_every_setting_is_found_under_its_number_and_survives_the_document(space):
    again = KnobSpace(space.to_dict())
    assert again == space
    assert [again.index(setting) for setting in space.settings] == list(range(len(space)))
    assert len(set(space.settings)) == len(space) == math.prod(space.sizes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_crops": 5, "top_k": 2}, "max_crops=5 is outside the knob space; allowed: 1, 4, 12"),
        ({"max_crops": True, "top_k": 2}, "max_crops=True is outside the knob space; allowed: 1, 4, 12"),
        ({"max_crops": 1}, "exactly the knobs max_crops, top_k; given: max_crops"),
        ({"max_crops": 1, "top_k": 2, "beams": 1}, "exactly the knobs"),
        ({}, "given: none"),
    ],
)
def test_a_setting_outside_the_space_is_an_error_and_never_the_nearest(setting, message):
    with pytest.raises(KnobSpaceError, match=message):
        SPACE.index(setting)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "no knobs"),
        ({"a": []}, "a has no values"),
        ({"a": [1, 1]}, "a is not strictly increasing"),
        ({"a": [2, 1]}, "a is not strictly increasing"),
        ({"a": [0, 1]}, "a has values that are not positive numbers"),
        ({"a": [True, 2]}, "not positive numbers"),
        ({"a": [1, math.inf]}, "not positive numbers"),
        ({"a": ["1"]}, "not positive numbers"),
    ],
)
def test_what_is_no_knob_space(knobs, message):
    with pytest.raises(KnobSpaceError, match=message):
        KnobSpace(knobs)


def test_all_problems_are_named_at_once():
    with pytest.raises(KnobSpaceError, match=r"a has no values; b is not strictly increasing"):
        KnobSpace({"a": [], "b": [2, 1]})


def test_spaces_differ_also_in_the_order_of_their_knobs():
    SPACE.require_equal(KnobSpace({"max_crops": [1, 4, 12], "top_k": [2, 8]}), "the table")
    with pytest.raises(KnobSpaceError, match="the table has another knob space"):
        SPACE.require_equal(KnobSpace({"top_k": [2, 8], "max_crops": [1, 4, 12]}), "the table")


def test_settings_of_another_space_are_found_by_their_values():
    copied, other = copy.deepcopy(SPACE), KnobSpace({"max_crops": [1, 12], "top_k": [8]})
    for number, setting in enumerate(SPACE.settings):
        assert copied.index(setting) == SPACE.index(copied.settings[number]) == SPACE.index(setting) == number
    assert [SPACE.index(setting) for setting in other.settings] == [1, 5]


def test_a_setting_is_a_mapping():
    setting = SPACE.setting(top_k=8, max_crops=4)
    assert dict(setting) == {"max_crops": 4, "top_k": 8}
    assert setting.get("top_k") == 8 and setting.get("beams") is None and setting.get("beams", 3) == 3
    assert setting == Setting((("max_crops", 4), ("top_k", 8)))
    with pytest.raises(KeyError):
        setting["beams"]
    with pytest.raises(KnobSpaceError, match="no knob 'beams'"):
        SPACE.values("beams")
