"""The distribution of an answer's length."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from budgetvlm.errors import DataError
from budgetvlm.guard.answer_length import MOST_LENGTHS, LengthModel
from budgetvlm.guard.kernels import length_forecast
from budgetvlm.guard.specification import expected_length


def questions(samples=600, seed=0):
    """Questions of two kinds, told by the first feature: answers of 1 token, or of 3 (two in three) and 4 tokens."""
    rng = np.random.default_rng(seed)
    long = rng.random(samples) < 0.5
    features = np.column_stack(
        [long * 2.0 + 0.1 * rng.normal(size=samples), rng.normal(size=samples), np.ones(samples)]
    )
    return features, np.where(long, np.where(rng.random(samples) < 2 / 3, 3, 4), 1)


def test_lengths_follow_the_question():
    model = LengthModel.fit(*questions())
    short, long = np.array([0.0, 0.0, 1.0]), np.array([2.0, 0.0, 1.0])
    np.testing.assert_allclose(model.probabilities(short), [1, 0, 0], atol=0.05)
    np.testing.assert_allclose(model.probabilities(long), [0, 2 / 3, 1 / 3], atol=0.08)
    assert model.expected(long) == pytest.approx(10 / 3, abs=0.15)
    assert (model.quantile(short, 0.9), model.quantile(long, 0.5), model.quantile(long, 0.9)) == (1, 3, 4)
    np.testing.assert_array_equal(model.quantile(np.stack([short, long]), 0.9), [1, 4])


def test_held_out_lengths_exceed_a_quantile_as_often_as_it_says():
    model = LengthModel.fit(*questions())
    features, tokens = questions(5000, seed=1)
    for level in (0.5, 0.8, 0.95):
        assert (tokens > model.quantile(features, level)).mean() <= 1 - level + 0.02


def test_features_that_tell_nothing_give_the_shares():
    rng = np.random.default_rng(0)
    tokens = rng.choice([1, 2, 9], p=[0.5, 0.3, 0.2], size=1000)
    model = LengthModel.fit(np.ones((1000, 2)), tokens)
    np.testing.assert_allclose(model.probabilities(np.ones(2)), [0.5, 0.3, 0.2], atol=0.05)


def test_many_lengths_are_put_into_bins_named_by_their_longest():
    tokens = np.arange(1, 201)
    model = LengthModel.fit(np.ones((200, 1)), tokens)
    assert len(model.lengths) == MOST_LENGTHS and model.lengths[-1] == 200
    assert abs(model.expected(np.ones(1)) - tokens.mean()) < 10


def test_it_survives_json():
    model = LengthModel.fit(*questions())
    again = LengthModel.from_dict(json.loads(json.dumps(model.to_dict())))
    np.testing.assert_array_equal(again.probabilities(questions()[0]), model.probabilities(questions()[0]))
    with pytest.raises(DataError, match="lacks the field bias"):
        LengthModel.from_dict({k: v for k, v in model.to_dict().items() if k != "bias"})


@pytest.mark.parametrize("tokens", [[], [1, 0], [1, np.nan], [1, 2, 3]])
def test_lengths_that_are_none(tokens):
    with pytest.raises(DataError, match="positive numbers"):
        LengthModel.fit(np.ones((2, 1))[: len(tokens) or 0], np.array(tokens))


def test_a_request_alone_has_the_lengths_of_many_and_another_width_is_named():
    features, tokens = questions()
    model = LengthModel.fit(features, tokens)
    weights, bias, lengths = model.folded
    state = SimpleNamespace(length_weights=weights, length_bias=bias, lengths=lengths, alpha=0.2)
    for row in features[:20].astype(np.float32):
        for expected, number in (expected_length(state, row), length_forecast(row, state)):
            assert expected == pytest.approx(float(model.expected(row)), rel=1e-4)
            assert model.lengths[number] == model.quantile(row, 0.9)
    with pytest.raises(DataError, match=r"has 2 numbers.*learnt from 3"):
        model.check(features[0, :2])
