"""Results of other programs: what arrives in the table, what is refused and what the message says."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data_sets import ROWS, png, write_parquet
from small_data_sets import picture as local_picture
from test_prepare import SPACE, ToyTask, ToyVLM
from test_ranks import write_tree
from tiny_vlm import write_tiny_model

from budgetvlm.cli import main
from budgetvlm.features import Features
from budgetvlm.importing.finish import FinishOptions, finish
from budgetvlm.importing.lmms_logs import LoggedRun
from budgetvlm.profiling.prepare.feature_extraction import Backend
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import TaskOptions, load_task

NAMES = [f"q{number}" for number in range(12)]
SETTINGS = [(1, 3), (1, 6), (4, 3), (4, 6)]


def measured(sample, setting):
    """Score and milliseconds of a made-up model: no two alike."""
    column = SETTINGS.index(setting)
    return round((7 * sample + 3 * column) % 13 / 13, 4), 10.0 * (column + 1) + sample


def flat_rows(samples=range(12), **more):
    return [
        {"sample_id": NAMES[s], "max_crops": c, "num_active_blocks": b, "score": score, "latency_ms": ms} | more
        for s in samples
        for c, b in SETTINGS
        for score, ms in [measured(s, (c, b))]
    ]


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_features(path, names=NAMES):
    rng = np.random.default_rng(0)
    np.savez(
        path, sample_ids=np.array(names), image=rng.normal(size=(len(names), 3)), language=np.ones((len(names), 2))
    )
    return path


def flat(tmp_path, rows=None, *words, name="r.csv"):
    if rows is not None:
        write_csv(tmp_path / name, rows)
    base = ["import", "table", "--input", tmp_path / name, "--knobs", "max_crops,num_active_blocks"]
    output = [] if "--output" in words else ["--output", tmp_path / "t.parquet"]
    return main([str(word) for word in (*base, *output, *words)])


def test_groups_are_named_once_and_no_split_parts_them(tmp_path, capsys):
    rows = [{**row, "book": f"b{NAMES.index(row['sample_id']) // 2}"} for row in flat_rows()]
    assert flat(tmp_path, rows, "--groups", "book", "--test_split", "0.34") == 0
    assert "split by book" in capsys.readouterr().out
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.unit == "book" and len(set(zip(table.units, table.split, strict=True))) == len(set(table.units)) == 6
    assert flat(tmp_path, None, "--groups", "shelf", "--overwrite") == 2
    assert "lacks the columns shelf" in capsys.readouterr().err
    assert flat(tmp_path, rows, "--groups", "book", "--overwrite") == 0  # six books are too few to hold some out
    assert "no test split: there are too few books" in capsys.readouterr().out
    assert flat(tmp_path, rows, "--groups", "sample_id", "--column", "group.book=book", "--overwrite") == 0
    parted = ["compare", "--table", str(tmp_path / "t.parquet"), "--groups"]
    assert main([*parted, "book"]) == 2
    assert re.search(r"--groups book does not fit .* share \d books", capsys.readouterr().err)
    assert main([*parted, "shelf"]) == 2
    assert "--groups shelf is no label of the table; it has book, sample_id" in capsys.readouterr().err


def test_a_csv_file_becomes_a_table_that_trains_a_controller(tmp_path, capsys):
    write_features(tmp_path / "f.npz")
    assert flat(tmp_path, flat_rows(), "--features", tmp_path / "f.npz", "--test_split", "0.25") == 0
    printed = capsys.readouterr().out
    assert (
        "12 samples (train 7, validation 2, test 3; split by " in printed
        and "4 settings, 48 of 48 cells" in printed
        and "next: budgetvlm train --table" in printed
    )
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.knob_space.to_dict() == {"max_crops": [1, 4], "num_active_blocks": [3, 6]}
    assert table.sample_ids == tuple(NAMES) and table.split.count("test") == 3
    for sample in range(12):
        for column, setting in enumerate(SETTINGS):
            score, ms = measured(sample, setting)
            assert table.accuracy[sample, column] == pytest.approx(score, abs=1e-6)
            assert table.latency_ms[sample, column] == pytest.approx(ms)
    words = ["train", "--table", tmp_path / "t.parquet", "--features", tmp_path / "t.features.safetensors"]
    assert main([*map(str, words), "--output_dir", str(tmp_path / "c"), "--num_epochs", "1"]) == 0
    assert (tmp_path / "c" / "best_checkpoint.pt").exists()


def test_columns_of_other_names_units_stages_tokens_and_labels(tmp_path, capsys):
    rows = [
        {"question": r["sample_id"], "max_crops": r["max_crops"], "depth": r["num_active_blocks"],
         "acc": 100 * r["score"], "time": r["latency_ms"] / 1e3, "T_prefill_ms": 0.004, "tok": 7,
         "image": "i" + r["sample_id"][1:], "image_id": "x"}
        for r in flat_rows()
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    columns = {
        "sample_id": "question", "num_active_blocks": "depth", "score": "acc", "latency_ms": "time",
        "tokens.output": "tok", "image_id": "image", "group.kind": "image_id",
    }  # fmt: skip
    more = [word for role, name in columns.items() for word in ("--column", f"{role}={name}")]
    assert flat(tmp_path, None, *more, "--score_scale", "100", "--latency_unit", "s", "--json", name="r.parquet") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["cells_with_both"], document["samples_without_gap"], document["features"]) == (48, 12, None)
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.latency_ms[3, 2] == pytest.approx(measured(3, (4, 3))[1])
    assert table.accuracy[3, 2] == pytest.approx(measured(3, (4, 3))[0], abs=1e-4)
    assert table.stages_ms["prefill"][0, 0] == pytest.approx(4.0)
    assert table.tokens["output"][0, 0] == 7
    assert (table.groups["image_id"][5], table.groups["kind"][5]) == ("i5", "x")


def test_duplicates_are_refused_or_put_together_as_asked(tmp_path, capsys):
    rows = [*flat_rows(), flat_rows()[5] | {"score": 0.0, "latency_ms": 100.0}]
    assert flat(tmp_path, rows) == 2
    error = capsys.readouterr().err
    assert "sample q1 at max_crops=1, num_active_blocks=6 (2 times)" in error and "--duplicates mean" in error
    assert not (tmp_path / "t.parquet").exists()
    score, ms = measured(1, (1, 6))
    for mode, expected in (("mean", (score / 2, (ms + 100) / 2)), ("last", (0.0, 100.0))):
        assert flat(tmp_path, rows, "--duplicates", mode, "--overwrite") == 0
        table = ProfileTable.load(tmp_path / "t.parquet")
        assert (table.accuracy[1, 1], table.latency_ms[1, 1]) == pytest.approx(expected, abs=1e-6)


def test_gaps_are_counted_and_kept_or_dropped(tmp_path, capsys):
    rows = flat_rows()
    del rows[6]
    rows[1] |= {"latency_ms": ""}
    assert flat(tmp_path, rows) == 0
    assert "2 of 12 samples lack score or latency at a setting: kept" in capsys.readouterr().out
    assert np.isnan(ProfileTable.load(tmp_path / "t.parquet").latency_ms).sum() == 2
    assert flat(tmp_path, rows, "--gaps", "drop", "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 10


BAD = [
    ({"score": 87.5}, (), "score of sample q0 at max_crops=1, num_active_blocks=3 is 87.5; .*--score_scale 100"),
    ({"score": -0.5}, (), "is -0.5; it has to be 0 to 1"),
    ({"latency_ms": 0}, (), "latency_ms of sample q0 .* is 0; it has to be above 0"),
    ({"latency_ms": "fast"}, (), "column latency_ms is not a column of numbers"),
    ({"max_crops": -1}, (), "knob max_crops is -1 in row 1"),
    ({"max_crops": ""}, (), "knob max_crops is nan in row 1"),
    ({}, ("--column", "score=acc"), "lacks the columns acc; it has sample_id, max_crops.*--column score=NAME"),
    ({}, ("--column", "scores=score"), "--column scores=score means nothing"),
    ({}, ("--column", "score"), "WHAT=NAME"),
    ({}, ("--train_split", "1"), "have to be shares"),
    ({}, ("--output", "x.csv"), "has to be the name of a .parquet file"),
    ({}, ("--features", "f.npz", "--model_path", "reference"), "not from both.*--model_path needs --dataset_name"),
    ({}, ("--data_files", "x.parquet"), "--data_files needs --dataset_name"),
]


@pytest.mark.parametrize(("change", "words", "message"), BAD)
def test_files_and_flags_that_cannot_work(tmp_path, capsys, change, words, message):
    rows = flat_rows()
    rows[0] |= change
    assert flat(tmp_path, rows, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not list(tmp_path.glob("t.*"))


def test_files_that_are_no_tables(tmp_path, capsys):
    for name, text, message in (
        ("none.csv", None, "does not exist"),
        ("r.xlsx", "x", "is of no known kind; give a .csv"),
        ("r.parquet", "no", "cannot be read as parquet"),
        ("r.csv", "sample_id,max_crops,num_active_blocks,score,latency_ms\n", "holds no measurements"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        assert flat(tmp_path, None, name=name) == 2
        assert message in capsys.readouterr().err


def test_what_is_there_is_not_replaced_unasked(tmp_path, capsys):
    assert flat(tmp_path, flat_rows()) == 0
    before = (tmp_path / "t.parquet").read_bytes()
    assert flat(tmp_path, flat_rows()) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "t.parquet").read_bytes() == before


def test_features_that_lack_a_sample_leave_nothing_behind(tmp_path, capsys):
    write_features(tmp_path / "f.npz", NAMES[:-1])
    assert flat(tmp_path, flat_rows(), "--features", tmp_path / "f.npz") == 2
    assert "1 of 12 samples have no features: q11" in capsys.readouterr().err
    assert not list(tmp_path.glob("t.*"))
    np.savez(tmp_path / "g.npz", image=np.ones((2, 2)))
    assert flat(tmp_path, flat_rows(), "--features", tmp_path / "g.npz") == 2
    assert "it needs the arrays sample_ids" in capsys.readouterr().err


def test_features_are_extracted_from_the_samples_that_the_numbers_mean(tmp_path):
    class Task(ToyTask):
        def num_samples(self, split):
            return 2 * len(self.sizes[split])

    table = ProfileTable.from_arrays(SPACE, ["3", "0", "8", "5"], np.ones((4, 4)), np.ones((4, 4)))
    backend = Backend(lambda name: Task(), lambda path, device: ToyVLM(), lambda path: "1")
    options = FinishOptions(tmp_path / "t.parquet", model_path="m", task=TaskOptions("toy"), split="train")
    table, features = finish(table, options, by_index=True, backend=backend, say=print)
    assert table.sample_ids == ("1-h", "0-w", "4-w", "2-h")  # two questions an image: what, how many
    assert features.image[:, 0].tolist() == [1.0, 0.0, 4.0, 2.0]
    assert table.groups["image_id"] == ("image 1", "image 0", "image 4", "image 2")
    assert Features.load(tmp_path / "t.features.safetensors").sample_ids == table.sample_ids


def test_what_the_ranks_repeated_is_left_out_and_the_results_say_the_split(tmp_path):
    class Task(ToyTask):
        def num_samples(self, split):
            return 2 * len(self.sizes[split])

    table = ProfileTable.from_arrays(
        SPACE, [str(n) for n in range(33)], np.ones((33, 4)), np.ones((33, 4)),
        metadata={"exp5_config": {"split": "train", "world_size": 3}},
    )  # fmt: skip
    backend = Backend(lambda name: Task(), lambda path, device: ToyVLM(), lambda path: "1")
    options = FinishOptions(tmp_path / "t.parquet", model_path="m", task=TaskOptions("toy"))
    said = []
    table, features = finish(table, options, by_index=True, backend=backend, say=said.append)
    assert len(table) == len(features) == 32
    assert any("1 samples were repeated" in line for line in said)


def test_replacing_a_table_takes_its_features_away(tmp_path):
    write_features(tmp_path / "f.npz")
    assert flat(tmp_path, flat_rows(), "--features", tmp_path / "f.npz") == 0
    assert flat(tmp_path, flat_rows(), "--overwrite") == 0
    assert not (tmp_path / "t.features.safetensors").exists()


# -- sample ids of a local data set ------------------------------------------------------------------------------------


def local_rows(names):
    """Results of others for four questions about two images, by whatever they call the questions."""
    return [
        {"sample_id": name, "max_crops": c, "num_active_blocks": 4, "score": (i + c) % 2, "latency_ms": 10 * c + i}
        for i, name in enumerate(names)
        for c in (1, 4)
    ]


@pytest.fixture
def questions(tmp_path):
    """coco_2014_vqa as it lies on the hub: rows 0 and 1 are about one image, 2 and 3 about another."""
    return write_parquet(tmp_path / "validation.parquet", ROWS["coco_2014_vqa"])


COCO = [f"validation-29714700{n}" for n in range(4)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([3, 0, 2, 1], ()),
        ([f"q{n}" for n in COCO], None),
        ([297147003, 297147000, 297147002, 297147001], ("--sample_ids", "name", "--split", "validation")),
        ([COCO[3], COCO[0], COCO[2], COCO[1]], ()),
    ],
)
def test_ids_of_others_are_found_in_a_local_data_set(tmp_path, questions, capsys, names, words):
    """A whole number is the row, a name the data set's own id, with the split before it or without."""
    known = ("--dataset_name", "coco_2014_vqa", "--data_files", questions, "--train_split", "0.5")
    code = flat(tmp_path, local_rows(names), *known, *(words or ()))
    if words is None:
        assert code == 2 and "4 of 4 profiled samples are not in coco_2014_vqa" in capsys.readouterr().err
        return
    assert code == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    row = {name: i for i, name in enumerate(table.sample_ids)}
    assert sorted(row) == COCO
    images = [table.groups["image_id"][row[name]] for name in COCO]
    assert images[0] == images[1] != images[2] == images[3]
    assert table.latency_ms[row[COCO[3]]].tolist() == [10, 40] and table.latency_ms[row[COCO[1]]].tolist() == [13, 43]


def test_numbers_need_to_know_the_split_and_stay_within_it(tmp_path, questions, capsys):
    write_parquet(tmp_path / "train.parquet", ROWS["coco_2014_vqa"][:2])
    both = f"train={tmp_path / 'train.parquet'},validation={questions}"
    words = ["--dataset_name", "coco_2014_vqa", "--data_files", both, "--train_split", "0.5"]
    assert flat(tmp_path, local_rows(range(4)), *words) == 2
    assert "say of which split of coco_2014_vqa with --split" in capsys.readouterr().err
    assert flat(tmp_path, local_rows(range(4)), *words, "--split", "train") == 2
    assert "sample_id 2 is a number and so an index in the split, but train" in capsys.readouterr().err
    assert flat(tmp_path, local_rows(range(4)), *words, "--split", "validation") == 0


def test_features_come_from_a_local_data_set_whose_columns_have_other_names(tmp_path):
    """From a file of lines and the images beside it."""
    (tmp_path / "photos").mkdir()
    lines = [{"query": f"what is {n}", "label": "red", "photo": f"photos/{n // 2}.png"} for n in range(4)]
    for n in range(2):
        (tmp_path / "photos" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "model").mkdir()
    words = ["--dataset_name", "mine", "--data_files", tmp_path / "mine.jsonl", "--columns",
             "question=query,answers=label,image=photo", "--model_path", write_tiny_model(tmp_path / "model"),
             "--train_split", "0.5"]  # fmt: skip
    assert flat(tmp_path, local_rows(range(4)), *words) == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    features = Features.load(tmp_path / "t.features.safetensors")
    assert features.sample_ids == table.sample_ids and len(set(table.groups["image_id"])) == 2
    first, second, third, _ = features.image
    assert np.array_equal(first, second) and not np.array_equal(second, third)


def test_logs_and_profiles_find_their_samples_too(tmp_path):
    rows = [{"question": f"what {n}?", "answers": ["a"], "image": local_picture(n // 2)} for n in range(12)]
    path = write_parquet(tmp_path / "train.parquet", rows)
    assert lmms(tmp_path, *runs_of(tmp_path), "--dataset_name", "mine", "--data_files", path) == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.sample_ids[3] == "train-3" and table.groups["image_id"][2] == table.groups["image_id"][3]
    write_tree(tmp_path, "train", size=100, count=20, timed=9)
    words = ["--exp5_dir", tmp_path / "exp5_accuracy", "--exp6_dir", tmp_path / "exp6_latency", "--output",
             tmp_path / "p.parquet", "--dataset_name", "signs"]  # fmt: skip
    assert main(["import", "profiles", *map(str, words)]) == 0  # without the model the numbers stay
    numbers = ProfileTable.load(tmp_path / "p.parquet").sample_ids
    assert main(["import", "profiles", *map(str, words), "--split", "train", "--overwrite"]) == 0
    samples = list(load_task("signs").samples("train"))
    names = tuple(samples[int(number)].sample_id for number in numbers)
    assert ProfileTable.load(tmp_path / "p.parquet").sample_ids == names


# -- logs of lmms-eval -------------------------------------------------------------------------------------------------


def log_line(sample, setting, cost=True, **more):
    score, ms = measured(sample, setting)
    line = {"doc_id": sample, "target": "a", "filtered_resps": "a", "resps": ["a"], "token_counts": [None],
            "doc_hash": "0", "input_media": [f"images/{sample // 2}.png"], "input": "what",
            "vqa_acc": score}  # fmt: skip
    if cost:
        knobs = {"max_crops": setting[0], "num_active_blocks": setting[1]}
        line["token_counts"] = [{"output_tokens": 2, "latency_ms": ms, "setting": knobs, "stages_ms": {"decode": 2.0}}]
    return line | more


def write_log(folder, setting, samples=range(12), task="vqa", date="20260101_000000", **more):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}_samples_{task}.jsonl"
    path.write_text("".join(json.dumps(log_line(s, setting, **more)) + "\n" for s in samples))
    return path


def lmms(tmp_path, *words):
    return main(["import", "lmms", "--output", str(tmp_path / "t.parquet"), *map(str, words)])


def runs_of(tmp_path, **more):
    words = []
    for crops, blocks in SETTINGS:
        folder = tmp_path / f"run_{crops}_{blocks}" / "model=x"
        write_log(folder, (crops, blocks), **more)
        words += ["--run", f"max_crops={crops},num_active_blocks={blocks}={folder.parent}"]
    return words


def check(table):
    for sample in range(12):
        for column, setting in enumerate(SETTINGS):
            score, ms = measured(sample, setting)
            assert table.accuracy[sample, column] == pytest.approx(score, abs=1e-6)
            assert table.latency_ms[sample, column] == pytest.approx(ms)


def test_a_run_for_each_setting_becomes_a_table(tmp_path, capsys):
    assert lmms(tmp_path, *runs_of(tmp_path)) == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    check(table)
    assert table.sample_ids == tuple(map(str, range(12)))
    assert table.groups["image_id"][5] == "images/2.png" and table.stages_ms["decode"][0, 0] == 2.0
    for image in set(table.groups["image_id"]):
        assert len({side for side, i in zip(table.split, table.groups["image_id"], strict=True) if i == image}) == 1


def test_runs_of_a_manifest_and_runs_that_say_their_setting(tmp_path):
    runs_of(tmp_path)
    runs = [{"setting": {"max_crops": c, "num_active_blocks": b}, "path": f"run_{c}_{b}"} for c, b in SETTINGS]
    (tmp_path / "m.json").write_text(json.dumps(runs))
    assert lmms(tmp_path, "--manifest", tmp_path / "m.json") == 0
    check(ProfileTable.load(tmp_path / "t.parquet"))
    silent = [word for c, b in SETTINGS for word in ("--run", tmp_path / f"run_{c}_{b}")]
    assert lmms(tmp_path, *silent, "--overwrite") == 0
    check(ProfileTable.load(tmp_path / "t.parquet"))


def test_latencies_of_another_field_or_file(tmp_path, capsys):
    words = runs_of(tmp_path, cost=False, extra={"seconds": 0.25})
    assert lmms(tmp_path, *words, "--latency_field", "extra.seconds", "--latency_unit", "s", "--metric", "vqa_acc") == 0
    assert ProfileTable.load(tmp_path / "t.parquet").latency_ms[0, 0] == 250
    assert lmms(tmp_path, *words, "--metric", "vqa_acc", "--overwrite") == 2
    assert "the results have no latency" in capsys.readouterr().err
    per_setting = [{"max_crops": c, "num_active_blocks": b, "latency_ms": 10 * c + b} for c, b in SETTINGS]
    more = ["--metric", "vqa_acc", "--overwrite", "--latencies", write_csv(tmp_path / "l.csv", per_setting)]
    assert lmms(tmp_path, *words, *more) == 0
    assert ProfileTable.load(tmp_path / "t.parquet").latency_ms[7].tolist() == [13, 16, 43, 46]
    write_csv(tmp_path / "l.csv", per_setting[1:])
    assert lmms(tmp_path, *words, *more) == 2
    assert "has no latency of max_crops=1, num_active_blocks=3" in capsys.readouterr().err


def test_several_metrics_tasks_and_dates_have_to_be_told_apart(tmp_path, capsys):
    words = runs_of(tmp_path, other={"score": 1, "why": "x"})
    assert lmms(tmp_path, *words) == 2
    assert "has several metrics; it has vqa_acc, other.score. Say which" in capsys.readouterr().err
    assert lmms(tmp_path, *words, "--metric", "f1") == 2
    assert "has no metric 'f1'" in capsys.readouterr().err
    assert lmms(tmp_path, *words, "--metric", "other.score") == 0
    assert ProfileTable.load(tmp_path / "t.parquet").accuracy.min() == 1
    for crops, blocks in SETTINGS:
        write_log(tmp_path / f"run_{crops}_{blocks}", (crops, blocks), task="doc")
    assert lmms(tmp_path, *words, "--metric", "vqa_acc", "--overwrite") == 0
    assert set(ProfileTable.load(tmp_path / "t.parquet").sample_ids) >= {"doc:0", "vqa:0"}
    assert lmms(tmp_path, *words, "--task", "doc", "--overwrite") == 0
    assert ProfileTable.load(tmp_path / "t.parquet").sample_ids[0] == "0"
    write_log(tmp_path / "run_1_3", (1, 3), task="doc", date="20260102_000000")
    assert lmms(tmp_path, *words, "--task", "doc", "--overwrite") == 2
    assert "holds several logs of doc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no runs were given"),
        (["--run", "a=1=nowhere"], "nowhere does not exist"),
        (["--run", "a=x=nowhere"], "have to be numbers"),
        (["--run", "a=1={empty}"], "holds no *_samples_*.jsonl"),
        (["--run", "a=1={log}", "--run", "b=1={log}"], "same knobs in every run; given a and b"),
        (["--run", "{bare}"], "does not say its setting"),
        (["--run", "a=1={cut}"], "line 2: not JSON"),
        (["--run", "a=1={other}"], "line 1, has no doc_id"),
        (["--run", "a=1={log}", "--run", "a=1={log}"], "12 cells occur more than once"),
        (["--run", "a=1={log}", "--score_scale", "0"], "above 0"),
        (["--run", "a=1={log}", "--latency_field", "x.y"], "has no field x.y; it has doc_id"),
    ],
)
def test_runs_that_cannot_be_used(tmp_path, capsys, words, message):
    files = {name: tmp_path / name / "samples_vqa.jsonl" for name in ("cut", "other")}
    (tmp_path / "empty").mkdir()
    log = write_log(tmp_path / "log", (1, 3))
    for path in files.values():
        path.parent.mkdir()
    files["cut"].write_text(log.read_text()[:400])
    files["other"].write_text('{"id": 1}\n')
    files |= {"log": log, "bare": write_log(tmp_path / "bare", (1, 3), cost=False), "empty": tmp_path / "empty"}
    assert lmms(tmp_path, *(word.format(**files) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.parquet").exists()


def test_a_run_is_a_setting_and_a_path():
    assert LoggedRun.parse("max_crops=4,top_k=8=logs/a=b") == LoggedRun(
        LoggedRun.parse("logs/a=b").path, (("max_crops", 4), ("top_k", 8))
    )
    assert LoggedRun.parse("logs").setting is None


# -- exp5 and exp6 without a model -------------------------------------------------------------------------------------


def test_profiles_of_unmerged_ranks_need_no_model(tmp_path, capsys):
    write_tree(tmp_path, "train", size=100, count=20, timed=9)
    write_features(tmp_path / "f.npz", np.arange(27))
    words = ["--exp5_dir", tmp_path / "exp5_accuracy", "--exp6_dir", tmp_path / "exp6_latency", "--features",
             tmp_path / "f.npz", "--output", tmp_path / "t.parquet"]  # fmt: skip
    assert main(["import", "profiles", *map(str, words)]) == 2
    assert "--dataset_name is needed" in capsys.readouterr().err
    assert main(["import", "profiles", *map(str, words), "--dataset_name", "signs", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["samples"], document["settings"], document["cells_with_both"]) == (27, 8, 216)
