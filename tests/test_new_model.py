"""A new model from earlier tables and few labels: what is carried over, how surely, and what cannot be."""

import json
from dataclasses import replace

import numpy as np
import pytest

from budgetvlm.adaptation.earlier_table import EarlierTable
from budgetvlm.adaptation.new_model import NewModel
from budgetvlm.adaptation.related_accuracy import Posterior, Prior, interpolation, likeness
from budgetvlm.cli import main
from budgetvlm.commands import adapt_model
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"max_crops": [1, 4, 12], "top_k": [2, 8]})
OTHER = KnobSpace({"a": [1, 2, 3], "b": [1, 2]})
K, LABELLED = len(SPACE), 100


def hierarchy(seed, samples=600, offset=0.05, weight=0.8):
    """An earlier model's expected accuracies ``[1, S, K]`` and those of a new one, which differ as the prior says."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(samples, 2))
    earlier = 0.6 + 0.15 * np.tanh(seen @ rng.normal(size=(2, K))) + 0.1 * (SPACE.complexity - 0.5)
    own = np.linalg.cholesky(likeness(SPACE, SPACE)) @ rng.normal(size=K) * offset
    return earlier[None], earlier.mean(axis=0) + own + weight * (earlier - earlier.mean(axis=0))


def learnt(seed, **how):
    expected, truth = hierarchy(seed, **how)
    rng = np.random.default_rng(1000 + seed)
    labels = (rng.random(truth[:LABELLED].shape) < truth[:LABELLED]).astype(float)
    prior = Prior.of(expected, likeness(SPACE, SPACE), np.zeros((K, K)), 0.24 * np.eye(K))
    few = expected[:, :LABELLED]
    return Posterior.of(prior, labels, few, np.zeros_like(few)), expected, truth, labels


def test_a_setting_that_both_spaces_have_is_itself_and_one_between_lies_between():
    other = KnobSpace({"max_crops": [1, 2, 4, 12], "top_k": [2, 8]})
    weights, left_open = interpolation(other, SPACE)
    for k, setting in enumerate(SPACE.settings):
        row = other.index(setting)
        np.testing.assert_allclose(weights[row], np.eye(K)[k], atol=1e-9)
        assert abs(left_open[row, row]) < 1e-9
    new = other.index({"max_crops": 2, "top_k": 8})
    near = [SPACE.index({"max_crops": crops, "top_k": 8}) for crops in (1, 4)]
    assert weights[new].sum() == pytest.approx(1) and set(np.argsort(weights[new])[-2:]) == set(near)
    assert left_open[new, new] > 0.05


def test_without_labels_that_differ_nothing_is_changed():
    """Labels that are what was expected, cell by cell, leave the expectation as it is."""
    expected, _ = hierarchy(0)
    prior = Prior.of(expected, likeness(SPACE, SPACE), np.zeros((K, K)), 0.24 * np.eye(K))
    few = expected[:, :LABELLED]
    found = Posterior.of(prior, few[0], few, np.zeros_like(few))
    np.testing.assert_allclose(found.accuracy(expected), expected[0], atol=1e-6)
    assert (found.weights > 0.999).all()


def test_what_is_carried_over_is_nearer_the_truth_than_either_source_alone():
    errors = []
    for seed in range(8):
        found, expected, truth, labels = learnt(seed)
        candidates = found.accuracy(expected), expected[0], np.broadcast_to(labels.mean(axis=0), truth.shape)
        errors.append([np.square(one - truth).mean() for one in candidates])
    own, unchanged, alone = np.sqrt(np.mean(errors, axis=0))
    assert own < 0.75 * min(unchanged, alone)


def test_intervals_of_the_settings_means_hold_the_truth():
    held = [
        np.abs(found.accuracy(expected).mean(axis=0) - truth.mean(axis=0)) < found.half_widths
        for found, expected, truth, _ in map(learnt, range(30))
    ]
    assert 0.9 <= np.mean(held) <= 0.995


def test_a_surprise_of_the_earlier_model_makes_the_labels_tell_more():
    """Both models are right by the same coin; with the coin known, an offset that is small is found."""
    expected, truth = hierarchy(3, weight=1.0)
    coin = np.random.default_rng(3).random((LABELLED, 1))
    labels, few = (coin < truth[:LABELLED]).astype(float), expected[:, :LABELLED]
    prior = Prior.of(expected, likeness(SPACE, SPACE), np.zeros((K, K)), 0.24 * (0.1 * np.eye(K) + 0.9))
    errors = []
    for surprise in ((coin < few[0]) - few, np.zeros_like(few)):
        found = Posterior.of(prior, labels, few, surprise)
        errors.append(float(found.half_widths.mean()))
    assert errors[0] < 0.8 * errors[1]


def tables(seed=0, samples=300):
    """Tables of an earlier and of a new model that is 0.15 worse at each setting and takes twice the time."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(samples, 2))
    truth = np.clip(0.7 + 0.25 * np.tanh(seen[:, :1]) * (1 - 1.5 * SPACE.complexity), 0.05, 0.95)
    ids = [f"s{i}" for i in range(samples)]
    latency = 100 * SPACE.complexity * rng.lognormal(0, 0.1, (samples, 1))
    split = (["train"] * 3 + ["validation"]) * (samples // 4)
    made = [
        ProfileTable.from_arrays(SPACE, ids, rng.random(truth.shape) < one, scale * latency, split=split)
        for one, scale in ((truth, 1), (truth - 0.15, 2))
    ]
    return *made, Features(tuple(ids), seen, rng.normal(size=(samples, 2))), truth - 0.15


@pytest.fixture(scope="module")
def adapted():
    earlier, new, features, truth = tables()
    few = new.subset(np.arange(0, 300, 3))
    return NewModel.of([(earlier, features)], few, features), few, new, truth


def test_the_labelled_samples_stay_as_measured_and_the_others_are_expected(adapted):
    made, few, new, truth = adapted
    row_of = {name: row for row, name in enumerate(made.table.sample_ids)}
    rows = [row_of[name] for name in few.sample_ids]
    np.testing.assert_array_equal(made.table.accuracy[rows], few.accuracy)
    assert made.labelled == made.shared == 100 and set(row_of) == set(new.sample_ids)
    others = [row for name, row in row_of.items() if name not in few.sample_ids]
    places = [int(made.table.sample_ids[row][1:]) for row in others]
    assert np.abs((made.table.accuracy[others] - truth[places]).mean(axis=0)).max() < 0.08
    assert np.square(made.table.accuracy[others] - truth[places]).mean() < 0.5 * truth.var(axis=0).mean() + 0.08**2
    own, unchanged, alone = made.errors
    assert own < unchanged and own < alone


def test_times_are_those_of_the_new_model(adapted):
    made, _, new, _ = adapted
    row_of = {name: row for row, name in enumerate(new.sample_ids)}
    there = new.latency_ms[[row_of[name] for name in made.table.sample_ids]]
    np.testing.assert_allclose(made.table.latency_ms, there, rtol=0.05)


def test_a_new_value_of_a_knob_is_learnt_from_the_labels():
    _, new, features, truth = tables(1)
    column = [k for k, setting in enumerate(SPACE.settings) if setting["max_crops"] != 4]
    part = ProfileTable.from_arrays(
        KnobSpace({"max_crops": [1, 12], "top_k": [2, 8]}), new.sample_ids, new.accuracy[:, column],
        new.latency_ms[:, column], split=new.split,
    )  # fmt: skip
    made = NewModel.of([(part, features)], new.subset(np.arange(0, 300, 3)), features)
    assert made.table.knob_space == SPACE
    means = np.array([one["accuracy"] for one in made.report["settings"]])
    assert np.abs(means - truth.mean(axis=0)).max() < 0.08


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda few, own: (few.subset(np.arange(10)), own), DataError, "20 are the least"),
        (lambda few, own: (replace(few, latency_ms=few.latency_ms * np.float32(np.nan)), own), DataError, "no latency"),
        (lambda few, own: (few, replace(own, image=own.image[:, :1])), DataError, "1 and 2"),
        (lambda few, own: (few, replace(own, image=own.image[::-1], language=own.language[::-1])), DataError, "correl"),
        (lambda few, own: (replace(few, knob_space=OTHER), own), KnobSpaceError, "a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_refused(change, error, words):
    earlier, new, features, _ = tables()
    with pytest.raises(error, match=words):
        NewModel.of([(earlier, features)], *change(new.subset(np.arange(0, 300, 3)), features))


def test_the_command_trains_a_controller_and_says_how_surely(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adapt_model, "MEMBERS", 1)
    earlier, new, features, _ = tables(2, samples=120)
    for name, table in (("old", earlier), ("few", new.subset(np.arange(0, 120, 3)))):
        table.save(tmp_path / f"{name}.parquet")
        features.aligned(table.sample_ids).save(tmp_path / f"{name}.features.safetensors")
    given = ["--table", tmp_path / "few.parquet", "--features", tmp_path / "few.features.safetensors"]
    words = ["adapt", "--from", tmp_path / "old.parquet", *given, "--json"]
    assert main([*map(str, words)]) == 2 and "--output_dir" in capsys.readouterr().err
    assert main([*map(str, words), "--output_dir", str(tmp_path / "new")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["labelled"] == report["shared"] == 40 and len(report["settings"]) == K
    assert load_controller(tmp_path / "new").knob_space == SPACE


def test_an_earlier_sample_that_was_not_measured_surprises_nobody():
    earlier, _, features, _ = tables()
    hole = earlier.accuracy.copy()
    hole[0] = np.nan
    learnt = EarlierTable.of(replace(earlier, accuracy=hole), features, SPACE)
    found = learnt.surprise(["s0", "s1", "unknown"])
    assert (found[[0, 2]] == 0).all() and (found[1] != 0).any()
