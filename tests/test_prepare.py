"""Joining both profiles, predicting latency, features, splits, reuse: with a toy task and a toy model."""

import argparse
import inspect
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from planted_tables import tiny
from test_made_features import write_encoder

from budgetvlm.errors import ConfigError, DataError, KnobSpaceError, OutputError
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.measure.setting_sampling import draw_cells
from budgetvlm.profiling.prepare.feature_extraction import Backend, extract_features, in_batches
from budgetvlm.profiling.prepare.fill import predict_times
from budgetvlm.profiling.prepare.preparation import prepare
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions
from budgetvlm.profiling.prepare.prepared_data import PreparedData, features_path, load_prepared, table_path
from budgetvlm.profiling.results.measurements import AccuracyRecord, LatencyRecord
from budgetvlm.profiling.results.result_files import write_result
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Sample, TaskOptions
from budgetvlm.vlm import Overview
from budgetvlm.vlm.fingerprint import model_fingerprint

SPACE = KnobSpace({"max_crops": [1, 4], "top_k": [2], "num_active_blocks": [3, 6]})
BLOCKS = {"num_total_blocks": 6, "active_block_indices": [0, 5]}


class ToyTask:
    """20 images, two questions each; image number n is a grey image of brightness n. 4 images are for testing."""

    name = "toy"
    sizes = {"train": range(16), "validation": range(0), "test": range(16, 20)}  # noqa: RUF012

    def num_samples(self, split):
        return 2 * len(self.sizes[split])

    def samples(self, split, num_samples=None, seed=0):
        for number in self.sizes[split]:
            for question in ("what", "how many are there"):
                yield Sample(
                    f"{number}-{question[0]}",
                    f"image {number}",
                    question,
                    ("yes",),
                    lambda number=number: Image.new("L", (2, 2), number),
                    {"kind": question.split()[0]},
                )


@dataclass
class ToyVLM:
    """Image feature: (brightness, 1); question feature: (length,). Counts what it encodes; may run out of memory."""

    knob_space: KnobSpace = SPACE
    encoded: list = field(default_factory=list)

    def encode_overview(self, image):
        self.encoded.append(image.getpixel((0, 0)))
        return Overview(torch.zeros(1, 1), np.array([self.encoded[-1], 1.0], np.float32), 0.0, 0.0)

    def question_feature(self, question):
        self.encoded.append(question)
        return np.array([len(question)], np.float32)


def toy_samples(*splits):
    return [sample for split in splits for sample in ToyTask().samples(split)]


def write_profiles(
    root, splits=("train",), timed=None, settings=SPACE.settings, groups=True, counts=True, task=None, **config
):
    """Accuracy 1 on the full setting and for "how" questions, else 0; time = 10 (k + 1) + 2 x output tokens, in ms."""
    config = {"split": "+".join(splits), "max_new_tokens": 4, "world_size": 1, "versions": {}} | config
    located = [(sample, split) for split in splits for sample in (task or ToyTask()).samples(split)]
    tokens = {sample.sample_id: 1 + number % 3 for number, (sample, _) in enumerate(located)}
    for k, setting in enumerate(settings):
        records = [
            AccuracyRecord(
                sample.sample_id,
                float(setting == SPACE.full or "how" in sample.question),
                "yes",
                ("yes",),
                **({"num_output_tokens": tokens[sample.sample_id], "num_vision_tokens": 16} if counts else {}),
                **({"num_language_tokens": len(sample.question)} if counts else {}),
                groups=sample.groups | {"image_id": sample.image_id, "split": split} if groups else {},
            )
            for sample, split in located
        ]
        write_result("accuracy", root / "exp5", "toy", setting, records, config=config, blocks=BLOCKS)
        times = [
            LatencyRecord(name, 10.0 * (k + 1) + 2 * count, 4.0, 2.0 * count, 16, length, count, 1.0)
            for name, count, length in ((s.sample_id, tokens[s.sample_id], len(s.question)) for s, _ in located[:timed])
        ]
        write_result("latency", root / "exp6", "toy", setting, times, config=config, blocks=BLOCKS)


@dataclass
class Prepared:
    """`prepare` on the toy, with what it said and the model it used."""

    root: object
    vlm: ToyVLM = field(default_factory=ToyVLM)
    task: ToyTask = field(default_factory=ToyTask)
    said: list = field(default_factory=list)
    version: str = "1"

    def __call__(self, **options):
        backend = Backend(lambda name: self.task, lambda path, device: self.vlm, lambda path: self.version)
        force = options.pop("force_recompute", False)
        paths = [self.root / "exp5", self.root / "exp6"]
        where = {
            "task": TaskOptions("toy"),
            "model_path": "toy-model",
            "output_data_path": self.root / "data" / "d.json",
        }
        return prepare(
            PrepareOptions(*paths, **where | options), force_recompute=force, backend=backend, say=self.said.append
        )


@pytest.fixture
def toy(tmp_path):
    return Prepared(tmp_path)


def test_the_whole_way(toy):
    write_profiles(toy.root)
    data = toy()
    assert data.table.knob_space == SPACE
    assert data.table.num_samples == 32
    how = np.array(data.table.groups["kind"]) == "how"
    np.testing.assert_array_equal(data.table.accuracy, np.stack([how, how, how, np.ones(32)], axis=1))
    np.testing.assert_array_equal(data.table.latency_ms[:4, 1], [22, 24, 26, 22])
    np.testing.assert_array_equal(data.table.stages_ms["decode"][:4, 3], [2, 4, 6, 2])
    assert set(data.table.stages_ms) == {"prefill", "decode"}
    np.testing.assert_array_equal(data.table.tokens["output"][:4, 0], [1, 2, 3, 1])
    np.testing.assert_array_equal(data.features.image[:, 0], np.repeat(np.arange(16), 2))  # image n is of brightness n
    np.testing.assert_array_equal(data.features.language[:2, 0], [len("what"), len("how many are there")])
    assert data.features.sample_ids == data.table.sample_ids
    assert len(toy.vlm.encoded) == 16 + 2  # once an image, once a question
    assert set(data.table.groups["latency_source"]) == {"measured"}
    assert "32 samples (train 20, validation 6, test 6; split by image)" in toy.said[-1]


def test_the_document_holds_it_all(toy):
    write_profiles(toy.root)
    data = toy()
    document = json.loads(data.path.read_text())
    assert document["schema_version"] == 2
    assert document["knob_space"] == SPACE.to_dict()
    assert document["budgets"]["multipliers"] == [0.8, 1.0, 1.2]
    assert document["splits"] == {
        "by": "image",
        "samples": {"train": 20, "validation": 6, "test": 6},
        "images": {"train": 10, "validation": 3, "test": 3},
    }
    assert document["settings"][3].items() >= SPACE.full.items()
    assert document["settings"][3]["latency_ms"][:3] == [42.0, 44.0, 46.0]
    train = data.table.subset("train")
    assert document["latency_reference_ms"] == np.median(train.latency_ms[:, 3])
    assert document["samples"][0]["groups"]["image_id"] == "image 0"
    assert document["metadata"]["exp5_config"]["max_new_tokens"] == 4


def test_groups_that_are_named_are_kept_together_and_remembered(toy):
    """The two kinds of question: too few to split into three, and enough for two."""
    write_profiles(toy.root)
    with pytest.raises(ConfigError, match="there are 2 images"):
        toy(groups="kind", train_split=0.9)
    data = toy(groups="kind", train_split=0.5)
    assert data.table.unit == "kind" and json.loads(data.path.read_text())["splits"]["by"] == "kind"
    assert len(set(zip(data.table.groups["kind"], data.table.split, strict=True))) == 2
    assert toy(train_split=0.5).table.unit == "kind"  # the same data, found again


def test_it_comes_back_from_the_document_and_from_the_table(toy):
    write_profiles(toy.root, timed=20)
    data = toy()
    for table in (load_prepared(data.path).table, ProfileTable.load(table_path(data.path))):
        np.testing.assert_array_equal(table.latency_ms, data.table.latency_ms)
        np.testing.assert_array_equal(table.accuracy, data.table.accuracy)
        np.testing.assert_array_equal(table.stages_ms["prefill"], data.table.stages_ms["prefill"])
        np.testing.assert_array_equal(table.tokens["output"], data.table.tokens["output"])
        assert (table.split, table.groups) == (data.table.split, data.table.groups)
    np.testing.assert_array_equal(Features.load(features_path(data.path)).image, data.features.image)


def test_latency_that_was_not_measured_is_predicted_and_said(toy):
    write_profiles(toy.root, timed=20)
    data = toy()
    tokens = 1 + np.arange(32) % 3
    np.testing.assert_allclose(data.table.latency_ms, 10.0 * np.arange(1, 5) + 2 * tokens[:, None], rtol=1e-5)
    assert data.table.groups["latency_source"] == ("measured",) * 20 + ("predicted",) * 12
    fill = data.table.metadata["latency_fill"]
    assert fill == {"predicted_samples": 12, "predicted_cells": 48, "fitted_on": 20, "median_relative_error": 0.0}
    assert toy.said[0].startswith("latency of 12 of 32 samples predicted from 20 measured at each setting")
    assert "median error 0.0%" in toy.said[0]


def test_latency_is_predicted_only_if_that_can_work(toy):
    write_profiles(toy.root, timed=20)
    with pytest.raises(DataError, match=r"lacks 12 of the 32 samples of exp5: 10-h.*--latency_fill model"):
        toy(latency_fill="none")
    write_profiles(toy.root, timed=7)
    with pytest.raises(DataError, match="8 have to be timed; 7 are"):
        toy()
    write_profiles(toy.root, timed=20, counts=False)
    with pytest.raises(DataError, match="have no field num_vision_tokens, num_language_tokens, num_output_tokens"):
        toy()


def test_sweeps_over_other_splits(toy):
    write_profiles(toy.root / "more", splits=("train", "test"))
    write_profiles(toy.root, splits=("test",))
    (toy.root / "exp6").rename(toy.root / "old")
    (toy.root / "more" / "exp6").rename(toy.root / "exp6")
    with pytest.raises(DataError, match=r"field config.split is 'train.test', but .* has 'test'"):
        toy()


def test_sweeps_that_share_no_sample(toy):
    write_profiles(toy.root)
    for path in (toy.root / "exp6").rglob("*.json"):
        edit(
            path, lambda d: [sample.update(sample_id="x" + sample["sample_id"]) for sample in d["per_sample_latencies"]]
        )
    with pytest.raises(DataError, match=r"shares no sample with exp5 .*: x0-h, x0-w and 30 more against 0-h, 0-w"):
        toy()


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def result(toy, experiment, crops=1, blocks=3):
    (path,) = (toy.root / experiment).rglob(f"*crops{crops}_topk2_blocks{blocks}.json")
    return path


def drop_last(key):
    def change(document):
        document[key].pop()
        document["summary"][0].pop("num_samples")

    return change


def test_a_sample_that_one_setting_lacks(toy):
    write_profiles(toy.root)
    edit(result(toy, "exp5", 4), drop_last("all_samples"))
    with pytest.raises(DataError, match=r"crops4_topk2_blocks3.json lacks 1 samples of .*: 15-h"):
        toy()


def test_settings_that_one_side_lacks(toy):
    write_profiles(toy.root)
    result(toy, "exp6", 4).unlink()
    with pytest.raises(DataError, match=r"exp6 \(latency\) lacks 1: max_crops=4, top_k=2, num_active_blocks=3"):
        toy()
    write_profiles(toy.root)
    result(toy, "exp5", 1).unlink()
    with pytest.raises(DataError, match=r"exp5 \(accuracy\) lacks 1: max_crops=1, top_k=2, num_active_blocks=3"):
        toy()


def test_answers_of_another_length(toy):
    write_profiles(toy.root)
    edit(result(toy, "exp6"), lambda document: document["config"].update(max_new_tokens=9))
    with pytest.raises(DataError, match=r"field config.max_new_tokens is 9, but .* has 4"):
        toy()


def test_times_may_have_been_measured_with_another_metric_but_not_with_another_prompt(toy):
    write_profiles(toy.root)
    edit(result(toy, "exp6"), lambda document: document["config"].update(task={"metric": "anls"}))
    toy()
    edit(result(toy, "exp6"), lambda document: document["config"].update(task={"prompt": "{question} Be brief."}))
    with pytest.raises(DataError, match=r"field config.task is .*Be brief"):
        toy(force_recompute=True)


def test_weights_that_differ(toy):
    write_profiles(toy.root, model_fingerprint="1")
    toy.version = "2"
    with pytest.raises(
        DataError, match=r"other weights \(field config.model_fingerprint is 1\) than model_path=toy-model"
    ):
        toy()
    edit(result(toy, "exp6"), lambda document: document["config"].update(model_fingerprint="2"))
    with pytest.raises(DataError, match=r"field config.model_fingerprint is 2, but .* has 1"):
        toy()


def test_samples_that_only_exp6_has_help_the_fit(toy):
    write_profiles(toy.root)
    for blocks in (3, 6):
        for crops in (1, 4):
            edit(result(toy, "exp5", crops, blocks), drop_last("all_samples"))
            edit(result(toy, "exp6", crops, blocks), lambda d: (d["per_sample_latencies"].pop(0), d.pop("summary")))
    data = toy()
    assert data.table.num_samples == 31
    assert data.table.latency_ms[0, 0] == pytest.approx(12, rel=1e-5)
    assert toy.said[1].startswith("1 samples of exp6 are not in exp5")


def test_a_sparse_sweep_leaves_gaps(toy):
    write_profiles(toy.root, settings=[SPACE.settings[0], SPACE.settings[3]])
    data = toy()
    assert data.table.knob_space == SPACE
    np.testing.assert_array_equal(np.isnan(data.table.accuracy[0]), [False, True, True, False])
    assert np.isnan(load_prepared(data.path).table.latency_ms[:, 1:3]).all()
    assert data.table.metadata["measured_settings"] == 2


def drop_cells(toy, keep):
    """Leave only the timed cells for which ``keep(number of the setting, number of the sample)`` holds."""
    for k, (crops, blocks) in enumerate([(1, 3), (1, 6), (4, 3), (4, 6)]):

        def cut(document, k=k):
            samples = document["per_sample_latencies"]
            document["per_sample_latencies"] = [s for n, s in enumerate(samples) if keep(k, n)]
            document["config"]["cells"] = 0.5
            document.pop("summary")

        edit(result(toy, "exp6", crops, blocks), cut)


def test_cells_that_were_not_timed_are_predicted_and_checked_on_some_that_were(toy):
    write_profiles(toy.root)
    whole = toy().table
    timed = draw_cells(32, 4, 0.5, seed=0)
    drop_cells(toy, lambda k, n: timed[n, k])
    table = toy(force_recompute=True).table
    fill = table.metadata["latency_fill"]
    assert {name: fill[name] for name in ("predicted_cells", "fitted_on_cells", "held_out_cells")} == {
        "predicted_cells": 64, "fitted_on_cells": 64, "held_out_cells": 12,
    }  # fmt: skip
    assert fill["held_out_error_p50"] < 0.05
    np.testing.assert_allclose(table.latency_ms, whole.latency_ms, rtol=0.1)
    np.testing.assert_allclose(table.stages_ms["decode"], whole.stages_ms["decode"], atol=0.8)
    np.testing.assert_array_equal(table.latency_ms[timed], whole.latency_ms[timed])
    assert any("64 of 128 cells" in line and "12 measured cells held out" in line for line in toy.said)
    with pytest.raises(DataError, match=r"lacks 16 of the 32 samples"):
        toy(force_recompute=True, latency_fill="none")


def test_cells_of_samples_that_were_not_scored_help_to_predict_the_others(toy):
    write_profiles(toy.root)
    drop_cells(toy, lambda k, n: n < 12)
    drop_scores(toy, lambda k, n: n >= 8)
    data = toy()
    assert any("8 samples of exp6 are not in exp5" in line for line in toy.said)
    np.testing.assert_allclose(data.table.latency_ms[:, 3], [40 + 2 * (1 + n % 3) for n in range(8, 32)], rtol=0.1)


def drop_scores(toy, keep, **config):
    """Leave only the scored cells for which ``keep(number of the setting, number of the sample)`` holds."""
    for k, (crops, blocks) in enumerate([(1, 3), (1, 6), (4, 3), (4, 6)]):

        def cut(document, k=k):
            for n, record in enumerate(document["all_samples"]):
                record["groups"]["document"] = str(n // 8)
            document["all_samples"] = [s for n, s in enumerate(document["all_samples"]) if keep(k, n)]
            document["config"] |= {"cells": 0.5, **config}
            document.pop("summary")

        edit(result(toy, "exp5", crops, blocks), cut)


ASKED = (6, 7, 16, 17, 30, 31)  # questions about images 3, 8 and 15, a fifth by their digests


@pytest.mark.parametrize(("splits", "in_full"), [(("train",), ASKED), (("train", "test"), range(32, 40))])
def test_cells_that_were_not_scored_stay_unmeasured_and_what_was_measured_in_full_is_the_test_split(
    toy, splits, in_full
):
    write_profiles(toy.root, splits=splits, timed=30)
    scored = draw_cells(40, 4, 0.5, seed=0)
    scored[[*in_full, 10, 11]] = True  # image 5 is complete as well, but because its outcomes were uncertain
    drop_scores(toy, lambda k, n: scored[n, k])
    table = toy().table
    rows = [int(name.split("-")[0]) * 2 + (name[-1] == "h") for name in table.sample_ids]
    np.testing.assert_array_equal(np.isfinite(table.accuracy), scored[rows])
    assert {row for row, side in zip(rows, table.split, strict=True) if side == "test"} == set(in_full)
    assert {"train", "validation"} < set(table.split)
    assert np.isfinite(table.latency_ms).all()
    assert np.isfinite(load_prepared(toy.root / "data" / "d.json").table.accuracy).sum() == scored[rows].sum()


def test_a_sweep_that_was_stopped_while_it_grew_to_all_cells_keeps_its_test_split(toy):
    write_profiles(toy.root)
    drop_scores(toy, lambda k, n: k == 0 or k % 2 == n % 2 or n in ASKED)
    edit(result(toy, "exp5", 1, 3), lambda document: document["config"].pop("cells"))  # the first has all by now
    table = toy().table
    tested = [name for name, side in zip(table.sample_ids, table.split, strict=True) if side == "test"]
    assert sorted(tested) == sorted(f"{row // 2}-{'wh'[row % 2]}" for row in ASKED)


def test_no_other_test_split_than_what_was_measured_in_full(toy):
    write_profiles(toy.root)
    drop_scores(toy, lambda k, n: k % 2 == n % 2 or n in ASKED)
    with pytest.raises(ConfigError, match="what was measured in full is the test split"):
        toy(test_split=0.5)


def test_whole_documents_are_the_test_split_where_the_sweep_measured_those_in_full(toy):
    """Five documents of eight questions; the digest of "test 0" is the smallest."""
    write_profiles(toy.root)
    drop_scores(toy, lambda k, n: k % 2 == n % 2 or n < 8, groups="document")
    table = toy().table
    assert table.unit == "document"  # as the sweep was told
    assert {label for label, side in zip(table.units, table.split, strict=True) if side == "test"} == {"0"}
    assert len(set(zip(table.units, table.split, strict=True))) == len(set(table.units)) >= 4
    assert np.isfinite(table.subset("test").accuracy).all()


def test_documents_that_were_measured_in_part_are_no_test_split(toy):
    write_profiles(toy.root)
    drop_scores(toy, lambda k, n: k % 2 == n % 2 or n in ASKED)
    with pytest.raises(ConfigError, match=r"no document can be held out.* --groups document: it keeps what there is"):
        toy(groups="document")
    assert "test" in toy().table.split  # by images it works


def test_a_setting_that_was_never_timed_is_predicted_on_request(toy):
    write_profiles(toy.root)
    whole = toy().table
    result(toy, "exp6", 4).unlink()
    table = toy(force_recompute=True, latency_fill="settings").table
    assert table.metadata["latency_fill"]["predicted_cells"] == 32
    assert np.isfinite(table.latency_ms).all()
    np.testing.assert_array_equal(table.latency_ms[:, [0, 1, 3]], whole.latency_ms[:, [0, 1, 3]])


def test_too_few_cells_to_predict_the_others(toy):
    write_profiles(toy.root)
    drop_cells(toy, lambda k, n: n < 9)
    with pytest.raises(DataError, match=r"36 cells .* were timed; to predict the others 40 are needed"):
        toy()


def test_the_tasks_own_test_split_is_kept_and_validation_drawn_from_train(toy):
    write_profiles(toy.root, splits=("train", "test"))
    table = toy().table
    split, ids = np.array(table.split), np.array(table.groups["image_id"])
    assert {int(name.split()[1]) for name in ids[split == "test"]} == set(range(16, 20))
    assert {name: int((split == name).sum()) for name in ("train", "validation")} == {"train": 26, "validation": 6}


def test_what_result_files_lack_comes_from_the_task(toy):
    write_profiles(toy.root, splits=("train", "test"), groups=False)
    table = toy().table
    assert table.groups["image_id"][2] == "image 1"
    assert table.split.count("test") == 8


def test_a_held_out_part_on_request(toy):
    write_profiles(toy.root)
    document = json.loads(toy(test_split=0.25, train_split=0.75).path.read_text())
    assert document["splits"]["images"] == {"train": 9, "validation": 3, "test": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": 1.0}, "train_split=1.0 leaves train or validation empty"),
        ({"train_split": 0.99}, "leaves split 'validation' empty"),
        ({"test_split": -0.1}, "test_split=-0.1"),
        ({"latency_fill": "guess"}, "latency_fill='guess' is unknown"),
        ({"feature_batch_size": 0}, "feature_batch_size=0"),
        ({"train_split": 0, "seed": -1}, "train_split=0 .*; seed=-1"),
    ],
)
def test_options_that_cannot_work(toy, options, message):
    write_profiles(toy.root)
    with pytest.raises(ConfigError, match=message):
        toy(**options)
    assert not toy.vlm.encoded  # found out before any work


def test_a_test_split_is_drawn_from_validation_where_the_task_has_both_others(toy):
    toy.task.sizes = {"train": range(6), "validation": range(6, 18), "test": range(0)}
    write_profiles(toy.root, splits=("train", "validation"), task=toy.task)
    table = toy().table
    assert [table.split.count(name) for name in ("train", "validation", "test")] == [12, 12, 12]
    assert set(table.rows_of("train")) == set(range(12))
    assert "the data set has no test split: a part is held out" in "\n".join(toy.said)
    assert "test" not in toy(test_split=0, force_recompute=True).table.split
    assert "`budgetvlm evaluate` can report on --split validation alone" in "\n".join(toy.said)


@pytest.mark.parametrize(
    ("images", "wanted", "held", "said"),
    [
        (130, None, 50, "50 samples are held back for `budgetvlm calibrate`"),  # a fifth of 260 samples, 50 at most
        (60, None, 28, "28 samples are held back"),  # what at most 5% takes
        (27, None, 0, "too few samples (54 of split train) to hold 28 back"),
        (27, 30, 30, "30 samples are held back"),
        (60, 0, 0, ""),
    ],
)
def test_calibration_gets_samples_that_nothing_has_seen(toy, images, wanted, held, said):
    toy.task.sizes = {"train": range(images), "validation": range(0), "test": range(0)}
    write_profiles(toy.root, task=toy.task)
    table = toy(calibration_samples=wanted).table
    assert table.num_samples == 2 * images - held
    assert said in "\n".join(toy.said)
    assert len(set(table.groups["image_id"])) * 2 == table.num_samples  # whole images
    assert table.metadata["calibration_split"] == "train"
    other = toy(calibration_samples=wanted, seed=3, force_recompute=True).table
    assert other.sample_ids == table.sample_ids and (other.split != table.split)  # the same ones, whatever the splits


def test_nothing_is_held_back_where_the_task_has_samples_left(toy):
    toy.task.sizes = {"train": range(16), "validation": range(0), "test": range(0)}
    write_profiles(toy.root, task=toy.task)
    toy.task.sizes = {"train": range(41), "validation": range(0), "test": range(0)}
    assert toy().table.num_samples == 32
    assert "held back" not in "\n".join(toy.said)


def test_the_model_is_the_one_that_the_results_name(toy):
    write_profiles(toy.root, model_path="toy-model", model_fingerprint="1")
    data = toy(model_path=None)
    document = json.loads(data.path.read_text())
    assert document["model_path"] == "toy-model"
    assert data.table.metadata["model_fingerprint"] == "1"


def test_a_test_split_is_not_drawn_beside_the_tasks_own(toy):
    write_profiles(toy.root, splits=("train", "test"))
    with pytest.raises(ConfigError, match="task's own splits"):
        toy(test_split=0.1)


def test_data_is_reused_and_redone_on_request(toy):
    write_profiles(toy.root)
    first = toy()
    encoded = len(toy.vlm.encoded)
    again = toy()
    assert again.reused
    assert len(toy.vlm.encoded) == encoded
    assert toy.said[-1].startswith("using the data in")
    assert again.table.split == first.table.split
    assert not toy(force_recompute=True).reused
    assert len(toy.vlm.encoded) == 2 * encoded


def test_results_of_another_version_of_the_data_set(toy):
    write_profiles(toy.root, splits=("train", "test"))
    for path in toy.root.rglob("exp5*.json"):
        edit(path, lambda d: d["all_samples"][0]["groups"].update(split="test"))
    with pytest.raises(DataError, match=r"groups.split of the accuracy results differs from the data set's own"):
        toy()


def test_the_seed_does_not_touch_splits_that_are_the_tasks_own(toy):
    toy.task.sizes = {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}
    write_profiles(toy.root, splits=("train", "validation", "test"), task=toy.task)
    table = toy().table
    assert [table.split.count(name) for name in ("train", "validation", "test")] == [24, 8, 8]
    before = (toy.root / "data" / "d.json").stat().st_mtime_ns
    assert toy(seed=5, train_split=0.5).table.split == table.split
    assert (toy.root / "data" / "d.json").stat().st_mtime_ns == before


def test_other_splits_need_no_new_features(toy):
    write_profiles(toy.root)
    toy()
    encoded = len(toy.vlm.encoded)
    data = toy(train_split=0.5)
    assert data.table.split.count("validation") == 14 and data.table.split.count("test") == 6
    assert load_prepared(data.path).table.split == data.table.split
    assert len(toy.vlm.encoded) == encoded


def test_features_of_an_encoder_are_fitted_on_the_training_samples_of_the_splits(toy, tmp_path):
    write_profiles(toy.root)
    encoder = str(write_encoder(tmp_path / "encoder", "text"))
    made = [toy(encoder=encoder, train_split=share).features for share in (0.8, 0.5, 0.5)]
    assert not toy.vlm.encoded
    assert made[0].metadata["extractor"]["encoder"]["name"] == encoder
    shades = [one.metadata["extractor"]["arrays"]["shades"]["data"] for one in made]
    assert shades[0] != shades[1] == shades[2]
    with pytest.raises(OutputError, match=r"made with other encoder\."):
        toy()


def test_data_of_another_origin_is_never_taken_silently(toy):
    write_profiles(toy.root)
    toy()
    edit(result(toy, "exp6"), lambda d: d["per_sample_latencies"][0].update(T_total_ms=99.0))
    with pytest.raises(OutputError, match=r"made with other exp6. To make it anew, add --force_recompute"):
        toy()
    toy.version = "2"
    with pytest.raises(OutputError, match="other model, exp6"):
        toy()
    assert toy(force_recompute=True).table.latency_ms.max() == 99


def test_features_outlive_a_run_that_was_cut_off(toy):
    write_profiles(toy.root)
    toy().path.unlink()
    toy.vlm.encoded.clear()
    assert toy().features.image.shape == (32, 2)
    assert not toy.vlm.encoded
    toy().path.unlink()
    toy.version = "2"
    with pytest.raises(OutputError, match="features of another model, processor or data set"):
        toy()


def test_results_of_another_model_or_data_set(toy):
    write_profiles(toy.root)
    toy.vlm.knob_space = KnobSpace({"max_crops": [1, 2], "top_k": [2], "num_active_blocks": [3, 6]})
    with pytest.raises(KnobSpaceError, match="the results have max_crops = 4, which toy-model does not know"):
        toy()
    toy.vlm.knob_space = SPACE
    for path in (toy.root / "exp5").rglob("*.json"):
        edit(path, lambda document: document["all_samples"][0].update(sample_id="99-w"))
    with pytest.raises(DataError, match=r"1 of 32 profiled samples are not in toy \(train\): 99-w"):
        toy()


def test_missing_results_name_the_command(toy):
    with pytest.raises(DataError, match="budgetvlm profile accuracy"):
        toy()


def test_a_place_that_cannot_be_written_is_found_before_the_work(toy):
    write_profiles(toy.root)
    (toy.root / "data").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        toy()
    assert not toy.vlm.encoded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("settings"), "is no controller training data"),
        (lambda d: d["settings"][0].pop("accuracy"), "missing field accuracy"),
        (lambda d: d["settings"].pop(), "is damaged"),
        (lambda d: d["settings"].reverse(), "not in the order of the knob space"),
        (lambda d: d["settings"][0]["accuracy"].pop(), "is damaged"),
        (lambda d: d.update(schema_version=5), "field schema_version is 5"),
        (lambda d: d.update(features_key="other"), "was made for other data"),
    ],
)
def test_damaged_documents(toy, change, message):
    write_profiles(toy.root)
    path = toy().path
    edit(path, change)
    with pytest.raises(DataError, match=message):
        load_prepared(path)


def test_out_of_memory_halves_the_batch_and_says_so():
    sizes, said = [], []

    def encode(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return np.array([[sample] for sample in batch], dtype=np.float32)

    rows = in_batches(list(range(7)), encode, 8, "image features", said.append)
    assert rows[:, 0].tolist() == list(range(7))
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert said[0] == "out of memory: going on with batches of 4 instead of 8"
    with pytest.raises(ConfigError, match="out of memory on one single sample"):
        in_batches([1], lambda batch: (_ for _ in ()).throw(MemoryError()), 4, "image features", said.append)
    with pytest.raises(RuntimeError, match="a mistake"):  # anything else is no reason to try again
        in_batches([1], lambda batch: (_ for _ in ()).throw(RuntimeError("a mistake")), 4, "x", said.append)


def test_a_model_that_encodes_batches_is_given_batches():
    class Batches(ToyVLM):
        sizes = ()

        def encode_overviews(self, images):
            self.sizes += (len(images),)
            return [self.encode_overview(image) for image in images]

    vlm, samples = Batches(), toy_samples("train")
    features = extract_features(vlm, samples, batch_size=10)
    np.testing.assert_array_equal(features.image, extract_features(ToyVLM(), samples).image)
    assert vlm.sizes == (10, 6)


def test_the_fingerprint_follows_model_and_processor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("changes nothing")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert model_fingerprint(tmp_path) != before


def test_predictions_stay_above_what_was_measured():
    tokens = np.array([[1, 5], [2, 5], [3, 5]])
    times = np.array([[10.0, 1.0], [12.0, 2.0], [14.0, 3.0]])
    predicted, errors = predict_times(tokens, times, np.array([[4, 5], [0, 5]]))
    np.testing.assert_allclose(predicted, [[16, 4], [10, 1]])
    np.testing.assert_allclose(errors, 0, atol=1e-12)


def test_ten_thousand_samples_of_36_settings_stay_under_2_gb(tmp_path):
    """In a process of its own, because a peak counts from the start of the process."""
    script = textwrap.dedent("""
        import json, resource, sys
        from pathlib import Path
        import numpy as np
        import budgetvlm.profiling.prepare.preparation  # with PyTorch, as the command has it
        from budgetvlm._io import write_json
        from budgetvlm.features import Features
        from budgetvlm.profiling.prepare.document import to_document
        from budgetvlm.profiling.prepare.join import join
        from budgetvlm.profiling.prepare.prepared_data import load_prepared

        root = Path(sys.argv[1])
        counts = {"num_vision_tokens": 16, "num_language_tokens": 9}
        samples = [{"sample_id": f"train-{i:05d}", "score": i % 3 / 2, "pred": "blue", "answers": ["blue"],
                    "groups": {"image_id": f"i{i // 2}", "kind": "read"}, "num_output_tokens": 1 + i % 4} | counts
                   for i in range(10_000)]
        timed = [{"sample_id": f"train-{i:05d}", "T_total_ms": 20 + i % 4, "T_prefill_ms": 9, "T_decode_ms": 8 + i % 4,
                  "num_output_tokens": 1 + i % 4, "accuracy": 1} | counts for i in range(400)]
        five, six = json.dumps({"all_samples": samples}), json.dumps({"per_sample_latencies": timed})
        for name, text in (("exp5_accuracy_results", five), ("exp6_latency", six)):
            for n in range(36):
                (root / f"{name}_crops{1 + n % 4}_topk{1 + n // 4 % 3}_blocks{1 + n // 12}.json").write_text(text)
        table, _ = join(root, root, "signs")
        table = table.with_splits({"train": 0.8, "validation": 0.2})
        write_json(root / "d.json", to_document(table, {"features_key": "k"}))
        size = (10_000, 1024)
        Features(table.sample_ids, np.zeros(size), np.zeros(size), {"key": "k"}).save(root / "d.features.safetensors")
        assert load_prepared(root / "d.json").table.accuracy.shape == (10_000, 36)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000  # MB


def test_the_script_ends_a_mistake_with_one_message(run_script, tmp_path):
    flags = ["--exp5_dir", tmp_path, "--exp6_dir", tmp_path, "--output_data_path", tmp_path / "d.json"]
    done = run_script("experiments/controller/data_preparation.py", *flags, "--train_split", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot prepare the data: train_split=2.0")
    assert "Traceback" not in done.stderr


def test_the_command_hands_over_its_flags(monkeypatch, tmp_path):
    from budgetvlm.commands import prepare as command
    from budgetvlm.profiling.prepare import preparation as module

    given = {}
    monkeypatch.setattr(
        module,
        "prepare",
        lambda options, **more: given.update(more, options=options) or PreparedData(*tiny(), tmp_path),
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--dataset_name", "text_vqa", "--force_recompute"])) == 0
    assert given.keys() <= inspect.signature(prepare).parameters.keys() and given["force_recompute"]
    assert (given["options"].dataset_name, given["options"].train_split) == ("text_vqa", 0.8)
