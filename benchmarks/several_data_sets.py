"""Does one controller for several data sets sacrifice one of them, and does it help to weigh data sets alike?

    python benchmarks/several_data_sets.py --data controller_training_data.json [--tables DIR] [--folds 5]

Two tests: the bundled task cut into three data sets by the kind of question, one of them with a fifth of its samples;
and two outside tables of one model at the same settings (benchmarks/outside_tables.py), one six times as large as the
other. Each is cut into folds by image. Printed for each data set, as the mean over the folds with its 95% interval:
accuracy under the budgets, and reward (accuracy less price x latency) over prices without a budget, both in points from
a controller that was trained on this data set alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.outside_tables import OutsideTable, budget_shares
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.validation import VALIDATION_PRICES
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.outcomes import Contender, Outcomes, outcomes
from budgetvlm.features import Features
from budgetvlm.features.cheap import CheapFeatures
from budgetvlm.policies import Policy
from budgetvlm.policies.by_label import ByLabel
from budgetvlm.policies.simple import LookupTable
from budgetvlm.profiling.prepare.joined_tables import join_tables
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.table import DATASET, ProfileTable

KINDS = {"read": "reading", "digits": "reading", "sum": "counting", "price": "counting", "largest": "counting",
         "origin": "looking", "shape": "looking"}  # fmt: skip
LOOKUP, JOINT, BALANCED = "lookup table", "one controller", "data sets weighed alike"
Fold = tuple[ProfileTable, Features]


def kinds_of(data: Path, number: int, folds: int) -> Fold:
    """A fold of the bundled task as three data sets, the last of which keeps a fifth of its samples for training."""
    prepared = load_prepared(data)
    table = replace(prepared.table, split=None)
    labels = tuple(KINDS[kind] for kind in table.groups["kind"])
    table = replace(table, groups={**table.groups, DATASET: labels})
    table = in_folds(table, number, folds)
    few = np.flatnonzero((np.array(labels) == "looking") & (np.array(table.split) != "test"))
    left_out = np.setdiff1d(few, few[::5])
    table = table.subset(np.setdiff1d(np.arange(table.num_samples), left_out))
    return table, prepared.features.aligned(table.sample_ids)


def outside(tables: Path, number: int, folds: int) -> Fold:
    """A fold of POPE and MME, as LLaVA answered them with 64 and with 576 visual tokens."""
    pope, mme = (OutsideTable.load(tables / f"{name}_llava15_tokens.npz") for name in ("pope", "mme"))
    columns = [pope.table.knob_space.index(setting) for setting in mme.table.knob_space.settings]
    alike = ProfileTable.from_arrays(
        mme.table.knob_space, pope.table.sample_ids, pope.table.accuracy[:, columns], pope.table.latency_ms[:, columns],
        groups=pope.table.groups,
    )  # fmt: skip
    table = in_folds(join_tables({"pope": alike, "mme": mme.table}), number, folds)
    texts = pope.texts + mme.texts
    made = CheapFeatures.fit(texts, rows=table.rows_of("train"))
    return table, made(texts, sample_ids=table.sample_ids)


def in_folds(table: ProfileTable, number: int, folds: int) -> ProfileTable:
    """The table with one fold of its units held out for testing."""
    units = np.array(table.units)
    names = np.random.default_rng(0).permutation(np.unique(units))
    held_out = np.isin(units, names[number::folds])
    split = np.full(len(units), "test", dtype="<U10")
    split[~held_out] = table.subset(~held_out).with_splits({"train": 0.8, "validation": 0.2}, number).split
    return replace(table, split=tuple(split.tolist()))


def weighed_alike(table: ProfileTable, features: Features) -> Fold:
    """Training and validation samples of which each data set has equally many: those of smaller ones are repeated."""
    labels, sides = np.array(table.groups[DATASET]), np.array(table.split)
    rows: list[np.ndarray] = []
    for side in ("train", "validation"):
        parts = [np.flatnonzero((labels == name) & (sides == side)) for name in np.unique(labels)]
        most = max(map(len, parts))
        rows += [np.resize(part, most) for part in parts]
    chosen = np.concatenate(rows)
    names = [f"{table.sample_ids[row]}#{place}" for place, row in enumerate(chosen)]
    held = replace(features.aligned(table.sample_ids))
    repeated = ProfileTable.from_arrays(
        table.knob_space, names, table.accuracy[chosen], table.latency_ms[chosen],
        groups={label: np.array(values)[chosen].tolist() for label, values in table.groups.items()},
        split=sides[chosen].tolist(), metadata=table.metadata,
    )  # fmt: skip
    return repeated, Features(tuple(names), held.image[chosen], held.language[chosen])


def fitted(table: ProfileTable, features: Features, seed: int, epochs: int) -> Policy:
    """A controller that was trained on all samples of a table."""
    known = table.subset(np.array(table.split) != "test")
    config = TrainingConfig(GRPOConfig(num_epochs=epochs), seed=seed)
    return ControllerPolicy(fit_controller(known, features.aligned(known.sample_ids), config))


def policies_of(
    table: ProfileTable, features: Features, data: EvaluationData, seed: int, epochs: int
) -> dict[str, Policy]:
    """All that is compared."""
    labels = np.array(table.groups[DATASET])
    own = {name: fitted(table.subset(labels == name), features, seed, epochs) for name in np.unique(labels).tolist()}
    return {
        "own": ByLabel(DATASET, own),
        JOINT: fitted(table, features, seed, epochs),
        BALANCED: fitted(*weighed_alike(table, features), seed, epochs),
        LOOKUP: LookupTable(data.means),
    }


def figures(
    fold: Fold, seed: int, epochs: int, shares: Callable[[ProfileTable], tuple[float, ...]]
) -> Iterator[tuple[Any, ...]]:
    """Yield data set, policy, each sample's differences from the own controller (accuracy, reward), its accuracy."""
    table, features = fold
    options = EvaluationOptions(budget_shares=shares(table), resamples=1)
    data = EvaluationData.of(table, features, options)
    ceilings, prices = data.under_budgets(options.budget_shares, options.price), data.at_prices(VALIDATION_PRICES)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, policy in policies_of(table, features, data, seed, epochs).items():
        contender = Contender(name, "controller", (policy,), "")
        accuracy = outcomes(contender, ceilings).sample_accuracy.mean(axis=1)
        found[name] = accuracy, rewards(outcomes(contender, prices), data.means.reference_ms)
    labels = np.array(data.test.groups[DATASET])
    for dataset in np.unique(labels).tolist():
        rows = labels == dataset
        for name, values in found.items():
            yield (
                dataset,
                name,
                *(column[rows] - own[rows] for column, own in zip(values, found["own"], strict=True)),
                found[name][0][rows],
            )


def rewards(found: Outcomes, reference_ms: float) -> np.ndarray:
    """Mean reward of each sample over the prices, ``[S]``."""
    cost = np.array(VALIDATION_PRICES) * found.sample_latency / reference_ms
    return (found.sample_accuracy - cost).mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="controller_training_data.json of the bundled task")
    parser.add_argument("--tables", type=Path, help="where the outside tables lie")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    tests = {}
    if args.data:
        tests["bundled task by kind"] = partial(kinds_of, args.data), lambda table: (0.5, 0.6, 0.7, 0.85)
    if args.tables:
        tests["POPE and MME"] = partial(outside, args.tables), budget_shares
    for title, (make, shares) in tests.items():
        print(title)
        collected: dict[tuple[str, str], list[list[np.ndarray]]] = {}
        for number in range(args.folds):
            for dataset, name, *columns in figures(make(number, args.folds), number, args.epochs, shares):
                collected.setdefault((dataset, name), []).append(columns)
            print(f"  fold {number + 1} of {args.folds}", file=sys.stderr, flush=True)
        for (dataset, name), parts in collected.items():
            columns = [100 * np.concatenate(column) for column in zip(*parts, strict=True)]
            said = [f"{c.mean():+6.2f} ±{1.96 * c.std() / len(c) ** 0.5:.2f}" for c in columns[:2]]
            level = f"{columns[2].mean():.1f}% of {len(columns[2])}"
            print(f"  {dataset:10} {name:24} accuracy {said[0]}  reward {said[1]}  ({level})")


if __name__ == "__main__":
    main()
