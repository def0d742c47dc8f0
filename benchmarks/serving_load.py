"""A server under load, beside others on the same machine: right answers in time per second, and who was late.

    python benchmarks/serving_load.py [--loads 0.5 1 2 4 --seconds 180 --fixed_prices 1 1.4 2 --out load.json]

Requests about fresh questions of the bundled task arrive at random (Poisson) from another process, which waits for no
answer before it sends the next. Budgets are drawn from 0.5 to 2 times what a request takes at the full setting; loads
are multiples of what the full setting alone could answer. Systems, each a `budgetvlm serve` of its own:

    ours           the price follows the queue
    price 0        every request takes what its budget allows
    fixed P        the same at another price: the best one is what ours is to be held against
    full deadline  the full setting alone, the earliest deadline first, with admission
    full arrival   the full setting alone, first in, first out

They take turns at each load, with the same requests. Late are those of the admitted that missed their budget by the
server's own clock, which counts from the arrival, or were told so after they had waited; "late here" is by the clock of
the one who asks, on the same cores.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.tasks import Sample, load_task
from tests.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = 0.5, 2.0  # times of the full setting
NUM_SAMPLES, NUM_ALONE = 300, 60
PROBE_S = 0.25
REFUSED_AT_ONCE = {"queue_full", "too_late", "too_small"}
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class System:
    """A server under test: flags of `budgetvlm serve`, and what requests say beside the question."""

    name: str
    flags: tuple[str, ...]
    says: tuple[tuple[str, Any], ...] = (("when_infeasible", "reject"),)


OURS, ZERO = System("ours", ()), System("price 0", ("--price", "0"))
FULL = System("full deadline", ("--full_only", "--price", "0"))
FIFO = System("full arrival", ("--full_only", "--price", "0", "--order", "arrival"), ())


def fixed(price: float) -> System:
    """The server with the price fixed at 0, whose clients all ask for another one."""
    return System(f"fixed {price:g}", ZERO.flags, (*ZERO.says, ("price", price)))


class Load:
    """Servers, questions, and the time of the full setting.

    Attributes:
        full_ms: what a request takes at the full setting, alone.
    """

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self._args, self._task = args, load_task("signs")
        self._samples = fresh_samples(self._task, "test", NUM_SAMPLES, seed=args.seed)
        self._servers: dict[tuple[str, ...], ServerProcess] = {}
        for flags in dict.fromkeys(one.flags for one in self.systems()):
            state = stack.enter_context(tempfile.TemporaryDirectory())
            self._servers[flags] = stack.enter_context(ServerProcess(*args.serve_flags, *flags, "--state_dir", state))
        alone_ms = {flags: self._alone_ms(server) for flags, server in self._servers.items()}  # warms them up, too
        self.full_ms = alone_ms[FULL.flags]

    def systems(self) -> list[System]:
        """All systems."""
        return [OURS, ZERO, *map(fixed, self._args.fixed_prices), FULL, FIFO]

    def run(self, system: System, load: float) -> dict[str, Any]:
        """Figures of a system at a load."""
        server, requests = self._servers[system.flags], self._requests(load)
        before = _memory_mb(server)
        found = self._send(server, system.says, requests)
        return self._figures(found, requests) | {"memory_mb": [before, _memory_mb(server)]}

    def _requests(self, load: float) -> list[list[Any]]:
        random, seconds = np.random.default_rng([self._args.seed, int(100 * load)]), self._args.seconds
        count = random.poisson(load * seconds * 1e3 / self.full_ms)
        moments = np.sort(random.uniform(0, seconds, count)).tolist()
        numbers = random.integers(NUM_SAMPLES, size=count).tolist()
        budgets = (random.uniform(*BUDGETS, count) * self.full_ms).tolist()
        return [list(one) for one in zip(moments, numbers, budgets, strict=True)]

    def _send(
        self, server: ServerProcess, says: Sequence[tuple[str, Any]], requests: list[list[Any]]
    ) -> dict[str, Any]:
        """Have another process send requests; returns what it saw."""
        bodies = [json.dumps(body_of(sample) | dict(says)) for sample in self._samples]
        plan = {"port": server.port, "path": PATH, "bodies": bodies, "requests": requests, "probe_s": PROBE_S}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(plan, file)
            file.flush()
            command = [sys.executable, str(ROOT / "benchmarks" / "serving_traffic.py"), file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = json.loads(said)
        return found

    def _alone_ms(self, server: ServerProcess) -> float:
        """The median of what requests take that come one after the other, by the server's clock."""
        took = []
        for sample in self._samples[:NUM_ALONE]:
            status, _, document = server.ask(body_of(sample))
            assert status == 200, document
            took.append(document["budgetvlm"]["latency_ms"])
        return float(np.median(took))

    def _figures(self, found: dict[str, Any], requests: list[list[Any]]) -> dict[str, Any]:
        rows, seconds = found["rows"], self._args.seconds
        admitted = [row.get("code") not in REFUSED_AT_ONCE for row in rows]
        met = [bool(row.get("budget_met")) for row in rows]
        met_here = [
            row["status"] == 200 and row["ms"] <= budget for row, (_, _, budget) in zip(rows, requests, strict=True)
        ]
        scores = [
            self._task.score(row["text"], self._samples[number]) if "text" in row else 0.0
            for row, (_, number, _) in zip(rows, requests, strict=True)
        ]
        beyond_ms = [row["ms"] - row["latency_ms"] for row in rows if row.get("latency_ms")]
        prices = [row["price"] for row in rows if row.get("price") is not None]
        codes = [str(row.get("code", row["status"])) for row in rows]
        return {
            "offered_per_s": len(rows) / seconds,
            "admitted": float(np.mean(admitted)),
            "right_per_s": float(np.dot(scores, met)) / seconds,
            "right_here_per_s": float(np.dot(scores, met_here)) / seconds,
            "late": 1 - sum(met) / max(sum(admitted), 1),
            "late_here": 1 - sum(met_here) / max(sum(admitted), 1),
            "beyond_ms": np.quantile(beyond_ms, (0.5, 0.95)).tolist() if beyond_ms else [],
            "price": float(np.mean(prices)) if prices else 0.0,
            "health_ms": [float(np.median(found["health_ms"])), max(found["health_ms"])],
            "outcomes": {code: codes.count(code) for code in sorted(set(codes))},
        }


def body_of(sample: Sample) -> dict[str, Any]:
    """A request about a sample."""
    data = io.BytesIO()
    sample.load_image().save(data, "PNG")
    image = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": sample.question}]
    return {"model": "reference", "messages": [{"role": "user", "content": parts}]}


def _memory_mb(server: ServerProcess) -> float:
    """Memory of a server and its replicas."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (server.process.pid, *server.replicas())]
    return sum(pages) * 4096 / 1e6


HEAD = (
    f"{'load':>5}  {'':14}{'offered/s':>10}{'admitted':>10}{'right/s':>9}{'here':>7}{'late':>7}{'here':>7}{'price':>7}"
    f"{'health':>8}{'worst':>7} ms{'memory':>9}{'after':>7} MB"
)


def line(load: float, name: str, it: dict[str, Any]) -> str:
    """A line of the table."""
    (health, worst), (before, after) = it["health_ms"], it["memory_mb"]
    return (
        f"{load:5g}  {name:14}{it['offered_per_s']:10.1f}{it['admitted']:10.1%}{it['right_per_s']:9.2f}"
        f"{it['right_here_per_s']:7.2f}{it['late']:7.1%}{it['late_here']:7.1%}{it['price']:7.2f}{health:8.1f}{worst:7.0f}"
        f"   {before:9.0f}{after:7.0f}"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All systems at all loads: load -> system -> figures."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        load_of = Load(args, stack)
        print(f"a request takes {load_of.full_ms:.1f} ms at the full setting", HEAD, sep="\n", flush=True)
        for load in args.loads:
            found[f"{load:g}"] = systems = {}
            for system in load_of.systems():
                systems[system.name] = load_of.run(system, load)
                print(line(load, system.name, systems[system.name]), flush=True)
        return {"full_ms": load_of.full_ms, "seconds": args.seconds, "loads": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], metavar="X")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="S", help="of each system at each load (180)")
    parser.add_argument("--fixed_prices", type=float, nargs="*", default=[], metavar="P", help="to compare with")
    parser.add_argument(
        "--serve_flags", type=shlex.split, default=[], metavar="FLAGS", help="further flags of each server, in quotes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with all figures")
    args = parser.parse_args(argv)
    found = run(args)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
