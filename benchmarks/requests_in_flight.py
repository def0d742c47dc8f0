"""Who is late, and how large the settings are, where requests in flight slow each other down: a simulation.

    python benchmarks/requests_in_flight.py

The machine of the tests serves several requests side by side, each at 1 / (1 + growth (n - 1)) of its speed alone.
Clients send their next request when one is answered; how many there are changes in bursts. Budgets are drawn from a
wide range. The guard knows the number in flight, or takes every request for one alone, and then only follows what the
last requests took. "size": log time of the setting, from 0 (cheapest) to 1 (full), 0 where the answer was late.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_adaptive import SPACE, STAGES, TOKENS, asked, bounded, guard  # noqa: E402 (found from the root)

from budgetvlm.guard.bounds import Bounds, Outcome  # noqa: E402
from budgetvlm.guard.rule import GUARDED  # noqa: E402

TOTAL, WARM, NOISE, OWN_MS = 2000, 200, 0.08, 0.5
CLIENTS: dict[str, Callable[[int], int]] = {
    "1": lambda number: 1,
    "4": lambda number: 4,
    "1 and 4, by 25": lambda number: 4 if (number // 25) % 2 else 1,
    "1 and 8, by 50": lambda number: 8 if (number // 50) % 2 else 1,
    "1 and 4, by 6": lambda number: 4 if (number // 6) % 2 else 1,
}
FULL_MS = sum(STAGES.values()).mean(axis=0)
SIZE = np.log(FULL_MS / FULL_MS.min()) / math.log(FULL_MS.max() / FULL_MS.min())


@dataclass
class Job:
    """A request under way: what was decided, what it takes alone, and how much of that is left."""

    row: int
    index: int
    looks: list[Any]
    budget_ms: float
    among: int
    began_ms: float
    alone_ms: dict[str, float]
    left_ms: float


def largest(look: Bounds, budget_ms: float) -> int:
    """Return the allowed setting that is expected to take longest, or the fastest."""
    allowed = look.allowed(budget_ms)
    return int(np.where(allowed, look.predicted_ms, -np.inf).argmax()) if allowed.any() else look.fastest


def simulate(clients: Callable[[int], int], growth: float, *, foresees: bool, seed: int = 0) -> dict[str, float]:
    """Return the shares of late and of promised requests, and the mean size."""
    rng, made = np.random.default_rng(seed), guard().replaced(rule=GUARDED.for_model(False))
    jobs, now_ms, started, done = list[Job](), 0.0, 0, list[tuple[bool, bool, float]]()
    most = max(clients(number) for number in range(TOTAL))
    while len(done) < TOTAL:
        while len(jobs) < clients(len(done)):
            row, among = started % len(TOKENS["vision"]), len(jobs) + 1 if foresees else 1
            budget_ms = rng.uniform(20, 130) * (1 + growth * (most - 1) / 2)
            look = bounded(made.among(among), asked(row), budget_ms)
            index, slow = largest(look, budget_ms), math.exp(NOISE * rng.standard_t(4))
            alone = {stage: slow * times[row, index] for stage, times in STAGES.items()}
            jobs.append(Job(row, index, [look], budget_ms, among, now_ms, alone, sum(alone.values())))
            started += 1
        first = min(jobs, key=lambda job: job.left_ms)
        passed_ms = first.left_ms * (1 + growth * (len(jobs) - 1))
        now_ms += passed_ms
        for job in jobs:
            job.left_ms -= passed_ms / (1 + growth * (len(jobs) - 1))
        jobs.remove(first)
        longer = (now_ms - first.began_ms) / sum(first.alone_ms.values())
        total_ms, promised = now_ms - first.began_ms + OWN_MS, bool(first.looks[0].allowed(first.budget_ms).any())
        late = total_ms > first.budget_ms
        stages = {stage: longer * ms for stage, ms in first.alone_ms.items()}
        output = int(TOKENS["output"][first.row, first.index])
        outcome = Outcome(stages, output, total_ms, late=late, promised=promised, among=first.among)
        made.update(first.index, first.looks, outcome)
        done.append((late and promised, promised, 0.0 if late else SIZE[first.index]))
    late_share, promised_share, size = np.array(done[WARM:], float).mean(axis=0)
    return {"late": late_share, "promised": promised_share, "size": size}


def main() -> int:
    """Print a line for each pattern of clients."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    assert len(SIZE) == len(SPACE)
    print(f"{'growth':>6} {'clients':16} {'':9} {'late':>6} {'promised':>9} {'size':>6}")
    for growth in (0.3, 1.0):
        for name, clients in CLIENTS.items():
            for foresees in (False, True):
                found = simulate(clients, growth, foresees=foresees)
                late, promised, size = found.values()
                how = "foreseen" if foresees else "followed"
                print(f"{growth:6g} {name:16} {how:9} {late:6.1%} {promised:9.1%} {size:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
