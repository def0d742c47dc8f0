"""Tables of others: read as they are, split by group, compared without a crash. Small made-up files stand for them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from budgetvlm.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import outside_tables  # noqa: E402
import outside_tasks  # noqa: E402


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one task of services and one table of settings, 120 samples each."""
    directory, rng, count = tmp_path_factory.mktemp("tables"), np.random.default_rng(0), 120
    hard = rng.random(count) < 0.5
    right = rng.random((count, 3)) < np.where(hard[:, None], [0.1, 0.5, 0.9], 0.9)
    task = {
        "cost_per_10k": np.array([5.0, 1.0, 2.0]), "correct": right[:, [2, 0, 1]].astype(np.int8),
        "conf": rng.random((count, 3)), "pred": np.tile(hard[:, None], (1, 3)).astype(int),
    }  # fmt: skip
    np.savez(directory / outside_tasks.FILE, **{f"FACES/{name}": values for name, values in task.items()})
    np.savez(
        directory / "words.npz", ids=np.arange(count).astype(str), group=(np.arange(count) // 4).astype(str),
        text=np.where(hard, "read the small print", "which colour is it"), correct=right.astype(np.float32),
        cost=np.tile([10.0, 20.0, 30.0], (count, 1)), knob=np.array("size"), values=np.array([1, 2, 2]),
    )  # fmt: skip
    return directory


def test_the_data_is_named_with_source_commit_and_licence() -> None:
    text = (ROOT / "benchmarks" / "data" / "README.md").read_text(encoding="utf-8")
    for part in ("VisionZip-exp", "@3edbf8f", "docvlm-eval", "@1760848", "DynaMath", "@598c3c3", "BLINK", "@2d6a779"):
        assert part in text
    assert "github.com/lchen001/FrugalML" in text and text.count("Apache-2.0") == 5 and "MIT" in text


def test_services_are_in_the_order_of_their_prices(tables: Path) -> None:
    assert outside_tasks.tasks(tables / outside_tasks.FILE) == ["FACES"]
    table, features = outside_tasks.load(tables / outside_tasks.FILE, "FACES", 100)
    assert np.array_equal(table.latency_ms, np.tile([1.0, 2.0, 5.0], (100, 1)))
    assert (np.diff(table.accuracy.mean(axis=0)) > 0).all()  # each price with its own service's answers
    assert table.num_samples == 100 == features.num_samples
    assert set(table.split) == {"train", "validation", "test"}
    assert features.language.sum(axis=1).tolist() == [1.0] * 100  # what the cheapest service answered, one of all


def test_a_fold_divides_no_group_and_its_features_see_the_training_samples_alone(tables: Path) -> None:
    outside = outside_tables.OutsideTable.load(tables / "words.npz")
    assert outside.table.knob_space.to_dict() == {"size": [1, 2, 3]}  # two settings share a value: numbered
    tested = []
    for number in range(3):
        table, features = outside.fold(number, 3)
        sides = np.array(table.split)
        groups = np.array(table.groups["image_id"])
        assert all(len(set(sides[groups == name])) == 1 for name in set(groups))
        tested += [name for name, side in zip(table.sample_ids, sides, strict=True) if side == "test"]
        train = sides == "train"
        changed = replace(outside, texts=tuple(np.where(train, outside.texts, "quite another text").tolist()))
        assert np.array_equal(changed.fold(number, 3)[1].language[train], features.language[train])
    assert sorted(tested) == sorted(outside.table.sample_ids)  # each sample is tested once


def test_a_difference_is_pooled_over_the_folds() -> None:
    folds = [np.array([0.1, *np.linspace(0.0, 0.2, 101)]), np.array([0.3, *np.linspace(0.2, 0.4, 101)])]
    pooled = outside_tables.Difference(folds).pooled
    assert (pooled.value, round(pooled.low, 4), round(pooled.high, 4)) == (pytest.approx(0.2), 0.105, 0.295)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("outside_tasks.py", "--tasks FACES --policies grpo --seeds 0 --max_samples 60 --json"),
        ("outside_tables.py", "--splits 2 --policies grpo lookup full predict --json {out}"),
    ],
)
def test_the_scripts_compare_and_write_one_document(tables: Path, tmp_path: Path, script: str, words: str) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks" / script, "--tables", tables, *words.format(out=out).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if out.exists():
        pooled = json.loads(out.read_text(encoding="utf-8"))["words"]["pooled"]
        assert {"mean grpo - mix", "request grpo - lookup", "request grpo - full"} <= set(pooled)
    else:
        assert {row["key"] for row in json.loads(done.stdout)["FACES"]["rows"]} >= {"grpo", "lookup", "oracle"}


@pytest.mark.parametrize("script", ["outside_tasks.py", "outside_tables.py"])
def test_a_directory_without_the_data_is_said_in_words(tmp_path: Path, script: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / script, "--tables", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "benchmarks/data/README.md" in done.stderr
    with pytest.raises(DataError, match="none of these tables"):
        outside_tables.OutsideTable.load(tmp_path / "missing.npz")
