"""Training that starts from supervised predictions: it knows at once what they know, and is the same for a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_policies import LATENCY, SPACE, features_of

from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.training_run import TrainingRun
from budgetvlm.errors import ConfigError
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import States
from budgetvlm.table import ProfileTable

CONFIG = TrainingConfig(grpo=GRPOConfig(num_epochs=1, learning_rate=1e-6), hidden_dim=32, dropout=0.0, teachers=1)


def table(samples: int = 160) -> ProfileTable:
    """Kind "a" is right with many tiles (settings 2 and 3), kind "b" with all the depth (1 and 3)."""
    accuracy = np.tile(np.array([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=np.float32), (samples // 2, 1))
    split = ["train"] * (samples // 2) + ["validation"] * (samples // 2)
    groups = {"kind": ("a", "b") * (samples // 2)}
    return ProfileTable.from_arrays(
        SPACE, range(samples), accuracy, np.tile(LATENCY, (samples, 1)), groups=groups, split=split
    )


def test_without_any_learning_from_rewards_it_already_chooses_as_its_teachers_do() -> None:
    data = table()
    features = features_of(data)
    states = States.under_budget(data, features, StaticGuard.fit(data.latency_ms), 30.0, 0.01)
    taught = ControllerPolicy(fit_controller(data, features, CONFIG)).choose(states)
    assert taught.tolist() == [2, 1] * 80
    untaught = ControllerPolicy(fit_controller(data, features, replace(CONFIG, teachers=0))).choose(states)
    assert len(set(untaught)) == 1  # the lookup table


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_generator_alone() -> None:
    data = table(40)
    before = torch.get_rng_state()
    one, two, other = (
        TrainingRun(data, features_of(data), CONFIG, [seed]).trainer.template.heads.weight for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_budget_and_price_still_start_without_influence() -> None:
    data = table(40)
    controller = TrainingRun(data, features_of(data), CONFIG, [0]).trainer.template
    assert not controller.context_layer.weight.any()


def test_members_that_start_together_learn_from_teachers_of_their_own() -> None:
    data = table()
    run = TrainingRun(data, features_of(data), CONFIG, [0, 1])
    states = States.under_budget(data, features_of(data), StaticGuard.fit(data.latency_ms), 30.0, 0.01)
    for member in range(2):
        policy = ControllerPolicy(run.trainer.averaged_controller(member))
        assert policy.choose(states).tolist() == [2, 1] * 80
    one, other = (run.trainer.averaged_controller(member).heads.weight for member in range(2))
    assert not torch.equal(one, other)


def test_fewer_teachers_than_none() -> None:
    with pytest.raises(ConfigError, match="teachers=-1"):
        replace(CONFIG, teachers=-1)
