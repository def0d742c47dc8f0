"""The benchmark of orders of blocks: it runs the blocks that it says, and compares like with like."""

import json
import sys
from pathlib import Path

import pytest
from tiny_vlm import ORDER, write_tiny_model

from budgetvlm.tasks import load_task
from budgetvlm.vlm import load_vlm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import block_selection


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_scores_are_those_of_the_model_with_just_these_blocks(directory):
    vlm, task = load_vlm(str(directory)), load_task("signs")
    task.score = lambda text, sample: sum(map(ord, text)) / 1000  # any two answers differ
    samples, width = list(task.samples("test", 3)), {"max_crops": 4, "top_k": 4}
    own, other = vlm.active_blocks(3), (0, 1, 3)
    assert own == (0, 2, 3) and tuple(ORDER[:2]) == (0, 3)
    found = block_selection.scores(vlm, task, samples, [own, other], [width], "test")[0]
    setting = vlm.knob_space.setting(**width, num_active_blocks=3)
    images, questions = [s.load_image() for s in samples], [s.question for s in samples]
    answers = vlm.generate_batch(images, questions, setting, max_new_tokens=task.max_new_tokens)
    assert found[0].tolist() == [task.score(answer.text, None) for answer in answers]
    assert found[1].tolist() != found[0].tolist()


def test_the_script_compares_all_orders_at_every_depth_and_width(directory, capsys, monkeypatch):
    words = ["--model_path", directory, "--num_samples", 6, "--calibration_samples", 2, "--random_orders", 2]
    monkeypatch.setattr("sys.argv", ["block_selection.py", *map(str, words), "--json"])
    assert block_selection.main() == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = ["all blocks", *["prefix", "similarity", "accuracy", "likelihood", "random"] * 2]
    assert [row["order"] for row in rows] == names * 2
    assert [row["num_active_blocks"] for row in rows[:11]] == [4, *[2] * 5, *[3] * 5]
    assert {(row["max_crops"], row["top_k"]) for row in rows} == {(4, 4), (1, 1)}
    for row in rows:
        assert all(len(blocks) == row["num_active_blocks"] for blocks in row.get("blocks", ()))
    assert [row["blocks"] for row in rows if row["order"] == "prefix"] == [[[0, 3]], [[0, 1, 3]]] * 2
    assert all(row["over_prefix"]["mean"] == 0 for row in rows if row["order"] == "prefix")


def test_what_cannot_be_compared_is_said(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["block_selection.py", "--random_orders", "0"])
    assert block_selection.main() == 2
    assert "1 at least" in capsys.readouterr().err
