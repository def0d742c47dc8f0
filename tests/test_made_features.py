"""`import --features auto`: from a table without features to a controller, and what lies on the way there."""

import csv
import json
import re
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from test_ranks import write_tree
from tiny_families import write_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from budgetvlm import load_controller
from budgetvlm.cli import main
from budgetvlm.engines import encoders
from budgetvlm.engines.request_features import extractor_beside
from budgetvlm.errors import DataError
from budgetvlm.features import Features, cheap
from budgetvlm.profiling.prepare import made_features
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import load_task

SMALL, LARGE = 1, 12


def planted(rng, number):
    """A question whose words tell which setting is right, and its scores: half of them need the dear setting."""
    needs_large = bool(rng.integers(2))
    words = ("read the tiny code on", "what is written below") if needs_large else ("what colour is", "name")
    question = f"{words[rng.integers(2)]} the {('sign', 'car', 'house', 'tree')[rng.integers(4)]} {number % 7}?"
    return question, {SMALL: float(not needs_large), LARGE: float(needs_large)}


def write_planted(path, count=200, column="question", **more):
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        names = ["sample_id", "max_crops", "score", "latency_ms", column, *more]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for number in range(count):
            question, scores = planted(rng, number)
            extra = {name: value(number) for name, value in more.items()}
            for crops, score in scores.items():
                row = {"sample_id": f"q{number}", "max_crops": crops, "score": score, "latency_ms": 20 + 5 * crops}
                writer.writerow(row | {column: question} | extra)
    return path


def imported(tmp_path, *words, output="t.parquet"):
    table = ["--input", tmp_path / "r.csv", "--knobs", "max_crops", "--output", tmp_path / output]
    return main(["import", "table", *map(str, [*table, *words])])


AUTO = ("--features", "auto")


def test_what_the_text_tells_is_learnt_and_the_checkpoint_makes_the_same_features(tmp_path, capsys):
    write_planted(tmp_path / "r.csv", 300)
    assert imported(tmp_path, *AUTO, "--test_split", "0.3", "--seed", "1") == 0
    data = ["--table", str(tmp_path / "t.parquet"), "--features", str(tmp_path / "t.features.safetensors")]
    assert main(["train", *data, "--output_dir", str(tmp_path / "c"), "--num_epochs", "20"]) == 0
    capsys.readouterr()
    assert main(["evaluate", *data, "--checkpoint", str(tmp_path / "c"), "--budgets", "1.0", "--json"]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    controller = next(one for one in policies if one["name"] == "controller")
    assert controller["at_budget"][0]["vs_lookup"]["low"] > 0.3

    stored = Features.load(data[3])
    extractor, controller = cheap.load(tmp_path / "c"), load_controller(tmp_path / "c")
    question, scores = planted(np.random.default_rng(0), 0)  # the table's first
    features = extractor([question])
    np.testing.assert_array_equal(features.language[0], stored.language[0])
    tensors = torch.from_numpy(features.image), torch.from_numpy(features.language)
    chosen = controller.sample_actions(controller(*tensors, 1000.0), deterministic=True)
    assert scores[int(chosen["max_crops"][0])] == 1.0


def test_test_rows_change_nothing_of_what_is_fitted(tmp_path):
    write_planted(tmp_path / "r.csv", 60)
    assert imported(tmp_path, *AUTO, "--test_split", "0.3") == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    text = (tmp_path / "r.csv").read_text().splitlines()
    held_out = {name for name, side in zip(table.sample_ids, table.split, strict=True) if side != "train"}
    changed = [f"{line},zzz" if line.split(",")[0] not in held_out else line.replace("the ", "zzz ") for line in text]
    (tmp_path / "r.csv").write_text("\n".join(line.removesuffix(",zzz") for line in changed))
    assert imported(tmp_path, *AUTO, "--test_split", "0.3", output="u.parquet") == 0
    first, second = (Features.load(tmp_path / f"{name}.features.safetensors") for name in "tu")
    assert first.metadata["extractor"] == second.metadata["extractor"]
    assert not np.array_equal(first.language, second.language)


def write_pictures(folder, shades=(0, 90, 180), size=(32, 16)):
    folder.mkdir(exist_ok=True)
    for number, shade in enumerate(shades):
        Image.new("L", size, shade).save(folder / f"p{number}.png")


def test_images_are_measured_once_and_split_by_image(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "pictures")
    write_planted(tmp_path / "r.csv", 12, image=lambda number: f"pictures/p{number % 3}.png")
    measured = []
    monkeypatch.setattr(cheap, "image_statistics", lambda image: measured.append(1) or statistics(image))
    assert imported(tmp_path, *AUTO) == 0
    assert len(measured) == 3
    features = Features.load(tmp_path / "t.features.safetensors")
    assert features.image[4, :2] == pytest.approx([np.log(32), np.log(16)], abs=1e-5)
    assert features.image[4, 4] == pytest.approx(90 / 255, abs=1e-5)
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.groups == {"image_id": tuple(f"pictures/p{n % 3}.png" for n in range(12))}

    write_pictures(tmp_path / "pictures", (0, 90, 200))  # one of them is new
    assert imported(tmp_path, *AUTO, "--overwrite") == 0
    assert len(measured) == 4
    again = Features.load(tmp_path / "t.features.safetensors")
    assert again.image[5, 4] == pytest.approx(200 / 255, abs=1e-5)
    np.testing.assert_array_equal(again.image[0, :9], features.image[0, :9])


statistics = cheap.image_statistics


def test_images_by_their_ids_in_a_folder(tmp_path):
    write_pictures(tmp_path / "elsewhere")
    write_planted(tmp_path / "r.csv", 12, image_id=lambda number: f"p{number % 3}")
    assert imported(tmp_path, *AUTO, "--image_dir", tmp_path / "elsewhere") == 0
    assert Features.load(tmp_path / "t.features.safetensors").image[2, 4] == pytest.approx(180 / 255, abs=1e-5)


def test_a_missing_and_a_damaged_image_are_named_with_their_sample(tmp_path, capsys):
    write_pictures(tmp_path / "pictures")
    write_planted(tmp_path / "r.csv", 12, picture=lambda number: f"pictures/p{number % 4}.png")
    assert imported(tmp_path, *AUTO, "--column", "image=picture") == 2
    error = capsys.readouterr().err
    assert "image of sample q3 (number 4): there is no file pictures/p3.png" in error and "--image_dir" in error
    (tmp_path / "pictures" / "p3.png").write_bytes(b"no image")
    assert imported(tmp_path, *AUTO, "--column", "image=picture") == 2
    assert "image of sample q3" in (error := capsys.readouterr().err) and "is not an image that Pillow knows" in error
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize("name", [".", "/", "data:image/png;base64," + "iVBORw0KGgo" * 50])
def test_what_is_no_name_of_a_file_is_a_missing_image(tmp_path, capsys, name):
    write_planted(tmp_path / "r.csv", 12, image=lambda number: name)
    assert imported(tmp_path, *AUTO) == 2
    error = capsys.readouterr().err
    assert f"image of sample q0 (number 1): there is no file {name[:100]}" in error and len(error) < 300


def test_half_a_character_in_a_question_is_read_as_an_unknown_one(tmp_path):
    """JSON may hold half of a surrogate pair."""
    write_planted(tmp_path / "r.csv", 20)
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row | {"question": "what\ud83d"}) + "\n" for row in rows))
    words = ["--input", tmp_path / "r.jsonl", "--knobs", "max_crops", "--output", tmp_path / "t.parquet", *AUTO]
    assert main(["import", "table", *map(str, words)]) == 0
    assert Features.load(tmp_path / "t.features.safetensors").language[0, 0] == pytest.approx(np.log1p(5))


def test_a_question_column_is_asked_for_and_empty_questions_are_counted(tmp_path, capsys):
    write_planted(tmp_path / "r.csv", 30, column="prompt")
    assert imported(tmp_path, *AUTO) == 2
    assert "no column is called question" in (error := capsys.readouterr().err) and "--column question=NAME" in error
    text = (tmp_path / "r.csv").read_text().splitlines()
    text[1:3] = [line.rsplit(",", 1)[0] + "," for line in text[1:3]]
    (tmp_path / "r.csv").write_text("\n".join(text))
    assert imported(tmp_path, *AUTO, "--column", "question=prompt") == 0
    assert "1 of 30 questions are empty: their text features are zeros" in capsys.readouterr().out
    assert not Features.load(tmp_path / "t.features.safetensors").language[0].any()
    assert "question" not in ProfileTable.load(tmp_path / "t.parquet").groups


def test_equal_questions_are_said(tmp_path, capsys):
    write_planted(tmp_path / "r.csv", 20, column="x", question=lambda number: "Same?")
    assert imported(tmp_path, *AUTO) == 0
    assert re.search(r"note: all \d+ training questions are equal", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image_dir", "x"), "--image_dir is of --features auto"),
        ((*AUTO, "--model_path", "reference", "--dataset_name", "signs"), "not from both"),
        (("--features", "f.npz", "--encoder", "e"), "not from both"),
        (("--encoder", "no_such_directory"), "--encoder no_such_directory cannot be opened"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, words, message):
    write_planted(tmp_path / "r.csv", 12)
    assert imported(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def write_encoder(directory, kind):
    """A tiny encoder of texts, of images or of both, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    words = {**sizes, "vocab_size": 200, "max_position_embeddings": 16}
    if kind == "text":
        model = BertModel(BertConfig(**words))
    elif kind == "image":
        model = ViTModel(ViTConfig(**vision))
    elif kind == "both":
        model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=6))
    else:
        model = SiglipModel(SiglipConfig(text_config=words, vision_config=vision))
    model.save_pretrained(directory)
    if kind != "image":
        write_tokenizer(directory, "right")
    if kind == "unmasked":  # reads the padding
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}))
    if kind != "text":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "image", "language"), [("text", 9, 8), ("image", 8, None), ("both", 6, 6), ("unmasked", 8, 8)]
)
def test_an_encoder_replaces_its_sides_at_import_and_at_run_time(tmp_path, kind, image, language):
    write_pictures(tmp_path / "pictures", [40] * 6)
    write_planted(tmp_path / "r.csv", 12, image=lambda number: f"pictures/p{number % 6}.png")
    encoder = write_encoder(tmp_path / "encoder", kind)
    assert imported(tmp_path, "--encoder", encoder, "--test_split", "0.2") == 0
    features = Features.load(tmp_path / "t.features.safetensors")
    assert features.image.shape[1] == image and language in (None, features.language.shape[1])
    data = ["--table", str(tmp_path / "t.parquet"), "--features", str(tmp_path / "t.features.safetensors")]
    assert main(["train", *data, "--output_dir", str(tmp_path / "c"), "--num_epochs", "1"]) == 0
    question, _ = planted(np.random.default_rng(0), 0)
    made = encoders.load(tmp_path / "c")([question, ""], [tmp_path / "pictures" / "p0.png"] * 2)
    np.testing.assert_allclose(made.language[0], features.language[0], atol=1e-5)
    np.testing.assert_allclose(made.image[0], features.image[0], atol=1e-5)
    assert not made.language[1].any()
    one = extractor_beside(tmp_path / "c")
    np.testing.assert_allclose(one.of_question(question), made.language[0], atol=1e-6)
    np.testing.assert_allclose(one.of_image(tmp_path / "pictures" / "p0.png"), made.image[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"encoders.load"):
        cheap.load(tmp_path / "c")


def test_an_image_encoder_needs_images(tmp_path, capsys):
    write_planted(tmp_path / "r.csv", 12)
    assert imported(tmp_path, "--encoder", write_encoder(tmp_path / "encoder", "image")) == 2
    assert "reads images, and the table names none" in capsys.readouterr().err


def test_vectors_of_a_data_set_are_kept_by_content(tmp_path):
    kept = made_features.KeptVectors(tmp_path / "t.parquet", 2, lambda line: None)
    seen = []

    def encode(batch):
        seen.extend(batch)
        return np.array([[len(item)] for item in batch], np.float32)

    assert kept.vectors("language", "a", ["x", "y", "x"], ["1", "22", "1"], encode)[:, 0].tolist() == [1, 2, 1]
    assert kept.vectors("language", "a", ["y", "z"], ["22", "333"], encode)[:, 0].tolist() == [2, 3]
    assert kept.vectors("language", "b", ["x"], ["1"], encode)[:, 0].tolist() == [1]
    assert seen == ["1", "22", "333", "1"]


def write_logs(folder, settings=(SMALL, LARGE), count=40, **more):
    """One run of lmms-eval for each setting, with its prompts."""
    words = []
    for crops in settings:
        rng, lines = np.random.default_rng(0), []
        for number in range(count):
            question, scores = planted(rng, number)
            costs = [{"latency_ms": 20 + 5 * crops}]
            line = {"doc_id": number, "input": question, "token_counts": costs, "acc": scores[crops]}
            lines.append(json.dumps(line | more))
        log = folder / f"c{crops}" / "samples_t.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("\n".join(lines))
        words += ["--run", f"max_crops={crops}={log.parent}"]
    return words


def test_the_prompts_of_logs_are_questions(tmp_path):
    words = write_logs(tmp_path / "logs")
    assert main(["import", "lmms", *words, *AUTO, "--output", str(tmp_path / "t.parquet")]) == 0
    features = Features.load(tmp_path / "t.features.safetensors")
    question, _ = planted(np.random.default_rng(0), 0)
    extractor = cheap.CheapFeatures.from_dict(features.metadata["extractor"])
    np.testing.assert_array_equal(extractor([question]).language[0], features.language[0])


@pytest.mark.parametrize("kind", ["lmms", "profiles"])
def test_questions_and_images_of_a_data_set(tmp_path, kind):
    samples = list(islice(load_task("signs").samples("train"), 40))
    words = write_logs(tmp_path / "logs", input="another prompt")
    if kind == "profiles":
        write_tree(tmp_path, "train", size=100, count=20, timed=9)
        words = ["--exp5_dir", str(tmp_path / "exp5_accuracy"), "--exp6_dir", str(tmp_path / "exp6_latency")]
    words += ["--dataset_name", "signs", "--split", "train", *AUTO]
    assert main(["import", kind, *words, "--output", str(tmp_path / "t.parquet")]) == 0
    features = Features.load(tmp_path / "t.features.safetensors")
    extractor = cheap.CheapFeatures.from_dict(features.metadata["extractor"])
    row = features.sample_ids.index(samples[3].sample_id)
    alone = extractor([samples[3].question], [samples[3].load_image()])
    np.testing.assert_array_equal(alone.language[0], features.language[row])
    np.testing.assert_array_equal(alone.image[0], features.image[row])


@pytest.mark.parametrize("made", ["a name alone", {"name": "a name alone"}])
def test_a_damaged_note_of_an_encoder_is_named(tmp_path, made):
    (tmp_path / "extractor.json").write_text(json.dumps({"encoder": made}))
    with pytest.raises(DataError, match=r"extractor.json names no encoder with its fingerprint .*Train again"):
        encoders.load(tmp_path / "best_checkpoint.pt")
