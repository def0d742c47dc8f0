"""A controller knows the weights and the samples that it was trained on, and is not used for others unasked."""

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted_tables import tiny
from safetensors.numpy import load_file, save_file
from tiny_vlm import write_tiny_model

from budgetvlm._io import write_json
from budgetvlm.cli import command_parser, main
from budgetvlm.commands.flags import forget_defaults
from budgetvlm.commands.origins import complete_from
from budgetvlm.commands.task_arguments import task_options
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.provenance import TrainedOn, digests_of
from budgetvlm.controller.training import train, with_splits
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.errors import BudgetVLMWarning, CheckpointError, ConfigError, DataError
from budgetvlm.features.cheap import EXTRACTOR, CheapFeatures
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.profiling.results.places import default_directory, find_results, measured_dataset
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import TaskOptions, load_task
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.fingerprint import PIECE, PIECES, model_fingerprint
from budgetvlm.vlm.loading import bundled_controller, model_directory

QUICK = TrainingConfig(grpo=GRPOConfig(num_epochs=1), hidden_dim=16, budget_dim=4, patience=None, teachers=0)
SAMPLES = {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}


def named(table, name="toy", model="weights 1"):
    return replace(
        table, metadata={"dataset_name": name, "model_fingerprint": model, "exp5_config": {"split": "train"}}
    )


def moved(table, source="train", target="test"):
    """The same table, one training sample now in the test split, and the samples that were there in training."""
    split = [{source: target, target: source}.get(side, side) for side in table.split]
    return replace(table, split=tuple(split))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    table, features = tiny()
    result = train(
        named(table), features, QUICK, tmp_path_factory.mktemp("c"), members=2, progress=False, say=lambda line: None,
        fit_guard=AdaptiveGuard.fit,
    )  # fmt: skip
    return named(table), features, result


def test_every_file_of_a_controller_says_where_it_comes_from(trained, tmp_path):
    table, _, result = trained
    wanted = TrainedOn.of_table(table)
    assert wanted.model == "weights 1" and wanted.opened == {"dataset_name": "toy", "split": "train"}
    assert {side: len(known) for side, known in wanted.samples.items()}.keys() == set(table.split)
    load_controller(result.output_dir).save_pretrained(tmp_path)
    for place in (
        result.output_dir,
        result.output_dir / "best_checkpoint.pt",
        result.output_dir / "members" / "1",
        tmp_path,
    ):
        assert replace(load_controller(place).trained_on, terms={}) == wanted
        assert TrainedOn.read(place) == load_controller(place).trained_on
        assert TrainedOn.read(place).terms["prices"] == [0.01, 1.0]
    assert json.loads((result.output_dir / "guard.json").read_text())["origin"] == {"model": "weights 1"}


def test_samples_are_known_again_by_data_set_and_id_or_image():
    assert digests_of("toy", "a", "x") == digests_of("toy", "a", "x")
    assert len(digests_of("toy", "a", "x") & digests_of("toy", "b", "x")) == 1  # another question about the image
    assert not digests_of("toy", "a", "x") & digests_of("other", "a", "x")
    assert digests_of("pope", "1", "x") == digests_of("text_vqa+pope", "pope/1", "x", "pope")


def test_samples_that_were_trained_on_are_no_test(trained):
    table, _, result = trained
    known = load_controller(result.output_dir).trained_on
    known.require_unseen(table, "test", "c")
    known.require_unseen(table, "validation", "c")  # it picked the best epoch, and is reported as what it is
    other = moved(table)
    names = [name for name, side in zip(table.sample_ids, table.split, strict=True) if side == "train"]
    with pytest.raises(
        DataError, match=rf"{len(names)} of the {len(names)} test samples.* train c: {sorted(names)[0]}"
    ):
        known.require_unseen(other, "test", "c")
    with pytest.raises(DataError, match="test samples"):
        known.require_unseen(moved(table, "validation"), "test", "c")
    known.require_unseen(named(other, "another data set"), "test", "c")


def test_without_a_data_sets_name_the_measurements_tell_samples_apart():
    table, _ = tiny()
    known = TrainedOn.of_table(table)
    with pytest.raises(DataError, match="test samples"):
        known.require_unseen(moved(table), "test", "c")
    known.require_unseen(replace(moved(table), latency_ms=table.latency_ms + np.float32(1)), "test", "c")


def test_the_split_that_training_draws_travels_with_the_checkpoint(tmp_path, capsys):
    table, features = tiny(split=False)
    table = replace(table, groups={"book": tuple(str(row // 2) for row in range(60))}).grouped_by("book")
    files = ["--table", str(tmp_path / "t.parquet"), "--features", str(tmp_path / "f.safetensors")]
    table.save(tmp_path / "t.parquet")
    features.save(tmp_path / "f.safetensors")
    run = ["--num_epochs", "1", "--hidden_dim", "16", "--teachers", "0", "--seed", "3"]
    assert main(["train", *files, "--output_dir", str(tmp_path / "c"), *run]) == 0
    said = capsys.readouterr().out
    assert "the table stores no splits; drawn by book: train 38, validation 10, test 12" in said
    assert "--split" not in said.splitlines()[-1]
    drawn = with_splits(table)  # equal for every seed, so that several seeds can be evaluated together
    assert load_controller(tmp_path / "c").trained_on.with_splits(table, "c").split == drawn.split
    assert main(["evaluate", *files, "--checkpoint", str(tmp_path / "c"), "--resamples", "20", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["counts"]["evaluated_samples"], document["counts"]["evaluated_units"]) == (12, 6)
    assert document["unit"] == "book" and "stores no splits" in err


def test_samples_that_training_did_not_know_are_a_test_unless_their_group_was_known():
    table, _ = tiny()
    known = TrainedOn.of_table(named(table))
    grown = replace(table, sample_ids=(*table.sample_ids[:-2], "new 1", "new 2"), split=None)
    books = (*map(str, range(59)), "0")  # the last one belongs to the first sample, of training
    grown = replace(named(grown), groups={"book": books}).grouped_by("book")
    assert known.with_splits(grown, "c").split == (*table.split[:-2], "test", table.split[0])
    with pytest.raises(DataError, match="c was trained on none of its samples"):
        known.with_splits(named(replace(table, split=None), "another data set"), "c")
    assert known.with_splits(table, "c") is table


def test_a_sample_that_was_measured_anew_does_not_become_a_test_sample():
    """Without a data set's name samples are told by their measurements, and here one more cell is there since."""
    table, _ = tiny()
    gap = table.accuracy.copy()
    gap[0, 1] = np.nan
    known = TrainedOn.of_table(replace(table, accuracy=gap))
    grown = replace(table, split=None, sample_ids=(*table.sample_ids[:-1], "new"))
    assert known.with_splits(grown, "c").split == (*table.split[:-1], "test")
    with pytest.raises(DataError, match="trained on none of its samples"):  # equal ids alone are those of others
        known.with_splits(replace(grown, accuracy=1 - grown.accuracy), "c")


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_the_commands_refuse_overlap_by_name_and_number(trained, tmp_path, capsys, command):
    table, features, result = trained
    moved(table).save(tmp_path / "t.parquet")
    features.save(tmp_path / "f.safetensors")
    words = [command, "--table", tmp_path / "t.parquet", "--features", tmp_path / "f.safetensors"]
    words += ["--checkpoint", result.output_dir] + (["--output", tmp_path / "r.html"] if command == "report" else [])
    assert main([str(word) for word in words]) == 2
    first = sorted(name for name, side in zip(table.sample_ids, table.split, strict=True) if side == "train")[0]
    error = capsys.readouterr().err
    assert f"test samples, or their images, were used to train {result.output_dir}: {first}" in error


def test_requests_on_the_clock_leave_out_what_the_controller_knows():
    task = load_task("signs")
    drawn = fresh_samples(task, "validation", 3, 0)
    used = digests_of("signs", drawn[0].sample_id, drawn[0].image_id)
    assert drawn[0].image_id not in {sample.image_id for sample in fresh_samples(task, "validation", 3, 0, used)}
    everything = frozenset().union(
        *(digests_of("signs", sample.sample_id, sample.image_id) for sample in task.samples("test"))
    )
    with pytest.raises(ConfigError, match=r"were used before: test-.*--calibration_samples and --test_split"):
        fresh_samples(task, "test", 1, 0, everything)


# ---- what need not be said again

KNOWN = {
    "model_path": "m", "dataset_name": "own", "max_new_tokens": 4, "split": "train",
    "task": {"data_files": "a.jsonl", "columns": "question=q", "metric": "anls"},
}  # fmt: skip


def parsed(*words):
    args = command_parser("calibrate").parse_args([*words])
    forget_defaults(args, "model_path", "dataset_name", "split")
    return args


def test_what_is_known_is_filled_in_and_what_is_given_wins():
    complete_from(args := parsed(), KNOWN)
    assert (args.model_path, args.dataset_name, args.metric, args.max_new_tokens) == ("m", "own", "anls", 4)
    assert task_options(args) == TaskOptions("own", "a.jsonl", "question=q", "anls")
    complete_from(args := parsed("--model_path", "n", "--data_files", "b.jsonl", "--max-new-tokens", "7"), KNOWN)
    assert (args.model_path, args.data_files, args.max_new_tokens, args.metric) == ("n", "b.jsonl", 7, "anls")
    complete_from(args := parsed("--dataset_name", "signs"), KNOWN)  # other data, of which nothing is known
    assert (args.dataset_name, args.data_files, args.max_new_tokens) == ("signs", None, None)
    complete_from(args := parsed(), {})
    assert (args.model_path, args.dataset_name) == ("reference", "signs")
    with pytest.raises(ConfigError, match="--metric 'vqa', but the profiles have 'anls'"):
        complete_from(parsed("--metric", "vqa"), KNOWN)


def test_results_lie_in_a_directory_of_their_model_and_are_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = default_directory("accuracy")
    assert default == Path("results/profiling/exp5_accuracy")
    assert default_directory("accuracy", "./models/a/") == Path("results/profiling/a/exp5_accuracy")
    assert measured_dataset(default) is None and find_results(default, "own_data", "accuracy", None) == default
    for name in ("a", "b"):
        folder = default_directory("accuracy", name) / "exp5_accuracy_own-data"
        folder.mkdir(parents=True)
        document = {"config": {"dataset_name": "own_data"}}
        (folder / "exp5_accuracy_results_crops1.json").write_text(json.dumps(document))
    assert measured_dataset(default) == "own_data"
    assert find_results(default, "own_data", "accuracy", "x/b") == default_directory("accuracy", "b")
    with pytest.raises(ConfigError, match=r"of several models: .*--model_path"):
        find_results(default, "own_data", "accuracy", None)
    assert find_results(Path("elsewhere"), "own_data", "accuracy", None) == Path("elsewhere")
    (default_directory("accuracy", "a") / "exp5_accuracy_own-data").rename(tmp_path / "away")
    assert find_results(default, "own_data", "accuracy", None) == default_directory("accuracy", "b")
    folder = default_directory("accuracy", "b") / "exp5_accuracy_more"
    folder.mkdir()
    (folder / "exp5_accuracy_results_crops1.json").write_text(json.dumps({"config": {"dataset_name": "more"}}))
    with pytest.raises(ConfigError, match="accuracy results of more, own_data; say which with --dataset_name"):
        measured_dataset(default)


def test_a_table_of_other_weights_is_evaluated_with_a_note(trained, tmp_path, capsys):
    table, features, result = trained
    named(table, model="weights 2").save(tmp_path / "t.parquet")
    features.save(tmp_path / "f.safetensors")
    words = ["evaluate", "--table", tmp_path / "t.parquet", "--features", tmp_path / "f.safetensors", "--json"]
    assert main([str(w) for w in (*words, "--checkpoint", result.output_dir, "--split", "validation")]) == 0
    assert "was trained for other weights than those that this data was measured with" in capsys.readouterr().err


# ---- the model


def fine_tuned(model: Path, to: Path) -> Path:
    """The same model with a slightly different tensor."""
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    weights = load_file(to / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + np.float32(1e-3)}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny model, another one with the same knobs, and a controller and guard of the first."""
    root = tmp_path_factory.mktemp("own")
    model = write_tiny_model(root / "model")
    fine_tuned(model, root / "other")
    vlm = load_vlm(str(model))
    controller = GRPOController(
        len(vlm.encode_overview(_blank()).feature), len(vlm.question_feature("what")), budget_dim=4, hidden_dim=8,
        knob_values=vlm.knob_space.to_dict(),
    )  # fmt: skip
    controller.trained_on = TrainedOn(model_fingerprint(model), {"model_path": str(model)})
    controller.save_pretrained(root / "controller")
    return root


def _blank():
    return Image.new("RGB", (64, 64))


def open_own(own, model="model", **how):
    return AdaptiveVLM.from_pretrained(str(own / model), own / "controller", rehearsals=0, compiled=False, **how)


def test_another_models_controller_is_refused_unless_the_user_says_so(own):
    assert open_own(own).fingerprint == model_fingerprint(own / "model")
    with pytest.raises(CheckpointError, match=r"the controller was made for other weights.*--allow_other_model"):
        open_own(own, "other")
    assert open_own(own, "other", allow_other_model=True).fingerprint == model_fingerprint(own / "other")


def test_features_that_were_made_without_the_model_are_made_so_for_a_request(own, tmp_path, monkeypatch):
    """A controller that was trained on them is asked with them, and their time is the request's."""
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    extractor = CheapFeatures.fit(["what is it", "is it red"], [picture, _blank()])
    image, language = extractor.of_image(picture), extractor.of_question("is it red")
    vlm = load_vlm(str(own / "model"))
    made = GRPOController(len(image), len(language), budget_dim=4, hidden_dim=8, knob_values=vlm.knob_space.to_dict())
    made.trained_on = TrainedOn(model_fingerprint(own / "model"))
    made.save_pretrained(tmp_path)
    write_json(tmp_path / EXTRACTOR, extractor.to_dict())
    model = AdaptiveVLM.from_pretrained(str(own / "model"), tmp_path, rehearsals=1, compiled=False)
    np.testing.assert_array_equal(model.request(picture, "is it red").feature, language)
    np.testing.assert_array_equal(model.vlm.encode_overview(picture).feature, image)
    monkeypatch.setattr(CheapFeatures, "of_image", lambda self, one: time.sleep(0.05) or image)
    assert model.generate(picture, "is it red", max_new_tokens=2).stages_ms["preprocess"] > 50


def test_an_old_checkpoint_is_used_with_a_plain_warning(own, tmp_path, capsys):
    load_controller(own / "controller").save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["trained_on"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.warns(BudgetVLMWarning, match="does not say which weights it was trained for"):
        AdaptiveVLM.from_pretrained(str(own / "model"), tmp_path, rehearsals=0, compiled=False)
    _blank().save(tmp_path / "i.png")
    words = ["ask", "--model_path", own / "model", "--checkpoint", tmp_path, "--image", tmp_path / "i.png"]
    assert main([str(word) for word in (*words, "--question", "what", "--budget_ms", "9000")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "does not say which weights" in notes[0] and "no guard lies beside this controller" in notes[1]


@pytest.mark.parametrize("command", ["ask", "explain", "calibrate", "evaluate --live"])
def test_the_commands_refuse_another_models_controller_and_take_the_option(own, tmp_path, capsys, command):
    _blank().save(tmp_path / "i.png")
    asked = ["--image", str(tmp_path / "i.png"), "--question", "what", "--budget_ms", "9000"]
    words = [*command.split(), "--model_path", str(own / "other"), "--checkpoint", str(own / "controller")]
    words += asked if command in ("ask", "explain") else []
    assert main(words) == 2
    assert "the controller was made for other weights" in capsys.readouterr().err
    code = main([*words, "--allow_other_model"])
    said = capsys.readouterr().err
    assert code == 0 or "no guard.json lies beside the controller" in said  # past the check


def test_the_model_need_not_be_named_again(own, tmp_path, capsys):
    _blank().save(tmp_path / "i.png")
    words = ["ask", "--checkpoint", own / "controller", "--image", tmp_path / "i.png", "--question", "what"]
    assert main([str(word) for word in (*words, "--budget_ms", "9000", "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["setting"]


def test_a_guard_of_another_model_is_refused_too():
    with pytest.raises(CheckpointError, match=r"the guard was made for other weights \(2\)"):
        TrainedOn("1").require_model("1", "m", {"model": "2"})
    TrainedOn("1").require_model("1", "m", {"model": None})


def test_the_bundled_controller_is_of_the_bundled_model():
    fingerprint = model_fingerprint(model_directory("reference"))
    assert TrainedOn.read(bundled_controller("reference")).model == fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveVLM.from_pretrained(rehearsals=0, compiled=False)


def test_a_large_file_is_known_by_pieces_from_all_of_it(tmp_path):
    """A fine-tune may leave both ends of a file, embeddings and image encoder, as they are."""
    size = PIECES * PIECE + (8 << 20)
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(size)
    before = model_fingerprint(tmp_path)
    with open(path, "r+b") as file:
        file.seek(size // 3)
        file.write(bytes([1]) * (2 << 20))
    assert model_fingerprint(tmp_path) != before
