"""Sweeps beside other work on the same cores.

Threads of one computation wait for each other busily. Where other processes take cores away, all of them wait for the
one that was stopped, and an answer takes ten times as long with two threads as with one. The system counts how often it
stopped this process, so that is noticed. Where no such count exists, the number of threads stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

WINDOW_S = 2.0  # over which interruptions are counted
BUSY = 40.0  # interruptions a second; alone on its cores a process has a few
LEAST_S = 5.0  # a measurement that is shorter is none
FIRST_WAIT_S, LONGEST_WAIT_S = 20.0, 320.0  # with one thread, before all are tried again; doubled each time


def interruptions() -> int:
    """How often the system stopped this process to run another."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class SharedCores:
    """Uses one thread while others work on the same cores, for computations whose time is not measured.

    ``say`` is told once that the cores are shared.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self.say, self.now, self.threads = say, now, torch.get_num_threads()
        self.seen, self.since = interruptions(), now()
        self.wait_s, self.again_at, self.said = FIRST_WAIT_S, 0.0, False

    def check(self) -> None:
        """Change the number of threads if interruptions since the last check ask for it; call this often."""
        now, count = self.now(), interruptions()
        if now - self.since < WINDOW_S or self.threads == 1:
            return
        busy = (count - self.seen) / (now - self.since) > BUSY
        self.seen, self.since = count, now
        if busy and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            self.again_at, self.wait_s = now + self.wait_s, min(2 * self.wait_s, LONGEST_WAIT_S)
            if not self.said:
                self.say("other processes use the same cores: going on with one thread while they do")
            self.said = True
        elif not busy and torch.get_num_threads() == 1 and now >= self.again_at:
            torch.set_num_threads(self.threads)

    def close(self) -> None:
        """Give the number of threads back."""
        torch.set_num_threads(self.threads)


class Interruptions:
    """Counts interruptions of a measurement, which keeps its number of threads whatever happens."""

    def __init__(self) -> None:
        self.seen, self.since = interruptions(), time.monotonic()

    def warning(self) -> str | None:
        """What to tell the user; None where the cores were its own, or it took too little time to tell."""
        took_s = time.monotonic() - self.since
        rate = (interruptions() - self.seen) / max(took_s, 1e-9)
        if rate <= BUSY or took_s < LEAST_S:
            return None
        several = ", or if such work is usual, with --num_threads 1, with which the model then has to serve too"
        return (
            f"other processes used the same cores: this one was stopped {rate:.0f} times a second while it was timed. "
            "The times are those beside such work. Measure again (--overwrite) on a quiet machine"
            f"{several if torch.get_num_threads() > 1 else ''}."
        )
