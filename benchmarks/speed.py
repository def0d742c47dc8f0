"""Speed that the project promises, measured and asserted here and nowhere else. Run it on an idle machine.

    python benchmarks/speed.py            a line a figure; exit code 1 if one misses its limit
    python benchmarks/speed.py --json     one document

Training: 100 epochs over 4,000 samples x 3 budgets x 27 settings at the guide's defaults (batch 64, groups of 8), from
the time of a short and of a longer run. Setting: applying and releasing a setting of the bundled model. Decision:
features in hand to setting out, in a space of 90 settings; the guard's bounds of one request beside it. Latency model:
fitted on 4,000 x 27 records, and the times of all of 432 settings for one request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from budgetvlm.adaptive import AdaptiveGuard, Request, Spent
from budgetvlm.controller.decision import Decider
from budgetvlm.controller.grpo import GRPOConfig
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training import TrainingConfig, train
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.latency import LatencyModel, QuickLatency
from budgetvlm.lengths import LengthModel
from budgetvlm.table import ProfileTable
from budgetvlm.vlm import load_vlm

LIMITS = {
    "training_100_epochs_s": 60.0,
    "setting_change_us": 100.0,
    "decision_us": 50.0,
    "latency_fit_s": 2.0,
    "latency_432_settings_us": 50.0,
}
FEW, MORE = 2, 8  # epochs of a short and of a longer run: their difference is free of what every run does once


def percentiles(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Microseconds of a call: median, 5th and 95th percentile."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    q = statistics.quantiles(times, n=20)
    return {"p50": round(statistics.median(times), 1), "p5": round(q[0], 1), "p95": round(q[-1], 1)}


def training_seconds() -> dict[str, float]:
    """Seconds of 100 epochs over 4,000 samples, 500 to validate on: those of `FEW` and 98 more at the rate beyond."""
    rng = np.random.default_rng(0)
    space = KnobSpace({"max_crops": [1, 4, 12], "top_k": [1, 2, 12], "num_active_blocks": [3, 4, 8]})
    count = 4500
    ids = [str(i) for i in range(count)]
    latency = np.linspace(10, 80, 27) * rng.uniform(0.95, 1.05, (count, 27))
    split = ["train"] * 4000 + ["validation"] * 500
    table = ProfileTable.from_arrays(space, ids, rng.integers(0, 2, (count, 27)), latency, split=split)
    features = Features(tuple(ids), rng.normal(size=(count, 256)), rng.normal(size=(count, 128)))

    def run(epochs: int, seed: int) -> float:
        config = TrainingConfig(grpo=GRPOConfig(num_epochs=epochs, group_size=8), patience=None, seed=seed)
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            train(table, features, config, directory, overwrite=True, say=lambda _line: None, progress=False)
            return time.perf_counter() - start

    run(1, 0)  # imports, memory
    pairs = [(run(FEW, seed), run(MORE, seed)) for seed in range(3)]
    seconds = [few + (more - few) / (MORE - FEW) * (100 - FEW) for few, more in pairs]
    return {"p50": round(statistics.median(seconds), 1), "p5": round(min(seconds), 1), "p95": round(max(seconds), 1)}


def setting_change() -> dict[str, float]:
    vlm = load_vlm("reference")
    setting = vlm.knob_space.cheapest

    def change() -> None:
        with vlm.apply(setting):
            pass

    return percentiles(change, 2000)


def decision() -> tuple[dict[str, float], dict[str, float]]:
    """A decision as requests get it, and by the PyTorch network that was trained, taking turns."""
    controller = GRPOController(256, 128).eval()
    decider = Decider(controller)
    image, language = torch.randn(256), torch.randn(128)
    features = image.numpy(), language.numpy()

    @torch.inference_mode()
    def eager() -> None:
        controller.sample_actions(controller(image, language, 500.0), deterministic=True)

    rounds = [(percentiles(lambda: decider.choose(*features, 500.0), 1000), percentiles(eager, 300)) for _ in range(5)]
    quick, slow = ({p: statistics.median(r[i][p] for r in rounds) for p in rounds[0][i]} for i in range(2))
    return quick, slow


def profiled(count: int) -> ProfileTable:
    """A made-up machine's times of ``count`` samples at 27 settings, by stage, with tokens."""
    rng = np.random.default_rng(0)
    space = KnobSpace({"max_crops": [1, 4, 12], "top_k": [1, 2, 12], "num_active_blocks": [3, 4, 8]})
    crops, experts, blocks = space.value_matrix.T
    vision = np.tile(16 * np.where(crops > 1, crops + 1, 1), (count, 1))
    language, output = (np.repeat(rng.integers(low, high, (count, 1)), 27, axis=1) for low, high in ((5, 12), (2, 6)))
    stages = {
        "preprocess": 0.5 + 0.01 * vision,
        "vision": 1.0 + 0.08 * vision,
        "prefill": 2.0 + blocks * (1.0 + 0.001 * (vision + language) * (4 + experts)),
        "decode": (output - 1) * (0.3 + blocks * (0.8 + 0.05 * experts)),
    }
    stages = {name: ms * np.exp(0.1 * rng.standard_normal(ms.shape)) for name, ms in stages.items()}
    tokens = {"vision": vision, "language": language, "output": output}
    total = sum(stages.values())
    return ProfileTable.from_arrays(space, range(count), total * 0, total, stages_ms=stages, tokens=tokens)


def latency_model() -> dict[str, dict[str, float]]:
    """Fitting it, asking it for 432 settings, and the guard's bounds of one request at 27."""
    table = profiled(4000)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        model = LatencyModel.fit(table)
        seconds.append(time.perf_counter() - start)
    large = {"max_crops": range(1, 13), "top_k": range(1, 7), "num_active_blocks": range(3, 9)}
    wide = QuickLatency(model.for_space(KnobSpace({name: list(values) for name, values in large.items()})))
    tokens = np.repeat(np.arange(1, 13) * 16.0, 36)
    features = np.random.default_rng(0).normal(size=(4000, 64))
    guard = AdaptiveGuard(model, LengthModel.fit(features, table.tokens["output"][:, 0]))
    request = Request(table.tokens["vision"][0].astype(float), 8.0, features[0])
    return {
        "latency_fit_s": {
            "p50": round(statistics.median(seconds), 2), "p5": round(min(seconds), 2), "p95": round(max(seconds), 2),
        },
        "latency_432_settings_us": percentiles(lambda: wide.total(tokens, 20.0, 4.0), 3000),
        "guard_bounds_us": percentiles(lambda: guard.bounds(request, 60.0, Spent(5.0, 3.0)), 3000),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quick, eager = decision()
    figures = {
        "training_100_epochs_s": training_seconds(),
        "setting_change_us": setting_change(),
        "decision_us": quick,
        "decision_pytorch_us": eager,
        **latency_model(),
    }
    missed = [name for name, limit in LIMITS.items() if figures[name]["p50"] > limit]
    if args.json:
        print(json.dumps({"figures": figures, "limits": LIMITS, "missed": missed, "threads": args.threads}))
    else:
        for name, values in figures.items():
            limit = f"  limit {LIMITS[name]:g}" if name in LIMITS else ""
            print(f"{name:24} p50 {values['p50']:<8g} p5 {values['p5']:<8g} p95 {values['p95']:<8g}{limit}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
