"""Several controllers averaged in one: same values, same kind of checkpoint, same quick decisions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_tables import tiny

from budgetvlm.commands.train import run as run_train
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.ensemble import member_seeds, merge
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training import TrainingResult, fit_controller, train
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.errors import ConfigError, OutputError

QUICK = TrainingConfig(grpo=GRPOConfig(num_epochs=2, learning_rate=1e-2), hidden_dim=12, budget_dim=4, patience=None)


def members(count: int = 3, layers: int = 2) -> list[GRPOController]:
    """Random controllers of one kind."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        controller = GRPOController(
            5, 4, budget_dim=4, hidden_dim=8, num_hidden_layers=layers, latency_reference_ms=40.0,
            knob_values={"tiles": [1, 4], "depth": [2, 8]}, latency_ms=[10, 20, 25, 40], bounds_ms=[11, 22, 27, 44],
        )  # fmt: skip
        for parameter in controller.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        made.append(controller.eval())
    return made


def values(controller: GRPOController) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    image, language = torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator)
    budget, price = torch.tensor([12.0, 20, 25, 30, 45, 1e9]), torch.tensor([0, 0.01, 0.1, 0.5, 1, 0.01])
    with torch.no_grad():
        return controller.setting_logits(controller(image, language, budget, price))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_values_of_the_average_are_the_mean_of_the_members_values(layers: int) -> None:
    parts = members(3, layers)
    mean = torch.stack([values(part) for part in parts]).mean(dim=0)
    assert torch.allclose(values(merge(parts)), mean, atol=1e-4)


def test_a_member_alone_is_itself() -> None:
    (one,) = members(1)
    assert torch.allclose(values(merge([one])), values(one))


def test_quick_decisions_multiply_only_the_members_own_blocks_and_choose_alike() -> None:
    merged = merge(members(3))
    network = ValueNetwork(merged)
    assert network.weights(None).hidden.shape[1:] == (3, 8, 8)
    rng = np.random.default_rng(0)
    for budget in (12.0, 21.0, 26.0, 50.0):
        image, language = rng.normal(size=5).astype("f4"), rng.normal(size=4).astype("f4")
        logits = merged(torch.from_numpy(image), torch.from_numpy(language), budget, 0.05)
        with torch.no_grad():
            wanted = merged.sample_actions(logits, deterministic=True)["setting_index"].item()
        allowed = logits["feasible"][0].numpy()
        chosen = np.where(allowed, network.values(image, language, budget, 0.05), -np.inf).argmax()
        assert chosen == wanted or not allowed.any()


def test_a_single_controllers_layers_are_one_block() -> None:
    assert ValueNetwork(members(1)[0]).weights(None).hidden.shape[1:] == (1, 8, 8)


def test_members_that_differ_in_size_or_data_are_refused() -> None:
    one, two, *_ = members()
    with pytest.raises(ConfigError, match="same sizes"):
        merge([one, GRPOController(5, 4, hidden_dim=4, knob_values={"tiles": [1, 4], "depth": [2, 8]})])
    two.fit_features(torch.randn(20, 5) * 3, torch.randn(20, 4))
    with pytest.raises(ConfigError, match="training data"):
        merge([one, two])
    with pytest.raises(ConfigError, match="at least one"):
        merge([])


def test_ensembles_of_different_seeds_share_no_member() -> None:
    assert member_seeds(0, 3) == (0, 1, 2)
    assert not set(member_seeds(1, 3)) & set(member_seeds(0, 3))
    assert member_seeds(4, 1) == (4,)


def test_fitting_in_memory_is_the_run_that_training_writes(tmp_path) -> None:
    table, features = tiny()
    written = train(table, features, QUICK, tmp_path, say=lambda text: None, progress=False)
    fitted = fit_controller(table, features, QUICK)
    for name, tensor in written.controller.state_dict().items():
        assert torch.equal(tensor, fitted.state_dict()[name]), name


def test_an_ensemble_leaves_a_checkpoint_that_loads_as_any_other(tmp_path) -> None:
    table, features = tiny()
    result = train(table, features, QUICK, tmp_path, members=2, say=lambda text: None, progress=False)
    loaded = load_controller(tmp_path)
    assert torch.equal(loaded.heads.weight, result.controller.heads.weight)
    assert loaded.config["hidden_dim"] == 24
    in_memory = fit_controller(table, features, QUICK, members=2)
    assert torch.equal(in_memory.heads.weight, loaded.heads.weight)
    with pytest.raises(OutputError, match="already holds"):
        train(table, features, QUICK, tmp_path, members=2, progress=False)
    again = train(table, features, QUICK, tmp_path, members=2, resume=True, say=lambda text: None, progress=False)
    assert torch.equal(again.controller.heads.weight, result.controller.heads.weight)


def quick(directory: Path, members: int = 3, config: TrainingConfig = QUICK, **options: Any) -> TrainingResult:
    table, features = tiny()
    return train(
        table, features, config, directory, members=members, progress=False,
        say=options.pop("say", lambda text: None), **options,
    )  # fmt: skip


def test_an_interrupted_ensemble_ends_like_an_undisturbed_one(tmp_path, monkeypatch) -> None:
    """Also where a member has stopped before the interruption."""
    config = replace(QUICK, grpo=replace(QUICK.grpo, num_epochs=9, beta=0.1, num_generations=4), patience=2)
    whole = quick(tmp_path / "whole", config=config)
    epochs = [len(member["history"]) for member in torch.load(tmp_path / "whole" / "last_checkpoint.pt")["members"]]
    assert min(epochs) < max(epochs)
    log_policy, updates = GRPOTrainer.log_policy, 2 * min(epochs) + 1  # two updates an epoch

    def interrupted(self: GRPOTrainer, batch: Batch) -> torch.Tensor:
        if self.average.n_averaged == updates:
            raise KeyboardInterrupt
        return log_policy(self, batch)

    monkeypatch.setattr(GRPOTrainer, "log_policy", interrupted)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "cut", config=config, say=lines.append)
    assert f"epoch {min(epochs)} is saved" in lines[-1]
    monkeypatch.undo()
    resumed = quick(tmp_path / "cut", config=config, resume=True)
    for name, tensor in whole.controller.state_dict().items():
        assert torch.equal(tensor, resumed.controller.state_dict()[name]), name
    for number in range(3):
        one, two = (json.loads((tmp_path / d / "members" / str(number) / "metrics.json").read_text()) for d in
                    ("whole", "cut"))  # fmt: skip
        assert one == two


def test_each_member_has_its_own_controller_figures_and_last_word(tmp_path) -> None:
    lines: list[str] = []
    config = replace(QUICK, grpo=replace(QUICK.grpo, num_epochs=9), patience=1)
    quick(tmp_path, config=config, say=lines.append)
    for number in range(3):
        place = tmp_path / "members" / str(number)
        figures = json.loads((place / "metrics.json").read_text())
        assert figures["best"] == max(figures["history"], key=lambda row: row["reward_mean"])
        assert load_controller(place).config["hidden_dim"] == 12
        assert any((place / "tensorboard").iterdir())
        about = [line for line in lines if line.startswith(f"member {number + 1} of 3, seed {number}: ")]
        assert f"best: epoch {figures['best']['epoch']:3d}" in about[-1]
        stopped = len(figures["history"]) < 10
        assert any("no better validation reward in 1 epochs" in line for line in about) == stopped


def test_no_member_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="members=0"):
        quick(tmp_path, members=0)
    with pytest.raises(ConfigError, match="members=0"):
        fit_controller(*tiny(), QUICK, members=0)


def test_the_command_trains_an_ensemble(tmp_path) -> None:
    from budgetvlm.cli import command_parser

    table, features = tiny()
    table.save(tmp_path / "t.parquet")
    features.save(tmp_path / "f.safetensors")
    words = [
        "--table",
        tmp_path / "t.parquet",
        "--features",
        tmp_path / "f.safetensors",
        "--output_dir",
        tmp_path / "o",
    ]
    words += ["--num_epochs", "1", "--hidden_dim", "8", "--ensemble", "2"]
    assert run_train(command_parser("train").parse_args(list(map(str, words)))) == 0
    assert load_controller(tmp_path / "o").config["hidden_dim"] == 16


def test_the_widths_of_members_follow_the_flag() -> None:
    from budgetvlm.cli import command_parser
    from budgetvlm.commands.train import training_config

    parse = command_parser("train").parse_args
    assert training_config(parse(["--output_dir", "x"])).hidden_dim == 256
    assert training_config(parse(["--output_dir", "x", "--ensemble", "5"])).hidden_dim == 128
    assert training_config(parse(["--output_dir", "x", "--ensemble", "5", "--hidden_dim", "64"])).hidden_dim == 64
    with pytest.raises(ConfigError, match="--ensemble 0"):
        training_config(parse(["--output_dir", "x", "--ensemble", "0"]))
