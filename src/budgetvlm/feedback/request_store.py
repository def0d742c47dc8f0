"""The store of served requests and their scores: one SQLite file of a bounded size, written by a thread of its own.

A request is kept with what its decision saw, never with its images, and with its question only where that is asked
for. A score is on the disk before it is acknowledged. Whoever serves waits for neither: where the disk does not keep
up, requests are left out and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from budgetvlm.errors import ConfigError, OutputError

_log = logging.getLogger(__name__)
APPLICATION, SCHEMA = 0x62766C6D, 1
TABLES = """
CREATE TABLE IF NOT EXISTS controllers (number INTEGER PRIMARY KEY, digest TEXT UNIQUE, knobs TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, at_s REAL NOT NULL,
    controller INTEGER NOT NULL REFERENCES controllers, image BLOB NOT NULL, language BLOB NOT NULL,
    seen_ms REAL NOT NULL, price REAL NOT NULL, allowed BLOB NOT NULL, chosen INTEGER NOT NULL,
    probabilities BLOB NOT NULL, answered INTEGER NOT NULL, budget_ms REAL, latency_ms REAL NOT NULL, question TEXT
);
CREATE TABLE IF NOT EXISTS scores (
    id TEXT NOT NULL REFERENCES requests (id) ON DELETE CASCADE, source TEXT NOT NULL, setting INTEGER NOT NULL,
    score REAL NOT NULL, PRIMARY KEY (id, source, setting)
) WITHOUT ROWID;
"""
CONTROLLER = "INSERT OR IGNORE INTO controllers (digest, knobs) VALUES (?, ?)"
REQUEST = (
    "INSERT OR IGNORE INTO requests (controller, id, at_s, image, language, seen_ms, price, allowed, chosen, "
    "probabilities, answered, budget_ms, latency_ms, question) SELECT number, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? "
    "FROM controllers WHERE digest = ?"
)
FEEDBACK = (
    "INSERT OR REPLACE INTO scores (id, source, setting, score) "
    "SELECT id, 'feedback', chosen, ? FROM requests WHERE id = ?"
)
SHADOW = "INSERT OR REPLACE INTO scores (id, source, setting, score) SELECT id, ?, ?, ? FROM requests WHERE id = ?"
OLDEST = "DELETE FROM requests WHERE number IN (SELECT number FROM requests ORDER BY number LIMIT ?)"
PAGE, LEAST_MB, MB = 4096, 16.0, 1_000_000
WAL, SPARE = 4 * MB, 2 * MB  # bytes kept free: for what is not yet in the file proper, and for the next batch
MOST_WAITING, BATCH, GATHERING_S = 1000, 32, 0.05
DELETED = 2 * BATCH  # of the oldest requests, at once


class Decided(NamedTuple):
    """A served request with what its decision saw.

    Attributes:
        controller, knobs: digest of the one that decided, and its knobs as JSON; settings are numbered by these.
        image, language: its features, bytes of float16.
        seen_ms, price: budget and price as the controller was told.
        allowed: bits of the settings that the budget allowed (`numpy.packbits`).
        chosen: the setting that was chosen first.
        probabilities: with which each setting would have been, bytes of float32.
        answered: the one that answered, which may be another once the image is encoded.
        budget_ms: as the client gave it; None: none.
        question: None: it is not kept.
    """

    id: str
    controller: str
    knobs: str
    image: bytes
    language: bytes
    seen_ms: float
    price: float
    allowed: bytes
    chosen: int
    probabilities: bytes
    answered: int
    budget_ms: float | None
    latency_ms: float
    question: str | None = None


Statements = Sequence[tuple[str, tuple[Any, ...]]]


class _Write(NamedTuple):
    """Makes statements that belong together, for one who may wait to know whether the last one changed anything."""

    statements: Callable[[], Statements]
    done: Future[bool] | None = None


class RequestStore:
    """See the module.

    Attributes:
        dropped: requests that were left out.

    Args:
        file: made if it is not there.
        most_mb: the most that it takes on the disk, in millions of bytes; the oldest requests make room.

    Raises:
        ConfigError: the file is no store, or cannot be opened.
    """

    def __init__(self, file: Path, most_mb: float) -> None:
        self.dropped, self._failing, self._closed = 0, False, False
        self._most_pages = int(most_mb * MB - WAL) // PAGE
        self._connection = _opened(file, self._most_pages)
        self._waiting: queue.Queue[_Write | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="request store", daemon=True)
        self._thread.start()

    def add(self, make: Callable[[], Decided]) -> None:
        """Keep a request, soon; the thread that writes makes its record. It is left out where the disk is too slow."""
        self._offer(_Write(partial(_request, make, time.time())))

    def feedback(self, request: str, score: float) -> Future[bool]:
        """Keep what an answer was worth; a second score takes the first one's place.

        Returns:
            Whether the request is known, once the score is on the disk; an OutputError: it could not be written.
        """
        return self._awaited(FEEDBACK, (score, request))

    def shadow(self, request: str, source: str, setting: int, score: float) -> Future[bool]:
        """Keep what a setting's answer was worth by another answer; the source says why it was this setting."""
        return self._awaited(SHADOW, (source, setting, score, request))

    def close(self) -> None:
        """Write what waits, and close the file."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
            self._thread.join()
            self._connection.close()

    def _awaited(self, statement: str, values: tuple[Any, ...]) -> Future[bool]:
        done: Future[bool] = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting stops no writing
        self._offer(_Write(lambda: [(statement, values)], done))
        return done

    def _offer(self, write: _Write) -> None:
        if self._closed:
            self._refuse([write], "the store is closed")
            return
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            self._refuse([write], "too much waits to be written")

    def _refuse(self, writes: Sequence[_Write], why: str) -> None:
        for write in writes:
            if write.done:
                write.done.set_exception(OutputError(f"the score cannot be kept: {why}; send it again later"))
            else:
                self.dropped += 1

    def _run(self) -> None:
        more = True
        while more:
            writes, more = self._gathered()
            self._keep(writes)

    def _keep(self, writes: Sequence[_Write]) -> None:
        """Write, and tell those who wait; what is wrong with one of several is that one's matter alone."""
        try:
            changed = self._written(writes)
        except Exception as error:
            if not isinstance(error, sqlite3.Error) and len(writes) > 1:
                for write in writes:
                    self._keep([write])
                return
            if not self._failing:
                _log.error("served requests cannot be kept at present: %s", error)
            self._failing = True
            self._refuse(writes, str(error))
            return
        self._failing = False
        for write, one in zip(writes, changed, strict=True):
            if write.done:
                write.done.set_result(one)

    def _gathered(self) -> tuple[list[_Write], bool]:
        """What is to be written at once, and whether there will be more: a score waits for nothing."""
        writes: list[_Write] = []
        until_s = None
        while len(writes) < BATCH:
            try:
                left_s = None if until_s is None else max(until_s - time.monotonic(), 0)
                write = self._waiting.get(timeout=left_s)
            except queue.Empty:
                break
            if write is None:
                return writes, False
            writes.append(write)
            until_s = until_s or time.monotonic() + GATHERING_S
            if write.done:
                until_s = 0.0  # take what is there, and no more
        return writes, True

    def _written(self, writes: Sequence[_Write]) -> list[bool]:
        """Write all or nothing; whether each one changed anything. Raises what SQLite does."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            changed = [[connection.execute(*one).rowcount for one in write.statements()][-1] > 0 for write in writes]
            if self._pages_used() > self._most_pages - SPARE // PAGE:
                connection.execute(OLDEST, (DELETED,))
            connection.execute("COMMIT")
        except Exception:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return changed

    def _pages_used(self) -> int:
        return _number(self._connection, "page_count") - _number(self._connection, "freelist_count")


def _request(make: Callable[[], Decided], at_s: float) -> Statements:
    name, digest, knobs, *seen = make()
    return [(CONTROLLER, (digest, knobs)), (REQUEST, (name, at_s, *seen, digest))]


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _opened(file: Path, most_pages: int) -> sqlite3.Connection:
    """Open or make a store that this user alone can read. Raises ConfigError."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(file, timeout=5.0, isolation_level=None, check_same_thread=False)
        known = _number(connection, "application_id"), _number(connection, "user_version")
        if _number(connection, "page_count") and known != (APPLICATION, SCHEMA):
            raise ConfigError(f"log_requests={file} is no store of requests that this version reads; give another file")
        _shrink(connection, most_pages)
        for pragma in (
            f"page_size = {PAGE}", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON",
            f"wal_autocheckpoint = {MB // PAGE}", f"journal_size_limit = {MB}", f"max_page_count = {most_pages}",
            f"application_id = {APPLICATION}", f"user_version = {SCHEMA}",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
        connection.executescript(TABLES)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"log_requests={file} cannot be opened: {error}; give a file that can be written") from None
    return connection


def _shrink(connection: sqlite3.Connection, most_pages: int) -> None:
    """Make a store smaller that was written with a larger limit."""
    pages = _number(connection, "page_count")
    if pages > most_pages:
        (kept,) = connection.execute("SELECT count(*) FROM requests").fetchone()
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(OLDEST, (kept - kept * most_pages // (2 * pages),))
        connection.execute("VACUUM")
