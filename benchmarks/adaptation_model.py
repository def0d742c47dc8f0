"""A controller of a new model from earlier tables and few labelled samples, against one from a full profile.

    python benchmarks/adaptation_model.py rounded --bits 4 --output_dir DIR      # the bundled model, less precise
    python benchmarks/adaptation_model.py models --earlier a.json[,b.json] --data new.json [--few 100] [--seeds 5]
    python benchmarks/adaptation_model.py tables --tables DIR [--only dynamath_open6 ...] [--seeds 2]

`models` takes prepared data of earlier models and of a new one, both profiled in full (`budgetvlm prepare`); budgets
are for each request, and the gain is over the full profile's lookup table. `tables` leaves out one value of the knob of
a table of others at a time (the tables are those of outside_tables.py): its labels are known on the few samples alone.
Budgets are on the mean there, and the gain is over the best blind mix of the full profile.

"full": all training and validation samples of the new model. "unchanged": the earlier model's accuracies. "alone": the
few. "pooled": the few below the earlier table, as if of one model. "carried over": `budgetvlm.adaptation.new_model`.
Each line has the mean over draws of the few, in points, with a 95% interval over these, and the share of what a full
profile gains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.outside_tables import MIDDLE, OutsideTable
from budgetvlm.adaptation.new_model import NewModel
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.errors import BudgetVLMError
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import sweep_prices, under_budgets, with_choice
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import BLIND, LOOKUP, Contender
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import LookupTable, Policy
from budgetvlm.policies.argmax_policy import ArgmaxPolicy
from budgetvlm.policies.predictor import PredictorConfig
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.teachers import Teachers
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.table import ProfileTable

Data = tuple[ProfileTable, Features]
FULL, UNCHANGED, ALONE, POOLED, CARRIED = "full", "unchanged", "alone", "pooled", "carried over"


@dataclass(frozen=True, eq=False)
class World:
    """A new model that was profiled in full, and earlier tables whose settings are a part of its, or all."""

    name: str
    earlier: Sequence[Data]
    new: Data
    mean_budgets: bool


def in_space(table: ProfileTable, space: KnobSpace) -> ProfileTable:
    """The table at the settings of another space, NaN where it lacks one."""
    own = {setting: k for k, setting in enumerate(table.knob_space.settings)}
    columns = np.array([own.get(setting, -1) for setting in space.settings])

    def moved(values: np.ndarray) -> np.ndarray:
        return np.where(columns < 0, np.float32(np.nan), values[:, columns])

    return ProfileTable.from_arrays(
        space, table.sample_ids, moved(table.accuracy), moved(table.latency_ms), groups=table.groups, split=table.split,
        metadata={"unit": table.unit},
    )  # fmt: skip


def drawn(data: Data, count: int, seed: int) -> Data:
    """Some training and validation samples, four fifths of them for training."""
    table, features = data
    rows = np.flatnonzero(np.array(table.split) != "test")
    some = table.subset(np.sort(np.random.default_rng(seed).permutation(rows)[:count]))
    some = some.with_splits({"train": 0.8, "validation": 0.2}, seed)
    return some, features.aligned(some.sample_ids)


def learnt_from(world: World, few: Data, seed: int) -> Iterator[tuple[str, Data]]:
    """What each way learns from."""
    space = few[0].knob_space
    first = in_space(world.earlier[0][0], space), world.earlier[0][1]
    yield UNCHANGED, first
    yield ALONE, few
    rest = first[0].subset(~np.isin(first[0].sample_ids, few[0].sample_ids) & (np.array(first[0].split) != "test"))
    yield POOLED, _below((rest, first[1].aligned(rest.sample_ids)), few)
    made = NewModel.of(world.earlier, *few, seed)
    found, errors = made.posterior, np.sqrt(made.errors).round(3)
    print(f"    weights {found.weights.round(2)}, errors {errors}")
    yield CARRIED, (made.table, made.features)


def _below(first: Data, second: Data) -> Data:
    tables, parts = (first[0], second[0]), (first[1], second[1])
    table = ProfileTable.from_arrays(
        tables[0].knob_space,
        [name for one in tables for name in one.sample_ids],
        np.concatenate([one.accuracy for one in tables]),
        np.concatenate([one.latency_ms for one in tables]),
        split=[side for one in tables for side in one.split or ()],
    )
    arrays = (np.concatenate([getattr(one, side) for one in parts]) for side in ("image", "language"))
    return table, Features(table.sample_ids, *arrays)


def policy_of(data: Data, seed: int, epochs: int) -> Policy:
    """A controller as training makes it; with no epochs what it starts from, which is faster."""
    table, features = data
    features = features.aligned(table.sample_ids)
    if epochs:
        config = TrainingConfig(grpo=GRPOConfig(num_epochs=epochs), patience=8, seed=seed)
        return ControllerPolicy(fit_controller(table, features, config))
    table = with_predictions(table, features)
    known = table.subset(np.array(table.split) != "test")
    used = np.isfinite(known.accuracy).any(axis=0)
    seeds = np.arange(3)[None] + 3 * seed
    taught = Teachers.fit(known, features, PredictorConfig(), seeds)

    def predict(image: np.ndarray, language: np.ndarray) -> np.ndarray:
        ids = tuple(map(str, range(len(image))))
        return np.where(used, taught.values(Features(ids, image, language))[0], -np.inf)

    return ArgmaxPolicy(SettingMeans.fit(known), predict, "predict")


def gains(world: World, policies: dict[str, Policy], seed: int) -> dict[str, float]:
    """Accuracy over the best that reads no input, from the full profile."""
    options = EvaluationOptions(mean_budgets=MIDDLE, seed=seed, resamples=1)
    data = EvaluationData.of(*world.new, options)
    found = [Contender(name, "baseline", (policy,), "", priced=True) for name, policy in policies.items()]
    if world.mean_budgets:
        metrics = MeanBudgetMetrics.measure(data, options, sweep_prices(data, found, options))
        reached = {
            name: np.mean([metrics.frontiers[name].accuracy_at(metrics.budget_ms(s))[0] for s in MIDDLE])
            for name in (*policies, BLIND)
        }
        return {name: float(reached[name] - reached[BLIND]) for name in policies}
    options, _ = with_choice(data, options)
    found.append(Contender(LOOKUP, "baseline", (LookupTable(data.means),), ""))
    ceiling = CeilingMetrics.measure(data, options.budget_shares, under_budgets(data, found, options))
    columns = [options.budget_shares.index(share) for share in options.room_shares]
    mean = {name: float(values[0, columns].mean()) for name, values in ceiling.accuracy.items()}
    return {name: mean[name] - mean[LOOKUP] for name in policies}


def run(world: World, args: argparse.Namespace) -> dict[str, list[float]]:
    """The gains of each way, one for each draw of the few."""
    once = {FULL: policy_of(world.new, 0, args.epochs)}
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        policies = dict(once)
        for name, data in learnt_from(world, drawn(world.new, args.few, seed), seed):
            if name not in once:
                policies[name] = policy_of(data, seed, args.epochs)
        once[UNCHANGED] = policies[UNCHANGED]
        for name, gain in gains(world, policies, seed).items():
            found.setdefault(name, []).append(gain)
        print(
            f"  {world.name} draw {seed}: " + ", ".join(f"{n} {100 * g[-1]:+.1f}" for n, g in found.items()), flush=True
        )
    return found


def show(name: str, found: dict[str, list[float]]) -> None:
    """Print mean, interval over draws, and share of what a full profile gains."""
    full = float(np.mean(found[FULL]))
    for way, values in found.items():
        mean, count = float(np.mean(values)), len(values)
        half = student.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count) if count > 1 else np.nan
        share = f"{mean / full:6.0%}" if full > 0.002 else "     -"
        print(f"{name:40s} {way:14s} {100 * mean:+5.1f} +- {100 * half:3.1f}  {share}", flush=True)


def left_out(outside: OutsideTable, fold: int, folds: int, few: int) -> Iterator[World]:
    """A fold of a table with each value of its knob left out in turn; the others are known on all samples."""
    table, features = outside.fold(fold, folds)
    ((knob, values),) = table.knob_space.knobs
    for value in values if len(values) > 2 else ():
        rest = KnobSpace({knob: [one for one in values if one != value]})
        yield World(f"{outside.name} without {value:g}", [(in_space(table, rest), features)], (table, features), True)


def rounded(bits: int, output_dir: Path) -> None:
    """Write the bundled model with weights rounded to whole multiples, a step for each row of a matrix."""
    import torch
    from safetensors.torch import load_file, save_file

    from budgetvlm.vlm.loading import model_directory

    source = model_directory("reference")
    shutil.copytree(source, output_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("controller"))
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim >= 2:
            exact = tensor.float().flatten(1)
            step = (exact.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-12)
            weights[name] = ((exact / step).round() * step).reshape(tensor.shape).to(tensor.dtype).contiguous()
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)


def prepared(path: str) -> Data:
    found = load_prepared(path)
    return found.table, found.features


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rounded", "models", "tables"])
    parser.add_argument("--bits", type=int, default=4, metavar="N")
    parser.add_argument("--output_dir", type=Path, metavar="DIR")
    parser.add_argument("--earlier", metavar="FILE[,FILE]")
    parser.add_argument("--data", metavar="FILE")
    parser.add_argument("--tables", type=Path, metavar="DIR")
    parser.add_argument(
        "--only", nargs="+", default=["dynamath_open6", "blink_open6", "pope_llava15_tokens"], metavar="NAME"
    )
    parser.add_argument("--few", type=int, default=100, metavar="N", help="labelled samples (default: 100)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="draws of these; of tables: folds by group")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="of GRPO; 0: what it starts from")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    reports: dict[str, dict[str, list[float]]] = {}
    try:
        if args.what == "rounded":
            rounded(args.bits, args.output_dir)
        elif args.what == "models":
            world = World(
                Path(args.data).stem, [prepared(one) for one in args.earlier.split(",")], prepared(args.data), False
            )
            reports[world.name] = run(world, args)
        else:
            for name in args.only:
                outside = OutsideTable.load(args.tables / f"{name}.npz")
                for fold in range(args.seeds):
                    for world in left_out(outside, fold, max(args.seeds, 3), args.few):
                        for way, values in run(world, argparse.Namespace(**{**vars(args), "seeds": 1})).items():
                            reports.setdefault(world.name, {}).setdefault(way, []).extend(values)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, found in reports.items():
        show(name, found)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
