"""The knob `model`: one table of several models, some of which lack settings that others have."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from budgetvlm.cli import main
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.latency_model import LatencyModel, Sizes
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.profiling.prepare.join import join
from budgetvlm.profiling.results.measurements import AccuracyRecord, LatencyRecord
from budgetvlm.profiling.results.reading import read_file
from budgetvlm.profiling.results.result_files import result_path, write_result
from budgetvlm.table import ProfileTable

# A small model without experts, which has them all, and a large one at both numbers.
SPACE = KnobSpace({"model": [2, 30], "max_crops": [1, 4], "top_k": [2, 8]})
LACKING = [k for k, setting in enumerate(SPACE.settings) if setting["model"] == 2 and setting["top_k"] == 2]
CONFIG = {"split": "train", "max_new_tokens": 4, "world_size": 1, "versions": {}}


def seconds(setting, steps: float = 3.0) -> dict[str, float]:
    """Stages in ms: each of them takes the larger model four times as long, and experts cost in prefill and decode."""
    larger, tiles, experts = (4.0 if setting["model"] == 30 else 1.0), setting["max_crops"], setting["top_k"] / 8
    return {
        "vision": larger * 5 * tiles,
        "prefill": larger * (4 + 2 * tiles * experts),
        "decode": larger * steps * (2 + experts),
    }


def tokens(setting) -> float:
    """Visual tokens: the small model has more of them for the same tiles, as a family of its own may."""
    return (80.0 if setting["model"] == 2 else 64.0) * setting["max_crops"]


def mixed(count: int = 90) -> tuple[ProfileTable, Features]:
    """Odd samples need the large model and 4 tiles, even ones are right everywhere."""
    rng = np.random.default_rng(0)
    hard = np.arange(count) % 2 == 1
    able = np.array([setting["model"] == 30 and setting["max_crops"] == 4 for setting in SPACE.settings])
    accuracy = np.where(hard[:, None], able[None], 1.0).astype(float)
    noise = rng.lognormal(0, 0.02, (count, len(SPACE)))
    stages = {n: np.array([seconds(s)[n] for s in SPACE.settings]) * noise for n in ("vision", "prefill", "decode")}
    for values in (accuracy, *stages.values()):
        values[:, LACKING] = np.nan
    counts = {"vision": np.tile([tokens(s) for s in SPACE.settings], (count, 1)), "language": np.full(noise.shape, 9.0)}
    split = ["train", "train", "validation", "test", "train"] * (count // 5)
    tokens_of = counts | {"output": np.full(noise.shape, 4.0)}
    ids, total = [f"s{i}" for i in range(count)], sum(stages.values())
    table = ProfileTable.from_arrays(SPACE, ids, accuracy, total, stages_ms=stages, tokens=tokens_of, split=split)
    return table, Features(table.sample_ids, np.eye(2)[hard.astype(int)], np.zeros((count, 1)))


def test_the_model_acts_on_every_stage_also_where_it_changes_the_tokens():
    table, _ = mixed()
    model = LatencyModel.fit(table)
    assert model.compute_knobs == ("model", "top_k")
    measured = np.setdiff1d(np.arange(len(SPACE)), LACKING)
    found = model.predict_stages(Sizes.of_table(table))
    for stage in ("vision", "prefill", "decode"):
        wanted = np.array([seconds(setting)[stage] for setting in SPACE.settings])
        np.testing.assert_allclose(np.median(found[stage], axis=0)[measured], wanted[measured], rtol=0.06)
    # what was never measured is between its neighbours in what it costs, and no less than nothing
    assert all(0 < model.predict_table(table)[:, k].mean() < 2 * table.latency_ms[:, -1].mean() for k in LACKING)


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    table, features = mixed()
    table.save(path / "t.parquet")
    features.save(path / "f.safetensors")
    words = ["--table", path / "t.parquet", "--features", path / "f.safetensors"]
    words += ["--output_dir", path / "c", "--num_epochs", "1", "--teachers", "0"]
    assert main(["train", *map(str, words)]) == 0
    return path


def test_a_setting_that_a_model_lacks_is_never_chosen(controller, capsys):
    guard = AdaptiveGuard.from_dict(json.loads((controller / "c" / "guard.json").read_text()))
    assert guard.latency.knob_space == SPACE
    words = ["--table", controller / "t.parquet", "--features", controller / "f.safetensors", "--json"]
    assert main(["evaluate", *map(str, words), "--checkpoint", str(controller / "c"), "--resamples", "20"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["settings"] == 6 and report["counts"]["evaluated_samples"] == 18
    chosen = [
        share["setting"] for policy in report["policies"] for at in policy["at_budget"] for share in at["settings"]
    ]
    assert {"model": 2, "max_crops": 1, "top_k": 8} in chosen
    assert not [setting for setting in chosen if setting["model"] == 2 and setting["top_k"] == 2]
    loaded = load_controller(controller / "c")
    for budget in (10.0, 40.0, 1e6):
        allowed = loaded.allowed(loaded.feasible(torch.tensor([budget])))
        assert not allowed[:, LACKING].any()


def test_results_of_several_models_make_one_table(tmp_path):
    """Result files name the model; what one of them lacks is not measured, and the space is that of all."""
    for number, setting in enumerate(SPACE.settings):
        if number in LACKING:
            continue
        own, counts = seconds(setting), (int(tokens(setting)), 9, 4)
        scored = [AccuracyRecord(f"s{i}", float(i % 2), "a", (), *counts, {"image_id": str(i)}) for i in range(4)]
        timed = [
            LatencyRecord(
                f"s{i}", sum(own.values()), own["prefill"], own["decode"], *counts, 1.0, None, own["vision"]
            ) for i in range(4)
        ]  # fmt: skip
        for kind, records in (("accuracy", scored), ("latency", timed)):
            blocks = {"num_total_blocks": 1, "active_block_indices": [0]}
            write_result(kind, tmp_path, "own", setting, records, blocks=blocks, config=CONFIG)
    path = result_path(tmp_path, "own", "accuracy", SPACE.full)
    assert path.name == "exp5_accuracy_results_model30_crops4_topk8.json" and path.exists()
    table, _ = join(tmp_path, tmp_path, "own")
    assert table.knob_space == SPACE and table.metadata["measured_settings"] == 6
    measured = np.setdiff1d(np.arange(len(SPACE)), LACKING)
    wanted = [sum(seconds(SPACE.settings[k]).values()) for k in measured]
    np.testing.assert_allclose(table.latency_ms[0, measured], wanted, rtol=1e-5)
    assert np.isnan(table.latency_ms[:, LACKING]).all() and np.isnan(table.accuracy[:, LACKING]).all()


def test_a_field_that_names_the_model_is_no_knob(tmp_path):
    """Tools write {"model": "smolvlm"} into their results."""
    config = CONFIG | {"model": "smolvlm"}
    path = write_result(
        "accuracy", tmp_path, "own", {"top_k": 2}, [AccuracyRecord("s", 1.0, "a")],
        blocks={"num_total_blocks": 1, "active_block_indices": [0]}, config=config,
    )  # fmt: skip
    assert read_file(path, "own", "accuracy").knobs == {"top_k": 2}


def test_where_no_model_has_the_full_setting_the_largest_measured_one_takes_its_place():
    table, features = mixed()
    accuracy, latency = table.accuracy.copy(), table.latency_ms.copy()
    accuracy[:, -1] = latency[:, -1] = np.nan
    table = replace(table, accuracy=accuracy, latency_ms=latency, stages_ms={})
    means = SettingMeans.fit(table)
    assert means.full == 6 and means.reference_ms == pytest.approx(float(np.median(latency[:, 6])))
    report = evaluate(table, features, {}, EvaluationOptions(resamples=5, prices=(0.1,), labels=()))
    assert report.full_accuracy == 1.0 and report.counts["settings"] == 5
    full = report.policy("full setting").at_budget[-1]
    assert [dict(one.setting) for one in full.settings] == [dict(SPACE.settings[6])]
