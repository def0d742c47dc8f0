"""The store of served requests: what was acknowledged is there, whatever ends its process, and it stays small."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from budgetvlm.errors import ConfigError, OutputError
from budgetvlm.feedback import request_store
from budgetvlm.feedback.request_store import MB, Decided, RequestStore

KNOBS = '{"top_k": [1, 2, 4]}'


def decided(name, **changed):
    made = Decided(
        name, "digest", KNOBS, b"i" * 8, b"l" * 4, 50.0, 0.1, b"\xe0", 1, b"p" * 12, 2, budget_ms=80.0, latency_ms=60.0
    )
    return made._replace(**changed)


def rows(file, sql):
    connection = sqlite3.connect(file)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "requests.sqlite"


@pytest.fixture
def store(file):
    made = RequestStore(file, 16)
    yield made
    made.close()


def test_a_request_is_kept_with_what_its_decision_saw(store, file):
    before = time.time()
    store.add(partial(decided, "first"))
    store.add(partial(decided, "second", controller="other", budget_ms=None, question="what is red"))
    store.close()
    kept = rows(file, "SELECT * FROM requests JOIN controllers ON controller = controllers.number ORDER BY at_s, id")
    first, second = kept
    assert before <= first[2] <= time.time()
    assert first[4:15] == (b"i" * 8, b"l" * 4, 50.0, 0.1, b"\xe0", 1, b"p" * 12, 2, 80.0, 60.0, None)
    assert first[16:] == ("digest", KNOBS) and second[16] == "other"
    assert second[12] is None and second[14] == "what is red"


def test_a_score_is_on_the_disk_when_it_is_acknowledged_and_the_last_one_counts(store, file):
    store.add(partial(decided, "first"))
    for score in (0.25, 1.0, 1.0):
        assert store.feedback("first", score).result(10) is True
        assert rows(file, "SELECT * FROM scores") == [("first", "feedback", 1, score)]
    assert store.shadow("first", "drawn", 0, 0.5).result(10) is True
    assert rows(file, "SELECT source, setting, score FROM scores ORDER BY setting") == [
        ("drawn", 0, 0.5), ("feedback", 1, 1.0),
    ]  # fmt: skip


def test_a_score_of_what_is_not_kept_is_known_to_be_none(store, file):
    assert store.feedback("nobody", 1.0).result(10) is False
    assert rows(file, "SELECT * FROM scores") == []


def test_the_store_is_as_large_as_its_owner_says_and_the_oldest_make_room(store, file):
    image, last = os.urandom(40_000), 900
    for number in range(last + 1):
        store.add(partial(decided, f"r{number}", image=image))
        if number % 20 == 0:
            assert store.feedback(f"r{number}", 1.0).result(10)
            assert sum(path.stat().st_size for path in file.parent.iterdir()) <= 16 * MB
    kept = [int(name[1:]) for (name,) in rows(file, "SELECT id FROM requests ORDER BY number")]
    assert kept == list(range(kept[0], last + 1)) and 150 < len(kept) < 400
    assert store.dropped == 0
    assert all(int(name[1:]) >= kept[0] for (name,) in rows(file, "SELECT id FROM scores"))


def test_a_smaller_limit_makes_a_store_smaller_when_it_is_opened(file):
    larger = RequestStore(file, 40)
    for number in range(500):
        larger.add(partial(decided, f"r{number}", image=os.urandom(40_000)))
    larger.close()
    assert file.stat().st_size > 19 * MB
    smaller = RequestStore(file, 16)
    smaller.close()
    assert file.stat().st_size < 12 * MB
    kept = rows(file, "SELECT min(number), max(number), count(*) FROM requests")[0]
    assert kept[1] == 500 and kept[2] == 500 - kept[0] + 1 > 100


def test_who_serves_never_waits_and_what_is_left_out_is_counted(store, file, monkeypatch):
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")  # somebody else holds the file
    most, begin = 2 * request_store.MOST_WAITING, time.perf_counter()
    for number in range(most):
        store.add(partial(decided, f"r{number}"))
    assert time.perf_counter() - begin < 4, "it waited for the disk"
    with pytest.raises(OutputError, match="too much waits"):
        store.feedback("r0", 1.0).result(10)
    assert store.dropped >= most - request_store.MOST_WAITING - request_store.BATCH
    connection.execute("ROLLBACK")
    connection.close()
    store.close()
    assert rows(file, "SELECT count(*) FROM requests") == [(most - store.dropped,)]


def test_a_disk_that_is_full_ends_nothing(store, file, monkeypatch):
    store.add(partial(decided, "first"))
    assert store.feedback("first", 1.0).result(10)
    monkeypatch.setattr(request_store, "GATHERING_S", 10.0)  # what comes now is written together
    store._connection.execute("PRAGMA max_page_count = 1")  # it can grow no more
    store.add(partial(decided, "second", image=os.urandom(100_000)))
    with pytest.raises(OutputError, match=r"cannot be kept.*full.*send it again"):
        store.shadow("first", "drawn", 0, 1.0).result(10)
    assert store.dropped == 1
    store._connection.execute("PRAGMA max_page_count = 100000")
    assert store.feedback("first", 0.5).result(10) is True


@pytest.mark.parametrize("planted", ["text", "other database", "directory", "missing directory"])
def test_what_is_no_store_is_refused(file, planted):
    if planted == "text":
        file.write_text("no database at all, but long enough to have a head" * 100)
    elif planted == "other database":
        connection = sqlite3.connect(file)
        connection.execute("CREATE TABLE requests (something)")
        connection.close()
    elif planted == "directory":
        file.mkdir()
    else:
        file = file / "deeper"
    with pytest.raises(ConfigError, match=r"log_requests=.*give"):
        RequestStore(file, 16)


def test_others_cannot_read_it(store, file):
    assert {path.stat().st_mode & 0o777 for path in file.parent.iterdir()} == {0o600}


WRITES = """
import sys
from functools import partial
from pathlib import Path
from tests.test_request_store import RequestStore, decided
store = RequestStore(Path(sys.argv[1]), 16)
for number in range(100_000):
    store.add(partial(decided, f"{sys.argv[2]}-{number}"))
    assert store.feedback(f"{sys.argv[2]}-{number}", number / 100_000).result()
    print(f"{sys.argv[2]}-{number}", number / 100_000, flush=True)
"""


@pytest.mark.parametrize("moments", [3])
def test_killed_at_random_moments_it_loses_nothing_that_was_acknowledged(file, moments):
    acknowledged = {}
    for moment in range(moments):
        command = [sys.executable, "-c", WRITES, str(file), str(moment)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        said = [process.stdout.readline() for _ in range(3 + 10 * moment)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        acknowledged |= {name: float(score) for name, score in (line.split() for line in said if line.endswith("\n"))}
    RequestStore(file, 16).close()
    assert rows(file, "PRAGMA integrity_check") == [("ok",)]
    assert acknowledged.items() <= dict(rows(file, "SELECT id, score FROM scores")).items()
    assert len(acknowledged) > 3 * moments


def test_who_gives_up_waiting_and_what_cannot_be_written_end_nothing_for_others(store, file):
    store.add(partial(decided, "first"))
    assert store.feedback("first", 0.5).result(5)
    for _ in range(20):
        store.feedback("first", 0.25).cancel()
    store.add(partial(decided, "half", question="half of a character: \ud800"))
    store.add(partial(decided, "second"))
    assert store.feedback("second", 1.0).result(5) and store.feedback("first", 0.75).result(5)
    assert store.dropped == 1
    assert rows(file, "SELECT id, score FROM scores ORDER BY id") == [("first", 0.75), ("second", 1.0)]


def test_a_score_for_a_store_that_is_closed_is_refused(store):
    store.close()
    with pytest.raises(OutputError, match="closed"):
        store.feedback("first", 0.5).result(5)
