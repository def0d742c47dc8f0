"""Kill workers and drivers of an accuracy sweep on Ray at random moments, and count what was lost or measured twice.

    python benchmarks/ray_faults.py --kills 10

The model sleeps, so nothing is measured but the sweep itself. Each kill is a SIGKILL of one process: of a worker, in
turn with the driver, which is then started again. At the end the result files have to be those of a sweep in one
process that nobody disturbed, byte for byte; each kill may cost the batch that was under way, and nothing else may have
been answered twice; and after each kill of a driver none of its processes may be left. Prints one JSON document; the
exit code is 1 where a demand is not met.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sleeping_model import SPACE, NumberedTask, SleepingVLM, opening
from budgetvlm.cluster.cluster_options import ClusterOptions
from budgetvlm.cluster.watcher import processes_of
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.elsewhere import Elsewhere
from budgetvlm.profiling.measure.sweep_options import SweepOptions

SAMPLES, BATCH, PAUSE_S = 960, 8, 0.4
LONGEST_S = 45.0  # until processes of a killed driver have to be gone


def sweep(directory: Path, elsewhere: Elsewhere | None = None, pause_s: float = 0.0) -> None:
    options = SweepOptions(("test",), directory)
    model, task = SleepingVLM(pause_s), NumberedTask(SAMPLES)
    profile_accuracy(model, task, SPACE.settings, options, batch_size=BATCH, elsewhere=elsewhere)


def drive(directory: Path, log: Path) -> None:
    """What a driver does."""
    from budgetvlm.cluster.on_ray import ray_crew

    crew = partial(ray_crew, ClusterOptions(workers=2))
    sweep(directory, Elsewhere(crew, opening(PAUSE_S, log, SAMPLES)))


def calls(log: Path) -> list[tuple[str, str, list[str]]]:
    """Process, setting and questions of each batch so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(own[0], own[1], own[2].split(",")) for own in (line.split("|") for line in lines)]


def start(directory: Path, log: Path, place: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "benchmarks.ray_faults", "--drive", str(directory), str(log)]
    with open(place / "terminal.txt", "ab") as terminal:
        return subprocess.Popen(words, env={**os.environ, "TMPDIR": str(place)}, stdout=terminal, stderr=terminal)


def wait_for_calls(driver: subprocess.Popen, log: Path, more: int) -> bool:
    """Wait until there is this number of batches more. Returns False where the driver ended before."""
    wanted = len(calls(log)) + more
    while len(calls(log)) < wanted:
        if driver.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def left_over(place: Path) -> float | None:
    """How long it took until no process was left; None where some were left to the end."""
    started = time.monotonic()
    while list(processes_of(f"{place}/bvlm-")):
        if time.monotonic() - started > LONGEST_S:
            return None
        time.sleep(0.1)
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--drive", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(*args.drive)
        return 0
    with tempfile.TemporaryDirectory(prefix="rf-") as name:
        return report(Path(name), args.kills, random.Random(args.seed))


def report(place: Path, kills: int, rng: random.Random) -> int:
    sweep(place / "whole")
    log, killed, gone_s = place / "log", Counter[str](), list[float | None]()
    driver = start(place / "killed", log, place)
    for number in range(kills):
        if not wait_for_calls(driver, log, rng.randint(4, 10)):
            break
        time.sleep(rng.uniform(0, PAUSE_S))
        victim = "driver" if number % 2 else "worker"
        process = driver.pid if victim == "driver" else int(calls(log)[-1][0])
        os.kill(process, signal.SIGKILL)
        killed[victim] += 1
        if victim == "driver":
            driver.wait()
            gone_s.append(left_over(place))
            driver = start(place / "killed", log, place)
    code = driver.wait()
    last_s = left_over(place)
    asked = Counter((setting, question) for _, setting, own in calls(log) for question in own)
    again = sum(count - 1 for count in asked.values())
    files = [{p.name: p.read_bytes() for p in (place / n).rglob("*") if p.is_file()} for n in ("whole", "killed")]
    found = {
        "killed": killed,
        "exit code of the last driver": code,
        "files are the same": files[0] == files[1],
        "cells never asked": len(SPACE) * SAMPLES - len(asked),
        "cells asked again": again,
        "which may be at most": BATCH * sum(killed.values())
        + BATCH * killed["driver"],  # two workers die with a driver
        "seconds until no process was left": gone_s,
        "processes left at the end": last_s is None,
        "directories left": [path.name for path in place.glob("bvlm-*")],
    }
    print(json.dumps(found, indent=2))
    good = code == 0 and files[0] == files[1] and None not in [*gone_s, last_s] and sum(killed.values()) == kills
    good = good and again <= found["which may be at most"]
    if not good:
        print((place / "terminal.txt").read_text()[-4000:], file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
