"""Hulls and latency at equal accuracy, on points worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from budgetvlm.evaluation.frontier import accuracy_at, latency_at, mixing_path, upper_hull


def test_hull_drops_points_below_the_line_and_beyond_the_best() -> None:
    latency = np.array([40.0, 10.0, 20.0, 30.0, 50.0])
    accuracy = np.array([1.0, 0.0, 0.5, 0.6, 0.9])
    # 30 ms lies under the line from (20, .5) to (40, 1); 50 ms is dearer and worse than 40 ms.
    assert upper_hull(latency, accuracy).tolist() == [1, 2, 0]


def test_hull_leaves_out_unknown_points_and_worse_twins() -> None:
    latency = np.array([10.0, 10.0, np.nan, 20.0])
    accuracy = np.array([0.2, 0.4, 1.0, 0.8])
    assert upper_hull(latency, accuracy).tolist() == [1, 3]


def test_latency_at_equal_accuracy_is_interpolated() -> None:
    latency, accuracy = np.array([10.0, 20.0, 40.0]), np.array([0.0, 0.5, 1.0])
    assert latency_at(latency, accuracy, 0.98) == pytest.approx(39.2)
    assert latency_at(latency, accuracy, 0.25) == pytest.approx(15.0)
    assert latency_at(latency, accuracy, 0.0) == pytest.approx(10.0)
    assert np.isnan(latency_at(latency, accuracy, 1.01))


def test_latency_at_takes_the_first_crossing_of_a_path_that_falls_again() -> None:
    latency, accuracy = np.array([10.0, 20.0, 30.0, 40.0]), np.array([0.0, 0.8, 0.4, 0.9])
    assert latency_at(latency, accuracy, 0.6) == pytest.approx(17.5)


def test_latency_at_works_on_many_resamples_at_once() -> None:
    latency = np.array([[10.0, 20.0], [10.0, 30.0]])
    accuracy = np.array([[0.0, 1.0], [0.0, 0.4]])
    least = latency_at(latency, accuracy, np.array([0.5, 0.5]))
    assert least[0] == pytest.approx(15.0) and np.isnan(least[1])


def test_a_dearer_point_that_is_nearly_as_good_ends_the_path() -> None:
    latency = np.array([10.0, 20.0, 30.0, 40.0])
    assert mixing_path(latency, np.array([0.2, 0.9, 0.897, 0.896])).tolist() == [0, 1, 3]
    assert mixing_path(latency, np.array([0.2, 0.9, 0.5, 0.7])).tolist() == [0, 1]


def test_accuracy_at_a_mean_latency_is_interpolated_along_the_path() -> None:
    latency, accuracy = np.array([10.0, 20.0, 30.0, 40.0]), np.array([0.0, 0.8, 0.4, 0.9])
    assert accuracy_at(latency, accuracy, 15.0) == pytest.approx(0.4)
    assert accuracy_at(latency, accuracy, 25.0) == pytest.approx(0.6)  # on the line, though 20 ms gives 0.8
    assert accuracy_at(latency, accuracy, 39.0) == pytest.approx(0.85)
    assert accuracy_at(latency, accuracy, 99.0) == pytest.approx(0.9)
    assert np.isnan(accuracy_at(latency, accuracy, 9.9))
    several = accuracy_at(np.array([latency, latency + 30]), np.array([accuracy, accuracy]), np.array([10.0, 10.0]))
    assert several[0] == 0.0 and np.isnan(several[1])
