import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_tables import Planted, planted, tiny

from budgetvlm import cli
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training import TrainingResult, train
from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, TrainingConfig
from budgetvlm.controller.validation import VALIDATION_PRICES, Validation, choose
from budgetvlm.errors import CheckpointError, ConfigError, DataError, OutputError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.predictor import fit_predictor
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

QUICK = TrainingConfig(grpo=GRPOConfig(num_epochs=3, learning_rate=1e-3), hidden_dim=16, budget_dim=4, patience=None)


def quick(directory: Path, config: TrainingConfig = QUICK, data=None, **options) -> TrainingResult:
    table, features = data or tiny()
    return train(
        table, features, config, directory, progress=False, say=options.pop("say", lambda line: None), **options
    )


def epochs(count: int, config: TrainingConfig = QUICK) -> TrainingConfig:
    return replace(config, grpo=replace(config.grpo, num_epochs=count))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("given", "directory"), [("D", "D"), ("D/best_checkpoint.pt", "D")])
def test_a_checkpoint_that_is_not_there_is_told_how_to_make(tmp_path, given, directory):
    with pytest.raises(CheckpointError, match=rf"does not exist; .*--output_dir {tmp_path / directory}` makes it"):
        load_controller(tmp_path / given)


def test_a_run_leaves_a_checkpoint_that_opens_safely_and_rebuilds_the_controller(tmp_path):
    result = quick(tmp_path)
    checkpoint = torch.load(tmp_path / "best_checkpoint.pt")  # the safe default: tensors and plain values only
    wanted = {"controller_state_dict", "controller_config", "knob_space", "feature_statistics", "metrics", "versions"}
    assert wanted <= checkpoint.keys()
    assert checkpoint["knob_space"] == {"max_crops": [1, 4], "top_k": [2, 8]}
    assert {"reward_mean", "accuracy_mean", "latency_mean"} <= checkpoint["metrics"].keys()
    json.dumps(checkpoint["controller_config"], allow_nan=False)
    controller = GRPOController(**checkpoint["controller_config"])
    controller.load_state_dict(checkpoint["controller_state_dict"])
    controller.eval()
    table, features = tiny()
    with torch.no_grad():
        arrays = (torch.from_numpy(features.image[:1]), torch.from_numpy(features.language[:1]))
        actions = controller.sample_actions(controller(*arrays, torch.tensor([25.0])), deterministic=True)
    setting = {name: actions[name].item() for name in ("max_crops", "top_k")}
    assert setting in [dict(s) for s in table.knob_space.settings[:2]]  # 30 ms and 40 ms do not fit in 25
    for other in (load_controller(tmp_path), GRPOController.from_pretrained(tmp_path)):
        assert same(other.state_dict(), controller.state_dict())
        assert not other.training
    assert same(result.controller.state_dict(), controller.state_dict())


def test_bounds_statistics_and_reference_come_from_the_training_samples_alone(tmp_path):
    table, features = tiny()
    latency = table.latency_ms.copy()
    latency[40:] *= 100.0  # the validation samples
    image = features.image.copy()
    image[40:] += 1000.0
    changed = ProfileTable.from_arrays(table.knob_space, table.sample_ids, table.accuracy, latency, split=table.split)
    config = quick(tmp_path, data=(changed, replace(features, image=image))).controller.config
    assert config["bounds_ms"] == pytest.approx(np.quantile(table.latency_ms[:40], 0.95, axis=0), rel=1e-5)
    assert config["latency_ms"] == pytest.approx(table.latency_ms[:40].mean(axis=0), rel=1e-5)
    assert config["latency_reference_ms"] == pytest.approx(np.median(table.latency_ms[:40, -1]), rel=1e-5)
    mean = load_controller(tmp_path).image_input.mean
    torch.testing.assert_close(mean, torch.from_numpy(features.image[:40].mean(axis=0)), atol=1e-5, rtol=0)


def test_figures_are_written_for_every_epoch_and_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines: list[str] = []
    quick(tmp_path, say=lines.append)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [0, 1, 2, 3]
    kept = metrics["best"]["epoch"]
    best = max(metrics["history"], key=lambda row: row["reward_mean"])
    assert metrics["best"].items() <= metrics["history"][kept].items() and kept in (0, best["epoch"])
    (said,) = [line for line in lines if line.startswith("GRPO ")]
    assert said == f"{metrics['kept']}." and ("did not improve" in said) == (kept == 0)
    assert lines[0].startswith("maximised (objective constrained)")
    for name in ("reward_mean", "accuracy_mean", "latency_mean", "violation_rate", "room_closed"):
        assert sum(name in line for line in lines) >= 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = events.Scalars("validation/reward_mean")
    assert [point.step for point in logged] == [0, 1, 2, 3]
    assert [point.value for point in logged] == pytest.approx([row["reward_mean"] for row in metrics["history"]])
    assert len(events.Scalars("train/loss")) == 3


def test_equal_seeds_give_equal_bits_whatever_the_order_of_the_features(tmp_path):
    table, features = tiny()
    order = np.random.default_rng(0).permutation(60)
    shuffled = Features(tuple(features.sample_ids[i] for i in order), features.image[order], features.language[order])
    first = quick(tmp_path / "a", data=(table, features))
    torch.manual_seed(99)  # the caller's own random state has no part in it
    second = quick(tmp_path / "b", data=(table, shuffled))
    other = quick(tmp_path / "c", replace(QUICK, seed=1))
    state, again = (torch.load(tmp_path / d / "last_checkpoint.pt")["trainer"]["weights"] for d in "ab")
    assert same(state, again)
    assert first.metrics == second.metrics
    assert not same(first.controller.state_dict(), other.controller.state_dict())


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    quick(tmp_path)
    assert torch.equal(torch.rand(1), wanted)


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    config = replace(QUICK, grpo=replace(QUICK.grpo, num_generations=4, num_epochs=5, beta=0.1))
    quick(tmp_path / "whole", config)
    quick(tmp_path / "parts", epochs(2, config))
    lines: list[str] = []
    quick(tmp_path / "parts", config, resume=True, say=lines.append)
    assert any("resuming after epoch 2" in line for line in lines)
    whole, parts = (torch.load(tmp_path / name / "last_checkpoint.pt") for name in ("whole", "parts"))
    assert whole["members"][0]["history"] == parts["members"][0]["history"]
    for kind in ("weights", "average"):
        assert same(whole["trainer"][kind], parts["trainer"][kind])


def test_an_interruption_keeps_the_last_finished_epoch(tmp_path, monkeypatch):
    from budgetvlm.controller.trainer import GRPOTrainer

    whole = quick(tmp_path / "whole")
    log_policy = GRPOTrainer.log_policy

    def interrupted(self, batch):
        if self.average.n_averaged == 5:  # two batches an epoch: in the middle of the third
            raise KeyboardInterrupt
        return log_policy(self, batch)

    monkeypatch.setattr(GRPOTrainer, "log_policy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "cut")
    monkeypatch.undo()
    assert len(torch.load(tmp_path / "cut" / "last_checkpoint.pt")["members"][0]["history"]) == 3  # epochs 0, 1 and 2
    assert load_controller(tmp_path / "cut")
    resumed = quick(tmp_path / "cut", resume=True)
    assert same(resumed.controller.state_dict(), whole.controller.state_dict())


def test_an_earlier_run_is_never_touched_unasked(tmp_path):
    quick(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        quick(tmp_path, replace(QUICK, seed=1))
    with pytest.raises(ConfigError, match="give one"):
        quick(tmp_path, resume=True, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("mine")
    quick(tmp_path, replace(QUICK, seed=1), overwrite=True)
    assert torch.load(tmp_path / "best_checkpoint.pt")["training"]["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_with_other_options_or_data_is_refused_by_name(tmp_path):
    quick(tmp_path)
    with pytest.raises(ConfigError, match=r"learning_rate 0\.001 instead of 0\.01"):
        quick(tmp_path, replace(QUICK, grpo=replace(QUICK.grpo, learning_rate=0.01)), resume=True)
    with pytest.raises(ConfigError, match="other data"):
        quick(tmp_path, data=tiny(seed=1), resume=True)


def test_resume_without_an_earlier_run_begins_one(tmp_path):
    assert quick(tmp_path / "new", resume=True).epochs_run == 3


def test_a_damaged_file_for_resuming_is_refused(tmp_path):
    quick(tmp_path)
    last = tmp_path / "last_checkpoint.pt"
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated"):
        quick(tmp_path, resume=True)


def test_training_stops_when_patience_is_spent_and_keeps_the_best(tmp_path):
    lines: list[str] = []
    config = replace(epochs(50), patience=2, grpo=replace(QUICK.grpo, num_epochs=50, learning_rate=1e-9))
    result = quick(tmp_path, config, say=lines.append)
    assert result.epochs_run == result.best_epoch + 2 < 50
    assert any("no better validation reward in 2 epochs" in line for line in lines)


def test_a_table_without_splits_is_split_by_image(tmp_path):
    table, features = tiny(split=False)
    by_image = replace(table, groups={"image_id": tuple(str(i // 3) for i in range(60))})
    assert quick(tmp_path, data=(by_image, features)).epochs_run == 3


def test_an_empty_side_of_the_split_is_refused_before_anything_is_written(tmp_path):
    table, features = tiny()
    for side in ("train", "validation"):
        with pytest.raises(DataError, match="is empty"):
            quick(tmp_path / "out", data=(replace(table, split=(side,) * 60), features))
    with pytest.raises(DataError, match="have no features: s0"):
        quick(
            tmp_path / "out", data=(table, Features(features.sample_ids[1:], features.image[1:], features.language[1:]))
        )
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        quick(tmp_path / "file" / "out")


def test_a_disk_that_fills_up_is_one_clear_error_and_leaves_whole_files(tmp_path, monkeypatch):
    quick(tmp_path)
    before = (tmp_path / "best_checkpoint.pt").read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        quick(tmp_path, epochs(5), resume=True)
    monkeypatch.undo()
    assert (tmp_path / "best_checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(ConfigError, match=r"train_split=1\.0.*guard_quantile=0.*patience=0.*seed=-1"):
        TrainingConfig(train_split=1.0, guard_quantile=0.0, patience=0, seed=-1)


def test_validation_figures_by_hand():
    """Two samples, two settings of 10 ms and 40 ms, always the same choice within a budget."""
    space = KnobSpace({"max_crops": [1, 4]})
    table = ProfileTable.from_arrays(space, ["a", "b"], [[0.0, 1.0], [1.0, 1.0]], [[10.0, 40.0], [30.0, 40.0]])
    guard, expected = StaticGuard(np.array([10.0, 40.0])), SettingMeans.fit(table)
    controller = GRPOController(
        1, 1, knob_values=space.to_dict(), latency_reference_ms=40.0, latency_ms=[20.0, 40.0], bounds_ms=[10.0, 40.0]
    )
    controller.start_from([0.5, 1.0])
    encoded = controller.encode(torch.zeros(2, 1), torch.zeros(2, 1))
    validation = Validation(table, encoded, expected, guard, "constrained", RewardWeights(), 0.01)
    figures = validation.measure(controller.eval())
    # budgets 14, 20, 24, 28 and 34 ms allow the first setting, 40 ms both
    assert figures["accuracy_mean"] == pytest.approx((5 * 0.5 + 1.0) / 6)
    assert figures["latency_mean"] == pytest.approx((5 * 20.0 + 40.0) / 6)
    assert figures["violation_rate"] == pytest.approx(4 / 12)  # 30 ms breaks all of the first five but 34
    assert figures["room_closed"] is None  # hindsight has nothing else to choose below 40 ms, and no more to win there
    # with no budget: 1 - p > 0.5 - p / 2 for every p below 1
    rewards = [(0.5 - 0.01 * 20 / 40)] * 5 + [1.0 - 0.01] + [1.0 - p for p in VALIDATION_PRICES]
    assert figures["reward_mean"] == pytest.approx(np.mean(rewards))
    assert len(validation.budget_shares) + len(VALIDATION_PRICES) == len(validation.contexts)


def test_validation_masks_what_was_not_measured():
    space = KnobSpace({"max_crops": [1, 4]})
    nan = math.nan
    table = ProfileTable.from_arrays(space, ["a", "b"], [[nan, 1.0], [1.0, 0.5]], [[nan, 40.0], [10.0, 40.0]])
    controller = GRPOController(
        1, 1, knob_values=space.to_dict(), latency_reference_ms=40.0, latency_ms=[10.0, 40.0], bounds_ms=[10.0, 40.0]
    )
    encoded = torch.zeros(2, 2)
    guard = StaticGuard(np.array([10.0, 40.0]))
    figures = Validation(table, encoded, SettingMeans.fit(table), guard, "reward", RewardWeights(), 0.01).measure(
        controller
    )
    assert choose(controller, encoded, 20.0, 0.01).tolist() == [0, 0]
    assert figures["accuracy_mean"] == 1.0  # the sample whose chosen setting was not measured is left out
    assert figures["latency_mean"] == 10.0


SHARES = (0.5, 0.6, 0.7, 0.85)


@pytest.fixture(scope="module")
def held_out() -> tuple[Planted, dict[str, float]]:
    """A table with features of width 128 + 128, and the true accuracy on its test split, mean over `SHARES`, of the
    lookup table, of predict-then-argmax and of who knows the truth."""
    data = planted(1000, 250, 1000)
    parts = {side: data.table.subset(side) for side in ("train", "validation", "test")}
    features = {side: data.features.aligned(part.sample_ids) for side, part in parts.items()}
    expected = SettingMeans.fit(parts["train"])
    predictor = fit_predictor(parts["train"], features["train"], parts["validation"], features["validation"])
    predicted = predictor.predict(features["test"].image, features["test"].language)
    known = {"lookup": expected.accuracy, "predict": predicted, "best": data.truth[-1000:]}
    guard = StaticGuard.fit(parts["train"].latency_ms)
    masks = [guard.feasible_or_cheapest(np.full(1000, share * expected.reference_ms)) for share in SHARES]
    return data, {
        name: mean_truth(data, [expected.choose(accuracy, mask, 0.01) for mask in masks])
        for name, accuracy in known.items()
    }


def mean_truth(data: Planted, chosen: list[np.ndarray]) -> float:
    """True accuracy of choices for the test samples, ``[1000]`` each."""
    return float(np.mean([data.truth[-1000:][np.arange(1000), settings] for settings in chosen]))


@pytest.mark.parametrize("group", [None, 8])
def test_on_held_out_samples_it_beats_the_lookup_and_reaches_predict_then_argmax(tmp_path, held_out, group):
    """With the defaults of the package (all settings weighed) and of the guide (8 drawn)."""
    data, rival = held_out
    config = TrainingConfig(grpo=GRPOConfig(num_generations=group, num_epochs=7))
    controller = quick(tmp_path, config, (data.table, data.features)).controller
    arrays = (torch.from_numpy(data.features.image[-1000:]), torch.from_numpy(data.features.language[-1000:]))
    reference = controller.latency_reference_ms.item()
    encoded = controller.encode(*arrays)
    accuracy = mean_truth(data, [choose(controller, encoded, share * reference, 0.01) for share in SHARES])
    assert rival["best"] - rival["lookup"] > 0.05
    assert accuracy > rival["lookup"] + 0.7 * (rival["best"] - rival["lookup"])
    assert accuracy > rival["predict"] - 0.01


def test_a_higher_price_buys_less_latency(tmp_path):
    data = planted(300, 100, 100, width=8)
    result = quick(tmp_path, data=(data.table, data.features))
    encoded = result.controller.encode(torch.from_numpy(data.features.image), torch.from_numpy(data.features.language))
    mean = data.table.latency_ms.mean(axis=0)
    paid = [mean[choose(result.controller, encoded, math.inf, price)].mean() for price in (0.0, 0.05, 0.2, 1.0, 5.0)]
    assert all(a >= b for a, b in itertools.pairwise(paid))
    assert paid[-1] == pytest.approx(mean.min(), rel=0.05)


def test_the_reward_objective_maximises_the_guides_reward_and_says_so(tmp_path):
    lines: list[str] = []
    config = replace(QUICK, grpo=replace(QUICK.grpo, objective="reward"), weights=RewardWeights(gamma=2.5))
    result = quick(tmp_path, config, say=lines.append)
    assert "objective reward" in lines[0] and "2.5 max(0, l/b - 1)^2" in lines[0]
    assert result.metrics["reward_mean"] is not None


def saved(directory: Path) -> tuple[Path, Path]:
    table, features = tiny()
    table.save(directory / "t.parquet")
    features.save(directory / "f.safetensors")
    return directory / "t.parquet", directory / "f.safetensors"


def test_the_command_trains_from_files(tmp_path, capsys):
    table, features = saved(tmp_path)
    words = ["train", "--table", table, "--features", features, "--output_dir", tmp_path / "out", "--num_epochs", "2"]
    words = [str(word) for word in (*words, "--hidden_dim", "8", "--feature_dim", "2", "--group_size", "4")]
    assert cli.main(words) == 0
    assert "maximised (objective constrained)" in capsys.readouterr().out
    training = torch.load(tmp_path / "out" / "best_checkpoint.pt")["training"]
    assert training["grpo"]["num_generations"] == 4
    assert load_controller(tmp_path / "out").image_input.out_dim == 2
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group_size", "1"], "at least 2 settings"),
        (["--train_split", "1.5"], "leaves a side empty"),
        (["--reward_alpha", "-1"], "alpha=-1.0"),
        (["--price", "nan"], "default_price=nan"),
        (["--table", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["--data", "x.json"], "either --table and --features, or --data"),
    ],
)
def test_mistakes_on_the_command_line_end_with_2_and_a_message(tmp_path, capsys, words, message):
    table, features = saved(tmp_path)
    given = {"--table": str(table), "--features": str(features), "--output_dir": str(tmp_path / "out")}
    flags = given | dict(zip(words[::2], words[1::2], strict=True))
    assert cli.main(["train", *itertools.chain(*flags.items())]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
