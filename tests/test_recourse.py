"""What a setting may fall back on once its image is encoded."""

import numpy as np

from budgetvlm.knobs import KnobSpace
from budgetvlm.recourse import SameImage

SPACE = KnobSpace({"top_k": [1, 2], "max_crops": [1, 4], "num_active_blocks": [2, 8]})


def test_settings_that_share_an_image_differ_in_other_knobs_alone():
    same = SameImage(SPACE)
    for k, setting in enumerate(SPACE.settings):
        expected = [other["max_crops"] == setting["max_crops"] for other in SPACE.settings]
        np.testing.assert_array_equal(same.of(k), expected)


def test_a_space_without_the_knob_has_one_image_and_one_with_nothing_else_has_no_recourse():
    bounds, aimed = np.array([3.0, 5.0]), np.array([2.0, 4.0])
    assert SameImage(KnobSpace({"top_k": [1, 2]})).reachable(bounds, aimed).tolist() == [3.0, 4.0]
    assert SameImage(KnobSpace({"max_crops": [1, 4]})).reachable(bounds, aimed).tolist() == [3.0, 5.0]


def test_many_requests_at_once_are_as_one_by_one():
    same, rng = SameImage(SPACE), np.random.default_rng(0)
    bounds, aimed = rng.uniform(size=(2, 3, 2, len(SPACE)))
    alone = [[same.reachable(*row) for row in zip(*rows, strict=True)] for rows in zip(bounds, aimed, strict=True)]
    np.testing.assert_array_equal(same.reachable(bounds, aimed), alone)


def test_what_can_be_reached():
    """The dear one is aimed at above the cheap one's bound; where nothing is cheaper its own bound counts."""
    same = SameImage(KnobSpace({"max_crops": [1, 4], "top_k": [1, 2]}))
    bounds, aimed = np.array([10.0, 30.0, 40.0, 50.0]), np.array([8.0, 20.0, 30.0, 35.0])
    assert same.reachable(bounds, aimed).tolist() == [10.0, 20.0, 40.0, 40.0]
