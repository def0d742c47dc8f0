"""The tasks of others: read as they are, with their licence, and compared without a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import outside_tasks  # noqa: E402


def test_the_data_has_eleven_tasks_and_names_its_source_and_licence() -> None:
    assert len(outside_tasks.tasks()) == 11
    text = (ROOT / "benchmarks" / "data" / "README.md").read_text(encoding="utf-8")
    assert "Apache License 2.0" in text and "github.com/lchen001/FrugalML" in text


def test_services_are_in_the_order_of_their_prices() -> None:
    table, features = outside_tasks.load("FERPLUS", 500)
    prices = table.latency_ms[0]
    assert (np.diff(prices) > 0).all() and np.allclose(table.latency_ms, prices)
    assert table.num_samples == 500 == features.num_samples
    assert set(table.split) == {"train", "validation", "test"}
    assert features.language.sum(axis=1).tolist() == [1.0] * 500  # what the cheapest service answered, one of all


def test_a_task_is_read_the_same_way_each_time() -> None:
    one, two = outside_tasks.load("YELP", 100)[0], outside_tasks.load("YELP", 100)[0]
    assert one.sample_ids == two.sample_ids and np.array_equal(one.accuracy, two.accuracy) and one.split == two.split


def test_the_script_compares_and_prints_one_document() -> None:
    words = ["--tasks", "DIGIT", "--policies", "grpo", "--seeds", "0", "--max_samples", "60", "--json"]
    script = ROOT / "benchmarks" / "outside_tasks.py"
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["DIGIT"]["rows"]
    assert {row["key"] for row in rows} >= {"grpo", "lookup", "oracle"}
