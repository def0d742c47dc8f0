"""Budgets and prices that a controller was not trained on: what it is worth there, beside the simple policies.

    python benchmarks/adaptation_terms.py --data DATA --checkpoint DIR [--seeds 3] [--json FILE]

First the controller as it is, at budgets of 0.2 and 1.5 of the full setting's time and at prices of 0 to 10. Then
controllers that were trained on budgets from 0.5 to 1 and prices from 0.01 to 0.1 alone, outside of these: as they are,
and told the nearest budget and price that they know while the guard and the price of each setting keep the true ones.
The lookup table knows no input; predict + argmax knows no budget and no price, and so extrapolates nowhere. Accuracy in
percent, under prices accuracy less price x latency; "late" in percent.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.known_terms import KnownTerms
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import StatePlan, TrainingConfig
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.outcomes import Contender, Outcomes, outcomes
from budgetvlm.policies import LookupTable, Policy
from budgetvlm.policies.predictor import PredictorConfig, fit_predictor
from budgetvlm.profiling.prepare.preparation import load_prepared

BUDGETS = 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.2, 1.5
PRICES = 0.0, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0
USUAL_PRICE, AMPLE = 0.01, 1.5
KNOWN_BUDGETS, KNOWN_PRICES = (0.5, 1.0), (0.01, 0.1)
NARROW = StatePlan(
    budget_factors=(1.0,), wide_share=1.0, wide_range=KNOWN_BUDGETS, price_share=0.4, price_range=KNOWN_PRICES
)


def rows(data: EvaluationData, policies: dict[str, list[Policy]]) -> Iterator[dict[str, object]]:
    """One row for each policy: at each budget accuracy and late ones, at each price what it is worth."""
    budgets = data.under_budgets(BUDGETS, USUAL_PRICE)
    priced = [states for price in PRICES for states in data.under_budgets((AMPLE,), price)]
    for name, runs in policies.items():
        contender = Contender(name, "controller", tuple(runs), "")
        at_budgets, at_prices = outcomes(contender, budgets), outcomes(contender, priced)
        late = at_budgets.sample_violations(data.budgets_ms(BUDGETS)).mean(axis=0)
        yield {
            "policy": name,
            "accuracy": (100 * at_budgets.sample_accuracy.mean(axis=0)).round(1).tolist(),
            "late": (100 * late).round(1).tolist(),
            "worth": (100 * _worth(data, at_prices)).round(1).tolist(),
        }


def _worth(data: EvaluationData, found: Outcomes) -> np.ndarray:
    share = found.sample_latency.mean(axis=0) / data.means.reference_ms
    worth: np.ndarray = found.sample_accuracy.mean(axis=0) - np.array(PRICES) * share
    return worth


def narrow_controllers(table, features, seeds: int) -> list[GRPOController]:
    with tempfile.TemporaryDirectory() as place:
        config = TrainingConfig(plan=NARROW)
        made = [replace(config, seed=seed) for seed in range(seeds)]
        return [
            train(table, features, one, Path(place) / str(one.seed), say=lambda text: None, progress=False).controller
            for one in made
        ]


def unbounded(controller: GRPOController) -> GRPOController:
    """The same controller, which takes itself to know every budget and price."""
    made = copy.deepcopy(controller)
    made.trained_on = replace(made.trained_on, terms=KnownTerms().to_dict() | {"prices": [0.0, 1e9]})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = load_prepared(args.data)
    data = EvaluationData.of(prepared.table, prepared.features, EvaluationOptions(resamples=1))
    given = load_controller(args.checkpoint)
    narrow = narrow_controllers(prepared.table, prepared.features, args.seeds)
    parts = data.train, data.train_features, data.tuning, data.tuning_features
    policies: dict[str, list[Policy]] = {
        "controller, as it is": [ControllerPolicy(unbounded(given))],
        "controller, nearest": [ControllerPolicy(given)],
        "narrow, as it is": [ControllerPolicy(unbounded(one)) for one in narrow],
        "narrow, nearest": [ControllerPolicy(one) for one in narrow],
        "lookup table": [LookupTable(data.means)],
        "predict + argmax": [fit_predictor(*parts, PredictorConfig(seed=seed)) for seed in range(args.seeds)],
    }
    found = list(rows(data, policies))
    print(f"{'accuracy at budgets':24}" + "".join(f"{share:>8g}" for share in BUDGETS))
    for row in found:
        print(f"{row['policy']:24}" + "".join(f"{a:8.1f}" for a in row["accuracy"]))
    print(f"{'late':24}" + "".join(f"{share:>8g}" for share in BUDGETS))
    for row in found:
        print(f"{row['policy']:24}" + "".join(f"{a:8.1f}" for a in row["late"]))
    print(f"{'worth at prices':24}" + "".join(f"{price:>8g}" for price in PRICES))
    for row in found:
        print(f"{row['policy']:24}" + "".join(f"{a:8.1f}" for a in row["worth"]))
    if args.json:
        args.json.write_text(json.dumps({"budgets": BUDGETS, "prices": PRICES, "rows": found}))


if __name__ == "__main__":
    main()
