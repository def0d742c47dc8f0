"""Does the latency model speak of settings that nobody measured?

    python benchmarks/latency_model.py data/controller_training_data.json [--draws 6] [--json]

Fitted on a quarter of the settings (balanced draws) of the timed training samples, it predicts the other settings of
the timed samples that are left: as they stand, which is what is judged, and at each sample's own pace, which its
measured quarter tells. A sample's settings are timed within seconds, so the second figure leaves out the slow spells of
a shared machine. Then controllers are trained, some on the latencies as prepared and some on latencies of which three
quarters of the settings are the model's, and compared on the test split at every budget. Exit code 1 if the median
error as it stands exceeds 8%, or the mean of the draws' curves differs by more than a point anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import BudgetVLMError, DataError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.features import Features
from budgetvlm.guard.latency_model import LatencyModel, relative_errors
from budgetvlm.guard.static import timed_rows
from budgetvlm.profiling.measure.setting_sampling import choose_settings
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.table import ProfileTable

MOST_ERROR, MOST_POINTS = 0.08, 1.0


def only(table: ProfileTable, columns: list[int]) -> ProfileTable:
    """The table with the latencies of all other settings not measured."""
    hidden = np.ones(table.num_settings, dtype=bool)
    hidden[columns] = False

    def hide(values: np.ndarray) -> np.ndarray:
        out = values.copy()
        out[:, hidden] = np.nan
        return out

    stages = {name: hide(values) for name, values in table.stages_ms.items()}
    return dataclasses.replace(table, latency_ms=hide(table.latency_ms), stages_ms=stages)


def quarter(table: ProfileTable, seed: int) -> list[int]:
    """Numbers of a quarter of the settings."""
    space = table.knob_space
    return [space.index(s) for s in choose_settings(space, "balanced", round(len(space) / 4), seed)]


def filled(table: ProfileTable, columns: list[int]) -> tuple[ProfileTable, float, float]:
    """The table with the other settings' latencies as predicted, and the median errors on timed samples held out.

    The errors are as they stand, and at the pace of each sample's measured settings.
    """
    timed = table.subset(timed_rows(table))
    model = LatencyModel.fit(only(timed.subset("train"), columns))
    predicted = model.predict_table(table)
    predicted[:, columns] = table.latency_ms[:, columns]
    others = [k for k in range(table.num_settings) if k not in columns]
    rest = np.array([split != "train" for split in timed.split or ()])
    if not rest.any():
        raise DataError(
            "only training samples were timed, and errors are judged on others: profile the latency of all splits "
            "(`budgetvlm profile latency --split train,validation,test`) and prepare again"
        )
    held_out = timed.subset(rest)
    expected, measured = model.predict_table(held_out), held_out.latency_ms
    pace = np.exp(np.nanmedian(np.log(measured / expected)[:, columns], axis=1, keepdims=True))
    errors = [np.median(relative_errors(e[:, others], measured[:, others])) for e in (expected, pace * expected)]
    prepared = dataclasses.replace(table, latency_ms=predicted.astype(np.float32), stages_ms={})
    return prepared, float(errors[0]), float(errors[1])


def curve(table: ProfileTable, trained_on: ProfileTable, features: Features, seeds: int) -> dict[float, float]:
    """Accuracy in percent at every budget, on the test split, of controllers trained on a table's latencies."""
    policies = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            config = TrainingConfig(seed=seed)
            run = train(trained_on, features, config, directory, say=lambda _: None, progress=False)
        policies[str(seed)] = ControllerPolicy(run.controller)
    report = evaluate(table, features, policies, EvaluationOptions(resamples=50))
    found = next(result for result in report.policies if result.name == "controller")
    return {at.budget_share: 100 * at.accuracy.value for at in found.at_budget}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA.json")
    parser.add_argument("--draws", type=int, default=6, help="draws of the settings (default 6)")
    parser.add_argument("--seeds", type=int, default=2, help="controllers a curve (default 2)")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        prepared = load_prepared(args.data)
        table, features = prepared.table, prepared.features
        draws = [filled(table, quarter(table, seed)) for seed in range(args.draws)]
        with_measured = curve(table, table, features, args.seeds)
        with_predicted = [curve(table, draw, features, args.seeds) for draw, *_ in draws[:3]]
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    _, errors, paced = zip(*draws, strict=True)
    points = {
        share: statistics.mean(c[share] for c in with_predicted) - accuracy for share, accuracy in with_measured.items()
    }
    found = {
        "median_errors": errors,
        "median_errors_at_own_pace": paced,
        "accuracy_measured": with_measured,
        "points_predicted_minus_measured": points,
    }
    if args.json:
        print(json.dumps(found))
    else:
        for what, these in (("as they stand", errors), ("at each sample's own pace", paced)):
            print(f"median error on the other settings, {what}: " + ", ".join(f"{e:.1%}" for e in sorted(these)))
        for share, accuracy in with_measured.items():
            print(f"budget {share:<5g} accuracy {accuracy:5.1f}%, with predicted latencies {points[share]:+.1f} points")
    wide = max(abs(p) for p in points.values()) > MOST_POINTS
    return 1 if statistics.median(errors) > MOST_ERROR or wide else 0


if __name__ == "__main__":
    sys.exit(main())
