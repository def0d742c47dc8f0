"""Drift: what chance explains is none, what is planted is found, and few requests say nothing."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from budgetvlm.controller.network import GRPOController
from budgetvlm.feedback import drift
from budgetvlm.feedback.drift import drift_of, misjudged, shifted

SEEDS = 200


def windows(shift=0.0, requests=500):
    """Windows of 40 features, any two of which are correlated by a half, standardised by 700 others."""
    rng = np.random.default_rng(0)
    for _ in range(SEEDS):
        both = rng.normal(size=(requests + 700, 40)) + rng.normal(size=(requests + 700, 1))
        rest, window = both[:700], both[700:]
        window = (window - rest.mean(axis=0)) / rest.std(axis=0)
        window[:, 7] += shift
        yield window


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0.0, 0.01), (0.2, 0.0, 0.5), (0.4, 0.99, 1.0)])
def test_what_chance_explains_is_no_drift_and_what_is_planted_is_found(shift, least, most):
    found = [shifted(window, 700) for window in windows(shift)]
    assert least <= np.mean([moved > explained for moved, explained in found]) <= most
    if shift == 0.4:
        assert np.mean([moved for moved, _ in found]) == pytest.approx(0.4, abs=0.05)


def test_what_chance_explains_is_worked_out_by_hand():
    """One feature of spread 2, of 100 requests and 400 others: 3.29 standard errors of sqrt(4 / 100 + 1 / 400)."""
    window = np.tile([3.0, -1.0], 50)[:, None] * np.sqrt(99 / 100)
    moved, explained = shifted(window, 400)
    assert moved == pytest.approx(np.sqrt(99 / 100))
    assert explained == pytest.approx(3.2905 * np.sqrt(4 / 100 + 1 / 400), rel=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_of_hardly_a_request_no_shift_is_said(count):
    assert shifted(np.ones((count, 3)), 400) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("mean", "count", "found"),
    [(0.0, 500, False), (0.03, 500, False), (0.3, 500, True), (-0.3, 500, True), (-0.3, 8, False)],
)
def test_scores_that_are_surely_not_as_expected(mean, count, found):
    """Expected are 0.5; the scores are 0 and 1."""
    ones = round(count * (0.5 + mean))
    assert misjudged(np.array([0.5] * ones + [-0.5] * (count - ones))) is found


def test_without_scores_nothing_is_misjudged():
    assert misjudged(np.empty(0)) is False


class Log(SimpleNamespace):
    """What is read of a log."""

    def __len__(self):
        return len(self.image)

    @property
    def scored(self):
        return self.rows(np.flatnonzero(~np.isnan(self.scores)))

    @property
    def as_scored_log(self):
        return SimpleNamespace(of_chosen=lambda values: values[:, 0])

    def rows(self, which):
        return Log(**{name: array[which] for name, array in vars(self).items()})

    def values_by(self, controller):
        return np.full((len(self), 1), 0.8)


def served(shift, score, requests):
    """Old requests that are as in training, and then others."""
    image, language = np.random.default_rng(1).normal(size=(2, 600 + requests, 3)).astype(np.float32)
    image[600:, 1] += shift
    scores = np.where(np.arange(600 + requests) % 2, np.nan, score)
    scores[:600] = 0.8
    return Log(image=image, language=language, scores=scores)


@pytest.mark.parametrize(
    ("shift", "score", "requests", "found", "said"),
    [
        (0.0, 0.8, 500, (False, False), []),
        (1.0, 0.8, 500, (True, False), ["the last 500 requests differ from.*moved by 1.0"]),
        (0.0, 0.4, 1000, (False, True), ["the last 500 scores are 0.40 below"]),
        (1.0, 1.0, 1000, (True, True), ["requests differ", "0.20 above"]),
    ],
)
def test_the_newest_requests_and_scores_are_looked_at(shift, score, requests, found, said):
    controller = GRPOController(3, 3, budget_dim=4, hidden_dim=8, knob_values={"top_k": [2, 8]})
    result = drift_of(served(shift, score, requests), controller)
    assert (result.features, result.accuracy) == found and bool(result) == any(found)
    assert len(result.said) == len(said)
    for sentence, expected in zip(result.said, said, strict=True):
        assert re.search(expected, sentence)


def test_few_requests_say_nothing_of_their_features():
    log = served(5.0, 0.8, 500).rows(np.arange(1100)[-drift.FEWEST + 1 :])
    controller = GRPOController(3, 3, budget_dim=4, hidden_dim=8, knob_values={"top_k": [2, 8]})
    assert not drift_of(log, controller)
