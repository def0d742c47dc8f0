"""Data sets: every known layout is read, as is a data set of one's own; what is missing or broken is named."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from small_data_sets import ROWS, picture, png, write_parquet

from budgetvlm.errors import ConfigError, DataError, InputError
from budgetvlm.tasks import TaskOptions, load_task
from budgetvlm.tasks.layouts import LAYOUTS
from budgetvlm.tasks.options import parse_columns
from budgetvlm.tasks.sources import find_files


def task_of(name, tmp_path, split="validation", rows=None, **options):
    path = write_parquet(tmp_path / f"{name}.parquet", ROWS[name] if rows is None else rows)
    return load_task(TaskOptions(name, data_files=f"{split}={path}", **options))


def read(task, split="validation", *args):
    return list(task.samples(split, *args))


def test_there_are_rows_of_every_known_data_set():
    assert set(ROWS) == set(LAYOUTS)


# sample id, image id, the end of the question, answers, options, kind of the first sample; a right and a wrong answer
EXPECTED = {
    "text_vqa": ("34600", "text_vqa-ab0", "single word or phrase.", 10, (), None, "Nokia", "apple"),
    "okvqa": ("2971475", "coco-297147", "single word or phrase.", 10, (), "four", "race", "rally"),
    "coco_2014_vqa": ("297147000", "coco-297147", "single word or phrase.", 10, (), "other", "net", "goal"),
    "doc_qa": ("49153", "doc_qa-pybv0228-81", "single word or phrase.", 2, (), "handwritten+form", "aug 12", "7"),
    "chart_qa": ("0", None, "with a single word.", 1, (), "human", "14.2", "15"),
    "ai2d": ("0", None, "choices directly.", 1, ("2", "1", "0", "cub"), None, "C", "A"),
    "science_qa_img": ("0", None, "choices directly.", 1, ("Ohio", "Iowa"), "social science", "Iowa", "Ohio"),
    "mmmu": ("validation_Art_1", None, "choices directly.", 1, ("Cubism", "Ed's"), "multiple-choice", "(B)", "A"),
    "tally_qa": ("1-0", None, "a single number.", 1, (), "simple", "0.", "1"),
    "st_qa": ("0-0", None, "single word or phrase.", 2, (), None, "main st", "elm"),
    "pope": ("adversarial-1", "coco-297147", "single word or phrase.", 1, (), "adversarial", "Yes, one.", "No."),
    "coco_caption": ("COCO_val2014_000000297147.jpg", "coco-297147", "provided image.", 2, (), None,
                     "a red bus number 0", "cats"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_columns_of_the_data_set_are_read(name, tmp_path):
    task = task_of(name, tmp_path)
    sample = read(task)[0]
    sample_id, image_id, end, answers, options, kind, right, wrong = EXPECTED[name]
    assert sample.sample_id == f"validation-{sample_id}"
    assert sample.image_id == image_id or (image_id is None and sample.image_id.startswith("sha256-"))
    assert sample.question.endswith(end)
    assert (len(sample.answers), sample.options, sample.groups.get("kind")) == (answers, options, kind)
    assert sample.load_image().size == (6, 5)
    assert task.score(right, sample) > 0.45 > task.score(wrong, sample)
    assert task.num_samples("validation") == len(read(task))
    assert task.max_new_tokens == LAYOUTS[name].max_new_tokens


def test_images_belong_to_their_questions(tmp_path):
    for name in ("text_vqa", "tally_qa", "st_qa"):
        for sample in read(task_of(name, tmp_path)):
            row = int(sample.sample_id.split("-")[1]) % 34600
            assert sample.load_image().getpixel((0, 0))[0] == row, name


def test_options_are_listed_with_letters_and_the_hint_comes_first(tmp_path):
    sample = read(task_of("science_qa_img", tmp_path))[1]
    assert sample.question.startswith("Look at the map.\nWhich state?\nA. Ohio\nB. Iowa\nAnswer with the option's")
    assert sample.answers == ("B",)


def test_questions_about_several_images_are_left_out_and_open_ones_are_open(tmp_path):
    task = task_of("mmmu", tmp_path)
    choice, opened = read(task)
    assert opened.sample_id == "validation-validation_Math_1"
    assert opened.question.endswith("single word or phrase.") and opened.options == ()
    assert task.score("so x = 8", opened) == 1.0 and task.score("B", choice) == 1.0


def test_one_image_has_one_id_in_all_coco_data_sets_and_equal_bytes_have_one_id(tmp_path):
    ids = {name: read(task_of(name, tmp_path))[0].image_id for name in ("okvqa", "pope", "coco_caption")}
    assert set(ids.values()) == {"coco-297147"}
    charts = [sample.image_id for sample in read(task_of("chart_qa", tmp_path))]
    assert charts[0] == charts[1] != charts[2] == charts[3]


def test_a_part_is_drawn_with_the_seed_and_lies_within_a_larger_part(tmp_path):
    rows = [{**ROWS["text_vqa"][0], "question_id": n} for n in range(40)]
    task = task_of("text_vqa", tmp_path, rows=rows)
    few, more = ([s.sample_id for s in read(task, "validation", count, 3)] for count in (5, 12))
    assert set(few) < set(more) and len(few) == 5
    assert more == [s.sample_id for s in read(task) if s.sample_id in more]
    assert more != [s.sample_id for s in read(task, "validation", 12, 4)]
    with pytest.raises(ConfigError, match="which has 40"):
        read(task, "validation", 41)


def test_splits_are_found_by_their_usual_names(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001", "test"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", ROWS["text_vqa"])
    found = find_files(str(tmp_path / "data"))
    assert {split: len(paths) for split, paths in found.items()} == {"test": 1, "train": 2, "validation": 1}
    assert find_files(f"{tmp_path}/data/t*.parquet").keys() == {"train", "test"}
    one = find_files(f"dev={tmp_path}/data/test.parquet,{tmp_path}/data/train-*.parquet")
    assert {split: len(paths) for split, paths in one.items()} == {"validation": 3}
    task = load_task(TaskOptions("text_vqa", data_files=str(tmp_path / "data")))
    assert task.num_samples("train") == 6 and task.num_samples("validation") == 3


def test_a_split_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"no split 'test' .* it has validation\. .*prepare draws the others"):
        read(task_of("text_vqa", tmp_path), "test")
    with pytest.raises(ConfigError, match="pope has no split 'train'"):
        load_task("pope").num_samples("train")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    rows = [{"img": picture(0), "q": "what?", "answers": ["x"]}]
    with pytest.raises(
        DataError, match=r"no column for question \(question\), image \(image\).*It has img, q, answers"
    ):
        read(task_of("text_vqa", tmp_path, rows=rows))
    with pytest.raises(DataError, match="--columns question=NAME"):
        read(task_of("text_vqa", tmp_path, rows=rows))
    task = task_of("text_vqa", tmp_path, rows=rows, columns="question=q,image=img")
    assert read(task)[0].question.startswith("what?")
    with pytest.raises(DataError, match="kind"):
        read(task_of("text_vqa", tmp_path, rows=rows, columns="question=q,image=img,kind=nowhere"))
    nested = [{"image": picture(0), "qa": [{"q": "how many?", "answer": "1"}]}]
    with pytest.raises(DataError, match="entries of qa have q, answer, none for question"):
        read(task_of("tally_qa", tmp_path, rows=nested))
    assert read(task_of("tally_qa", tmp_path, rows=nested, columns="question=q"))[0].answers == ("1",)


def write_folder(folder, kind="jsonl"):
    """A folder of images with a list of them."""
    folder.mkdir()
    rows = []
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
        rows.append({"file_name": f"{number}.png", "question": f"how much is {number}?", "answer": f"{number} euro"})
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(folder / f"metadata.{kind}", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_images_is_a_data_set(tmp_path, kind):
    task = load_task(TaskOptions("prices", data_files=str(write_folder(tmp_path / "own", kind)), metric="anls"))
    samples = read(task, "train")
    assert [sample.sample_id for sample in samples] == [f"train-{n}" for n in range(4)]
    assert [sample.load_image().getpixel((0, 0))[0] for sample in samples] == [0, 1, 2, 3]
    assert samples[2].image_id.startswith("sha256-") and samples[2].image_id != samples[1].image_id
    assert task.score("2 euros", samples[2]) > 0.8
    drawn = [sample.sample_id for sample in read(task, "train", 2, 1)]
    assert drawn == [sample.sample_id for sample in samples if sample.sample_id in drawn] and len(drawn) == 2


def test_images_of_one_name_in_two_splits_are_two_images(tmp_path):
    for split, number in (("train", 7), ("test", 9)):
        (tmp_path / "own" / split).mkdir(parents=True)
        (tmp_path / "own" / split / "0.png").write_bytes(png(number))
        line = json.dumps({"file_name": "0.png", "question": "what?", "answers": [split]})
        (tmp_path / "own" / split / "metadata.jsonl").write_text(line)
    task = load_task(TaskOptions("own", data_files=str(tmp_path / "own")))
    (first,), (second,) = read(task, "train"), read(task, "test")
    assert first.image_id != second.image_id
    assert (first.load_image().getpixel((0, 0))[0], second.load_image().getpixel((0, 0))[0]) == (7, 9)


def test_captions_of_ones_own_need_no_question(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"image": picture(n), "answers": [f"bus {n}"]} for n in range(3)])
    task = load_task(TaskOptions("own", data_files=str(path), metric="cider"))
    sample = read(task, "train")[1]
    assert sample.question.startswith("Provide a one-sentence caption") and sample.load_image()
    assert task.score("bus 1", sample) > task.score("bus", sample) == 0.0
    described = load_task(TaskOptions("own", data_files=str(path), metric="cider", prompt="Describe it."))
    assert read(described, "train")[0].question == "Describe it."


def test_an_image_id_that_is_missing_in_a_row_is_a_hash(tmp_path):
    rows = [ROWS["text_vqa"][0], {**ROWS["text_vqa"][1], "image_id": None}]
    first, second = read(task_of("text_vqa", tmp_path, rows=rows))
    assert first.image_id == "text_vqa-ab0" and second.image_id.startswith("sha256-")


def test_answers_in_cells_may_be_lists_and_choices_letters_numbers_or_texts(tmp_path):
    path = tmp_path / "quiz.csv"
    (tmp_path / "a.png").write_bytes(png(1))
    path.write_text(
        'image,question,options,answer\na.png,one?,"[""cat"", ""dog""]",dog\na.png,two?,"[\'x\', \'y\']",A\n'
    )
    task = load_task(TaskOptions("quiz", data_files=str(path), metric="multiple_choice"))
    first, second = read(task, "train")
    assert (first.answers, second.answers) == (("B",), ("A",))
    assert first.question == "one?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."


def test_the_prompt_can_be_replaced(tmp_path):
    sample = read(task_of("text_vqa", tmp_path, prompt=r"Q: {question}\nA:"))[0]
    assert sample.question == "Q: what brand 0?\nA:"
    with pytest.raises(ConfigError, match="say where the question goes"):
        task_of("text_vqa", tmp_path, prompt="Answer!")
    with pytest.raises(ConfigError, match="metric='bleu' is unknown; choose from vqa, anls"):
        task_of("text_vqa", tmp_path, metric="bleu")


def corrupt(rows, number, data):
    return [{**row, "image": {"bytes": data, "path": None}} if n == number else row for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("data", "message"),
    [(png(1)[:47], "cannot be read|cannot be decoded"), (b"no image", "not an image"), (None, "it has no image")],
    ids=["truncated", "text", "none"],
)
def test_a_corrupt_image_is_one_samples_error_with_its_name(tmp_path, data, message):
    task = task_of("text_vqa", tmp_path, rows=corrupt(ROWS["text_vqa"], 1, data))
    first, second, third = read(task)
    assert first.load_image().size == third.load_image().size
    with pytest.raises(InputError, match=f"sample validation-34601 of text_vqa cannot be used: .*({message})"):
        second.load_image()


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_wrong_with_an_image_is_an_input_error(tmp_path, monkeypatch):
    """Bytes changed at random places in images of several formats."""
    import io

    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    rng, broken = np.random.default_rng(0), 0
    picture_ = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    path = write_parquet(tmp_path / "x.parquet", ROWS["text_vqa"][:1])
    task = load_task(TaskOptions("text_vqa", data_files=f"validation={path}"))
    sample = read(task)[0]
    for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        picture_.save(buffer, form)
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            source = task._opened["validation"].source
            source.value = lambda row, column, data=bytes(data): {"bytes": data, "path": None}
            try:
                sample.load_image()
            except InputError:
                broken += 1
    assert broken > 50


def test_rows_without_question_or_answer_are_samples_that_cannot_be_used(tmp_path):
    rows = [{**ROWS["text_vqa"][0], "question": None}, {**ROWS["text_vqa"][1], "answers": []}, ROWS["text_vqa"][2]]
    without_question, without_answer, good = read(task_of("text_vqa", tmp_path, rows=rows))
    with pytest.raises(InputError, match="it has no question"):
        without_question.load_image()
    with pytest.raises(InputError, match="it has no answer"):
        without_answer.load_image()
    good.load_image()


def test_captions_are_weighed_by_the_references_of_their_split(tmp_path):
    task = task_of("coco_caption", tmp_path)
    first = read(task)[0]
    assert task.score("a bus on a street", first) == 0.0  # every image is described so
    assert task.score("a red bus number 0", first) == pytest.approx(0.5)  # 1 for one of two references, 0 for the other


def test_captions_in_lists_are_a_corpus_too(tmp_path):
    rows = [{"image": picture(n), "qa": [{"question": "?", "answer": f"bus {n}"}]} for n in range(3)]
    task = task_of("tally_qa", tmp_path, rows=rows, metric="cider")
    assert task.score("bus 1", read(task)[1]) > task.score("bus", read(task)[1]) == 0.0


def test_several_data_sets_are_one_task(tmp_path):
    files = []
    for name in ("text_vqa", "pope", "coco_caption"):
        files.append(f"{name}:validation={write_parquet(tmp_path / f'{name}.parquet', ROWS[name])}")
    options = TaskOptions("text_vqa,pope,coco_caption", data_files=",".join(files))
    task = load_task(options)
    assert task.name == options.name == "text_vqa+pope+coco_caption"
    assert load_task(replace(options, dataset_name=options.name)).name == task.name
    samples = read(task)
    assert len(samples) == task.num_samples("validation") == 10
    assert samples[0].sample_id == "text_vqa/validation-34600" and samples[0].groups["dataset"] == "text_vqa"
    assert samples[3].sample_id == "pope/validation-adversarial-1"
    assert task.score("Nokia", samples[0]) == 1.0 and task.score("yes", samples[3]) == 1.0
    assert task.score("a red bus number 0", samples[7]) == pytest.approx(0.5)
    assert task.max_new_tokens == 64
    drawn = read(task, "validation", 5, 2)
    assert len(drawn) == 5 and len({sample.groups["dataset"] for sample in drawn}) == 3


def test_a_data_set_without_a_split_adds_nothing_to_it(tmp_path):
    one = write_parquet(tmp_path / "a.parquet", ROWS["text_vqa"])
    two = write_parquet(tmp_path / "b.parquet", ROWS["pope"])
    task = load_task(
        TaskOptions("text_vqa,pope", data_files=f"text_vqa:train={one},text_vqa:test={one},pope:test={two}")
    )
    assert (task.num_samples("train"), task.num_samples("test")) == (3, 7)
    with pytest.raises(ConfigError, match=r"text_vqa has no split 'validation'.*; pope has no split"):
        task.num_samples("validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TaskOptions("sings"), "there is no task 'sings'; this version has: signs, text_vqa.*--data_files"),
        (TaskOptions("text_vqa,text_vqa"), "name each data set once"),
        (TaskOptions("text_vqa,"), "name each data set once"),
        (TaskOptions("signs", metric="vqa"), "signs is drawn, not read: --metric"),
        (TaskOptions("text_vqa", columns="query=q"), "columns='query=q': query cannot be used.*question, answers"),
        (TaskOptions("text_vqa", columns="question="), "question cannot be used"),
        (TaskOptions("text_vqa,pope", data_files="x.parquet"), "has to say of which data set it speaks: text_vqa:"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        load_task(options)


def test_files_that_cannot_be_read(tmp_path):
    def opening(text, split="train"):
        return load_task(TaskOptions("own", data_files=str(text))).num_samples(split)

    with pytest.raises(DataError, match=r"no\.parquet does not exist"):
        opening(tmp_path / "no.parquet")
    with pytest.raises(DataError, match=r"\*\.jsonl does not exist"):
        opening(tmp_path / "*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no list of its images"):
        opening(tmp_path / "empty")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="not a format that is read"):
        opening(tmp_path / "x.txt")
    (tmp_path / "cut.parquet").write_bytes(write_parquet(tmp_path / "whole.parquet", ROWS["pope"]).read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        opening(tmp_path / "cut.parquet")
    (tmp_path / "list.json").write_text("[\n{}\n]\n")
    with pytest.raises(DataError, match=r"list\.json, line 1: not JSON"):
        opening(tmp_path / "list.json")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no column for question"):
        opening(tmp_path / "none.jsonl")


def test_only_the_row_groups_that_are_needed_are_read(tmp_path, monkeypatch):
    task = task_of("text_vqa", tmp_path, rows=[{**ROWS["text_vqa"][0], "question_id": n} for n in range(10)])
    task.num_samples("validation")
    source, reads = task._opened["validation"].source, []
    read_group = source._read
    monkeypatch.setattr(source, "_read", lambda g, c: reads.append((g, tuple(c))) or read_group(g, c))
    samples = read(task, "validation", 1, 0)
    assert len(reads) == 1 and "image" not in reads[0][1]
    samples[0].load_image()
    assert [columns for _, columns in reads[1:]] == [("image",)]


def test_what_profiles_remember_opens_the_task_again(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"img": picture(0), "query": "what?", "answers": ["x"]}])
    options = TaskOptions("text_vqa", data_files=str(path), columns="image=img,question=query", prompt="{question}!")
    stored = json.loads(json.dumps(options.to_dict()))
    again = TaskOptions("text_vqa").remembered(stored)
    assert again == options
    moved = shutil.move(path, tmp_path / "y.parquet")
    elsewhere = TaskOptions("text_vqa", data_files=str(moved)).remembered(stored)
    assert read(load_task(elsewhere), "train")[0].question == "what?!"
    with pytest.raises(ConfigError, match=r"--prompt 'other', but the profiles have '\{question\}!'"):
        TaskOptions("text_vqa", prompt="other").remembered(stored)
    assert TaskOptions("signs").to_dict() == {}


def test_columns_are_roles_and_names():
    assert parse_columns("question=query, image_id=doc+page") == {"question": "query", "image_id": "doc+page"}
    assert parse_columns(None) == {}
