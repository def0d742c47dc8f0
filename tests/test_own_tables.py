"""Tables of one's own: nothing is guessed from the first row, a type or a name; what is not understood is refused."""

import base64
import codecs
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data_sets import png

from budgetvlm.errors import BudgetVLMError, ConfigError, DataError, InputError
from budgetvlm.profiling.prepare.feature_extraction import extract_features
from budgetvlm.tasks import TaskOptions, load_task

datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def read(files, **options):
    task = load_task(TaskOptions("own", data_files=str(files), **options))
    return task, list(task.samples("train"))


def written(folder, rows, kind="jsonl"):
    """Rows with an image and a question, as JSON lines, as a Parquet file or as one shard for each row."""
    rows = [{"image": "0.png", "question": "what?", **row} for row in rows]
    path = folder / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        return path
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    names = [folder / f"s{n}.parquet" for n in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        pq.write_table(pa.Table.from_pylist([row]), name)
    return ",".join(map(str, names))


@pytest.mark.parametrize("kind", ["jsonl", "shards"])
def test_columns_are_those_of_all_rows_and_shards(folder, kind):
    rows = [{"answer": "red"}, {"answer": "B", "options": ["red", "green"], "hint": "Look."}]
    task, (opened, choice) = read(written(folder, rows, kind))
    assert (opened.options, choice.options, choice.answers) == ((), ("red", "green"), ("B",))
    assert choice.question.startswith("Look.\nwhat?\nA. red\nB. green\nAnswer with the option's letter")
    assert task.score("Red.", opened) == task.score("B", choice) == 1.0 and task.score("A", choice) == 0.0


ANSWERS = [
    (["cat"] * 10, "cat"),
    ("cat", "cat"),
    ('["cat", "dog"]', "dog"),
    ("['cat', 'dog']", "dog"),
    ({"answer": ["cat"] * 10, "answer_confidence": ["yes"] * 10}, "cat"),
    ([{"answer": "cat", "answer_id": 1}, {"answer": "cat", "answer_id": 2}], "cat"),
    ('[{"answer": "cat"}]', "cat"),
    ('{"answer": ["cat", "dog"]}', "dog"),
    ({"text": ["cat"], "answer_start": [3]}, "cat"),
    (3, "3"), (3.0, "3"), (1.5, "1.5"), (-2, "-2"), ("007", "007"), ([2, 3], "3"), ("[illegible]", "illegible"),
    (True, "yes"), (True, "True"), (False, "no"), ([False], "No."),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "said"), ANSWERS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_answers_mean_the_same_in_whatever_shape_they_come(folder, answer, said, kind):
    task, (sample,) = read(written(folder, [{"answer": answer}], kind))
    assert task.score(said, sample) == 1.0
    assert task.score("something else", sample) == task.score("", sample) == task.score("30", sample) == 0.0


def test_columns_of_pandas(folder):
    """A gap makes decimals of whole numbers and objects of booleans; answers are also arrays, categories, decimals."""
    columns = {
        "gap": ([3, None], "3"),
        "single": (np.array([0.1, np.nan], dtype=np.float32), "0.1"),
        "truth": ([True, None], "yes"),
        "category": (pd.Categorical(["cat", None]), "cat"),
        "array": ([np.array(["cat", "dog"]), None], "dog"),
        "bytes": ([b"cat", None], "cat"),
        "whole": (pd.array([3, None], dtype="Int64"), "3"),
    }
    frame = pd.DataFrame({"image": ["0.png"] * 2, "question": ["what?"] * 2})
    for name, (values, said) in columns.items():
        frame[name] = values
        frame.to_parquet(folder / "t.parquet")
        task, (first, second) = read(folder / "t.parquet", columns=f"answers={name}")
        assert task.score(said, first) == 1.0, name
        with pytest.raises(InputError, match="it has no answer"):
            second.load_image()
    frame[["image", "question", "gap"]].to_csv(folder / "t.csv", index=False)
    task, (first, _) = read(folder / "t.csv", columns="answers=gap")
    assert task.score("3", first) == 1.0 and task.score("30", first) == 0.0


def test_class_labels_go_by_their_names_wherever_they_lie(folder):
    label, text = datasets.ClassLabel(names=["green", "red"]), datasets.Value("string")
    features = {
        "image": text,
        "question": text,
        "plain": label,
        "listed": datasets.List(label),
        "objects": [{"answer": label}],
        "old": datasets.Sequence({"answer": label}),
    }
    rows = {
        "image": ["0.png"],
        "question": ["?"],
        "plain": [1],
        "listed": [[1]],
        "objects": [[{"answer": 1}]],
        "old": [{"answer": [1]}],
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(folder / "t.parquet"))
    for name in ("plain", "listed", "objects", "old"):
        assert read(folder / "t.parquet", columns=f"answers={name}")[1][0].answers == ("red",), name


def test_mixed_types_that_datasets_stores_as_json(folder):
    rows = [
        {"image": "0.png", "question": "?", "answer": a} for a in ("007", True, 3, "red", ["a", "b"], {"answer": "x"})
    ]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stored = datasets.load_dataset("json", data_files=str(folder / "m.jsonl"), split="train", cache_dir=str(folder))
    stored.to_parquet(str(folder / "m.parquet"))
    answers = [sample.answers for sample in read(folder / "m.parquet")[1]]
    assert answers == [("007",), ("yes", "true"), ("3",), ("red",), ("a", "b"), ("x",)]


@pytest.mark.parametrize(
    ("gold", "said", "other"),
    [(gold, "Yes.", "No.") for gold in (True, "yes", "Yes.", "True", 1, "1", 1.0)]
    + [(gold, "no", "yes") for gold in (False, "no", "FALSE", 0, "0")],
)
def test_yes_and_no_in_whatever_type(folder, gold, said, other):
    task, (sample,) = read(written(folder, [{"answer": gold}]), metric="yes_no")
    assert (task.score(said, sample), task.score(other, sample)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B.", "B)", "B. green", "(b) Green", "green", " Green ", 1, "1", 1.0, ["B"]]
)
@pytest.mark.parametrize(
    "options",
    [
        ["red", "green"],
        '["red", "green"]',
        "['red', 'green']",
        {"A": "red", "B": "green"},
        '{"A": "red", "B": "green"}',
        {"label": ["A", "B"], "text": ["red", "green"]},
        [{"label": "A", "text": "red"}, {"label": "B", "text": "green"}],
        ["red", "green", None],
    ],
)  # fmt: skip
def test_choices_as_letter_number_or_text_and_options_in_any_shape(folder, answer, options):
    _, (sample,) = read(written(folder, [{"answer": answer, "options": options}]))
    assert (sample.options, sample.answers) == (("red", "green"), ("B",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "E", "options": ["x", "y"]}, "'E' is none of its options"),
        ({"answer": 2, "options": ["x", "y"]}, "2 is none of its options.*from 0 on"),
        ({"answer": "2", "options": ["1", "2", "3"]}, "could be option B or C"),
        ({"answer": "a", "options": ["b", "a"]}, "could be option A or B"),
        ({"answer": "A", "options": ["x"]}, "two at least"),
        ({"answer": "A", "options": ["x", None, "y"]}, "without a gap"),
        ({"answer": "A", "options": "x, y"}, "write them as a list"),
        ({"answer": "A", "options": {"red": 1, "green": 2}}, "have to be A, B, C"),
        ({"answer": "['cat' 'dog']"}, "looks like a list"),
        ({"answer": "[1 2 3]"}, "looks like a list"),
        ({"answer": "['cat', 'dog'"}, None),
        ({"answer": {"ids": ["cat"], "weights": [1.0]}}, "ids, weights has no field answer"),
        ({"answer": [["cat"], ["dog"]]}, "list of lists"),
        ({"answer": float("inf")}, "the number inf"),
        ({"answer": ["A", "C"], "options": ["x", "y", "z"]}, "right options are A, C"),
        ({"answer": "maybe", "metric": "yes_no"}, "needs yes or no.*'maybe'"),
        ({"answer": "so x = 5", "metric": "multiple_choice"}, "scores 0 against itself"),
        ({"question": ["a", "b"], "answer": "x"}, "row 3: .'a', 'b'. is no text"),
        ({"answer": "x", "image_2": "1.png"}, "image, image_2 are columns of images.*--columns image=image"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_runs(folder, row, message):
    metric = row.pop("metric", None)
    if message is None:
        assert read(written(folder, [row]))[1][0].answers == ("['cat', 'dog'",)  # it does not end as a list does
        return
    with pytest.raises(DataError, match=message) as caught:
        read(written(folder, [{"answer": "x"} if metric is None else {"answer": "yes"}] * 2 + [row]), metric=metric)
    assert len(str(caught.value)) < 500


def test_numbers_that_count_from_1_are_asked_about(folder):
    rows = [{"answer": 1 + n % 3, "options": ["a", "b", "c", "d"]} for n in range(30)]
    with pytest.raises(DataError, match="none is 0: do they count from 1"):
        read(written(folder, rows))
    read(written(folder, [*rows, {"answer": 0, "options": ["a", "b"]}]))


@pytest.mark.parametrize("metric", [None, "multiple_choice"])
def test_letters_without_options_are_asked_about(folder, metric):
    rows = [{"answer": "ABC"[n], "a": "red", "b": "green", "c": "blue"} for n in range(3)]
    with pytest.raises(DataError, match=r"letters of options, and there are none.*options=A\+B"):
        read(written(folder, rows), metric=metric)
    assert read(written(folder, rows), metric="exact_match")[1][0].answers == ("A",)
    assert read(written(folder, rows), metric=metric, columns="options=a+b+c")[1][1].answers == ("B",)


def test_truth_is_yes_whatever_its_type(folder):
    for answer in (True, "True", "true"):
        task, (sample,) = read(written(folder, [{"answer": answer}]))
        assert [task.score(said, sample) for said in ("yes", "True.", "no", "false")] == [1, 1, 0, 0]
    assert read(written(folder, [{"answer": True}]), metric="vqa")[1][0].answers == ("yes",)


def test_gaps_are_no_questions_and_no_answers(folder):
    gaps = [None, float("nan"), "", " ", "nan", "NaN"]
    rows = [{"question": gap, "answer": "x"} for gap in [*gaps, "None", "null"]] + [{"answer": gap} for gap in gaps]
    for sample in read(written(folder, rows))[1]:
        with pytest.raises(InputError, match=r"it has no (question|answer)"):
            sample.load_image()
    assert read(written(folder, [{"answer": "none"}]))[1][0].answers == ("none",)


def vlmevalkit(folder, rows, encoding="utf-8"):
    path = folder / "m.tsv"
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def test_the_layout_of_vlmevalkit(folder):
    """Options are columns, the last ones may be empty; images are base64, or the index of the row that has it."""
    big = base64.b64encode(png(7) + bytes(200_000)).decode()
    row = {
        "index": 10,
        "image": big,
        "question": "which?",
        "A": "red",
        "B": "green",
        "C": "blue",
        "D": "",
        "answer": "C",
    }
    rows = [row, {**row, "index": 11, "image": "10", "D": "white", "answer": "D"}]
    task, (first, second) = read(vlmevalkit(folder, rows))
    assert [s.sample_id for s in (first, second)] == ["train-10", "train-11"]
    assert (first.options, second.options) == (("red", "green", "blue"), ("red", "green", "blue", "white"))
    assert first.load_image().getpixel((0, 0))[0] == second.load_image().getpixel((0, 0))[0] == 7
    assert first.image_id == second.image_id and task.score("D", second) == 1.0
    task, (first, _) = read(folder / "m.tsv", columns="options=A+B+C+D,sample_id=index")
    assert first.options == ("red", "green", "blue")
    with pytest.raises(ConfigError, match="only sample_id, image_id, options can"):
        read(folder / "m.tsv", columns="question=question+A")


@pytest.mark.parametrize("how", ["text", "data", "in an object", "in a list"])
def test_images_in_base64(folder, how):
    text = base64.b64encode(png(5)).decode()
    cell = {
        "text": text,
        "data": f"data:image/png;base64,{text}",
        "in an object": {"bytes": text},
        "in a list": [text],
    }[how]
    (sample,) = read(written(folder, [{"image": cell, "answer": "x"}]))[1]
    assert sample.load_image().getpixel((0, 0))[0] == 5 and sample.image_id.startswith("sha256-")


def test_several_images_in_a_cell_are_one_samples_error(folder):
    rows = [{"image": ["0.png", "1.png"]}, {"image": ["0.png"]}, {"question": "Is <image 2> red?"}]
    two, one, second = read(written(folder, [{"answer": "x", **row} for row in rows]))[1]
    assert one.load_image().size == (6, 5)
    with pytest.raises(InputError, match="it has 2 images"):
        two.load_image()
    with pytest.raises(InputError, match=r"it speaks of a second image \(<image 2>\)"):
        second.load_image()


def test_a_picture_that_is_stored_as_its_path_alone(folder):
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = {"image": [str(folder / "0.png")], "question": ["?"], "answer": ["x"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "t.parquet"))
    assert read(folder / "t.parquet")[1][0].load_image().size == (6, 5)
    row = {"image": {"bytes": None, "path": "/gone/0.png"}, "question": "?", "answer": "x"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "t.parquet")
    with pytest.raises(InputError, match=r"'/gone/0\.png' does not exist"):
        read(folder / "t.parquet")[1][0].load_image()


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (["000", "001"], ["000", "001"]),
        ([0, 1], ["0", "1"]),
        ([0.0, None], ["0", "row1"]),
        ([b"a", b"b"], ["a", "b"]),
        (["a ", " b"], ["a", "b"]),
    ],
)
def test_ids_are_text_from_the_first_byte(folder, ids, names):
    frame = pd.DataFrame({"image": "0.png", "question": "?", "answer": "x", "id": ids})
    frame.to_parquet(folder / "t.parquet")
    assert [s.sample_id for s in read(folder / "t.parquet")[1]] == [f"train-{name}" for name in names]
    if isinstance(ids[0], str):
        frame.to_csv(folder / "t.csv", index=False)
        assert [s.sample_id for s in read(folder / "t.csv")[1]] == [f"train-{name}" for name in names]


def test_an_image_id_that_restarts_in_each_document_lends_no_features(folder):
    rows = [{"image": f"{n}.png", "image_id": 0, "question": f"{n}?", "answer": "x"} for n in (0, 1, 0)]
    for kind in ("jsonl", "parquet"):
        samples = read(written(folder, rows, kind))[1]
        assert len({sample.image_id for sample in samples}) == 1

        class Eyes:
            def encode_overview(self, image):
                return type("Overview", (), {"feature": np.array([image.getpixel((0, 0))[0]], dtype=np.float32)})

            def question_feature(self, text):
                return np.ones(1, dtype=np.float32)

        assert extract_features(Eyes(), samples).image[:, 0].tolist() == [0, 1, 0]


ENCODINGS = {
    "UTF-16": codecs.BOM_UTF16_LE + "{}".encode("utf-16-le"),
    "Latin-1": '{"question": "café"}'.encode("latin-1"),
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_a_foreign_encoding_is_named(folder, name, kind):
    (folder / f"t.{kind}").write_bytes(ENCODINGS[name] * 20)
    with pytest.raises(DataError, match=f"not written in UTF-8.*{name}"):
        read(folder / f"t.{kind}")


def test_a_byte_order_mark_is_no_damage(folder):
    for kind, text in (
        ("csv", 'question,image,answer\nwhat?,0.png,"x"\n'),
        ("jsonl", '{"question": "what?", "image": "0.png", "answer": "x"}'),
    ):
        (folder / f"t.{kind}").write_bytes(codecs.BOM_UTF8 + text.encode())
        assert read(folder / f"t.{kind}")[1][0].answers == ("x",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,question,answer\n0.png,who, really?,x\n", "4 cells, but the first line names 3"),
        ("image,question,answer,answer\n0.png,who?,x,y\n", "two columns 'answer'"),
    ],
)
def test_cells_that_slip_are_no_rows(folder, text, message):
    (folder / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(folder / "t.csv")


def test_a_message_never_holds_a_long_cell(folder):
    for row in (
        {"image": "x" * 9000, "answer": "x"},
        {"answer": "y" * 9000, "options": ["a", "b"]},
        {"answer": "[1 " + "2 " * 9000 + "]"},
    ):
        with pytest.raises(BudgetVLMError) as caught:
            read(written(folder, [row]))[1][0].load_image()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("options", [["A. red", "B. green"], ["(B) green", "(A) red"], {"B": "green", "A": "red"}])
def test_options_with_letters_of_their_own_keep_them(folder, options):
    _, (sample,) = read(written(folder, [{"answer": "B", "options": options}]))
    assert (sample.options, sample.answers) == (("red", "green"), ("B",))
    names = ["J. Smith", "K. Smith"]
    assert read(written(folder, [{"answer": "K. Smith", "options": names}]))[1][0].options == tuple(names)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (pa.array(np.array([0.1, 3.0], np.float16)), ["0.1", "3"]),
        (pa.array([0.1, 3.0], pa.float32()), ["0.1", "3"]),
        (pa.array([1e-5, 1e16]), ["0.00001", "10000000000000000"]),
        (pa.array([-0.0, None]), ["0"]),
    ],
)
def test_numbers_are_written_as_people_write_them(folder, numbers, said):
    table = pa.table({"image": ["0.png"] * 2, "question": ["how many?"] * 2, "answer": numbers})
    pq.write_table(table, folder / "n.parquet")
    assert [answer for sample in read(folder / "n.parquet")[1] for answer in sample.answers] == said


def test_a_shard_without_the_column_of_answers_has_gaps(folder):
    first, second = read(written(folder, [{"label": "x"}, {"answer": "y"}], "shards"))[1]
    assert (first.answers, second.answers) == ((), ("y",))


def test_the_mark_of_an_image_is_not_asked_and_two_are_two_images(folder):
    questions = ["<image>\nwhat?", "what? <image>", "<image>\n<image>\nwhich differs?"]
    before, behind, two = read(written(folder, [{"question": text, "answer": "x"} for text in questions]))[1]
    assert before.question == behind.question == read(written(folder, [{"answer": "x"}]))[1][0].question
    with pytest.raises(InputError, match="a second image"):
        two.load_image()


@pytest.mark.parametrize("how", ["bytes as text", "base64 as bytes as text", "address of a file"])
def test_other_ways_to_write_an_image(folder, how):
    ways = {"bytes as text": repr(png(1)), "base64 as bytes as text": repr(base64.b64encode(png(1)))}
    _, (sample,) = read(written(folder, [{"image": ways.get(how, f"file://{folder}/1.png"), "answer": "x"}]))
    assert (
        sample.load_image().tobytes()
        == read(written(folder, [{"image": "1.png", "answer": "x"}]))[1][0].load_image().tobytes()
    )


def test_an_array_of_pixels_is_named(folder):
    _, (sample,) = read(written(folder, [{"image": [[[255, 0, 0], [0, 0, 0]]] * 2, "answer": "x"}]))
    with pytest.raises(InputError, match="an array of numbers"):
        sample.load_image()


def test_names_of_columns_lose_their_blanks_and_another_separator_is_named(folder):
    path = folder / "t.csv"
    path.write_text("image, question, answer\n0.png, what?, x\n")
    assert read(path)[1][0].answers == ("x",)
    path.write_text("image;question;answer\n0.png;what?;1,5\n")
    with pytest.raises(DataError, match="parted by ';'"):
        read(path)
    with pytest.raises(ConfigError, match="question is given twice, a and b"):
        read(path, columns="question=a,question=b")


@pytest.mark.parametrize("shape", ["list", "lists", "text"])
def test_a_list_of_questions_in_any_shape(folder, shape):
    listed = [{"question": "a?", "answer": "x"}, {"question": "b?", "answer": "y"}]
    lists = {"question": ["a?", "b?"], "answer": ["x", "y"]}
    cell = {"list": listed, "lists": lists, "text": json.dumps(listed)}[shape]
    rows = written(folder, [{"qas": cell}, {"qas": None}, {"qas": float("nan")}])
    found = [(s.sample_id, s.question[:2], s.answers) for s in read(rows, columns="list=qas")[1]]
    assert found == [("train-0-0", "a?", ("x",)), ("train-0-1", "b?", ("y",))]
    with pytest.raises(DataError, match=r"row 1: .*write them as a list of objects"):
        read(written(folder, [{"qas": "a?"}]), columns="list=qas")


def test_braces_in_options_are_no_places_to_fill(folder):
    _, (sample,) = read(written(folder, [{"answer": "B", "options": ["{options}", "{question}"]}]))
    assert sample.question.startswith("what?\nA. {options}\nB. {question}\n")
