"""How often drift is said of requests that nothing changed about, and how soon it is seen where something did.

    python benchmarks/drift.py --data DATA --checkpoint DIR [--seeds 200] [--json FILE]

Features: a reference is fitted on one random half of the samples, and a window of requests is drawn from the other
half; then a share of the window is replaced by samples of one size of sign, of one kind of question. Scores: the
controller answers test samples at the usual budgets, and a share of the scores is turned to 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm._io import write_json
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.layers import Standardiser
from budgetvlm.feedback.drift import LEAST_SHIFT, WINDOW, misjudged, shifted
from budgetvlm.policies.budget_grid import BUDGET_SHARES
from budgetvlm.profiling.prepare.preparation import load_prepared

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)  # of the requests, that changed
SCORES = (50, 100, 200, 500)
PRICE = 0.01


def features_drift(features: list[np.ndarray], changed: np.ndarray, share: float, seed: int) -> bool:
    """Whether a window is said to have drifted, a share of which is of the changed samples."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(changed))
    half = len(order) // 2
    window = order[half:][:WINDOW]
    new = rng.random(len(window)) < share
    window = np.where(new, rng.choice(np.flatnonzero(changed), len(window)), window)
    scores = []
    for raw in features:
        layer = Standardiser(raw.shape[1])
        layer.fit(torch.from_numpy(raw[order[:half]]))
        scores.append(layer(torch.from_numpy(raw[window])).double().numpy())
    shift, explained = shifted(np.concatenate(scores, axis=1), half)
    return shift > max(LEAST_SHIFT, explained)


def residuals_of(data: Path, checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores and expectations of a controller's choices for test samples at the usual budgets, ``[N]`` each."""
    prepared, controller = load_prepared(data), load_controller(checkpoint)
    table = prepared.table.subset("test")
    features = prepared.features.aligned(table.sample_ids)
    image, language = torch.from_numpy(features.image), torch.from_numpy(features.language)
    scores, expected = [], []
    with torch.no_grad():
        for share in BUDGET_SHARES:
            budget = torch.full((len(image),), share * float(controller.latency_reference_ms))
            price = torch.full((len(image),), PRICE)
            logits = controller.setting_logits(controller(image, language, budget, price))
            allowed = controller.allowed(controller.feasible(budget, controller.bounds_of(image, language)))
            chosen = logits.masked_fill(~allowed, -torch.inf).argmax(dim=1)
            values = ((logits - controller.price_term(price)) / controller.logit_scale).clamp(0, 1)
            rows = torch.arange(len(chosen))
            expected.append(values[rows, chosen].double().numpy())
            scores.append(table.accuracy[rows.numpy(), chosen.numpy()])
    return np.concatenate(scores).astype(np.float64), np.concatenate(expected)


def scores_drift(scores: np.ndarray, expected: np.ndarray, lost: float, num: int, seed: int) -> bool:
    """Whether this number of scored requests is said to have drifted where a share of the scores is lost."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(scores), num)
    return misjudged(np.where(rng.random(num) < lost, 0.0, scores[rows]) - expected[rows])


def main() -> None:
    """Count alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table, features = (prepared := load_prepared(args.data)).table, prepared.features
    features = features.aligned(table.sample_ids)
    raw = [features.image, features.language]
    groups = {"small signs": ("difficulty", "small"), "questions for a price": ("kind", "price")}
    report: dict[str, dict[str, float]] = {}
    for name, (label, value) in groups.items():
        changed = np.array(table.groups[label]) == value
        alarms = {
            f"{share:.0%} changed": np.mean([features_drift(raw, changed, share, seed) for seed in range(args.seeds)])
            for share in SHARES
        }
        report[f"features, {name}"] = {what: float(alarm) for what, alarm in alarms.items()}
    scores, expected = residuals_of(args.data, args.checkpoint)
    report["scores less expectations"] = {"mean": float((scores - expected).mean())}
    for num in SCORES:
        alarms = {
            f"{lost:.0%} lost": np.mean([scores_drift(scores, expected, lost, num, s) for s in range(args.seeds)])
            for lost in SHARES[:-1]
        }
        report[f"{num} scores"] = {what: float(alarm) for what, alarm in alarms.items()}
    print(json.dumps(report, indent=1))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
