"""Ends what a cluster of this machine started, once the process that started it is gone, however it went.

    python watcher.py DIRECTORY      # of the cluster's sessions, a temporary one

Runs as a process of its own and waits until its standard input is closed, which a kill of the other process does as
well. It then ends all processes that name the directory in their command line or write into it, and removes it. (Some
of Ray's processes take another name when they run, and survive a kill of the process that started them.) Nothing
outside the standard library is imported, so that it starts at once. Linux only: elsewhere there is no /proc, and Ray's
own ways have to do.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CALM_S, LONGEST_S = 1.0, 30.0  # without a process of the cluster, until it is over; in all


def processes_of(directory: str, spared: int = 0) -> Iterator[int]:
    """Yield the processes that a directory belongs to, without this one and the one that is ``spared``."""
    for place in Path("/proc").glob("[0-9]*"):
        if int(place.name) not in (os.getpid(), spared) and any(directory in text for text in _traces(place)):
            yield int(place.name)


def _traces(place: Path) -> Iterator[str]:
    """Yield the command line of a process and the files that it writes; a process that ended has none."""
    try:
        yield (place / "cmdline").read_bytes().decode(errors="replace")
        for link in (place / "fd").iterdir():
            if link.lstat().st_mode & stat.S_IWUSR:
                yield os.readlink(link)
    except OSError:
        return


def end_all(directory: str, spared: int) -> None:
    """End the processes of a directory until no more appear, but for one, and remove it."""
    started = calm = time.monotonic()
    while time.monotonic() - calm < CALM_S and time.monotonic() - started < LONGEST_S:
        for process in processes_of(directory, spared):
            calm = time.monotonic()
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue  # it ended by itself
        time.sleep(0.1)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    starter = os.getppid()  # it may still live, and then it writes a log there
    sys.stdin.read()
    end_all(sys.argv[1], starter)
