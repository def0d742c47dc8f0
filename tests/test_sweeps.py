"""Accuracy and latency sweeps: what they measure, what they write, and that a kill loses and repeats nothing."""

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import write_tiny_model
from tqdm import tqdm

from budgetvlm.cli import main
from budgetvlm.errors import ConfigError, DataError, InputError, OutputError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.profiling.measure import machine as timing
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.journal import Journal
from budgetvlm.profiling.measure.latency_sweep import profile_latency
from budgetvlm.profiling.measure.sweep import collect
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.prepare.columns import read_accuracy
from budgetvlm.profiling.results.measurements import LatencyRecord
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.tasks import Sample
from budgetvlm.vlm import STAGES, Generation, Overview

SPACE = KnobSpace({"max_crops": [1, 4], "top_k": [2, 4], "num_active_blocks": [2, 3]})
SIZES = {"train": 10, "validation": 4, "test": 6}


def list_results(directory, dataset_name, kind):
    return tuple(iter_results(directory, dataset_name, kind))


class FakeTask:
    """Right is the sample's number."""

    name = "fake_task"
    max_new_tokens = 3

    def num_samples(self, split):
        if split not in SIZES:
            raise ConfigError(f"no split {split}")
        return SIZES[split]

    def samples(self, split, num_samples=None, seed=0):
        total = self.num_samples(split)
        chosen = range(total)
        if num_samples is not None:
            chosen = sorted(np.random.default_rng(seed).permutation(total)[:num_samples].tolist())
        for i in chosen:
            image = lambda i=i: Image.new("RGB", (8, 8), (i, 0, 0))  # noqa: E731
            yield Sample(
                f"{split}-{i}", f"{split}-{i // 2}", f"question {i}", (str(i),), image, {"kind": "odd" * (i % 2)}
            )

    def score(self, prediction, sample):
        return float(prediction in sample.answers)


class FakeVLM:
    """Answers with the red of the image's corner where the setting is dear enough; every call is written down."""

    name = "fake"
    knob_space = SPACE
    num_total_blocks, can_revise = 3, True

    def __init__(self, log=None, pause=0.0, largest_batch=None):
        self.calls, self.log, self.pause, self.largest_batch = [], log, pause, largest_batch

    def active_blocks(self, num_active_blocks):
        return (0, 2) if num_active_blocks == 2 else (0, 1, 2)

    def encode_overview(self, image):
        return Overview(None, None, 0.5, 1.0)

    def prompt_size(self, image, question):
        return np.array([4.0 * setting["max_crops"] for setting in SPACE.settings]), 5

    def generate(self, image, question, setting, *, max_new_tokens=16, overview=None):
        assert overview is not None and max_new_tokens == 3
        self._note(setting, question)
        drift = len(self.calls) / 1000
        stages = dict(zip(STAGES, (0.5, 1.0, setting["top_k"] + drift, setting["max_crops"]), strict=True))
        return replace(self._answer(image, setting), stages_ms=stages)

    def generate_batch(self, images, questions, setting, *, max_new_tokens=16):
        assert max_new_tokens == 3
        if self.largest_batch is not None and len(images) > self.largest_batch:
            raise MemoryError
        time.sleep(self.pause)
        for question in questions:
            self._note(setting, question)
        return [self._answer(image, setting) for image in images]

    def _answer(self, image, setting):
        red = image.getpixel((0, 0))[0]
        right = red <= setting["max_crops"] * setting["num_active_blocks"]
        return Generation(str(red) if right else "?", (7,), "stop", setting["max_crops"] * 4, 5, 1)

    def _note(self, setting, question):
        self.calls.append((str(setting), question))
        if self.log is not None:
            os.write(self.log, f"{setting}|{question}\n".encode())


def options(directory, **changes):
    return SweepOptions(**{"splits": ("train", "test"), "output_dir": Path(directory), **changes})


def accuracy(
    directory, vlm=None, settings=SPACE.settings, batch_size=4, cells=1.0, groups=None, say=lambda line: None, **changes
):
    vlm, opts, more = vlm or FakeVLM(), options(directory, **changes), {"cells": cells, "groups": groups}
    return profile_accuracy(vlm, FakeTask(), settings, opts, batch_size=batch_size, say=say, **more)


def latency(
    directory, vlm=None, settings=SPACE.settings, warmup=0, repeats=3, cells=1.0, say=lambda line: None, **changes
):
    vlm, sweep = vlm or FakeVLM(), options(directory, **changes)
    return profile_latency(vlm, FakeTask(), settings, sweep, warmup=warmup, repeats=repeats, cells=cells, say=say)


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_accuracy_files_hold_what_was_measured(tmp_path):
    paths = accuracy(tmp_path)
    assert len(paths) == 8 and all(path.is_file() for path in paths)
    assert paths[0] == tmp_path / "exp5_accuracy_fake-task" / "exp5_accuracy_results_crops1_topk2_blocks2.json"
    document = json.loads(paths[0].read_text())
    summary = document["summary"][0]
    right = [0, 1, 2]  # what the cheapest setting gets right of each split
    assert summary["accuracy"] == pytest.approx(2 * len(right) / 16)
    assert (summary["num_samples"], summary["num_total_blocks"], summary["active_block_indices"]) == (16, 3, [0, 2])
    first = document["all_samples"][0]
    assert (first["sample_id"], first["score"], first["pred"], first["answers"]) == ("train-0", 1.0, "0", ["0"])
    assert first["groups"] == {"kind": "", "image_id": "train-0", "split": "train"}
    assert document["all_samples"][-1]["groups"]["split"] == "test"
    config = document["config"]
    assert (config["split"], config["max_new_tokens"], config["world_size"]) == ("train+test", 3, 1)
    assert {"torch", "transformers", "budgetvlm", "python"} <= set(config["versions"])


def test_accuracy_files_are_read_by_the_reader(tmp_path):
    accuracy(tmp_path)
    results = list_results(tmp_path, "fake_task", "accuracy")
    assert [tuple(result.knobs.values()) for result in results] == [tuple(s.values()) for s in SPACE.settings]
    assert all(len(result.records) == 16 for result in results)


def test_nothing_but_results_is_left(tmp_path):
    accuracy(tmp_path / "a")
    latency(tmp_path / "b")
    assert all(name.startswith("exp") for name in [*contents(tmp_path / "a"), *contents(tmp_path / "b")])


def test_latency_files_hold_the_median_with_its_stages(tmp_path):
    vlm = FakeVLM()
    paths = latency(tmp_path, vlm, splits=("test",))
    document = json.loads(paths[-1].read_text())
    assert paths[-1].name == "exp6_latency_crops4_topk4_blocks3.json"
    summary = document["summary"][0]
    assert {"mean", "std", "P50", "P95", "P99"} == set(summary["latency_total_ms"])
    record = document["per_sample_latencies"][0]
    stages = sum(record[f"T_{stage}_ms"] for stage in STAGES)
    assert record["T_total_ms"] == pytest.approx(stages)
    mine = [i for i, call in enumerate(vlm.calls, 1) if call == (str(SPACE.full), "question 0")]
    assert record["T_prefill_ms"] == pytest.approx(4 + sorted(mine)[1] / 1000)  # the second of three repeats drifted
    assert (record["max_crops"], record["num_vision_tokens"], record["accuracy"]) == (4, 16, 1.0)
    assert document["config"]["repeats"] == 3 and document["config"]["hardware"]["cpu"]


def test_each_repeat_is_a_pass_over_all_samples_in_changing_orders(tmp_path):
    vlm = FakeVLM()
    latency(tmp_path, vlm, splits=("test",), repeats=2)
    calls = np.array([question for _, question in vlm.calls]).reshape(2, 6, 8)
    assert (calls == calls[:, :, :1]).all()  # a sample is measured at all settings together
    assert all(len(set(taken)) == 6 for taken in calls[:, :, 0])
    assert list(calls[0, :, 0]) != list(calls[1, :, 0])
    rounds = [tuple(setting for setting, _ in vlm.calls[start : start + 8]) for start in range(0, 96, 8)]
    assert all(len(set(r)) == 8 for r in rounds)
    assert len(set(rounds)) > 10


def test_warm_up_comes_first_and_is_not_recorded(tmp_path):
    vlm = FakeVLM()
    latency(tmp_path, vlm, splits=("test",), warmup=2, repeats=1)
    assert len(vlm.calls) == 2 * 8 + 6 * 8
    assert {question for _, question in vlm.calls[:16]} == {"question 0"}


def test_the_median_run_is_a_run():
    runs = [LatencyRecord("a", 10 + ms, ms, 10.0, 1, 1, 1, 1.0) for ms in (4.0, 1.0, 9.0, 2.0)]
    assert timing.median_run(runs[:3]).T_prefill_ms == 4.0
    assert timing.median_run(runs).T_prefill_ms == 2.0


def test_the_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Abacus 3000 @ 1 Hz\nmodel name : other\n")
    assert timing.cpu_model(tmp_path / "cpuinfo") == "Abacus 3000 @ 1 Hz"
    assert timing.cpu_model(tmp_path / "none")


@pytest.mark.parametrize("sweep", [accuracy, latency])
def test_a_second_run_measures_nothing_and_changes_nothing(tmp_path, sweep):
    sweep(tmp_path)
    before, vlm, said = contents(tmp_path), FakeVLM(), []
    sweep(tmp_path, vlm, say=said.append)
    assert vlm.calls == [] and contents(tmp_path) == before
    assert said == ["8 of 8 settings are finished already"]


@pytest.mark.parametrize("sweep", [accuracy, latency])
def test_more_settings_are_added_to_finished_ones(tmp_path, sweep):
    sweep(tmp_path, settings=SPACE.settings[:3])
    vlm = FakeVLM()
    sweep(tmp_path, vlm)
    assert {setting for setting, _ in vlm.calls} == {str(s) for s in SPACE.settings[3:]}


@pytest.mark.parametrize("sweep", [accuracy, latency])
def test_results_of_another_sweep_are_an_error_unless_overwritten(tmp_path, sweep):
    sweep(tmp_path)
    with pytest.raises(OutputError, match=r"other seed\. .*--overwrite"):
        sweep(tmp_path, seed=1)
    with pytest.raises(OutputError, match="other model_fingerprint"):
        sweep(tmp_path, model_fingerprint="other weights")
    with pytest.raises(OutputError, match=r"other split\."):
        sweep(tmp_path, splits=("train", "validation"))
    sweep(tmp_path, seed=1, overwrite=True)
    sweep(tmp_path, seed=1)


class Stopped(Exception):
    pass


class StopsAfter(FakeVLM):
    """Fails at a given call."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def _note(self, setting, question):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        super()._note(setting, question)


@pytest.mark.parametrize("calls", [0, 3, 9, 40, 127])
def test_a_stopped_accuracy_sweep_goes_on(tmp_path, calls):
    whole = accuracy(tmp_path / "whole")
    with pytest.raises(Stopped):
        accuracy(tmp_path / "cut", StopsAfter(calls))
    second = FakeVLM()
    assert len(accuracy(tmp_path / "cut", second)) == len(whole)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(second.calls) <= 128 - calls + 3  # at most one batch of 4 was under way


@pytest.mark.parametrize("calls", [3, 60, 150])
def test_a_stopped_latency_sweep_goes_on(tmp_path, calls):
    first, said = StopsAfter(calls), []
    with pytest.raises(Stopped):
        latency(tmp_path, first, repeats=2, splits=("train",))
    second = FakeVLM()
    latency(tmp_path, second, repeats=2, splits=("train",), say=said.append)
    finished = calls // 8  # rounds; the next was under way
    going_on = f"going on with {finished} of 20 rounds (samples x repeats) of an earlier run"
    assert said == ([going_on] if finished else [])
    done = Counter([*first.calls[: 8 * finished], *second.calls])
    assert len(done) == 10 * 8 and set(done.values()) == {2}  # every cell twice
    assert all(len(result.records) == 10 for result in list_results(tmp_path, "fake_task", "latency"))


def test_an_unfinished_sweep_with_other_options_is_an_error(tmp_path):
    with pytest.raises(Stopped):
        accuracy(tmp_path, StopsAfter(9))
    with pytest.raises(OutputError, match=r"unfinished sweep .* other seed"):
        accuracy(tmp_path, seed=1)
    accuracy(tmp_path, seed=1, overwrite=True)


def test_killed_at_random_moments_it_loses_and_repeats_nothing(tmp_path):
    """kill -9 while it runs, ten times; the files of the resumed run are those of an undisturbed one, byte for byte."""
    accuracy(tmp_path / "whole")
    log = os.open(tmp_path / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                tqdm.set_lock(threading.RLock())  # its own is shared between processes, and dies with its holder
                accuracy(tmp_path / "killed", FakeVLM(log, pause=0.01))
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        if kills == 10:
            accuracy(tmp_path / "killed", FakeVLM(log))
            break
    os.close(log)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(set(calls)) == len({(str(s), f"question {i}") for s in SPACE.settings for i in range(10)})
    assert len(calls) <= 128 + 4 * kills  # a batch that was under way when the kill came is not yet finished
    assert kills >= 2


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, {"seed": 0}) as journal:
        journal.append([1, 2])
        journal.append([3])
    path.write_bytes(path.read_bytes()[:-2])
    with Journal(path, {"seed": 0}) as journal:
        assert journal.entries == [[1, 2]]
        journal.append([4])
    with Journal(path, {"seed": 0}) as journal:
        assert journal.entries == [[1, 2], [4]]


def test_a_journal_damaged_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        journal.append(1)
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(DataError, match="is damaged"):
        Journal(path, {})


def test_two_sweeps_cannot_share_a_journal(tmp_path):
    with Journal(tmp_path / "journal", {}), pytest.raises(OutputError, match="in use by another sweep"):
        Journal(tmp_path / "journal", {})


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        accuracy(tmp_path / "file" / "below")


def test_a_full_disk_loses_no_finished_batch(tmp_path, monkeypatch):
    with Journal(tmp_path / "journal", {}) as journal:
        journal.append("kept")
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left"):
            journal.append("lost")
    monkeypatch.undo()
    with Journal(tmp_path / "journal", {}) as journal:
        assert journal.entries == ["kept"]


def test_memory_that_runs_out_halves_the_batch_and_says_so(tmp_path):
    accuracy(tmp_path / "whole", batch_size=16)
    said = []
    accuracy(tmp_path / "little", FakeVLM(largest_batch=4), batch_size=16, say=said.append)
    assert [line.split(": ")[1] for line in said] == [
        "going on with batches of 8 instead of 16",
        "going on with batches of 4 instead of 8",
    ]
    assert contents(tmp_path / "little") == contents(tmp_path / "whole")
    with pytest.raises(ConfigError, match="one single sample"):
        accuracy(tmp_path / "none", FakeVLM(largest_batch=0))


def test_other_errors_are_not_taken_for_full_memory(tmp_path):
    class Broken(FakeVLM):
        def _answer(self, image, setting):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        accuracy(tmp_path, Broken())


def test_ranks_share_the_samples(tmp_path):
    accuracy(tmp_path / "one")
    for rank in (0, 1, 2):
        paths = accuracy(tmp_path / "three", rank=rank, world_size=3)
        assert paths[0].name.endswith(f"_rank{rank}.json")
    one, three = (list_results(tmp_path / name, "fake_task", "accuracy") for name in ("one", "three"))
    for a, b in zip(one, three, strict=True):
        assert {r.sample_id: r for r in a.records} == {r.sample_id: r for r in b.records}
    for rank in (0, 1):
        latency(tmp_path / "six", rank=rank, world_size=2)
    assert all(len(r.records) == 16 for r in list_results(tmp_path / "six", "fake_task", "latency"))


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(None, (10, 4, 6)), ((2, 1, 3), (2, 1, 3)), ((10,), (5, 2, 3)), ((3,), (1, 1, 1)), ((20,), (10, 4, 6))],
)
def test_how_many_samples_of_each_split(tmp_path, num_samples, expected):
    found = collect(FakeTask(), options(tmp_path, splits=("train", "validation", "test"), num_samples=num_samples))
    counts = tuple(sum(place.split == split for place in found) for split in SIZES)
    assert counts == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ()}, "each split once"),
        ({"splits": ("train", "train")}, "each split once"),
        ({"num_samples": (1, 2, 3)}, "3 numbers of samples for 2 splits"),
        ({"num_samples": (0,)}, "num_samples=.* 1 at least"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1, "rank": 1}, "seed=-1.*; rank=1"),
    ],
)
def test_options_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, **changes)


def test_more_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="choose 2 to 16"):
        accuracy(tmp_path, num_samples=(17,))
    with pytest.raises(ConfigError, match="no split dev"):
        accuracy(tmp_path, splits=("dev",))
    with pytest.raises(ConfigError, match="batch_size=0"):
        accuracy(tmp_path, batch_size=0)
    with pytest.raises(ConfigError, match=r"warmup=-1.*; repeats=0"):
        latency(tmp_path, warmup=-1, repeats=0)
    with pytest.raises(ConfigError, match="use fewer ranks"):
        accuracy(tmp_path, num_samples=(2,), rank=2, world_size=3)
    assert contents(tmp_path) == {}


def test_ids_that_occur_in_two_splits_are_an_error(tmp_path):
    class Ambiguous(FakeTask):
        def samples(self, split, num_samples=None, seed=0):
            return (replace(s, sample_id=s.sample_id.split("-")[1]) for s in super().samples(split, num_samples, seed))

    with pytest.raises(DataError, match="more than once in train\\+test"):
        profile_accuracy(FakeVLM(), Ambiguous(), SPACE.settings, options(tmp_path))


def test_both_scripts_run_on_a_real_model(tmp_path, run_script):
    model = write_tiny_model(tmp_path / "model")
    flags = ["--model_path", model, "--dataset_name", "signs", "--split", "train,test", "--num_samples", "4"]
    flags += ["--settings", "4,2,3", "--max_new_tokens", "2", "--seed", "3", "--num_threads", "1"]
    for script, more, kind in (
        ("exp5_accuracy", ["--batch_size", "3"], "accuracy"),
        ("exp6_latency", ["--warmup", "0", "--repeats", "1"], "latency"),
    ):
        done = run_script(f"experiments/profiling/{script}.py", *flags, *more, "--output_dir", tmp_path / script)
        assert done.returncode == 0, done.stderr
        assert "3 result files" in done.stdout
        results = list_results(tmp_path / script, "signs", kind)
        assert [tuple(r.knobs.values()) for r in results] == [(1, 1, 2), (4, 2, 3), (4, 4, 4)]
        assert [len(r.records) for r in results] == [4, 4, 4]
        assert [r.records[0].num_vision_tokens for r in results] == [4, 20, 20]


def test_a_mistake_in_a_flag_is_one_message(tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model")
    own = ["--model_path", str(model)]
    for more, message in (
        ([*own, "--settings", "9,9,9"], "error: max_crops=9.0 is outside the knob space"),
        ([*own, "--num_samples", "many"], "error: num_samples='many' is no number"),
        (["--model_path", "nowhere"], "error: model_path='nowhere'"),
        ([*own, "--dataset_name", "sings"], "error: there is no task 'sings'"),
    ):
        capsys.readouterr()
        assert main(["profile", "accuracy", "--output_dir", str(tmp_path / "out"), *more]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
    assert not (tmp_path / "out").exists()


class Corrupt(FakeTask):
    """Some samples cannot be loaded."""

    def __init__(self, *names, error=None):
        self.names, self.error = names, error or InputError("the image is truncated")

    def samples(self, split, num_samples=None, seed=0):
        for sample in super().samples(split, num_samples, seed):
            yield replace(sample, load_image=self._fail) if sample.sample_id in self.names else sample

    def _fail(self):
        raise self.error


def sweep_of(kind, directory, task, vlm=None, settings=SPACE.settings, say=lambda line: None, **changes):
    profile, more = (profile_accuracy, {"batch_size": 4}) if kind == "accuracy" else (profile_latency, {"repeats": 1})
    return profile(vlm or FakeVLM(), task, settings, options(directory, **changes), say=say, **more)


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
@pytest.mark.parametrize("error", [InputError("the image is truncated"), OSError("the disk is gone")])
def test_a_corrupt_image_in_the_middle_is_skipped_counted_and_named(tmp_path, kind, error):
    said = []
    sweep_of(kind, tmp_path, Corrupt("train-0", "train-5", error=error), say=said.append)
    results = list_results(tmp_path, "fake_task", kind)
    assert len(results) == 8
    for result in results:
        names = [record.sample_id for record in result.records]
        assert len(names) == 14 and not {"train-0", "train-5"} & set(names)
        assert list(result.config["skipped"]) == ["train-0", "train-5"]
    assert said[0].startswith("skipped sample train-0: ") and str(error) in said[0]
    assert said[-1] == "2 of 16 samples cannot be used and were skipped: train-0, train-5"
    sweep_of(kind, tmp_path, Corrupt("train-0", "train-5"), FakeVLM(), say=said.append)  # finished: nothing to do
    assert said[-1].startswith(("8 of 8 settings", "2 of 16 samples"))


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
def test_strict_stops_at_a_corrupt_image_and_keeps_what_was_measured(tmp_path, kind):
    with pytest.raises(DataError, match=r"truncated.*Mend the sample train-8, or leave out --strict"):
        sweep_of(kind, tmp_path, Corrupt("train-8"), strict=True)
    second = FakeVLM()
    sweep_of(kind, tmp_path, FakeTask(), second)
    assert 0 < len(second.calls) < 16 * 8 + 16
    assert all(len(result.records) == 16 for result in list_results(tmp_path, "fake_task", kind))


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
def test_a_task_without_a_usable_sample_is_an_error(tmp_path, kind):
    names = [f"{split}-{n}" for split in ("train", "test") for n in range(10)]
    with pytest.raises(DataError, match=r"none of the 16 samples can be used; the first, train-0: .*truncated"):
        sweep_of(kind, tmp_path, Corrupt(*names))


class Refuses(FakeVLM):
    """Cannot do with one image."""

    def _answer(self, image, setting):
        if image.getpixel((0, 0))[0] == 3:
            raise InputError("the image is too long")
        return super()._answer(image, setting)


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
def test_an_image_that_the_model_refuses_takes_no_other_with_it(tmp_path, kind):
    sweep_of(kind, tmp_path, FakeTask(), Refuses())
    for result in list_results(tmp_path, "fake_task", kind):
        assert set(result.config["skipped"]) == {"train-3", "test-3"}
        assert len(result.records) == 14


@pytest.mark.parametrize(("kind", "name"), [("accuracy", "train-1"), ("latency", "train-2")])
def test_a_stopped_sweep_remembers_what_it_skipped(tmp_path, kind, name):
    """The sample is among the first ones; those of the latency sweep are drawn."""
    whole = sweep_of(kind, tmp_path / "whole", Corrupt(name))
    with pytest.raises(Stopped):
        sweep_of(kind, tmp_path / "cut", Corrupt(name), StopsAfter(60))
    sweep_of(kind, tmp_path / "cut", FakeTask())  # the image is there again, but half of the settings went without it
    assert len(whole) == 8
    for result in list_results(tmp_path / "cut", "fake_task", kind):
        assert name not in [record.sample_id for record in result.records]


def test_settings_measured_later_skip_what_the_earlier_ones_skipped(tmp_path):
    sweep_of("accuracy", tmp_path, Corrupt("train-1"), settings=SPACE.settings[:3])
    sweep_of("accuracy", tmp_path, Corrupt("test-2"))
    results = list_results(tmp_path, "fake_task", "accuracy")
    assert [len(result.records) for result in results] == [15] * 3 + [14] * 5
    side = read_accuracy(tmp_path, "fake_task")
    assert len(side.sample_ids) == 14 and side.values["score"].shape == (14, 8)
    assert set(side.config["skipped"]) == {"train-1", "test-2"}


def test_ranks_skip_each_their_own(tmp_path):
    for rank in (0, 1):
        sweep_of("accuracy", tmp_path, Corrupt("train-1", "train-2"), rank=rank, world_size=2)
    side = read_accuracy(tmp_path, "fake_task")
    assert len(side.sample_ids) == 14 and set(side.config["skipped"]) == {"train-1", "train-2"}


def test_a_model_with_fewer_knobs_goes_the_whole_way(tmp_path):
    """A dense model of another family: both sweeps, and one table of the knobs that it has."""
    from tiny_families import write_tiny_family

    from budgetvlm.profiling.prepare.join import join
    from budgetvlm.vlm import load_vlm

    vlm = load_vlm(str(write_tiny_family("qwen2_5_vl", tmp_path / "model")))
    assert vlm.knob_space.names == ("max_crops", "num_active_blocks")
    settings = [vlm.knob_space.cheapest, vlm.knob_space.full]
    options = SweepOptions(splits=("train",), output_dir=tmp_path / "exp5", num_samples=(4,), max_new_tokens=2)
    profile_accuracy(vlm, WordsTask(), settings, options, batch_size=3)
    profile_latency(vlm, WordsTask(), settings, replace(options, output_dir=tmp_path / "exp6"), warmup=0, repeats=1)
    table, _ = join(tmp_path / "exp5", tmp_path / "exp6", "fake_task")
    assert table.knob_space.to_dict() == {"max_crops": [1, 4], "num_active_blocks": [2, 4]}
    measured = np.isfinite(table.latency_ms)
    assert measured[:, [0, 3]].all() and not measured[:, [1, 2]].any()


class WordsTask(FakeTask):
    """Questions in words that the tiny tokenizer knows, images that a patch fits into."""

    def samples(self, split, num_samples=None, seed=0):
        for sample in super().samples(split, num_samples, seed):
            yield replace(sample, question="what is red", load_image=lambda: Image.new("RGB", (90, 60), (200, 0, 0)))


def timed_cells(directory):
    """(setting, sample) of all result files."""
    read = list_results(directory, "fake_task", "latency")
    return {
        (str(Setting(tuple(result.knobs.items()))), record.sample_id) for result in read for record in result.records
    }


def test_a_share_of_the_cells_is_timed_equally_often_at_each_setting_and_sample(tmp_path):
    vlm = FakeVLM()
    latency(tmp_path, vlm, repeats=1, cells=0.25)
    found = timed_cells(tmp_path)
    assert len(found) == len(vlm.calls) == 16 * 2
    settings, samples = (Counter(names) for names in zip(*found, strict=True))
    assert len(settings) == 8 and set(settings.values()) == {4}
    assert len(samples) == 16 and set(samples.values()) == {2}


def test_a_stopped_sweep_of_some_cells_goes_on_and_settings_may_come_later(tmp_path):
    latency(tmp_path / "whole", repeats=1, cells=0.25)
    with pytest.raises(Stopped):
        latency(tmp_path / "cut", StopsAfter(17), repeats=1, cells=0.25)
    second = FakeVLM()
    latency(tmp_path / "cut", second, repeats=1, cells=0.25)
    assert 32 - 17 <= len(second.calls) <= 32 - 17 + 2
    latency(tmp_path / "later", repeats=1, cells=0.25, settings=SPACE.settings[:3])
    latency(tmp_path / "later", repeats=1, cells=0.25)
    assert timed_cells(tmp_path / "cut") == timed_cells(tmp_path / "later") == timed_cells(tmp_path / "whole")


def test_another_share_is_another_sweep(tmp_path):
    latency(tmp_path, repeats=1)
    with pytest.raises(OutputError, match="other cells"):
        latency(tmp_path, repeats=1, cells=0.25)


@pytest.mark.parametrize(("cells", "message"), [(0.0, "above 0"), (1.5, "above 0"), (0.1, "Give 0.12 or more")])
def test_a_share_of_cells_that_cannot_work(tmp_path, cells, message):
    with pytest.raises(ConfigError, match=message):
        latency(tmp_path, cells=cells)


def test_too_few_samples_for_a_share_of_cells(tmp_path):
    with pytest.raises(ConfigError, match=r"Give 0\.25 or more"):
        latency(tmp_path, num_samples=(2, 2), cells=0.125)
