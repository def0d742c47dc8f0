"""What it costs a request to be kept, how large the store gets, and what is left when its process is killed.

    python benchmarks/kept_requests.py [--requests 2000] [--every_ms 10] [--kills 50] [--json FILE]

Times are those of the request's own thread: what a replica says of its decision, and handing the record over, one
request every `--every_ms`. A process that writes is killed at random moments; what it had acknowledged is
then looked for in the store.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from budgetvlm.decide import Seen
from budgetvlm.feedback.request_store import Decided, RequestStore
from budgetvlm.serving.jobs import Job
from budgetvlm.serving.kept_requests import kept, told_of
from budgetvlm.serving.wire import packed

KNOBS, WIDTH, SETTINGS = '{"max_crops": [1, 4, 12]}', 1024, 27
WRITER = """
import sys
from functools import partial
from pathlib import Path
from benchmarks.kept_requests import decided
from budgetvlm.feedback.request_store import RequestStore
store = RequestStore(Path(sys.argv[1]), 16)
for number in range(10**9):
    store.add(partial(decided, f"{sys.argv[2]}-{number}"))
    assert store.feedback(f"{sys.argv[2]}-{number}", 0.5).result()
    print(f"{sys.argv[2]}-{number}", flush=True)
"""


def decided(name: str) -> Decided:
    """A record with small features."""
    return Decided(name, "digest", KNOBS, b"i" * 256, b"l" * 64, 50.0, 0.1, b"\xe0", 1, b"p" * 12, 1, 80.0, 60.0)


def cost_ms(requests: int, every_ms: float, file: Path) -> tuple[np.ndarray, int]:
    """What each request pays ``[2, N]``, in the replica and in the server, and how many were left out."""
    rng, store, times = np.random.default_rng(0), RequestStore(file, 200), []
    identity = {"controller": "digest", "knobs": KNOBS}
    for number in range(requests):
        image, language = rng.normal(size=(2, WIDTH)).astype(np.float32)
        allowed, probabilities = np.ones(SETTINGS, dtype=bool), np.full(SETTINGS, 1 / SETTINGS)
        seen, answer = Seen(image, language, 50.0, 0.1, allowed, 3, probabilities, 3), {"latency_ms": 50.0}
        time.sleep(every_ms / 1e3)
        begin = time.perf_counter()
        said, blocks = told_of(seen)
        packed({"seen": said | identity}, blocks)
        between = time.perf_counter()
        job = Job(f"r{number}", [{"role": "user", "content": "what"}], [], 0.0)
        store.add(partial(kept, job, answer, said | identity, blocks, False))
        times.append((between - begin, time.perf_counter() - between))
    store.close()
    return 1e3 * np.array(times).T, store.dropped


def killed(kills: int, file: Path) -> tuple[int, int, str]:
    """Kill writers at random moments: scores that were acknowledged, of these the lost ones, and SQLite's own check."""
    said = []
    for moment in range(kills):
        command = [sys.executable, "-c", WRITER, str(file), str(moment)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        lines += process.stdout.readlines()
        process.wait()
        said += [line.strip() for line in lines if line.endswith("\n")]
    RequestStore(file, 16).close()
    connection = sqlite3.connect(file)
    there = {name for (name,) in connection.execute("SELECT id FROM scores")}
    (state,) = connection.execute("PRAGMA integrity_check").fetchone()
    connection.close()
    return len(said), len(set(said) - there), state


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--every_ms", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        times, dropped = cost_ms(args.requests, args.every_ms, Path(directory, "cost.sqlite"))
        size = Path(directory, "cost.sqlite").stat().st_size
        acknowledged, lost, state = killed(args.kills, Path(directory, "killed.sqlite"))
    quantiles = {f"p{q}": np.percentile(times.sum(axis=0), q).round(4) for q in (50, 90, 99)}
    found = {
        "ms a request": quantiles, "of it in the replica, p50": round(float(np.median(times[0])), 4),
        "left out": dropped, "bytes a request": size // args.requests,
        "kills": args.kills, "acknowledged": acknowledged, "lost": lost, "integrity": state,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0 if lost == 0 and state == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
