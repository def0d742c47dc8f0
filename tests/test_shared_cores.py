"""Sweeps beside other work: fewer threads where no time is measured, a warning where it is."""

from contextlib import closing

import pytest
import torch
from test_sweeps import accuracy, latency

from budgetvlm.profiling.measure import shared_cores
from budgetvlm.profiling.measure.shared_cores import FIRST_WAIT_S, Interruptions, SharedCores


@pytest.fixture
def threads():
    """Three threads for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


class Machine:
    """A clock, and a count of interruptions that grows at a rate while the clock runs."""

    def __init__(self, monkeypatch):
        self.time, self.count = 0.0, 0.0
        monkeypatch.setattr(shared_cores, "interruptions", lambda: int(self.count))

    def run(self, seconds, rate, cores):
        used = []
        for _ in range(round(seconds / 0.5)):
            self.time += 0.5
            self.count += 0.5 * rate
            cores.check()
            used.append(torch.get_num_threads())
        return used


def test_one_thread_while_others_work_and_all_again_afterwards(monkeypatch, threads):
    machine, said = Machine(monkeypatch), []
    with closing(SharedCores(said.append, now=lambda: machine.time)) as cores:
        assert set(machine.run(30, 2, cores)) == {3} and said == []
        assert machine.run(5, 500, cores)[4:] == [1] * 6
        assert len(said) == 1 and "one thread" in said[0]
        assert set(machine.run(FIRST_WAIT_S - 6, 2, cores)) == {1}
        assert machine.run(5, 2, cores)[-1] == 3
        machine.run(3, 500, cores)
        assert torch.get_num_threads() == 1 and len(said) == 1
    assert torch.get_num_threads() == 3


def test_where_others_stay_all_threads_are_tried_ever_more_rarely(monkeypatch, threads):
    machine = Machine(monkeypatch)
    with closing(SharedCores(lambda line: None, now=lambda: machine.time)) as cores:
        tried = 0
        for _ in range(1200):  # others leave room for one thread, not for three
            rate = 500 if torch.get_num_threads() == 3 else 2
            tried += machine.run(0.5, rate, cores)[0] == 3
        assert 0 < tried * 0.5 < 0.03 * 600


def test_where_interruptions_are_not_counted_nothing_changes(monkeypatch, threads):
    monkeypatch.setattr(shared_cores, "resource", None)
    assert shared_cores.interruptions() == 0
    assert Interruptions().warning() is None


def interrupted_all_the_time(monkeypatch):
    counts = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(shared_cores, "interruptions", lambda: next(counts))


def test_the_accuracy_sweep_gives_its_threads_back(tmp_path, monkeypatch, threads):
    interrupted_all_the_time(monkeypatch)
    monkeypatch.setattr(shared_cores, "WINDOW_S", 0.0)
    said = []
    accuracy(tmp_path, say=said.append)
    assert any("one thread" in line for line in said)
    assert torch.get_num_threads() == 3


def test_the_latency_sweep_keeps_its_threads_and_says_that_it_was_disturbed(tmp_path, monkeypatch, threads):
    interrupted_all_the_time(monkeypatch)
    monkeypatch.setattr(shared_cores, "LEAST_S", 0.0)
    said = []
    latency(tmp_path, say=said.append)
    assert any("times a second while it was timed" in line for line in said)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("used", [1, 3])
def test_one_thread_is_advised_to_those_who_use_more(monkeypatch, threads, used):
    counts = iter((0, 10**9))
    monkeypatch.setattr(shared_cores, "interruptions", lambda: next(counts))
    monkeypatch.setattr(shared_cores, "LEAST_S", 0.0)
    torch.set_num_threads(used)
    said = Interruptions().warning()
    assert "on a quiet machine" in said and ("--num_threads 1" in said) == (used > 1)
