"""Several data sets: profiled apart, joined into one table, trained on together, reported apart."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from planted_tables import planted, tiny

from budgetvlm.cli import main
from budgetvlm.errors import ConfigError, DataError, KnobSpaceError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.evaluation.records import EvaluationReport, build
from budgetvlm.evaluation.text_tables import plain_text, tables
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import States
from budgetvlm.policies.by_label import ByLabel
from budgetvlm.profiling.prepare.joined_tables import join_features, join_tables
from budgetvlm.table import DATASET, ProfileTable
from budgetvlm.tasks import TaskOptions

QUICK = EvaluationOptions(resamples=20, prices=(0.0, 0.1), labels=())


def images(table: ProfileTable, of: list[str], **metadata: object) -> ProfileTable:
    """The table with these image ids, as many times as it has samples."""
    names = (of * table.num_samples)[: table.num_samples]
    return replace(table, groups={**table.groups, "image_id": tuple(names)}, metadata={**metadata})


def test_a_joined_table_holds_each_data_sets_cells_under_ids_that_cannot_collide():
    (one, seen), (other, also_seen) = tiny(12, seed=0), tiny(9, seed=1)
    table = join_tables({"a": replace(one, groups={"kind": ("x",) * 12}), "b": other})
    features = join_features({"a": seen, "b": also_seen})
    assert (
        table.sample_ids
        == features.sample_ids
        == tuple(f"a/s{i}" for i in range(12)) + tuple(f"b/s{i}" for i in range(9))
    )
    np.testing.assert_array_equal(table.accuracy, np.concatenate([one.accuracy, other.accuracy]))
    np.testing.assert_array_equal(table.latency_ms[12:], other.latency_ms)
    np.testing.assert_array_equal(features.image[12:], also_seen.image)
    assert table.groups == {DATASET: ("a",) * 12 + ("b",) * 9}  # a label that only one has tells nothing of the other
    assert table.split == (one.split or ()) + (other.split or ())
    assert join_tables({"a": one}) is one and join_features({"a": seen}) is seen


def test_an_image_of_two_data_sets_never_stands_on_two_sides():
    one, other = (tiny(6, seed=s)[0] for s in (0, 1))  # 4 train, 2 validation
    one = replace(images(one, ["p", "q", "r", "s", "t", "u"]), split=("train",) * 3 + ("validation",) * 2 + ("test",))
    other = replace(images(other, ["p", "t", "u", "v", "w", "q"]), split=("train",) * 5 + ("test",))
    said: list[str] = []
    table = join_tables({"a": one, "b": other}, said.append)
    # q is a test image of b, t a validation image of a, u a test image of a
    assert table.split[:6] == ("train", "test", "train", "validation", "validation", "test")
    assert table.split[6:] == ("train", "validation", "test", "train", "train", "test")
    assert len(said) == 1 and said[0].startswith("3 images are in several data sets")


def test_units_of_other_names_are_kept_apart():
    one, other = (tiny(6, seed=s, split=False)[0] for s in (0, 1))
    table = join_tables({"a": images(one, ["p", "q"]), "b": other})
    assert table.unit == "unit_id" and table.units[:3] == ("a/p", "a/q", "a/p") and table.units[6] == "b/s0"


def test_what_is_known_of_all_sweeps_is_that_of_each():
    sweep = {"split": "train", "max_new_tokens": 4, "model_fingerprint": "w", "task": {"metric": "vqa"}}
    parts = {
        "a": {"dataset_name": "a", "exp5_config": sweep, "model_fingerprint": "w", "calibration_split": "train"},
        "b": {
            "dataset_name": "b",
            "exp5_config": sweep | {"split": "validation+train", "max_new_tokens": 9, "task": {"data_files": "x.csv"}},
            "model_fingerprint": "w",
        },
    }
    table, _ = tiny(6, split=False)
    metadata = join_tables({name: replace(table, metadata=one) for name, one in parts.items()}).metadata
    assert metadata["dataset_name"] == "a+b" and metadata["data_sets"] == parts
    assert metadata["exp5_config"] == {
        "model_fingerprint": "w",
        "split": "train+validation",
        "max_new_tokens": 9,
        "task": {"data_files": "b:x.csv", "metric": "a:vqa"},
    }
    json.dumps(metadata)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"knob_space": planted(1, 1, 1).table.knob_space}, KnobSpaceError, r"the table of b \(beside a\) has another"),
        ({"metadata": {"model_fingerprint": "v"}}, DataError, r"a and b were measured with other weights \(w and v\)"),
    ],
)
def test_tables_of_other_models_are_not_joined(change, error, message):
    table = replace(tiny(6)[0], metadata={"model_fingerprint": "w"})
    other = planted(2, 2, 2).table if "knob_space" in change else replace(table, **change)
    with pytest.raises(error, match=message):
        join_tables({"a": table, "b": other})


def test_features_that_mean_other_things_are_not_joined():
    _, features = tiny(6)
    with pytest.raises(DataError, match=r"of b have 2 image and 2 language dimensions, those of a 3 and 2"):
        join_features({"a": features, "b": replace(features, image=features.image[:, :2])})
    with pytest.raises(DataError, match=r"fitted to other samples.*import table --input"):
        join_features({"a": features, "b": replace(features, metadata={"extractor": {"seed": 1}})})


SEVERAL = TaskOptions("a,b", "a:train=x.csv,test=y.csv,b:z.csv", "b:question=q,answers=g", "vqa", "b:Say, {question}")


def test_what_is_said_of_several_data_sets_comes_apart_and_together():
    a, b = (SEVERAL.only(name) for name in ("a", "b"))
    assert a == TaskOptions("a", "train=x.csv,test=y.csv", metric="vqa")
    assert b == TaskOptions("b", "z.csv", "question=q,answers=g", "vqa", "Say, {question}")
    assert TaskOptions.joined([a, b]) == SEVERAL
    assert TaskOptions("a").only("a") == TaskOptions("a")
    alone = TaskOptions("a", prompt="a: {question}")  # the words of a prompt, and no name
    assert alone.only("a") == alone


def test_options_that_do_not_say_of_which_data_set_they_speak():
    with pytest.raises(ConfigError, match="columns='question=q' has to say of which data set it speaks: a:"):
        TaskOptions("a,b", columns="question=q").only("a")


@dataclass(frozen=True)
class Fixed:
    """Chooses the setting with this number."""

    k: int
    name: str = "fixed"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), self.k)


def two_data_sets(count: int = 60) -> tuple[ProfileTable, Features]:
    """Samples of a are right with setting 2 or 3, those of b with 1 or 3; a is three quarters of all."""
    space = KnobSpace({"tiles": [1, 4], "depth": [2, 8]})
    names = tuple("aaab" * (count // 4))
    right = {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}
    table = ProfileTable.from_arrays(
        space,
        [f"{name}/{i}" for i, name in enumerate(names)],
        [right[name] for name in names],
        np.tile([10.0, 20.0, 20.0, 40.0], (count, 1)),
        groups={DATASET: names},
        split=["train", "validation", "test"] * (count // 3),
    )
    return table, Features(table.sample_ids, np.eye(2)[[int(name == "a") for name in names]], np.zeros((count, 1)))


@pytest.fixture(scope="module")
def sacrificed():
    """A policy that does for a what b needs not, beside policies of their own."""
    table, features = two_data_sets()
    options = replace(QUICK, budget_shares=(0.5,), room_range=(0.5, 0.5))
    own = ByLabel(DATASET, {"a": Fixed(2), "b": Fixed(1)})
    return evaluate(table, features, {"one": Fixed(2)}, options, own=own)


def test_each_data_sets_accuracy_is_reported_apart_and_against_its_own_controller(sacrificed):
    a, b = sacrificed.policy("controller").on_dataset
    assert (a.dataset, a.samples, a.accuracy.value, a.vs_own.value) == ("a", 15, 1.0, 0.0)
    assert (b.dataset, b.samples, b.accuracy.value, b.vs_own.value) == ("b", 5, 0.0, -1.0)
    assert [on.accuracy.value for on in sacrificed.policy("own controllers").on_dataset] == [1.0, 1.0]
    assert sacrificed.notes[0].startswith("A data set is sacrificed: b is -100.0 points [-100.0, -100.0] from")
    text = " ".join(plain_text(tables(sacrificed)).split())
    assert "Accuracy on each data set (%), mean over the same budgets; points over its own controller" in text
    assert "a b policy (15 samples) (5 samples)" in text and "controller 100.0 ±0.0 0.0 ±0.0" in text
    document = sacrificed.to_dict()
    assert build(EvaluationReport, document).policy("controller").on_dataset == (a, b)


def test_nothing_is_said_apart_of_a_single_data_set():
    table, features = two_data_sets()
    report = evaluate(replace(table, groups={}), features, {}, replace(QUICK, budget_shares=(0.5,)))
    assert "on_dataset" not in json.dumps(report.to_dict()) and "data set" not in plain_text(tables(report))


def test_who_sacrifices_nothing_is_told_so(sacrificed):
    table, features = two_data_sets()
    own = ByLabel(DATASET, {"a": Fixed(2), "b": Fixed(1)})
    report = evaluate(table, features, {"one": own}, replace(QUICK, budget_shares=(0.5,)), own=own)
    assert report.notes[0].startswith("No data set is sacrificed: the worst of them, a is +0.0 points")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two tables of tiny data sets, and what is trained on both and on each."""
    path = tmp_path_factory.mktemp("several")
    table, features = two_data_sets(120)
    for name in ("a", "b"):
        rows = np.flatnonzero(np.array(table.groups[DATASET]) == name)
        ids = tuple(table.sample_ids[row].removeprefix(f"{name}/") for row in rows)
        replace(table.subset(rows), sample_ids=ids, groups={}).save(path / f"{name}.parquet")
        Features(ids, features.image[rows], features.language[rows]).save(path / f"{name}.safetensors")
    quick = ["--num_epochs", "1", "--teachers", "0", "--check_each", "--output_dir", str(path / "c")]
    with (path / "said").open("w") as file, contextlib.redirect_stdout(file):
        assert main(["train", *data_of(path, "a", "b"), *quick]) == 0
    return path


def data_of(path, *names):
    return [
        "--table", ",".join(str(path / f"{name}.parquet") for name in names),
        "--features", ",".join(str(path / f"{name}.safetensors") for name in names),
    ]  # fmt: skip


def test_each_data_sets_own_controller_shows_what_the_common_one_costs_it(trained, capsys):
    said = (trained / "said").read_text()
    assert "for a alone:" in said and "Accuracy on each data set" in said and "sacrificed" in said
    for place in ("c", "c/each/a", "c/each/b"):
        assert (trained / place / "best_checkpoint.pt").exists() and (trained / place / "guard.json").exists()
    words = [*data_of(trained, "a", "b"), "--checkpoint", str(trained / "c"), "--resamples", "20", "--json"]
    assert main(["evaluate", *words]) == 0
    report = build(EvaluationReport, json.loads(capsys.readouterr().out))
    assert {result.name for result in report.policies} >= {"own controllers", "controller"}
    assert [on.dataset for on in report.policy("controller").on_dataset] == ["a", "b"]
    assert all(on.vs_own is not None for on in report.policy("controller").on_dataset)


def test_what_was_trained_on_together_is_known_again_alone(trained, capsys):
    table = ProfileTable.load(trained / "a.parquet")
    sides = tuple("test" if side == "train" else "train" for side in table.split)
    words = ["--table", str(trained / "other.parquet"), "--features", str(trained / "a.safetensors")]
    replace(table, split=sides).save(trained / "other.parquet")
    assert main(["evaluate", *words, "--checkpoint", str(trained / "c")]) == 2
    assert "were used to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors", "--check_each"], "--check_each compares data sets, and this is one"),
        (["a.safetensors,b.safetensors"], "2 files of features for 1 tables"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(trained, capsys, monkeypatch, words, message):
    monkeypatch.chdir(trained)
    assert main(["train", "--table", "a.parquet", "--features", *words, "--output_dir", "no"]) == 2
    assert message in capsys.readouterr().err and not (trained / "no").exists()


def test_features_made_from_the_questions_of_several_tables_are_fitted_to_all(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        lines = [
            f"{i},{k},{(i + k) % 2},{10 * k},what {colour} thing is number {i},p{i}" for i in range(20) for k in (1, 2)
        ]
        (tmp_path / f"{name}.csv").write_text("sample_id,size,score,latency_ms,question,image_id\n" + "\n".join(lines))
    words = ["--input", f"{tmp_path}/a.csv,{tmp_path}/b.csv", "--knobs", "size", "--features", "auto"]
    assert main(["import", "table", *words, "--latency_unit", "ms", "--output", str(tmp_path / "t.parquet")]) == 0
    table, features = ProfileTable.load(tmp_path / "t.parquet"), Features.load(tmp_path / "t.features.safetensors")
    assert table.num_samples == 40 and table.groups[DATASET] == ("a",) * 20 + ("b",) * 20
    assert table.sample_ids[:2] == ("a/0", "a/1") and table.unit == "image_id"
    sides = dict(zip(table.sample_ids, table.split, strict=True))
    assert all(sides[f"a/{i}"] == sides[f"b/{i}"] for i in range(20))  # they share their images
    assert features.aligned(table.sample_ids).num_samples == 40 and "extractor" in features.metadata
