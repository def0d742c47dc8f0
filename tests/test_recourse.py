"""What a setting may fall back on once its image is encoded."""

import numpy as np
import pytest

from budgetvlm.guard.recourse import Hurry, SameImage
from budgetvlm.guard.specification import reachable, upper_bound
from budgetvlm.knobs import KnobSpace

SPACE = KnobSpace({"top_k": [1, 2], "max_crops": [1, 4], "num_active_blocks": [2, 8]})


def test_settings_that_share_an_image_differ_in_other_knobs_alone():
    same = SameImage(SPACE)
    for k, setting in enumerate(SPACE.settings):
        expected = [other["max_crops"] == setting["max_crops"] for other in SPACE.settings]
        np.testing.assert_array_equal(same.of(k), expected)


def test_a_space_without_the_knob_has_one_image_and_one_with_nothing_else_has_no_recourse():
    bounds, aimed = np.array([3.0, 5.0]), np.array([2.0, 4.0])
    assert reachable(bounds, aimed, SameImage(KnobSpace({"top_k": [1, 2]})).members).tolist() == [3.0, 4.0]
    assert reachable(bounds, aimed, SameImage(KnobSpace({"max_crops": [1, 4]})).members).tolist() == [3.0, 5.0]


def test_many_requests_at_once_are_as_one_by_one():
    same, rng = SameImage(SPACE).members, np.random.default_rng(0)
    bounds, aimed = rng.uniform(size=(2, 3, 2, len(SPACE)))
    alone = [[reachable(*row, same) for row in zip(*rows, strict=True)] for rows in zip(bounds, aimed, strict=True)]
    np.testing.assert_array_equal(reachable(bounds, aimed, same), alone)


def test_what_can_be_reached():
    """The dear one is aimed at above the cheap one's bound; where nothing is cheaper its own bound counts."""
    same = SameImage(KnobSpace({"max_crops": [1, 4], "top_k": [1, 2]})).members
    bounds, aimed = np.array([10.0, 30.0, 40.0, 50.0]), np.array([8.0, 20.0, 30.0, 35.0])
    assert reachable(bounds, aimed, same).tolist() == [10.0, 20.0, 40.0, 40.0]


def test_an_answer_is_hurried_by_one_knob_after_the_other_and_never_shown_another_image():
    steps = Hurry(SPACE).steps
    by_name = {
        tuple(s.values()): [tuple(SPACE.settings[k].values()) for k in steps[i]] for i, s in enumerate(SPACE.settings)
    }
    assert by_name[2, 4, 8] == [(1, 4, 8), (1, 4, 2)]
    assert by_name[1, 4, 8] == [(1, 4, 2)] and by_name[2, 4, 2] == [(1, 4, 2)]
    assert by_name[1, 1, 2] == [] and Hurry(SPACE).fastest[SPACE.index(SPACE.cheapest)] == 0
    only_images = Hurry(KnobSpace({"max_crops": [1, 4]}))
    assert only_images.steps == ((), ()) and only_images.fastest.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("factor", "longer", "expected"),
    [(0.5, 0.0, 7.5), (1.0, 0.0, 15.0), (1.44, 0.0, 18.0), (1.44, 5.0, 14.4), (1.44, 2.0, 15.6), (4.0, 5.0, 40.0)],
)
def test_the_bound_of_an_answer_that_may_be_hurried(factor, longer, expected):
    """10 of 15 ms are left in a hurry; half of the log factor is kept for an answer of the expected length without."""
    assert upper_bound(factor, 15.0, 5.0, longer) == pytest.approx(expected)
    assert upper_bound(factor, np.array([15.0, 15.0]), 0.0, longer) == pytest.approx(np.full(2, factor * 15.0))
