"""A machine that was not profiled: 50 requests against a full profile there.

    python benchmarks/adaptation_machine.py --exp5_dir DIR [--threads 2 1 3] [--json FILE]

The same machine with other numbers of threads stands for others. The first number is profiled in full; a controller is
trained on that. At each of the others three systems answer the same held-out requests, replayed on their measured times
at equal budgets: the controller adapted from 50 requests, the old controller with its guard calibrated on the same 50,
and one that was trained on a full profile of latency there, its guard calibrated on the same 50. Accuracies are those
of --exp5_dir everywhere. Beside the replays stand accuracies on all test samples of the full profile's table, where
each controller has its own bounds: no clock, and so less noise. Intervals are of paired differences over requests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.controller.network import GRPOController
from budgetvlm.decide import wait_for_compiled
from budgetvlm.evaluation.evaluation_options import BUDGET_SHARES
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.live.adapt_here import adapted
from budgetvlm.live.calibrate_here import measure_here
from budgetvlm.live.calibration import Measured, calibrated, measure
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.live.replay import replay
from budgetvlm.profiling.prepare.preparation import load_prepared
from budgetvlm.profiling.prepare.prepared_data import PreparedData, features_path
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import SPLITS, load_task

ALPHA, RESAMPLES = 0.05, 1000
FULL, ADAPTED, OLD = "full profile", "adapted", "guard alone"


@dataclass(frozen=True)
class Profiled:
    """A full profile at a number of threads, and the directory of the controller that was trained on it."""

    data: PreparedData
    controller: Path


def profile(args: argparse.Namespace, place: Path, threads: int) -> Profiled:
    """Measure latencies, join them with the accuracies there are, and train, each in a process of its own."""
    data = place / f"{threads}.json"
    first = features_path(place / f"{args.threads[0]}.json")
    if first.exists() and not features_path(data).exists():
        shutil.copy2(first, features_path(data))
    own = ["--model_path", "reference", "--dataset_name", "signs"]
    budgetvlm("profile", "latency", *own, "--split", "train,validation,test", "--num_threads", threads,
              "--num_samples", args.latency_samples, "--repeats", args.repeats,
              "--output_dir", place / f"exp6_{threads}")  # fmt: skip
    budgetvlm("prepare", *own, "--exp5_dir", args.exp5_dir, "--exp6_dir", place / f"exp6_{threads}",
              "--output_data_path", data)  # fmt: skip
    budgetvlm("train", "--data", data, "--output_dir", place / f"controller_{threads}")
    return Profiled(load_prepared(data), place / f"controller_{threads}")


def budgetvlm(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "budgetvlm.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def compare(args: argparse.Namespace, old: Profiled, full: Profiled, threads: int) -> dict[str, Any]:
    """All three systems at a number of threads: what they are worth, and how well latencies are known."""
    task = load_task("signs")
    model = AdaptiveVLM.from_pretrained("reference", old.controller, num_threads=threads)
    wait_for_compiled()
    profiled_guard = model.guard
    assert isinstance(profiled_guard, AdaptiveGuard)
    how: dict[str, Any] = {"alpha": ALPHA, "used": (), "seed": 0, "progress": False, "concurrency": 1}
    asked, digests = measure_here(model, task, args.requests, split="validation", **how)
    here = adapted(model, old.data.table, old.data.features, asked, digests, ALPHA)
    there = AdaptiveVLM.from_pretrained("reference", full.controller, num_threads=threads)
    assert isinstance(there.guard, AdaptiveGuard)
    guards = {
        ADAPTED: (here.controller, here.guard),
        OLD: (model.controller, calibrated(model, profiled_guard, asked, ALPHA)),
        FULL: (there.controller, calibrated(there, there.guard, asked, ALPHA)),
    }
    used = model.controller.trained_on.seen(SPLITS)
    held_out = measure(model, task, fresh_samples(task, "test", args.test, 1, used), 1, progress=False)
    reference_ms = float(np.median(held_out.latency_ms[:, -1]))
    known = held_out.latency_ms.mean(axis=0)
    found: dict[str, Any] = {"threads": threads, "reference_ms": reference_ms, "systems": {}}
    replays = {}
    for name, (controller, guard) in guards.items():
        system = AdaptiveVLM(model.vlm, controller, guard)
        replays[name] = replayed(system, task, held_out, reference_ms)
        on_table = table_accuracy(controller, full.data)
        found["systems"][name] = figures(replays[name], replays[ADAPTED], on_table) | {
            "latency_error": float(np.median(np.abs(controller.latency_ms.numpy() / known - 1))),
        }
    return found


def replayed(system: AdaptiveVLM, task: Any, held_out: Measured, reference_ms: float) -> np.ndarray:
    """Accuracy and lateness of each request at each budget, ``[2, n, P]``, the budgets one after the other."""
    found = []
    for share in BUDGET_SHARES:
        system.guard, kept = system.guard.copy(), system.guard  # each budget begins with the guard as calibrated
        run = replay(system, task, held_out, reference_ms=reference_ms, budget_shares=(share,),
                     num_requests=len(held_out))  # fmt: skip
        system.guard = kept
        found.append([[one.accuracy for one in run], [one.late for one in run]])
    return np.array(found, dtype=float).transpose(1, 2, 0)


def figures(own: np.ndarray, adapted_one: np.ndarray, on_table: np.ndarray) -> dict[str, Any]:
    """Mean accuracy and lateness, and how far the adapted system's accuracy is above this one's, with its interval."""
    gain = (adapted_one[0] - own[0]).mean(axis=1)
    rng = np.random.default_rng(0)
    means = gain[rng.integers(0, len(gain), (RESAMPLES, len(gain)))].mean(axis=1)
    return {
        "accuracy": float(own[0].mean()),
        "late": float(own[1].mean()),
        "adapted_gain": float(gain.mean()),
        "interval": np.quantile(means, (0.025, 0.975)).tolist(),
        "on_table": on_table.mean(axis=1).tolist(),
        "by_budget": own[0].mean(axis=0).tolist(),
    }


@torch.no_grad()
def table_accuracy(controller: GRPOController, data: PreparedData) -> np.ndarray:
    """Accuracy on the test samples, and those over the budget, at the usual budgets, by the controller's bounds."""
    test = data.table.subset("test")
    own = data.features.aligned(test.sample_ids)
    image, language = torch.from_numpy(own.image), torch.from_numpy(own.language)
    reference_ms = float(np.nanmedian(data.table.subset("train").latency_ms[:, -1]))
    found = []
    for share in BUDGET_SHARES:
        logits = controller(image, language, share * reference_ms)
        chosen = controller.sample_actions(logits, deterministic=True)["setting_index"].numpy()
        rows = np.arange(len(chosen))
        late = test.latency_ms[rows, chosen] > share * reference_ms
        found.append([test.accuracy[rows, chosen].mean(), late.mean()])
    return np.array(found).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exp5_dir", type=Path, required=True, help="accuracies of the bundled model on signs")
    add("--threads", type=int, nargs="+", default=[2, 1, 3], help="the profiled number, then the others")
    add("--latency_samples", type=int, default=24, help="samples of a full profile of latency")
    add("--repeats", type=int, default=3, help="of each of them")
    add("--requests", type=int, default=50, help="that adapt and calibrate")
    add("--test", type=int, default=30, help="held-out requests that are replayed at every budget")
    add("--json", type=Path)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        first, *others = args.threads
        began = time.perf_counter()
        old = profile(args, place, first)
        print(f"profiled at {first} threads in {time.perf_counter() - began:.0f} s", flush=True)
        for threads in others:
            began = time.perf_counter()
            one = compare(args, old, profile(args, place, threads), threads)
            found.append(one)
            show(one, first, time.perf_counter() - began)
    if args.json:
        args.json.write_text(json.dumps(found))


def show(one: dict[str, Any], first: int, seconds: float) -> None:
    print(f"\nfrom {first} to {one['threads']} threads: full setting {one['reference_ms']:.0f} ms ({seconds:.0f} s)")
    print(f"{'':14} {'right':>7} {'late':>6} {'adapted better by':>24} {'latency off':>12} {'table: right, late':>19}")
    for name, of in one["systems"].items():
        low, high = of["interval"]
        gain = f"{100 * of['adapted_gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        right, over = of["on_table"]
        print(f"{name:14} {of['accuracy']:7.1%} {of['late']:6.1%} {gain:>24} {of['latency_error']:12.1%} "
              f"{right:12.1%} {over:6.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
