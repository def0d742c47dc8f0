"""A data set goes through the commands: profiled, prepared, found again by its ids, one bad image left out."""

import importlib
import json

import numpy as np
import pytest
from small_data_sets import ROWS, picture, write_parquet
from test_made_features import write_encoder
from tiny_vlm import write_tiny_model

from budgetvlm.cli import command_parser, main
from budgetvlm.commands import task_arguments
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.tasks import SPLITS, TaskOptions, load_task

FLAGS = ["--data_files", "x.parquet", "--columns", "question=q", "--metric", "vqa", "--prompt", "{question}",
         "--repository", "a/b"]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["profile", "accuracy", "--max_new_tokens", "3"],
        ["profile", "latency", "--max_new_tokens", "3"],
        ["prepare"],
        ["calibrate", "--checkpoint", "c", "--max_new_tokens", "3"],
        ["evaluate", "--live", "--max_new_tokens", "3"],
    ],
)
def test_every_command_on_a_data_set_takes_the_same_flags(words):
    args = command_parser(words[0]).parse_args([*words[1:], "--dataset_name", "own", *FLAGS])
    options = task_arguments.task_options(args)
    assert options == TaskOptions("own", "x.parquet", "question=q", "vqa", "{question}", "a/b")


def test_the_longest_answer_is_the_flags(tmp_path):
    args = command_parser("calibrate").parse_args(["--checkpoint", "c", "--max_new_tokens", "3"])
    assert task_arguments.open_task(args).max_new_tokens == 3
    args.max_new_tokens = 0
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        task_arguments.open_task(args)


def write_data(tmp_path):
    """24 questions about 12 images; the image of two of them is corrupt."""
    rows = [
        {"img": picture(n // 2), "query": f"what is sign {n}", "gold": ["red"], "doc": f"d{n // 2}", "id": n}
        for n in range(24)
    ]
    for row in rows[6:8]:
        row["img"] = {"bytes": b"broken", "path": None}
    columns = [{**{k: v for k, v in row.items() if k != "img"}, "image_x": row["img"]} for row in rows]
    return write_parquet(tmp_path / "own.parquet", columns, row_group_size=5)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Both profiles of a data set of one's own, on a tiny model."""
    path = tmp_path_factory.mktemp("profiled")
    model, data = write_tiny_model(path / "model"), write_data(path)
    flags = ["--model_path", model, "--dataset_name", "own_data", "--data_files", data, "--metric", "vqa"]
    flags += ["--columns", "question=query,answers=gold,image=image_x,image_id=doc", "--prompt", r"{question}\nthe"]
    flags += ["--settings", "4,2,3", "--max_new_tokens", "2", "--num_threads", "1"]
    for kind, more in (("accuracy", ["--batch_size", "5"]), ("latency", ["--warmup", "0", "--repeats", "1"])):
        words = ["profile", kind, *flags, *more, "--output_dir", path / kind]
        assert main([str(word) for word in words]) == 0
    return path


def prepare(profiled, *words):
    flags = ["--exp5_dir", profiled / "accuracy", "--exp6_dir", profiled / "latency", "--dataset_name", "own_data"]
    flags += ["--model_path", profiled / "model", "--test_split", "0.25"]
    if "--output_data_path" not in words:
        flags += ["--output_data_path", profiled / "d.json"]
    return main([str(word) for word in ("prepare", *flags, *words)])


def test_prepare_finds_the_samples_again_by_what_the_profiles_remember(profiled, capsys):
    assert prepare(profiled) == 0
    said = capsys.readouterr().out
    assert "2 samples that could not be used were left out: train-6, train-7" in said
    prepared = load_prepared(profiled / "d.json")
    assert prepared.table.num_samples == 22
    assert prepared.table.metadata["exp5_config"]["task"]["prompt"] == r"{question}\nthe"
    sides = dict.fromkeys(zip(prepared.table.groups["image_id"], prepared.table.split, strict=True))
    assert len({image for image, _ in sides}) == len(sides) == 11  # no image on two sides
    assert {side for _, side in sides} == {"train", "validation", "test"}
    samples = json.loads((profiled / "d.json").read_text())["samples"]
    assert samples[0]["sample_id"] == "train-0" and samples[0]["groups"]["image_id"] == "own_data-d0"


def test_files_that_moved_are_given_anew_and_another_prompt_is_refused(profiled, tmp_path, capsys):
    moved = tmp_path / "moved.parquet"
    moved.write_bytes((profiled / "own.parquet").read_bytes())
    assert prepare(profiled, "--data_files", f"train={moved}", "--output_data_path", tmp_path / "e.json") == 0
    assert prepare(profiled, "--prompt", "{question}", "--output_data_path", tmp_path / "f.json") == 2
    assert "--prompt '{question}', but the profiles have" in capsys.readouterr().err


def test_fresh_samples_share_no_image_with_the_profiled_ones_and_can_be_used(profiled, tmp_path, capsys):
    options = TaskOptions(
        "own_data", str(profiled / "own.parquet"), "question=query,answers=gold,image=image_x,image_id=doc"
    )
    task = load_task(options)
    assert len(fresh_samples(task, "train", 22, 0)) == 22
    assert "skipped: sample train-6 of own_data cannot be used" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="23 samples were asked of own_data/train, and 22"):
        fresh_samples(task, "train", 23, 0)
    document = tmp_path / "d.json"
    assert prepare(profiled, "--output_data_path", document) == 0
    with pytest.raises(ConfigError, match="and 0 of its 24"):
        fresh_samples(task, "train", 1, 0, TrainedOn.of_table(load_prepared(document).table).seen(SPLITS))


def test_several_data_sets_go_through_the_commands(tmp_path, capsys):
    model, files = write_tiny_model(tmp_path / "model"), []
    for name in ("text_vqa", "pope"):
        files.append(f"{name}:validation={write_parquet(tmp_path / f'{name}.parquet', ROWS[name] * 4)}")
    rows = [{**row, "question_id": 100 * k + n} for k in range(4) for n, row in enumerate(ROWS["text_vqa"])]
    write_parquet(tmp_path / "text_vqa.parquet", rows)
    rows = [
        {**row, "question_id": f"{k}{n}", "image_source": f"i{k}"}
        for k in range(4)
        for n, row in enumerate(ROWS["pope"])
    ]
    write_parquet(tmp_path / "pope.parquet", rows)
    flags = ["--model_path", model, "--dataset_name", "text_vqa,pope", "--data_files", ",".join(files)]
    flags += ["--split", "validation", "--settings", "4,2,3", "--max_new_tokens", "2"]
    for kind, more in (("accuracy", []), ("latency", ["--warmup", "0", "--repeats", "1"])):
        assert main([str(w) for w in ("profile", kind, *flags, *more, "--output_dir", tmp_path / kind)]) == 0
    words = ["prepare", "--exp5_dir", tmp_path / "accuracy", "--exp6_dir", tmp_path / "latency", "--dataset_name"]
    words += ["text_vqa,pope", "--model_path", model, "--output_data_path", tmp_path / "d.json"]
    assert main([str(word) for word in words]) == 0
    joined = load_prepared(tmp_path / "d.json")
    table, names = joined.table, np.array(joined.table.groups["dataset"])
    for name, count in (("text_vqa", 12), ("pope", 16)):
        own = load_prepared(tmp_path / f"d.{name}.json")  # what is trained on alone
        rows = np.flatnonzero(names == name)
        assert [table.sample_ids[row] for row in rows] == [f"{name}/{one}" for one in own.table.sample_ids]
        assert len(rows) == count and set(np.array(table.split)[rows]) >= {"train", "validation"}
        np.testing.assert_array_equal(joined.features.image[rows], own.features.image)
    # data set, files and answers of both are known to what is trained on it, and samples are known again
    opened = TrainedOn.of_table(table).opened
    assert opened["dataset_name"] == "text_vqa+pope" and opened["task"] == {"data_files": ",".join(files)}
    alone = TrainedOn.of_table(load_prepared(tmp_path / "d.pope.json").table).seen(SPLITS)
    assert alone and alone <= TrainedOn.of_table(table).seen(SPLITS)
    assert main([str(word) for word in words]) == 0  # what is there is used
    assert capsys.readouterr().out.count("using the data in") == 2
    words[words.index(tmp_path / "d.json")] = tmp_path / "e.json"
    assert main([str(word) for word in (*words, "--encoder", write_encoder(tmp_path / "encoder", "text"))]) == 0
    made = load_prepared(tmp_path / "e.json").features  # what makes them is fitted to the samples of both
    assert "encoder" in made.metadata["extractor"] and made.num_samples == table.num_samples


def test_the_train_split_is_reported_only_live_and_without_what_was_profiled(capsys):
    assert main(["evaluate", "--split", "train", "--data", "d.json"]) == 2
    assert "what the controller was trained on" in capsys.readouterr().err
    assert main(["evaluate", "--live", "--split", "train", "--checkpoint", "c"]) == 2
    assert "give its --data, so that it is left out" in capsys.readouterr().err


def test_the_guides_script_hands_the_flags_on(monkeypatch, tmp_path):
    script = importlib.import_module("experiments.controller.train_controller")
    from budgetvlm.profiling.prepare import preparation as module

    given = {}

    def prepare(options, **_):
        given.update(vars(options))
        raise DataError("enough")

    monkeypatch.setattr(module, "prepare", prepare)
    assert script.main(["--dataset_name", "own", *FLAGS]) == 2
    assert given["task"] == TaskOptions("own", "x.parquet", "question=q", "vqa", "{question}", "a/b")
    assert "--data_files x.parquet" in script.training_command(script.parser().parse_args(FLAGS))
