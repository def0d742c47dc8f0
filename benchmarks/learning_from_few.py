"""What helps where groups are few: teachers, starts and variants of GRPO on tables of real models' answers.

    python benchmarks/learning_from_few.py --tables DIR [--only dynamath_open6 ...] [--splits 2] [--epochs 30]

Points over the best blind mix of settings at mean budgets in the middle of the range, pooled over folds by group. For
each variant of GRPO there is the epoch that is best on the validation samples and the last one; all begin at the same
start. The tables and their folds are those of outside_tables.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.outside_tables import MIDDLE, Difference, OutsideTable
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.training_run import MemberProgress, TrainingRun
from budgetvlm.controller.training_states import TrainingData
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import sweep_prices
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import BLIND, Contender
from budgetvlm.features import Features
from budgetvlm.policies import Policy
from budgetvlm.policies.argmax_policy import ArgmaxPolicy
from budgetvlm.policies.predictor import fit_predictor
from budgetvlm.policies.ridge import Ridge
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class Variant:
    """A change of GRPO: other options, or other outcomes to learn from ("smoothed" or "predicted")."""

    name: str
    options: GRPOConfig
    outcomes: str = "measured"


def variants(epochs: int) -> list[Variant]:
    """The default first."""
    plain = GRPOConfig(num_epochs=epochs)
    return [
        Variant("GRPO, exact gradient", plain),
        Variant("GRPO, groups of 8", replace(plain, num_generations=8, group_size=8)),
        Variant("GRPO, KL to the start 0.1", replace(plain, beta=0.1)),
        Variant("GRPO, KL to the start 1", replace(plain, beta=1.0)),
        Variant("GRPO, learning rate 1e-5", replace(plain, learning_rate=1e-5)),
        Variant("GRPO, entropy 0.2", replace(plain, entropy_coef=0.2)),
        Variant("GRPO, weight decay 1", replace(plain, weight_decay=1.0)),
        Variant("GRPO, outcomes smoothed over neighbouring settings", plain, "smoothed"),
        Variant("GRPO, outcomes half measured, half predicted", plain, "predicted"),
    ]


def policies(
    table: ProfileTable, features: Features, data: EvaluationData, epochs: int
) -> Iterator[tuple[str, Policy]]:
    """Everything that is compared on one fold."""
    train, validation = (table.subset(side) for side in ("train", "validation"))
    known, held_out = (features.aligned(side.sample_ids) for side in (train, validation))
    both = table.subset(np.array(table.split) != "test")
    yield "network", fit_predictor(train, known, validation, held_out)
    yield "ridge", ArgmaxPolicy(data.means, Ridge.fit(train, known, checked=False).predict, "ridge")
    joint = Ridge.fit(both, features.aligned(both.sample_ids))
    yield "ridge, on validation samples too, checked", ArgmaxPolicy(data.means, joint.predict, "ridge")
    config = TrainingConfig(patience=8)
    run = TrainingRun(table, features, config, [0])
    yield "start", ControllerPolicy(run.starts[0])
    plain = run.trainer.data
    for variant in variants(epochs):
        run.config, run.members, run.training = replace(config, grpo=variant.options), [MemberProgress(0)], [0]
        learnt_from = _changed(plain, variant.outcomes, run.starts[0])
        run.trainer = GRPOTrainer(variant.options, run.starts, learnt_from, config.plan, config.weights, [0])
        run.train()
        yield f"{variant.name}: best epoch", ControllerPolicy(run.controller(0))
        yield f"{variant.name}: last epoch", ControllerPolicy(run.trainer.averaged_controller(0))


def _changed(data: TrainingData, outcomes: str, start: GRPOController) -> TrainingData:
    """The training data with other accuracies in the place of the measured ones."""
    accuracy = data.outcomes.accuracy
    if outcomes == "smoothed":
        wide = torch.cat([accuracy[:, :1], accuracy, accuracy[:, -1:]], dim=1)
        accuracy = 0.5 * accuracy + 0.25 * (wide[:, :-2] + wide[:, 2:])
    elif outcomes == "predicted":
        rows = slice(None) if data.rows is None else data.rows
        with torch.no_grad():
            logits = start(data.image[rows], data.language[rows], np.inf, 0.0)
            accuracy = 0.5 * accuracy + 0.5 * start.setting_logits(logits) / start.logit_scale
    return replace(data, outcomes=replace(data.outcomes, accuracy=accuracy))


def measure(table: ProfileTable, features: Features, epochs: int, seed: int) -> dict[str, np.ndarray]:
    """Accuracy over the best blind mix's, ``[1 + R]``, of everything that is compared on one fold."""
    options = EvaluationOptions(mean_budgets=MIDDLE, seed=seed)
    data = EvaluationData.of(table, features, options)
    found = list(policies(table, features, data, epochs))
    contenders = [Contender(name, "baseline", (policy,), "", priced=True) for name, policy in found]
    metrics = MeanBudgetMetrics.measure(data, options, sweep_prices(data, contenders, options))

    def accuracy(name: str) -> np.ndarray:
        mean: np.ndarray = np.mean([metrics.frontiers[name].accuracy_at(metrics.budget_ms(s)) for s in MIDDLE], axis=0)
        return mean

    return {name: accuracy(name) - accuracy(BLIND) for name, _ in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="where the .npz files lie")
    parser.add_argument("--only", nargs="+", default=["dynamath_open6", "blink_open6"], metavar="NAME")
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="folds by group (default: 5)")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="of GRPO, at most (default: 30)")
    args = parser.parse_args()
    for name in args.only:
        outside = OutsideTable.load(args.tables / f"{name}.npz")
        found: dict[str, Difference] = {}
        for number in range(args.splits):
            for policy, gain in measure(*outside.fold(number, args.splits), args.epochs, number).items():
                found.setdefault(policy, Difference([])).folds.append(gain)
        for policy, gains in found.items():
            over = Difference([a - b for a, b in zip(gains.folds, found["start"].folds, strict=True)]).pooled
            print(f"{name}  {policy:55s} {points(gains)}  over the start {100 * over.value:+.1f} "
                  f"[{100 * over.low:+.1f}, {100 * over.high:+.1f}]", flush=True)  # fmt: skip
    return 0


def points(gains: Difference) -> str:
    pooled = gains.pooled
    return f"{100 * pooled.value:+.1f} [{100 * pooled.low:+.1f}, {100 * pooled.high:+.1f}]"


if __name__ == "__main__":
    sys.exit(main())
