"""The same data is the same wherever it lies, other data is other data; stored answers are scored by another metric."""

import json
import os
import shutil

import numpy as np
import pytest
from small_data_sets import png
from tiny_vlm import write_tiny_model

from budgetvlm.cli import main
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.profiling.results.reading import iter_results

DATA = "own.jsonl"


def write_data(folder, answer="the sign"):
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(16):
        (folder / f"{n}.png").write_bytes(png(n))
        rows.append({"image": f"{n}.png", "question": f"what is {n}?", "answer": answer, "id": f"{n:03}"})
    (folder / DATA).write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two settings, profiled from a relative path."""
    path = tmp_path_factory.mktemp("same")
    write_tiny_model(path / "model")
    write_data(path / "data")
    for kind in ("accuracy", "latency"):
        assert profile(path, kind, path / "data", relative=True) == 0
    return path


def profile(path, kind, data, *words, relative=False, model=None):
    files = os.path.relpath(data / DATA) if relative else data / DATA
    flags = ["--model_path", model or path / "model", "--dataset_name", "own", "--data_files", files]
    flags += ["--settings", "4,2,3;4,2,4", "--max_new_tokens", "2", "--num_threads", "1", "--output_dir", path / kind]
    more = ["--warmup", "0", "--repeats", "1"] if kind == "latency" else []
    return main([str(word) for word in ("profile", kind, *flags, *more, *words)])


def prepare(path, *words):
    flags = ["--exp5_dir", path / "accuracy", "--exp6_dir", path / "latency", "--dataset_name", "own"]
    flags += ["--model_path", path / "model", "--output_data_path", path / "d.json", "--train_split", "0.5"]
    return main([str(word) for word in ("prepare", *flags, *words)])


def test_a_sweep_goes_on_with_data_model_and_results_that_moved(measured, tmp_path, capsys):
    for name in ("data", "model", "accuracy", "latency"):
        shutil.copytree(measured / name, tmp_path / name)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    shutil.move(tmp_path / "model", tmp_path / "there")
    assert profile(tmp_path, "accuracy", tmp_path / "elsewhere", model=tmp_path / "there") == 0
    assert "4 of 4 settings are finished already" in capsys.readouterr().out
    next(
        tmp_path.glob("accuracy/*/*blocks4.json")
    ).unlink()  # one setting is measured at the new place, and joined with what was measured at the old one
    assert profile(tmp_path, "accuracy", tmp_path / "elsewhere", model=tmp_path / "there") == 0
    shutil.move(tmp_path / "there", tmp_path / "model")
    assert prepare(tmp_path, "--data_files", str(tmp_path / "elsewhere" / DATA)) == 0
    assert load_prepared(tmp_path / "d.json").table.num_samples == 16
    assert load_prepared(tmp_path / "d.json").table.sample_ids[0] == "train-000"


@pytest.mark.parametrize("change", ["answer", "image"])
def test_other_data_under_the_same_path_is_other_data(measured, tmp_path, capsys, change):
    for name in ("data", "accuracy"):
        shutil.copytree(measured / name, tmp_path / name)
    if change == "answer":
        write_data(tmp_path / "data", "another")
    else:
        (tmp_path / "data" / "3.png").write_bytes(png(99))
    assert profile(tmp_path, "accuracy", tmp_path / "data", model=measured / "model") == 2
    assert "was made with other samples_digest" in capsys.readouterr().err


def rescore(path, *words):
    flags = ["rescore", "--dataset_name", "own", "--exp5_dir", path / "accuracy", *words]
    return main(list(map(str, flags)))


def test_stored_answers_are_scored_by_another_metric(measured, tmp_path, capsys):
    for name in ("data", "accuracy", "latency"):
        shutil.copytree(measured / name, tmp_path / name)
    for path in tmp_path.glob("accuracy/*/*.json"):  # answers that the metrics tell apart
        document = json.loads(path.read_text())
        for sample in document["all_samples"]:
            sample["pred"] = "the sing"
        path.write_text(json.dumps(document))
    assert rescore(tmp_path, "--metric", "anls", "--output_dir", tmp_path / "anls") == 0
    assert "accuracy 0.0% before, 75.0% by anls" in capsys.readouterr().out
    for result in iter_results(tmp_path / "anls", "own", "accuracy"):
        assert {record.score for record in result.records} == {0.75}
        assert result.config["task"]["metric"] == "anls" and len(result.records) == 16
    shutil.rmtree(tmp_path / "accuracy")
    shutil.move(tmp_path / "anls", tmp_path / "accuracy")
    shutil.copytree(measured / "model", tmp_path / "model")
    assert prepare(tmp_path) == 0  # with the latencies that are there
    table = load_prepared(tmp_path / "d.json").table
    assert np.allclose(table.accuracy[~np.isnan(table.accuracy)], 0.75)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no metric was given"),
        (["--metric", "blue"], "metric='blue' is unknown"),
        (["--metric", "cider"], "would have been asked otherwise"),
        (["--metric", "yes_no"], "needs yes or no"),
    ],
)
def test_what_cannot_be_scored_is_refused(measured, tmp_path, capsys, words, message):
    assert rescore(measured, *words, "--output_dir", tmp_path / "new") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert rescore(measured, "--metric", "anls", "--output_dir", measured / "accuracy") == 2
    assert "exists. To replace it, add --overwrite" in capsys.readouterr().err
