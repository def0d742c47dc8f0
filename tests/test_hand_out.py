"""Handing out jobs: who gets what, what a death costs, when it is given up; and a sweep whose workers die."""

from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
from test_sweeps import SPACE, FakeTask, FakeVLM, contents, list_results, options

from budgetvlm.cluster.hand_out import TRIES, News, do_here, hand_out
from budgetvlm.errors import DataError, InputError, WorkerError
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.elsewhere import Elsewhere
from budgetvlm.profiling.measure.latency_sweep import profile_latency


class Counting:
    """A job: numbers to be doubled."""

    def __init__(self, numbers):
        self.numbers, self.found, self.ended = numbers, {}, 0

    def left(self):
        return [number for number in self.numbers if number not in self.found] or None

    def take(self, piece):
        assert piece[0] not in self.found, "measured twice"
        self.found[piece[0]] = piece[1]

    def end(self):
        self.ended += 1


class Doubling:
    closed = False

    def work(self, message):
        for number in message:
            yield number, 2 * number

    def close(self):
        self.closed = True


class LocalCrew:
    """Workers in this process, one piece at a time, in an order drawn by chance.

    ``dies(worker, message, pieces)`` tells whether a worker dies now, after so many pieces of its message.
    """

    def __init__(self, build, count, dies=lambda worker, message, pieces: False, seed=0):
        self.build, self.dies, self.rng = build, dies, np.random.default_rng(seed)
        self.workers, self.running, self.news = {}, {}, deque()
        self.largest = 0
        for worker in range(count):
            self.replace(worker)

    def replace(self, worker):
        if self.dies(worker, None, 0):
            self.news.append(News(worker, "dead", "no start"))
        else:
            self.workers[worker] = self.build()
            self.news.append(News(worker, "ready"))

    def give(self, worker, message):
        assert worker in self.workers and worker not in self.running
        self.running[worker] = [message, self.workers[worker].work(message), 0]
        self.largest = max(self.largest, len(self.running))

    def hear(self):
        if self.news:
            return self.news.popleft()
        worker = int(self.rng.choice(sorted(self.running)))
        message, pieces, count = self.running[worker]
        if self.dies(worker, message, count):
            del self.running[worker], self.workers[worker]
            return News(worker, "dead", "killed")
        self.running[worker][2] += 1
        for piece in pieces:
            return News(worker, "piece", piece)
        del self.running[worker]
        return News(worker, "done")


def jobs_of(sizes):
    numbers = iter(range(sum(sizes)))
    return [Counting([next(numbers) for _ in range(size)]) for size in sizes]


def doubled(jobs):
    return all(job.found == {n: 2 * n for n in job.numbers} and job.ended == 1 for job in jobs)


def test_in_one_process_jobs_are_done_in_their_order():
    jobs, worker = jobs_of([2, 0, 3]), Doubling()
    do_here(iter(jobs), worker)
    assert doubled(jobs) and worker.closed


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_no_worker_idles(workers):
    jobs = jobs_of([3] * 7)
    crew = LocalCrew(Doubling, workers)
    hand_out(iter(jobs), crew, print)
    assert doubled(jobs) and crew.largest == workers


def test_a_death_costs_what_had_not_come_back_and_no_more():
    asked, said = [], []

    def dies(worker, message, pieces):
        if message and pieces == 0:
            asked.append(message)
        return message == [0, 1, 2, 3] and pieces == 3

    jobs = jobs_of([4, 4])
    hand_out(iter(jobs), LocalCrew(Doubling, 1, dies), said.append)
    assert doubled(jobs)
    assert [3] in asked and [0, 1, 2, 3] in asked
    assert said == ["worker 1 died (killed); another one takes its place"]


@pytest.mark.parametrize("seed", range(10))
def test_deaths_at_random_lose_and_repeat_nothing(seed):
    rng = np.random.default_rng(seed)
    left = [20]

    def dies(worker, message, pieces):
        left[0] -= (dead := message is not None and left[0] > 0 and rng.random() < 0.1)
        return dead

    jobs = jobs_of(rng.integers(0, 6, 40).tolist())
    try:
        hand_out(iter(jobs), LocalCrew(Doubling, 4, dies, seed), lambda line: None)
    except WorkerError:  # three times at the same job, by chance
        return
    assert doubled(jobs)


def test_a_job_that_workers_die_at_is_given_up():
    jobs = jobs_of([1, 1, 1])
    with pytest.raises(WorkerError, match=f"{TRIES} workers died at one and the same work.*killed"):
        hand_out(iter(jobs), LocalCrew(Doubling, 2, lambda worker, message, pieces: message == [1]), print)
    assert jobs[0].found == {0: 0}


def test_workers_that_die_before_they_begin_are_given_up():
    with pytest.raises(WorkerError, match="before they had anything to do"):
        hand_out(iter(jobs_of([1])), LocalCrew(Doubling, 2, lambda *given: True), print)


def test_jobs_are_asked_for_as_they_are_needed():
    """So that there may be a million of them."""
    asked, ended = [], []

    class Tracked(Counting):
        def end(self):
            ended.append(self)

    def jobs():
        for number in range(200):
            asked.append(number)
            yield Tracked([number])
            assert len(asked) - len(ended) <= 4 + 1

    hand_out(jobs(), LocalCrew(Doubling, 4), print)
    assert len(ended) == 200


def elsewhere(workers=3, dies=lambda *given: False, seed=0, vlm=FakeVLM, task=FakeTask):
    """Workers in this process, each with a model and a data set of its own."""

    @contextmanager
    def crew(build, say):
        yield LocalCrew(lambda: build(say), workers, dies, seed)

    return Elsewhere(crew, lambda: (vlm(), task()))


def sweep(directory, kind="accuracy", vlm=None, task=None, say=lambda line: None, cells=1.0, **more):
    own = {"batch_size": 4, "cells": cells} if kind == "accuracy" else {"warmup": 0, "cells": cells}
    profile = profile_accuracy if kind == "accuracy" else profile_latency
    given = (vlm or FakeVLM(), task or FakeTask(), SPACE.settings, options(directory))
    return profile(*given, say=say, **own, **more)


@pytest.mark.parametrize("cells", [1.0, 0.4])
@pytest.mark.parametrize("workers", [1, 3, 40])
def test_files_are_those_of_one_process_byte_for_byte(tmp_path, cells, workers):
    sweep(tmp_path / "here", cells=cells)
    driver = FakeVLM()
    sweep(tmp_path / "there", vlm=driver, cells=cells, elsewhere=elsewhere(workers))
    assert contents(tmp_path / "here") == contents(tmp_path / "there") and driver.calls == []


def dies_sometimes(seed, most=12):
    """A worker dies in one case of five, ``most`` times in all."""
    rng, left = np.random.default_rng(seed), [most]

    def dies(worker, message, pieces):
        left[0] -= (dead := message is not None and left[0] > 0 and rng.random() < 0.2)
        return dead

    return dies


@pytest.mark.parametrize("seed", range(3))
def test_files_are_the_same_when_workers_die(tmp_path, seed):
    sweep(tmp_path / "here")
    while True:  # three deaths at one batch end a run; the next goes on
        try:
            sweep(tmp_path / "there", elsewhere=elsewhere(3, dies_sometimes(seed), seed))
            break
        except WorkerError:
            continue
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_sweep_begins_here_and_goes_on_there_and_the_other_way_round(tmp_path, first):
    class Stops(FakeVLM):
        def _note(self, setting, question):
            super()._note(setting, question)
            if len(self.calls) == 30:
                raise RuntimeError("stopped")

    stopping = {"vlm": Stops()} if first == "here" else {"elsewhere": elsewhere(2, vlm=Stops)}
    with pytest.raises(RuntimeError, match="stopped"):
        sweep(tmp_path / "both", **stopping)
    said = []
    sweep(tmp_path / "both", say=said.append, **({"elsewhere": elsewhere()} if first == "here" else {}))
    assert said[0].startswith("going on with ") and not said[0].startswith("going on with 0")
    sweep(tmp_path / "whole")
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")


class Refusing(FakeTask):
    """One image cannot be loaded."""

    def samples(self, split, num_samples=None, seed=0):
        from dataclasses import replace

        for sample in super().samples(split, num_samples, seed):
            yield replace(sample, load_image=self._fail) if sample.sample_id == "train-3" else sample

    def _fail(self):
        raise InputError("truncated")


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
def test_a_sample_that_cannot_be_used_is_skipped_there_as_here(tmp_path, kind):
    said = []
    sweep(tmp_path / "there", kind, task=Refusing(), say=said.append, elsewhere=elsewhere(2, task=Refusing))
    assert [line for line in said if line.startswith("skipped")] == ["skipped sample train-3: truncated"]
    for result in list_results(tmp_path / "there", "fake_task", kind):
        assert len(result.records) == 15 and list(result.config["skipped"]) == ["train-3"]


def test_another_data_set_on_a_workers_machine_is_an_error(tmp_path):
    class Other(FakeTask):
        def samples(self, split, num_samples=None, seed=0):
            return (s for s in super().samples(split, num_samples, seed) if s.sample_id != "train-3")

    with pytest.raises(DataError, match="has other samples on a worker's machine than here"):
        sweep(tmp_path, elsewhere=elsewhere(task=Other))


def test_latency_records_say_which_machine_it_was(tmp_path):
    sweep(tmp_path, "latency", elsewhere=elsewhere(2))
    for result in list_results(tmp_path, "fake_task", "latency"):
        (name,) = result.config["machines"]
        assert {record.machine for record in result.records} == {name}
        assert {run["machine"] for record in result.records for run in record.runs} == {name}
        assert result.config["machines"][name]["cpu"] and result.config["hardware"] == {"device": "cpu"}
