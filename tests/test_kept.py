"""What is trained does no harm: noise is not followed, and what held-out samples do not confirm is not kept."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from planted_tables import SPACE, planted

from budgetvlm.controller.kept import keep
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.training_run import TrainingRun
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import LookupTable, States
from budgetvlm.policies.evidence import clearly_positive, mean_and_margin, squared_error, trust
from budgetvlm.policies.predictor import PredictorConfig
from budgetvlm.policies.ridge import Ridge
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.teachers import Teachers
from budgetvlm.table import ProfileTable

CONFIG = TrainingConfig(grpo=GRPOConfig(num_epochs=3), hidden_dim=32, patience=None)


def nothing_to_learn(seed: int, samples: int = 300) -> tuple[ProfileTable, Features]:
    """Right by a coin that no feature shows; larger settings are better on average."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0.4, 0.8, len(SPACE))
    latency = np.linspace(10.0, 60.0, len(SPACE)) * rng.lognormal(0.0, 0.05, (samples, 1))
    split = ["train"] * (samples // 2) + ["validation"] * (samples // 4) + ["test"] * (samples - 3 * (samples // 4))
    ids = tuple(map(str, range(samples)))
    table = ProfileTable.from_arrays(SPACE, ids, rng.random((samples, len(SPACE))) < share, latency, split=split)
    return table, Features(ids, rng.normal(size=(samples, 6)), rng.normal(size=(samples, 6)))


def test_few_groups_say_less_than_many() -> None:
    values, group = np.array([1.0, 3.0, 5.0, 7.0, np.nan]), np.array(list("aabbc"))
    mean, margin = mean_and_margin(values, group)
    # two groups with the means 2 and 6: a standard error of 2, times Student's t of one degree of freedom
    assert mean == 4.0 and margin == pytest.approx(2.0 * np.tan(np.pi * (0.977 - 0.5)))
    assert not clearly_positive(values, group) and clearly_positive(values + 24.0, group)
    many = np.arange(2000) % 2 * 2.0  # a standard deviation of 1
    assert mean_and_margin(many, np.arange(2000))[1] == pytest.approx(2.0 / np.sqrt(2000), rel=0.01)
    assert mean_and_margin(values[:2], group[:2]) == (2.0, np.inf)  # one group says nothing about others


def test_trust_is_the_slope_of_what_was_measured() -> None:
    rng, means, group = np.random.default_rng(0), np.array([0.3, 0.5, 0.6]), np.arange(400)
    signal = rng.normal(size=(400, 3)) * 0.1
    measured = means + 0.5 * signal + rng.normal(size=(400, 3)) * 0.1 + rng.normal(size=(400, 1))  # all shift alike
    assert trust(means + signal, means, measured, group) == pytest.approx(0.5, abs=0.1)
    assert trust(means + 0.25 * signal, means, measured, group) == pytest.approx(1.0, abs=0.05)  # never more than that
    weak = means + 0.05 * signal + rng.normal(size=(400, 3)) * 0.1
    assert trust(means + signal, means, weak, group) < 0.04  # what is hardly visible is shrunk further
    assert trust(means - signal, means, measured, group) == 0.0
    assert trust(np.tile(means, (400, 1)), means, measured, group) == 0.0
    assert trust(means + signal, means, measured, np.zeros(400)) == 0.0  # a single group
    gaps = np.where(rng.random((400, 3)) < 0.3, np.nan, measured)
    assert trust(means + signal, means, gaps, group) == pytest.approx(0.5, abs=0.12)


def test_only_differences_between_settings_count_as_errors() -> None:
    accuracy = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, 1.0]])
    predicted = np.array([[0.4, 1.4, 9.0], [0.7, 0.7, 0.4]])
    assert squared_error(predicted, accuracy) == pytest.approx([0.0, 0.06])


def test_a_regression_finds_what_is_linear_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(600, 5)).astype(np.float32)
    share = np.clip(np.array([0.4, 0.5, 0.6]) + 0.2 * x[:, :1] * np.array([-1.0, 0.0, 1.0]), 0, 1)
    right = (rng.random((600, 3)) < share).astype(np.float32)
    right[::7, 1] = np.nan
    table = ProfileTable.from_arrays(_space(), range(600), right, np.tile([1.0, 2.0, 3.0], (600, 1)))
    features = Features(table.sample_ids, x[:, :2], x[:, 2:])
    ridge = Ridge.fit(table, features)
    assert ridge.tells_settings_apart
    assert np.abs(ridge.predict(x[:, :2], x[:, 2:]) - share)[np.abs(x[:, 0]) < 1].mean() < 0.05
    alone = replace(table, groups={"image_id": ("one",) * 600})
    assert not Ridge.fit(alone, features).tells_settings_apart  # one group: nothing can be checked
    shuffled = replace(table, accuracy=table.accuracy[rng.permutation(600)])
    blind = Ridge.fit(shuffled, features)
    assert not blind.tells_settings_apart
    assert blind.predict(x[:, :2], x[:, 2:]) == pytest.approx(np.tile(np.nanmean(right, axis=0), (600, 1)), abs=0.08)


def test_more_features_than_samples_are_no_obstacle() -> None:
    table, features = nothing_to_learn(0, 40)
    wide = replace(features, image=np.random.default_rng(0).normal(size=(40, 700)))
    assert np.isfinite(Ridge.fit(table, wide).predict(wide.image, wide.language)).all()


def _space():
    from budgetvlm.knobs import KnobSpace

    return KnobSpace({"size": [1, 2, 3]})


@pytest.mark.parametrize("members", [1, 3])
def test_where_nothing_can_be_learnt_the_simple_policy_is_written(tmp_path, members: int) -> None:
    table, features = nothing_to_learn(seed=0)
    lines: list[str] = []
    result = train(table, features, CONFIG, tmp_path, members=members, say=lines.append, progress=False)
    test = table.subset("test")
    lookup = LookupTable(SettingMeans.fit(table.subset("train")))
    for price in (0.0, 0.01, 0.1, 0.5):
        states = [
            States.under_budget(test, features.aligned(test.sample_ids), StaticGuard.fit(test.latency_ms), ms, price)
            for ms in (20.0, 45.0, np.inf)
        ]
        for requests in states:
            assert ControllerPolicy(result.controller).choose(requests).tolist() == lookup.choose(requests).tolist()
    why = json.loads((tmp_path / "metrics.json").read_text())["kept"]
    assert why.startswith("GRPO did not improve on its start") and "lookup table" in why
    assert f"{why}." in lines and result.best_epoch == 0


def test_noise_is_hardly_ever_followed() -> None:
    """Over many tables without anything to learn, the start is seldom anything but the means."""
    config, followed = PredictorConfig(hidden_dim=16, num_epochs=10), 0
    for seed in range(12):
        table, features = nothing_to_learn(seed)
        known = table.subset(np.array(table.split) != "test")
        followed += bool(Teachers.fit(known, features, config, np.array([[seed]])).weights.any())
    assert followed <= 2


def test_what_grpo_makes_is_kept_only_if_it_is_clearly_better_than_its_start(monkeypatch) -> None:
    data = planted(120, 60, 10, width=8)
    run = TrainingRun(data.table, data.features, CONFIG, [0])
    run.train()
    monkeypatch.setattr(run, "best_controllers", lambda: run.starts)
    kept = keep(run)
    assert kept.epoch == 0 and kept.controller is run.starts[0]
    assert "did not improve on its start (validation reward +0.0000 ± 0.0000); the start is kept" in kept.why
    worse = TrainingRun(data.table, data.features, replace(CONFIG, teachers=0), [0])
    monkeypatch.setattr(worse, "best_controllers", lambda: run.starts)  # taught against untaught
    worse.members[0].best = {"epoch": 7}
    kept = keep(worse)
    assert kept.epoch == 7 and kept.controller is run.starts[0] and "controller of epoch 7 is kept" in kept.why
    assert not torch.equal(kept.controller.heads.weight, worse.starts[0].heads.weight)


@pytest.mark.parametrize(
    ("units", "said"),
    [("abcd", r"did not improve .*\+0.5000 ± 0.9504"), ("aaaa", r"did not improve .*\+0.5000, from a single document")],
)
def test_what_stands_behind_the_sign_is_what_a_gain_has_to_exceed(units, said) -> None:
    """Gains of 0, 1, 0, 1: the standard error is sqrt(4 x 0.25 / 3) / 2, Student's t of 3 degrees is 3.29."""
    start, trained = planted_controllers()
    validation = SimpleNamespace(
        rewards=lambda controller: np.array([0.0, 1.0, 0.0, 1.0]) * (controller is trained),
        table=SimpleNamespace(units=tuple(units), unit_name="document"),
        measure=lambda controller: {},
    )
    member = SimpleNamespace(best={"epoch": 3})
    run = SimpleNamespace(starts=[start], best_controllers=lambda: [trained], validation=validation, members=[member])
    kept = keep(cast(TrainingRun, run))
    assert kept.controller is start and re.search(said, kept.why) and "inf" not in kept.why


def planted_controllers() -> list[GRPOController]:
    return [GRPOController(1, 1, knob_values={"max_crops": [1, 4]}, hidden_dim=4) for _ in range(2)]
