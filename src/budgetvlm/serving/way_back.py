"""What an answer takes from its last token to the server's process, which belongs to its budget. Times in ms."""

from __future__ import annotations

import time

from budgetvlm.serving.jobs import Job

LEARNING = 0.05  # share of an answer in what is known
NUM_SPREADS = 2.0  # beyond the mean, that are reserved


class WayBack:
    """Learns how long the way is, and how much that varies."""

    def __init__(self) -> None:
        self._mean = self._spread = 0.0

    @property
    def reserve_ms(self) -> float:
        """What a budget has to leave for it."""
        return self._mean + NUM_SPREADS * self._spread

    def arrived(self, job: Job, answer: dict[str, object]) -> None:
        """Learn from an answer that is here now, and have it say what it took until now."""
        latency_ms = (time.perf_counter() - job.arrived_s) * 1e3
        off = latency_ms - float(answer["latency_ms"]) - self._mean  # type: ignore[arg-type]
        self._mean += LEARNING * off
        self._spread += LEARNING * (abs(off) - self._spread)
        answer["latency_ms"], answer["budget_met"] = latency_ms, latency_ms <= job.budget_ms
        answer["budget_ms"] = job.given_budget_ms
