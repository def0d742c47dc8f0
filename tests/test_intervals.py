"""Bootstrap over images and other groups."""

from __future__ import annotations

import numpy as np
import pytest

from budgetvlm.errors import DataError
from budgetvlm.evaluation.intervals import Bootstrap, ratio


def test_samples_of_one_image_are_drawn_together() -> None:
    values = np.array([0.0, 0.0, 3.0])
    bootstrap = Bootstrap(unit=np.array([0, 0, 1]), weights=np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
    assert bootstrap.means(values).tolist() == [0.0, 1.0, 3.0]
    assert bootstrap.means(np.stack([values, 2 * values], axis=1))[1].tolist() == [1.0, 2.0]


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    bootstrap = Bootstrap.draw([str(i) for i in range(2000)], resamples=1000, seed=1)
    low, high = bootstrap.interval(bootstrap.means(values))
    assert low < values.mean() < high
    assert abs((high - low) / (2 * 1.96 / np.sqrt(2000)) - 1) < 0.12


def test_equal_samples_of_an_image_count_once() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=500), 4)
    images = [str(i) for i in np.repeat(np.arange(500), 4)]
    by_image = Bootstrap.draw(images, seed=1)
    by_sample = Bootstrap.draw([str(i) for i in range(2000)], seed=1)
    wide = np.ptp(by_image.interval(by_image.means(values)))
    narrow = np.ptp(by_sample.interval(by_sample.means(values)))
    assert 1.7 < wide / narrow < 2.3


def test_undefined_resamples_are_left_out() -> None:
    bootstrap = Bootstrap(np.array([0]), np.ones((3, 1)))
    resampled = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = bootstrap.interval(resampled)
    assert 1.0 <= low[0] < high[0] <= 3.0 and np.isnan(low[1]) and np.isnan(high[1])


def test_a_ratio_is_paired_by_resample_and_unknown_where_nothing_is_divided_by() -> None:
    found = ratio(np.array([3.0, 2.0, 4.0]), np.array([6.0, 8.0, 0.0]))
    assert found[:2].tolist() == [0.5, 0.25] and np.isnan(found[2])


def test_an_estimate_is_the_number_with_its_interval() -> None:
    bootstrap = Bootstrap(unit=np.array([0, 0, 1]), weights=np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), level=0.5)
    both = bootstrap.mean(np.array([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]]))
    estimate = bootstrap.estimate(both[:, 0])
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 0.5, 2.0)  # resampled means 0, 1 and 3
    assert both.mean(axis=1).tolist() == [1.0, 0.5, 1.0, 2.0]


def test_a_single_group_is_refused_and_groups_of_one_are_samples() -> None:
    with pytest.raises(DataError, match="all 4 evaluated samples belong to one group"):
        Bootstrap.draw(["a"] * 4)
    alone = Bootstrap.draw(list("abcd"), resamples=5)
    assert alone.num_units == 4 and (alone.weights.sum(axis=1) == 4).all()
