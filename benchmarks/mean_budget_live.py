"""A budget on the mean, on the clock: the controller against the best blind mix of settings, in one run.

    python benchmarks/mean_budget_live.py --data results/quickstart/data/controller_training_data.json \
        --checkpoint results/quickstart/controller [--mean_budget_ms 50 --num_requests 1500 --json]

Both answer the same fresh questions in turns, without a ceiling. The controller's price follows what was spent. The
blind mix draws a setting for each request, whatever the input, from the two neighbours on the hull of the profile's
means between which the budget lies; how often it draws which follows what was spent, so that it spends as much.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.evaluation.frontier import upper_hull
from budgetvlm.evaluation.intervals import Bootstrap
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import load_task

WINDOW = 500  # requests whose mean has to be the budget
LEARNING = 0.2  # places on the hull that a request of twice the budget moves the blind mix
MAX_NEW_TOKENS = 16


class BlindMix:
    """Draws a setting for each request so that the mean latency is a budget.

    Args:
        means: of the settings on training samples.
    """

    def __init__(self, means: SettingMeans, budget_ms: float, seed: int = 0) -> None:
        self.hull, self._budget_ms = upper_hull(means.latency_ms, means.accuracy), budget_ms
        self.place = float(np.interp(budget_ms, means.latency_ms[self.hull], np.arange(len(self.hull))))
        self._random = np.random.default_rng(seed)

    def draw(self) -> int:
        """Return the number of a setting."""
        low = math.floor(self.place)
        return int(self.hull[low + (self._random.random() < self.place - low)])

    def add(self, latency_ms: float) -> None:
        """Count a finished request."""
        moved = self.place - LEARNING * (latency_ms / self._budget_ms - 1)
        self.place = min(max(moved, 0.0), len(self.hull) - 1.0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer all requests with both and return the figures."""
    table = load_prepared(args.data).table
    task = load_task("signs")
    model = AdaptiveVLM.from_pretrained(
        "reference", args.checkpoint, num_threads=args.num_threads, mean_budget_ms=args.mean_budget_ms
    )
    mix = BlindMix(SettingMeans.fit(table.subset("train")), args.mean_budget_ms)
    samples = fresh_samples(task, "test", args.num_requests, seed=args.seed, used=frozenset(table.sample_ids))
    order, found = np.random.default_rng(args.seed), []
    for sample in tqdm(samples, unit="request", file=sys.stderr):
        image, row = sample.load_image(), {}
        for name in order.permutation(["controller", "mix"]):
            if name == "controller":
                answer = model.generate(image, sample.question, budget_ms=math.inf, max_new_tokens=MAX_NEW_TOKENS)
                row[name] = answer.latency_ms, task.score(answer.answer, sample)
                continue
            setting = model.vlm.knob_space.settings[mix.draw()]
            made = model.vlm.generate(image, sample.question, setting, max_new_tokens=MAX_NEW_TOKENS)
            mix.add(made.total_ms)
            row[name] = made.total_ms, task.score(made.text, sample)
        found.append([row["controller"], row["mix"]])
    return figures(np.array(found), [sample.groups.get("image_id", sample.sample_id) for sample in samples], args)


def figures(found: np.ndarray, images: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return means, the worst window and the paired difference in accuracy; ``found`` is ``[S, 2, 2]``."""
    boot = Bootstrap.draw(images)
    over = boot.estimate(boot.mean(found[:, 0, 1] - found[:, 1, 1]))
    out: dict[str, Any] = {"requests": len(found), "mean_budget_ms": args.mean_budget_ms}
    for i, name in enumerate(("controller", "best blind mix")):
        latency = found[:, i, 0]
        size = min(WINDOW, len(latency))
        windows = np.convolve(latency, np.full(size, 1 / size), mode="valid")
        out[name] = {
            "mean_ms": float(latency.mean()),
            f"worst mean of {size} requests, % off": float(100 * np.abs(windows / args.mean_budget_ms - 1).max()),
            "accuracy": float(100 * found[:, i, 1].mean()),
        }
    out["points over the blind mix"] = [100 * over.value, 100 * over.low, 100 * over.high]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="prepared profile")
    parser.add_argument("--checkpoint", metavar="DIR", help="controller (default: the bundled one)")
    parser.add_argument("--mean_budget_ms", type=float, default=50.0, metavar="MS", help="default: 50")
    parser.add_argument("--num_requests", type=int, default=1500, metavar="N", help="of each (default: 1500)")
    parser.add_argument("--num_threads", type=int, default=2, metavar="N", help="of PyTorch (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document on one line")
    args = parser.parse_args(argv)
    print(json.dumps(run(args), indent=None if args.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
