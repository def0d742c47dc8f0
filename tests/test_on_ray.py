"""Workers on Ray: the files are those of one process, errors arrive as they were raised, no process is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_sweeps import contents

from benchmarks import house
from benchmarks.sleeping_model import SPACE, NumberedTask, SleepingVLM, opening
from budgetvlm._extras import installed
from budgetvlm.cli import main
from budgetvlm.cluster import watcher
from budgetvlm.cluster.cluster_options import ClusterOptions
from budgetvlm.errors import ConfigError, DataError, WorkerError
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.elsewhere import Elsewhere
from budgetvlm.profiling.measure.sweep_options import SweepOptions

needs_ray = pytest.mark.skipif(not installed("ray"), reason="the extra ray is not installed")


def sweep(directory, elsewhere=None, size=40):
    options = SweepOptions(("test",), directory)
    return profile_accuracy(
        SleepingVLM(0.0), NumberedTask(size), SPACE.settings, options, batch_size=4, elsewhere=elsewhere
    )


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_watcher_ends_what_belongs_to_a_directory_and_nothing_else(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir(), other.mkdir()
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    by_words = subprocess.Popen([*sleep, str(own / "log")])
    with open(own / "out", "w") as out, open(other / "out", "w") as elsewhere:
        by_output, by_log = subprocess.Popen(sleep, stdout=out), subprocess.Popen(sleep, pass_fds=[out.fileno()])
        spared = subprocess.Popen(sleep, stdout=elsewhere)
    held = open(own / "log", "w")  # noqa: SIM115 - by the process that starts the watcher, which is spared
    with open(own / "out") as read:
        reader = subprocess.Popen(sleep, stdin=read)
    watch = subprocess.Popen([sys.executable, "-S", watcher.__file__, str(own)], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: len(list(watcher.processes_of(str(own)))) >= 3)
        assert [process.poll() for process in (by_words, by_output, by_log)] == [None] * 3
        watch.stdin.close()  # as the system does when the process that holds the other end is killed
        assert watch.wait(30) == 0
        assert [process.wait(5) for process in (by_words, by_output, by_log)] == [-signal.SIGKILL] * 3
        assert not own.exists() and other.exists() and spared.poll() is None and reader.poll() is None
    finally:
        held.close()
        for process in (by_words, by_output, by_log, spared, reader, watch):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "ray_workers=0 has to be 1"),
        ({"cpus_per_worker": 0}, "cpus_per_worker=0"),
        ({"address": "ray://head:10001"}, "cannot stream results.*--ray auto"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterOptions(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray_workers", "2"], "add --ray"),
        (["--ray", "ray://head:1"], "cannot stream results"),
        (["--ray", "--ray_workers", "0"], "ray_workers=0"),
        (["--ray", "--world_size", "2"], "give one of both" if installed("ray") else "ray is not installed"),
    ],
)
def test_flags_that_cannot_work_end_before_a_model_is_opened(tmp_path, capsys, flags, message):
    assert main(["profile", "accuracy", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def in_short_directory(tmp_path_factory, monkeypatch):
    """Sessions of Ray in a directory whose processes can be told from those of others."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(name)
    monkeypatch.setattr(tempfile, "tempdir", None)


def another_data_set():
    return SleepingVLM(0.0), NumberedTask(39)


@needs_ray
def test_a_sweep_on_ray(tmp_path, in_short_directory):
    """One cluster for several checks, because it takes seconds to start."""
    from budgetvlm.cluster.on_ray import RayCrew, connected

    @contextmanager
    def crew(build, say):
        own = RayCrew(ClusterOptions(workers=2), build, say)
        yield own
        own.close()

    sweep(tmp_path / "here")
    with connected(ClusterOptions(workers=2)):
        sweep(tmp_path / "there", Elsewhere(crew, opening(0.05, tmp_path / "log", 40)))
        assert contents(tmp_path / "here") == contents(tmp_path / "there")
        processes = {line.split("|")[0] for line in (tmp_path / "log").read_text().splitlines()}
        assert len(processes) == 2 and str(os.getpid()) not in processes
        with pytest.raises(DataError, match="other samples on a worker's machine"):
            sweep(tmp_path / "other", Elsewhere(crew, another_data_set))
    assert list(watcher.processes_of(str(in_short_directory))) == []
    assert list(in_short_directory.glob("bvlm-*")) == []


@needs_ray
def test_an_address_without_a_cluster(tmp_path):
    from budgetvlm.cluster.on_ray import connected

    with pytest.raises(WorkerError, match=r"no Ray cluster at '127.0.0.1:9'"), connected(ClusterOptions("127.0.0.1:9")):
        pass


def test_one_module_imports_ray():
    importing = [house.module_name(path) for path in house.source_files() if "ray" in house.top_level_names(path)]
    assert importing == ["budgetvlm.cluster.on_ray"]
