"""Imports: units, scales, ids and gaps are checked, and nothing is taken for what it is not."""

import codecs
import json
import re

import numpy as np
import pandas as pd
import pytest

from budgetvlm.cli import main
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.importing.flat_tables import read_flat
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable


def rows(count=8, **cells):
    """Two settings a sample; a cell may be a function of sample and setting."""
    plain = {"sample_id": lambda i, c: f"q{i}", "max_crops": lambda i, c: c, "score": lambda i, c: (i + c) % 2}
    plain |= {"latency_ms": lambda i, c: 20.0 * c + i} | cells
    return [
        {name: cell(i, c) if callable(cell) else cell for name, cell in plain.items()}
        for i in range(count)
        for c in (1, 12)
    ]


def imported(tmp_path, given, *words, kind="csv"):
    path = tmp_path / f"r.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, given)))
    else:
        getattr(pd.DataFrame(given), f"to_{kind}")(path, index=False)
    flags = [
        "import",
        "table",
        "--input",
        path,
        "--knobs",
        "max_crops",
        "--output",
        tmp_path / "t.parquet",
        "--overwrite",
    ]
    return main([*map(str, flags), *words])


@pytest.mark.parametrize(
    ("cells", "words", "message"),
    [
        ({"latency_ms": lambda i, c: 0.02 * c + i / 100}, [], r"look like seconds.*--latency_unit s or"),
        ({"latency_ms": lambda i, c: 0.3 * c + 1}, [], "look like seconds"),
        ({"latency_ms": lambda i, c: 900.0 * c}, ["--latency_unit", "s"], "Are they milliseconds"),
        ({"seconds": lambda i, c: 30.0 * c}, ["--column", "latency_ms=seconds"], "look like seconds"),
        ({"t_us": lambda i, c: 3e4 * c}, ["--column", "latency_ms=t_us"], "look like another unit"),
        ({"latency_ms": lambda i, c: 3e7 * c}, [], "look like another unit"),
        ({"latency_ms": lambda i, c: 80.0 if i % 2 else 0.08}, [], "Have some of them another unit"),
        ({"latency_ms": lambda i, c: 80.0 if c == 1 else 0.12}, [], "Have some of them another unit"),
        ({"T_prefill_ms": 0.015}, [], r"stage prefill is 0\.0.*another unit"),
        ({"score": 1.0000001}, [], r"is 1\.0000001; it has to be 0 to 1"),
        ({}, ["--column", "score=latency_ms"], "cannot be both score and latency_ms"),
        ({"other": 1}, ["--column", "score=other", "--column", "score=max_crops"], "score is given twice"),
        ({"T_prefill_ms": lambda i, c: 800.0}, [], "stages of sample q0 are 800 ms in all.*one unit"),
        ({"T_prefill_ms": 0.02, "T_decode_ms": lambda i, c: 0.01 * c}, [], r"stage prefill is 0\.0.*another unit"),
        ({"score": lambda i, c: i % 2 * (100 if c == 1 else 1)}, ["--score_scale", "100"], "at max_crops=12 is abo"),
        ({"score": lambda i, c: i % 2}, ["--score_scale", "100"], "so they are fractions"),
        ({"score": lambda i, c: f"{i}%"}, [], "no column of numbers|not a column of numbers"),
        ({"sample_id": lambda i, c: f"q{i}" if i else None}, [], "column sample_id is empty in row 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_values_that_contradict_each_other_are_asked_about(tmp_path, capsys, cells, words, message, kind):
    assert imported(tmp_path, rows(**cells), *words, kind=kind) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_what_is_said_is_taken(tmp_path):
    assert imported(tmp_path, rows(latency_ms=lambda i, c: 0.02 * c), "--latency_unit", "s") == 0
    assert ProfileTable.load(tmp_path / "t.parquet").latency_ms[0].tolist() == [20, 240]
    assert imported(tmp_path, rows(latency_ms=lambda i, c: 0.25 * c), "--latency_unit", "ms") == 0
    assert ProfileTable.load(tmp_path / "t.parquet").latency_ms[0].tolist() == [0.25, 3]


def test_stages_fit_into_their_total():
    space = KnobSpace({"max_crops": [1, 2]})
    table = ProfileTable.from_arrays(space, ["a"], [[1, 0]], [[10, 20]], stages_ms={"p": [[6, np.nan]], "d": [[5, 20]]})
    assert table.stages_ms["d"][0, 1] == 20
    with pytest.raises(DataError, match=r"sample a are 120 ms in all, and its latency is 20 ms \(1 such cells\)"):
        ProfileTable.from_arrays(space, ["a"], [[1, 0]], [[10, 20]], stages_ms={"p": [[6, 100]], "d": [[4, 20]]})


@pytest.mark.parametrize(
    ("ids", "names", "by_index"),
    [
        (["000", "001"], ["000", "001"], False),
        (["0", "1"], ["0", "1"], True),
        ([0, 1], ["0", "1"], True),
        ([0.0, 1.0], ["0", "1"], True),
        (["7", "x"], ["7", "x"], False),
        ([b"a", b"b"], ["a", "b"], False),
        (["-1", "2"], ["-1", "2"], False),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_ids_are_text_from_the_first_byte(tmp_path, ids, names, by_index, kind):
    if isinstance(ids[0], bytes) and kind != "parquet":
        return
    path = tmp_path / f"r.{kind}"
    frame = pd.DataFrame({"sample_id": ids, "max_crops": 1, "score": 1, "latency_ms": 20, "image_id": ids})
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, frame.to_dict("records"))))
    else:
        getattr(frame, f"to_{kind}")(path, index=False)
    cells = read_flat(path, knobs=["max_crops"])
    assert (cells.sample_ids.tolist(), cells.by_index) == (names, by_index)
    assert cells.labels["group.image_id"].tolist() == names


def test_columns_of_json_lines_are_those_of_all_lines(tmp_path):
    given = rows()
    given[0] = {name: value for name, value in given[0].items() if name != "score"} | {"note": {"a": 1}}
    given[3] |= {"T_decode_ms": 3, "score": True}
    assert imported(tmp_path, given, kind="jsonl") == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert np.isnan(table.accuracy[0, 0]) and table.accuracy[1, 1] == 1 and table.stages_ms["decode"][1, 1] == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_foreign_encoding_is_named_and_a_mark_is_no_damage(tmp_path, kind, capsys):
    assert imported(tmp_path, rows(sample_id=lambda i, c: f"é{i}"), kind=kind) == 0
    path = tmp_path / f"r.{kind}"
    text = path.read_text(encoding="utf-8") if kind == "csv" else path.read_text().replace("\\u00e9", "é")
    flags = ["import", "table", "--input", str(path), "--knobs", "max_crops", "--output", str(tmp_path / "u.parquet")]
    for encoding, name in (("utf-16", "UTF-16"), ("latin-1", "Latin-1")):
        path.write_bytes(text.encode(encoding))
        assert main(flags) == 2
        assert f"not written in UTF-8 but in {name}" in capsys.readouterr().err.replace(
            "another encoding, probably ", ""
        )
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert main(flags) == 0


def log(tmp_path, lines, *words):
    """The same lines for two settings, with a latency."""
    runs = []
    for crops in (4, 12):
        folder = tmp_path / f"c{crops}"
        folder.mkdir(exist_ok=True)
        full = [{"latency_s": crops / 100, **line} for line in lines]
        (folder / "20260101_000000_samples_t.jsonl").write_text("\n".join(map(json.dumps, full)))
        runs += ["--run", f"max_crops={crops}={folder}"]
    flags = ["import", "lmms", *runs, "--latency_field", "latency_s", "--latency_unit", "s", "--overwrite"]
    return main([*flags, "--output", str(tmp_path / "t.parquet"), *words])


def test_a_latency_is_never_the_score_and_a_null_is_a_gap_wherever_it_stands(tmp_path, capsys):
    lines = [{"doc_id": i, "judge": None if i in (0, 3) else i % 2} for i in range(6)]
    lines[2]["latency_s"] = None
    assert log(tmp_path, lines) == 2
    assert "only 'judge', with a number in 4 of 6 lines" in capsys.readouterr().err
    assert log(tmp_path, lines, "--metric", "judge") == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert np.isnan(table.accuracy[:, 0]).tolist() == [True, False, False, True, False, False]
    assert np.isnan(table.latency_ms[:, 0]).tolist() == [False, False, True, False, False, False]
    assert log(tmp_path, [{"doc_id": i, "judge": None} for i in range(6)]) == 2
    assert log(tmp_path, [{"doc_id": i, "time_s": 0.5} for i in range(6)]) == 2
    assert "only 'time_s'" in capsys.readouterr().err


def test_facts_of_a_log_come_from_all_of_its_lines(tmp_path):
    lines = [{"doc_id": i, **({"judge": 1, "input_media": ["a.png"]} if i else {})} for i in range(4)]
    assert log(tmp_path, lines, "--metric", "judge") == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert np.isnan(table.accuracy[0]).all() and (table.accuracy[1:] == 1).all() and "image_id" not in table.groups


def test_several_filters_are_chosen_from(tmp_path, capsys):
    lines = [{"doc_id": i, "acc": int(f == "strict"), "filter": f} for i in range(4) for f in ("strict", "flexible")]
    assert log(tmp_path, lines) == 2
    assert "several filters; it has strict, flexible. Say which one with --filter" in capsys.readouterr().err
    for name, score in (("strict", 1), ("flexible", 0)):
        assert log(tmp_path, lines, "--filter", name) == 0
        assert (ProfileTable.load(tmp_path / "t.parquet").accuracy == score).all()
    assert log(tmp_path, lines, "--filter", "none") == 2
    assert log(tmp_path, [{"doc_id": i, "acc": 1} for i in range(4)], "--filter", "strict") == 2


def test_a_log_in_another_encoding_is_named(tmp_path, capsys):
    (tmp_path / "a_samples_t.jsonl").write_bytes('{"doc_id": 0, "acc": 1, "x": "é"}'.encode("latin-1"))
    words = ["import", "lmms", "--run", f"a=1={tmp_path}/a_samples_t.jsonl", "--output", str(tmp_path / "t.parquet")]
    assert main(words) == 2 and "not written in UTF-8" in capsys.readouterr().err


def test_a_few_slow_requests_are_no_other_unit(tmp_path):
    assert imported(tmp_path, rows(count=40, latency_ms=lambda i, c: 20.0 * c if i else 30_000.0)) == 0


def test_numbers_that_differ_by_rounding_are_one_value_of_a_knob(tmp_path):
    given = rows(max_crops=lambda i, c: c / 10 + 0.2 if i % 2 else {1: 0.3, 12: 1.4}[c])
    assert {row["max_crops"] for row in given} == {0.3, 0.1 + 0.2, 1.4}
    assert imported(tmp_path, given) == 0
    assert ProfileTable.load(tmp_path / "t.parquet").knob_space.to_dict() == {"max_crops": [0.3, 1.4]}


def test_what_is_measured_is_no_knob_and_a_column_has_one_name(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("sample_id,score,score,latency_ms,max_crops\n1,1,0,50,1\n")
    with pytest.raises(DataError, match="two columns 'score'"):
        read_flat(path, knobs=("max_crops",))
    with pytest.raises(ConfigError, match="latency_ms is measured"):
        read_flat(path, knobs=("max_crops", "latency_ms"))


@pytest.mark.parametrize("cell", [[1], {"acc": 1}])
def test_a_score_that_is_a_list_or_an_object_is_named(tmp_path, capsys, cell):
    assert imported(tmp_path, rows(score=lambda i, c: cell), kind="jsonl") == 2
    assert "column score is not a column of numbers" in capsys.readouterr().err


def runs(tmp_path, first, second):
    """Two logs of three samples, each line with what is given."""
    words = ["import", "lmms", "--output", tmp_path / "t.parquet", "--overwrite"]
    for crops, more in ((1, first), (12, second)):
        path = tmp_path / f"c{crops}" / "samples_t.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [{"doc_id": i, "token_counts": [{"latency_ms": 20.0 * crops}], "acc": i % 2} | more for i in range(3)]
        path.write_text("\n".join(map(json.dumps, lines)))
        words += ["--run", f"max_crops={crops}={path}"]
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"filter": "strict"}, {"filter": "flexible"}, "after filter flexible.*after filter strict"),
        ({"doc_hash": "a"}, {"doc_hash": "b"}, "another document than in an earlier run"),
        ({"target": "a"}, {"target": "b"}, "another document than in an earlier run"),
        ({"acc": None, "elapsed": 0.5}, {}, "it may be no score"),
        ({"acc": "x", "wer": 0.25}, {}, "it may be no score"),
    ],
)
def test_logs_that_do_not_belong_together_or_have_no_score(tmp_path, capsys, first, second, message):
    assert runs(tmp_path, {}, {}) == 0
    assert runs(tmp_path, first, second) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_log_is_of_one_setting_and_a_setting_has_one_value_of_each_knob(tmp_path, capsys):
    assert runs(tmp_path, {}, {}) == 0
    log, output = tmp_path / "c1", ["--output", str(tmp_path / "u.parquet")]
    assert main(["import", "lmms", "--run", f"max_crops=1={log}", "--run", f"max_crops=2={log}", *output]) == 2
    assert "is given for two settings" in capsys.readouterr().err
    assert main(["import", "lmms", "--run", f"max_crops=1,max_crops=2={log}", *output]) == 2
    assert "max_crops is given twice, 1 and 2" in capsys.readouterr().err
