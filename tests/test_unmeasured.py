"""Cells that were not measured: what is expected of them, and that no evaluation sees it."""

from dataclasses import replace

import numpy as np
import pytest

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.unmeasured import expected_cells, second_order, with_predictions
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"max_crops": [1, 2, 4], "num_active_blocks": [2, 4, 8]})
S, K = 300, len(SPACE)


def planted(seed=0):
    """Harder samples need dearer settings; a feature tells a part of how hard one is. A fifth is the test split."""
    rng = np.random.default_rng(seed)
    seen, hidden = rng.normal(size=(2, S))
    power = SPACE.complexity[None, :] * 4 - 2
    accuracy = (power > 0.7 * seen[:, None] + 0.7 * hidden[:, None] + 0.2 * rng.normal(size=(S, K))).astype(np.float32)
    latency = 100 * SPACE.complexity[None, :] * rng.lognormal(0, 0.05, (S, 1)) * rng.lognormal(0, 0.01, (S, K))
    split = np.array(["train", "train", "train", "validation", "test"] * (S // 5))
    ids = [str(i) for i in range(S)]
    table = ProfileTable.from_arrays(SPACE, ids, accuracy, latency, split=split.tolist())
    return table, Features(tuple(ids), seen[:, None].astype(np.float32), rng.normal(size=(S, 3)).astype(np.float32))


def thinned(table, share=0.3, seed=1):
    """The table with a share of the cells of training and validation samples."""
    known = np.random.default_rng(seed).random((S, K)) < share
    known[np.array(table.split) == "test"] = True
    return replace(
        table,
        accuracy=np.where(known, table.accuracy, np.nan).astype(np.float32),
        latency_ms=np.where(known, table.latency_ms, np.nan).astype(np.float32),
    ), known


def test_what_was_measured_stays_and_the_rest_is_predicted_well():
    whole, features = planted()
    table, known = thinned(whole)
    said = []
    filled = with_predictions(table, features, said.append)
    np.testing.assert_array_equal(filled.accuracy[known], whole.accuracy[known])
    np.testing.assert_array_equal(filled.latency_ms[known], whole.latency_ms[known])
    assert np.isfinite(filled.accuracy).all() and ((filled.accuracy >= 0) & (filled.accuracy <= 1)).all()
    error = (filled.accuracy - whole.accuracy)[~known]
    blind = (np.nanmean(table.accuracy, axis=0) - whole.accuracy)[~known]
    assert (error**2).mean() < 0.65 * (blind**2).mean()
    assert np.abs(np.log(filled.latency_ms / whole.latency_ms)[~known]).mean() < 0.03
    np.testing.assert_allclose(filled.accuracy.mean(axis=0), whole.accuracy.mean(axis=0), atol=0.08)
    (line,) = said
    fitted = np.array(table.split) != "test"
    assert f"{known[fitted].sum():,} of {fitted.sum() * K:,} cells" in line and "held-out" in line


def test_features_help():
    whole, features = planted()
    table, known = thinned(whole, share=0.15)
    with_them, without = (with_predictions(table, given).accuracy - whole.accuracy for given in (features, None))
    assert (with_them[~known] ** 2).mean() < 0.9 * (without[~known] ** 2).mean()


def test_predictions_are_calibrated():
    whole, features = planted()
    table, known = thinned(whole)
    predicted = with_predictions(table, features).accuracy[~known]
    right = whole.accuracy[~known]
    for low in (0.1, 0.3, 0.5, 0.7):
        some = (predicted >= low) & (predicted < low + 0.2)
        assert right[some].mean() == pytest.approx(predicted[some].mean(), abs=0.15)


def test_cells_that_were_chosen_by_what_was_measured_do_not_bias_the_means():
    whole, features = planted()
    known = np.zeros((S, K), dtype=bool)
    known[:, [0, -1]] = True
    differ = whole.accuracy[:, 0] != whole.accuracy[:, -1]
    known[:, 4] = differ | (np.arange(S) % 10 == 0)
    known[np.array(whole.split) == "test"] = True
    table = replace(
        whole,
        accuracy=np.where(known, whole.accuracy, np.nan).astype(np.float32),
        latency_ms=whole.latency_ms,
    )
    fitted = np.array(whole.split) != "test"
    filled = with_predictions(table, features).accuracy[fitted, 4].mean()
    truth = whole.accuracy[fitted, 4].mean()
    plain = np.nanmean(table.accuracy[fitted, 4])
    assert abs(filled - truth) < 0.05
    assert abs(filled - truth) <= abs(plain - truth) + 0.01


def test_test_samples_are_never_predicted():
    whole, features = planted()
    table, _ = thinned(whole)
    gap = int(np.flatnonzero(np.array(table.split) == "test")[0])
    table.accuracy[gap, 2] = np.nan
    assert np.isnan(with_predictions(table, features).accuracy[gap, 2])
    data = EvaluationData.of(table, features, EvaluationOptions(resamples=100))
    assert data.left_out == 1 and data.test.num_samples == S // 5 - 1
    assert set(np.unique(data.test.accuracy)) == {0.0, 1.0}
    np.testing.assert_allclose(data.means.accuracy, whole.subset("train").accuracy.mean(axis=0), atol=0.08)


def test_a_setting_that_was_never_measured_stays_unmeasured():
    whole, features = planted()
    table, _ = thinned(whole)
    table.accuracy[:, 3] = np.nan
    filled = with_predictions(table, features)
    assert np.isnan(filled.accuracy[:, 3]).all()
    assert np.isfinite(np.delete(filled.accuracy, 3, axis=1)).all()


def test_a_whole_table_is_left_alone():
    whole, features = planted()
    assert with_predictions(whole, features, pytest.fail) is whole


def test_two_neighbours_that_agree_say_what_lies_between():
    """By hand: four samples that are right or wrong at both ends, and one each without its middle."""
    line = KnobSpace({"max_crops": [1, 2, 3]})
    measured = np.array([[1, 1, 1], [0, 0, 0]] * 10 + [[1, np.nan, 1], [0, np.nan, 0], [0, np.nan, 1.0]])
    found = expected_cells(measured, np.ones(3, dtype=bool), np.zeros((len(measured), 0)), line)
    assert found[-3, 1] > 0.9 and found[-2, 1] < 0.1 and 0.3 < found[-1, 1] < 0.7


def test_a_surface_of_second_order_keeps_what_bends_once_and_smooths_the_rest():
    ranks = np.array([[a, b] for a in (0, 1 / 3, 2 / 3, 1) for b in (0, 0.5, 1)])
    surface, rank = second_order(ranks)
    a, b = ranks.T
    bent = 1 + 2 * a - b + a * b - 3 * a**2 + b**2
    assert rank == 6
    np.testing.assert_allclose(surface @ bent, bent, atol=1e-9)
    assert np.abs(surface @ (bent + a**3) - bent - a**3).max() > 0.01


def test_few_cells_tell_the_means_of_settings_better_than_their_plain_means():
    """Of a surface of second order, which the planted settings follow nearly."""
    errors = []
    for seed in range(4):
        whole, features = planted(seed)
        table, _ = thinned(whole, share=0.15, seed=seed)
        fitted = np.array(whole.split) != "test"
        filled = with_predictions(table, features).accuracy[fitted].mean(axis=0)
        both = filled, np.nanmean(table.accuracy[fitted], axis=0)
        errors.append([np.square(means - whole.accuracy[fitted].mean(axis=0)).mean() for means in both])
    ours, plain = np.mean(errors, axis=0)
    assert ours < 0.6 * plain
