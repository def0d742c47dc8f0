"""Schedulers of a server side by side on simulated requests: what a price that follows the queue is worth.

    python benchmarks/serving_simulation.py --data results/quickstart/data/controller_training_data.json \
        --checkpoint results/quickstart/controller [--loads 0.5 1 2 4 --seconds 120 --replicas 1 --own_ms 3 --json]

Requests arrive at random (Poisson), each about a test sample and with a budget between 0.5 and 2 times the full
setting's time. Loads are multiples of what the full setting alone could answer. A request takes what the table says of
its sample at the setting that the controller chooses with the time left, within the table's bounds; times vary by some
percent, and now and then there is a stall. "best fixed price" is picked afterwards, for each load.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.price_sweep import price_curve_of
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.serving.scheduler import Scheduler
from budgetvlm.serving.toll import Worth

BUDGETS = 0.5, 2.0  # times of the full setting
FIXED_PRICES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
SPREAD, STALLS, LONGEST_STALL = 0.03, 0.02, 0.5  # of a time's logarithm; share of requests that stall, and by how much


class Request(NamedTuple):
    """A simulated request; ``row``: its sample. ``noise``: times what the table says."""

    id: str
    arrived_s: float
    budget_ms: float
    row: int
    noise: float
    price: float | None = None
    when_infeasible: str = "reject"


@dataclass(frozen=True, eq=False)
class Model:
    """What a replica takes and gets right, by the table; see the module for its choices.

    Attributes:
        own_ms: that a request takes beside the model.
    """

    data: EvaluationData
    network: ValueNetwork
    own_ms: float

    def least_ms(self, row: int, full: bool) -> float:
        """The bound of the fastest setting, or of the full one."""
        bounds_ms = self._bounds_ms(row)
        return self.own_ms + float(bounds_ms[-1] if full else bounds_ms.min())

    def answer(self, request: Request, left_ms: float, price: float, full: bool) -> tuple[float, float]:
        """What it takes in ms, and its accuracy."""
        bounds_ms, features = self._bounds_ms(request.row), self.data.test_features
        left_ms -= self.own_ms
        allowed = bounds_ms <= left_ms
        if full:
            chosen = len(bounds_ms) - 1
        elif not allowed.any():
            chosen = int(bounds_ms.argmin())
        else:
            assert features is not None
            image, language = features.image[request.row], features.language[request.row]
            values = self.network.values(image, language, left_ms, price)
            chosen = int(np.where(allowed, values, -np.inf).argmax())
        cell = request.row, chosen
        took_ms = float(self.data.test.latency_ms[cell]) * request.noise + self.own_ms
        return took_ms, float(self.data.test.accuracy[cell])

    def _bounds_ms(self, row: int) -> np.ndarray:
        bounds_ms = self.data.test_bounds_ms
        return bounds_ms[row % len(bounds_ms)]  # one row for all, or one each


def requests(model: Model, load: float, seconds: float, seed: int) -> list[Request]:
    """Requests at this load, in the order of their arrival."""
    random, reference_ms = np.random.default_rng(seed), model.data.means.reference_ms
    count = random.poisson(load * seconds * 1e3 / reference_ms)
    arrived_s = np.sort(random.uniform(0, seconds, count))
    budgets_ms = random.uniform(*BUDGETS, count) * reference_ms
    stalls = (random.random(count) < STALLS) * random.uniform(0, LONGEST_STALL, count)
    noise = np.exp(random.normal(0, SPREAD, count) + stalls)
    rows = random.integers(model.data.test.num_samples, size=count)
    found = zip(arrived_s.tolist(), budgets_ms.tolist(), rows.tolist(), noise.tolist(), strict=True)
    return [Request(str(number), *one) for number, one in enumerate(found)]


def simulate(
    scheduler: Scheduler, model: Model, stream: Sequence[Request], seconds: float, full: bool = False
) -> dict[str, float]:
    """Serve a stream of requests and count."""
    events: list[tuple[float, int, Request, float]] = [(one.arrived_s, 0, one, 0.0) for one in stream]
    right, late, admitted, prices, busy_ms = 0.0, 0, 0, [], 0.0
    while events:
        now_s, ended, request, accuracy = heapq.heappop(events)
        if ended:
            scheduler.finished(request.id, now_s)
            in_time = now_s <= request.arrived_s + request.budget_ms / 1e3
            right, late = right + in_time * accuracy, late + (not in_time)
        else:
            admitted += scheduler.offer(request, model.least_ms(request.row, full), now_s) is None
        late += len(scheduler.expired(now_s))
        while start := scheduler.next(now_s):
            job: Request = start.job  # type: ignore[assignment]
            left_ms = job.budget_ms - (now_s - job.arrived_s) * 1e3
            took_ms, accuracy = model.answer(job, left_ms, start.price, full)
            heapq.heappush(events, (now_s + took_ms / 1e3, 1, job, accuracy))
            prices.append(start.price)
            busy_ms += took_ms
    return {
        "right_per_s": right / seconds,
        "offered_per_s": len(stream) / seconds,
        "admitted": admitted / len(stream),
        "late": late / max(admitted, 1),
        "mean_price": float(np.mean(prices)),
        "mean_ms": busy_ms / len(prices),
        "busy": busy_ms / 1e3 / seconds / scheduler.replicas,
    }


def run(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """All systems at all loads: load -> system -> figures."""
    prepared = load_prepared(args.data)
    data = EvaluationData.of(prepared.table, prepared.features, EvaluationOptions(resamples=2))
    controller = load_controller(args.checkpoint).eval()
    curve = price_curve_of(controller, prepared.table, prepared.features)
    reference_ms, price = data.means.reference_ms, float(controller.default_price)
    model = Model(data, ValueNetwork(controller), args.own_ms)
    worth = Worth.of(curve, reference_ms, price, args.own_ms)
    none = worth.fixed(0.0)

    def at(load: float) -> dict[str, dict[str, float]]:
        stream = requests(model, load * args.replicas, args.seconds, args.seed)

        def system(worth: Worth, full: bool = False, **options: str) -> dict[str, float]:
            scheduler = Scheduler(worth, replicas=args.replicas, **options)  # type: ignore[arg-type]
            return simulate(scheduler, model, stream, args.seconds, full)

        fixed = [system(worth.fixed(price)) for price in FIXED_PRICES]
        return {
            "price follows the queue": system(worth),
            "price 0": system(none),
            "best fixed price": max(fixed, key=lambda figures: figures["right_per_s"]),
            "full setting, by deadline": system(replace(none, pace=1.0), full=True),
            "full setting, by arrival": system(none, full=True, order="arrival"),
        }

    return {f"{load:g}": at(load) for load in args.loads}


def show(found: dict[str, dict[str, dict[str, float]]], say: Callable[[str], None] = print) -> None:
    """Print a table."""
    say(f"{'load':>5}  {'':26}{'right in time/s':>16}{'admitted':>10}{'late':>8}{'price':>8}{'ms':>8}{'busy':>7}")
    for load, systems in found.items():
        for name, it in systems.items():
            say(
                f"{load:>5}  {name:26}{it['right_per_s']:16.2f}{it['admitted']:10.1%}{it['late']:8.1%}"
                f"{it['mean_price']:8.2f}{it['mean_ms']:8.1f}{it['busy']:7.0%}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="what `budgetvlm prepare` wrote")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a controller trained on it")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], metavar="X")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="at each load (default: 120)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="loads are for each (default: 1)")
    parser.add_argument("--own_ms", type=float, default=3.0, metavar="MS", help="of the server, a request (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document on one line")
    args = parser.parse_args(argv)
    found = run(args)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
