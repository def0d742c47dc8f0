"""The whole way with a model and data of one's own: the commands of docs/own-model.md, as they stand there.

The model has random weights, so the gold answers are what it says itself at the full setting: cheaper settings are then
right sometimes.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_data_sets import write_parquet
from test_docs import commands
from tiny_families import BUILDERS, ID, NAMES, WORDS, write_tiny, write_tiny_family

from budgetvlm.cli import main
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.tasks import TaskOptions, load_task
from budgetvlm.vlm import load_vlm

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-model.md"
STEPS = [words[1:] for words in commands(PAGE) if words[0] == "budgetvlm"]
QUESTIONS = ["what is the total", "what is the sum", "what colour is the sign", "the code of the red sign"]
KNOBS = {"max_crops": [1, 4], "top_k": [1, 4]}
COLUMNS = "question=ask,answers=gold,image=photo"
ONCE = {"model_path", "dataset_name", "data_files", "columns", "metric", "prompt", "split", "max_new_tokens"}


def write_world(root: Path) -> None:
    """A model and 64 questions about 32 images, where the page expects them."""
    directory = root / "models" / "my-model"
    config, *others = BUILDERS["qwen3_vl_moe"]()
    config.text_config.num_hidden_layers = 2  # no knob of it is tried here, and time is short
    write_tiny(config, *others, directory, NAMES["qwen3"])
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][[i for word, i in ID.items() if word not in WORDS]] = 0  # so that it says words
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    knobs = json.loads((directory / "knobs.json").read_text())
    (directory / "knobs.json").write_text(json.dumps({**knobs, "knob_space": KNOBS}))
    rng, rows = np.random.default_rng(0), []
    (root / "images").mkdir()
    for number in range(32):
        image = Image.fromarray(rng.integers(0, 255, (24 + 8 * (number % 4), 48, 3), dtype=np.uint8))
        image.save(root / "images" / f"{number}.png")
        for question in rng.choice(QUESTIONS, 2, replace=False).tolist():
            rows.append({"photo": f"images/{number}.png", "ask": question, "gold": "x", "place": [number, 1]})
    write_lines(root / "receipts.jsonl", rows)
    task = load_task(TaskOptions("receipts", str(root / "receipts.jsonl"), COLUMNS, "exact_match"))
    vlm = load_vlm(str(directory))
    for row, sample in zip(rows, task.samples("train"), strict=True):
        made = vlm.generate(sample.load_image(), sample.question, vlm.knob_space.full, max_new_tokens=8)
        row["gold"] = made.text
    write_lines(root / "receipts.jsonl", rows)
    Image.open(root / "images" / "0.png").save(root / "photo.png")
    for row in rows:
        row["photo"] = {"bytes": (root / row["photo"]).read_bytes(), "path": None}
    write_parquet(root / "receipts.parquet", rows, row_group_size=17)


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(words, kind, capsys):
    words = [word.replace("receipts.jsonl", f"receipts.{kind}") for word in words]
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, f"{shlex.join(words)}\n{out}\n{err}"
    return out, err


def flags_of(words):
    return {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}


def test_the_page_names_each_value_once_and_every_step():
    names = [words[0] for words in STEPS]
    assert list(dict.fromkeys(names)) == [
        "check-model", "profile", "prepare", "train", "evaluate", "calibrate", "ask", "explain", "compare", "report",
    ]  # fmt: skip
    assert any("--live" in words for words in STEPS)
    given = [flag for words in STEPS for flag in sorted(flags_of(words) & ONCE)]
    assert len(given) == len(set(given))
    documented = " ".join(path.read_text() for path in [*PAGE.parent.glob("*.md"), PAGE.parents[1] / "README.md"])
    assert all(f"--{flag}" in documented for words in STEPS for flag in flags_of(words))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world, in which the JSONL way leaves its results for the Parquet way."""
    root = tmp_path_factory.mktemp("own")
    write_world(root)
    return root


def walk(steps, kind, capsys):
    """Run steps of the page, and check what the first ones say and leave, which is the same for every kind of file."""
    said = {}
    for words in steps:
        name = " ".join(words[:2]) if words[0] == "profile" or "--live" in words else words[0]
        said[name] = run(words, kind, capsys)
    # the accuracies end the sweep; gold is the full setting's own answer, where it gave one
    shares = re.findall(
        r"^ *([\d.]+)%  max_crops=\d, top_k=\d  \(64 samples\)$", said["profile accuracy"][0], re.MULTILINE
    )
    assert len(shares) == 4 and max(map(float, shares)) == float(shares[-1]) > 50
    assert "as in the accuracy results in results/profiling/my-model/exp5_accuracy" in said["profile latency"][0]
    assert "28 samples are held back for `budgetvlm calibrate`" in said["prepare"][0]
    assert "the data set has no test split: a part is held out" in said["prepare"][0]
    assert (
        "next: budgetvlm evaluate --data data/controller_training_data.json --checkpoint checkpoints"
        in said["train"][0]
    )
    prepared = load_prepared("data/controller_training_data.json").table
    assert prepared.num_samples == 36 and set(prepared.split) == {"train", "validation", "test"}
    known = TrainedOn.read(Path("checkpoints/controller"))
    assert known.opened["model_path"] == "./models/my-model" and known.opened["calibration_split"] == "train"
    return said


def test_the_whole_way(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    said = walk(STEPS, "jsonl", capsys)
    assert "at most 5.0% of the requests late, from 28 requests" in said["calibrate"][0]
    assert "repeat it on another machine" in said["calibrate"][0] and "usual: 1.1 to 1.5" in said["calibrate"][0]
    assert "at most 5.0% may be late" in said["evaluate --live"][0]
    assert said["ask"][0].startswith("answer   ") and "note" not in said["ask"][1]
    page = Path("report.html").read_text()
    assert "data:image/jpeg;base64" in page and "no pictures" not in said["report"][1]
    guard = json.loads(Path("checkpoints/controller/guard.json").read_text())["origin"]
    known = TrainedOn.read(Path("checkpoints/controller"))
    assert guard["model"] == known.model and not set(guard["samples"]) & known.seen(("train", "validation", "test"))
    after_the_way("jsonl", capsys)


def test_the_same_data_as_parquet_go_the_same_way(world, tmp_path, monkeypatch, capsys):
    """Everything is made anew but the times: those of the JSONL file are found to be of the same samples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(world / "models")
    (tmp_path / "receipts.parquet").symlink_to(world / "receipts.parquet")
    times = Path("results/profiling/my-model/exp6_latency")
    shutil.copytree(next(world.glob("results/profiling/*/exp6_latency")), times)
    said = walk(STEPS[:5], "parquet", capsys)
    assert "4 of 4 settings are finished already" in said["profile latency"][0]
    assert {**TrainedOn.read(Path("checkpoints/controller")).opened["task"]}["data_files"] == "receipts.parquet"


def after_the_way(kind, capsys):
    """What would be wrong without a sign is refused or said, on what the way has left behind."""
    data, checkpoint = "./data/controller_training_data.json", "./checkpoints/controller"
    # data prepared anew with other splits: its test samples were trained on
    assert main(["prepare", "--seed", "7", "--output_data_path", "data/again.json"]) == 0
    capsys.readouterr()
    for words in (["evaluate"], ["report", "--output", "again.html"]):
        assert main([*words, "--data", "data/again.json", "--checkpoint", checkpoint]) == 2
        assert re.search(r"\d+ of the \d+ test samples, or their images, were used to train", capsys.readouterr().err)
    # a sweep of another model beside this one's
    directory = write_tiny_family("qwen3_vl", Path("models") / "another")
    os.rename("results/profiling/my-model", "results/profiling/another")
    knobs = {**json.loads((directory / "knobs.json").read_text()), "knob_space": {"max_crops": [1, 4]}}
    (directory / "knobs.json").write_text(json.dumps(knobs))
    words = ["--model_path", str(directory), "--dataset_name", "receipts", "--data_files", f"receipts.{kind}"]
    words += ["--columns", COLUMNS]
    assert main(["profile", "accuracy", *words]) == 2
    assert "holds results of another model (./models/my-model" in capsys.readouterr().err
    # a budget that nothing keeps
    ask = ["ask", "--checkpoint", checkpoint, "--image", "photo.png", "--question", "what is the total"]
    assert main([*ask, "--budget_ms", "0.5"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"not even this setting, which may take [\d.]+ ms, fits into the budget, so", said)
    # a metric that nothing satisfies
    golds = [json.loads(line) for line in Path(f"receipts.{kind}").read_text().splitlines()]
    write_lines(Path("wrong.jsonl"), [{**row, "gold": "zebra"} for row in golds[:12]])
    words = ["--model_path", "./models/my-model", "--dataset_name", "wrong", "--data_files", "wrong.jsonl"]
    words += ["--columns", COLUMNS]
    assert main(["profile", "accuracy", *words]) == 0
    assert "every answer at every setting scores 0" in capsys.readouterr().out
    assert main(["calibrate", "--data", data, "--checkpoint", checkpoint, "--samples", "40"]) == 2
    assert "were used before" in capsys.readouterr().err
