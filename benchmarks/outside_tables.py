"""Compare the controller with simple policies on five tables of real models' answers; nothing is tuned for any of them.

    python benchmarks/outside_tables.py --tables DIR --splits 5 [--only pope_llava15_tokens ...] [--json FILE]

The tables are not part of this repository: benchmarks/data/README.md says what they are, whose, and what an .npz of
them holds. Each is cut into folds by group (image, document or template). A fold's test samples are seen by nothing
that is fitted for it, features included. Differences are paired, and pooled over the folds with their intervals.

Two faces: a budget for each request (just above the bound of each setting), and a budget on the mean latency.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.comparison.compare_options import CompareOptions
from budgetvlm.comparison.fits import CellSpec, make_cell
from budgetvlm.comparison.roster import ROSTER
from budgetvlm.comparison.rows import cell_outcomes
from budgetvlm.comparison.runner import ComparisonTask
from budgetvlm.errors import BudgetVLMError, DataError
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics, PriceSweep
from budgetvlm.evaluation.outcomes import BLIND
from budgetvlm.evaluation.records import Estimate
from budgetvlm.features import Features
from budgetvlm.features.cheap import CheapFeatures
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

POLICIES = ("grpo", "grpo_ensemble", "predict", "lookup", "full")
MIDDLE = (0.3, 0.5, 0.7)  # of the way from the cheapest setting's mean latency to the slowest's
JUST_ABOVE = 1.001


@dataclass(frozen=True, eq=False)
class OutsideTable:
    """A table without splits, the text of each sample, and image statistics ``[S, Di]`` where there are some."""

    name: str
    table: ProfileTable
    texts: tuple[str, ...]
    image: np.ndarray | None = None

    @classmethod
    def load(cls, path: Path) -> OutsideTable:
        """Read one .npz; its groups become the label "image_id", which no split divides. Raises DataError."""
        try:
            with np.load(path) as arrays:
                read = {name: arrays[name] for name in arrays.files}
            values = read["values"].tolist()
            numbers = values if len(set(values)) == len(values) else list(range(1, len(values) + 1))
            table = ProfileTable.from_arrays(
                KnobSpace({str(read["knob"]): numbers}),
                read["ids"].tolist(),
                read["correct"],
                read["cost"],
                groups={"image_id": read["group"].tolist()},
            )
            return cls(path.stem, table, tuple(read["text"].tolist()), read.get("image"))
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path} is none of these tables: {error}; see benchmarks/data/README.md") from error

    def fold(self, number: int, folds: int) -> tuple[ProfileTable, Features]:
        """Fold ``number`` of several: a table split by group, and features fitted on its training samples."""
        labels = np.array(self.table.groups["image_id"])
        names = np.random.default_rng(0).permutation(np.unique(labels))
        held_out = np.isin(labels, names[number::folds])
        rest = self.table.subset(~held_out).with_splits({"train": 0.8, "validation": 0.2}, number)
        split = np.full(len(labels), "test", dtype="<U10")
        split[~held_out] = rest.split
        table = replace(self.table, split=tuple(split.tolist()))
        return table, self._features(np.flatnonzero(split == "train"))

    def _features(self, rows: np.ndarray) -> Features:
        """Features of all samples, fitted on some rows; image statistics where the table has them."""
        made = CheapFeatures.fit(self.texts, rows=rows)(self.texts, sample_ids=self.table.sample_ids)
        return made if self.image is None else replace(made, image=self.image.astype(np.float32))


@dataclass(frozen=True, eq=False)
class Difference:
    """A paired difference in accuracy in each fold, and in each resample of it, ``[1 + R]`` times folds."""

    folds: list[np.ndarray]

    @property
    def pooled(self) -> Estimate:
        """The mean over the folds with its 95% interval; folds share no test group, so they are resampled apart."""
        number = np.mean(self.folds, axis=0)
        low, high = np.nanquantile(number[1:], [0.025, 0.975])
        return Estimate(float(number[0]), float(low), float(high))


def measure(table: ProfileTable, features: Features, args: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    """Accuracies and paired differences of one fold, ``[1 + R]`` each, by their names."""
    options = EvaluationOptions(budget_shares=budget_shares(table), room_range=(0.0, np.inf), seed=seed)
    keys = tuple(args.policies)
    task = ComparisonTask.of(table, features, CompareOptions(options, keys, (seed,), ("policies",)))
    cells = {key: make_cell(CellSpec(ROSTER[key], seed), task.fitting, task.data, options) for key in keys}
    failed = [f"{key}: {cell.note}" for key, cell in cells.items() if cell.status != "ok"]
    if failed:
        raise DataError("; ".join(failed))
    data = task.data
    under = {key: cell_outcomes([cell], "budgets", data.test) for key, cell in cells.items()}
    ceiling = CeilingMetrics.measure(data, options.budget_shares, under)
    sweeps = {
        key: PriceSweep(
            options.swept,
            cell_outcomes([cell], "tuning_prices", data.tuning),
            cell_outcomes([cell], "prices", data.test),
        )
        for key, cell in cells.items()
        if cell.spec.entry.priced
    }
    mean_budget = MeanBudgetMetrics.measure(data, options, sweeps)
    return dict(_ceiling_differences(ceiling, keys)) | dict(_mean_differences(mean_budget, [*sweeps]))


def budget_shares(table: ProfileTable) -> tuple[float, ...]:
    """Budgets just above the bound of each setting, as shares of the full setting's median latency."""
    train = table.subset("train")
    bounds = StaticGuard.fit_table(train).bounds_ms
    shares = JUST_ABOVE * bounds / float(np.median(train.latency_ms[:, -1]))
    return tuple(sorted(set(np.round(shares, 6).tolist())))


def _ceiling_differences(ceiling: CeilingMetrics, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Under a budget for each request; "full" is compared where every setting is allowed, elsewhere it is late."""
    for key in keys:
        yield f"request {key}", ceiling.accuracy[key].mean(axis=1)
        for other in ("lookup", "predict", "full"):
            if other in keys and other != key and key not in ("lookup", "full"):
                gain = ceiling.accuracy[key] - ceiling.accuracy[other]
                yield f"request {key} - {other}", gain[:, -1] if other == "full" else gain.mean(axis=1)


def _mean_differences(metrics: MeanBudgetMetrics, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """At mean budgets in the middle of the range, and at each single one of them against the blind mix."""
    at = {
        key: np.stack([metrics.frontiers[key].accuracy_at(metrics.budget_ms(share)) for share in MIDDLE], axis=1)
        for key in (*keys, BLIND)
    }
    for key in keys:
        yield f"mean {key}", at[key].mean(axis=1)
        yield f"mean {key} - mix", (at[key] - at[BLIND]).mean(axis=1)
        if key != "predict" and "predict" in at:
            yield f"mean {key} - predict", (at[key] - at["predict"]).mean(axis=1)
        for column, share in enumerate(MIDDLE):
            yield f"mean {share:g} {key} - mix", at[key][:, column] - at[BLIND][:, column]
    yield "mean mix", at[BLIND].mean(axis=1)


def run(path: Path, args: argparse.Namespace, bar: tqdm[Any]) -> dict[str, Any]:
    """One table's pooled figures."""
    outside, started = OutsideTable.load(path), time.perf_counter()
    found: dict[str, Difference] = {}
    for number in range(args.splits):
        bar.set_postfix_str(f"{outside.name}: split {number + 1} of {args.splits}")
        table, features = outside.fold(number, args.splits)
        for name, value in measure(table, features, args, number).items():
            found.setdefault(name, Difference([])).folds.append(value)
    pooled = {name: asdict(difference.pooled) for name, difference in found.items()}
    return {
        "samples": outside.table.num_samples,
        "groups": len(set(outside.table.groups["image_id"])),
        "seconds": time.perf_counter() - started,
        "pooled": pooled,
    }


def show(reports: dict[str, Any], key: str) -> Table:
    """One line a table: what a policy gains over the simple ones; "behind" names those it is clearly worse than."""
    table = Table(title=f"{key}: points gained, with 95% intervals", box=SIMPLE_HEAD, title_justify="left")
    rivals = ("request {} - lookup", "request {} - predict", "request {} - full")
    means = ("mean {} - mix", "mean 0.5 {} - mix", "mean {} - predict")
    columns = [column.format(key) for column in (*rivals, *means)]
    table.add_column("table", no_wrap=True)
    for column in columns:
        table.add_column(column.replace(f" {key} -", "\nover"), justify="right", no_wrap=True)
    table.add_column("behind")
    for name, report in reports.items():
        found = [report["pooled"].get(column) for column in columns]
        behind = [column for column, e in zip(columns, found, strict=True) if e and e["high"] < 0]
        cells = [f"{100 * e['value']:+.1f} [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]" if e else "" for e in found]
        table.add_row(name, *cells, ", ".join(behind))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="where the .npz files lie")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the tables; default: all but frugalml")
    parser.add_argument("--policies", nargs="+", choices=list(ROSTER), default=list(POLICIES), metavar="NAME")
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="folds by group (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    paths = [path for path in sorted(args.tables.glob("*.npz")) if path.stem != "frugalml"]
    paths = [path for path in paths if not args.only or path.stem in args.only]
    try:
        if not paths:
            raise DataError(f"{args.tables} holds no such table; see benchmarks/data/README.md")
        with tqdm(paths, disable=None, file=sys.stderr, leave=False, unit="table") as bar:
            reports = {path.stem: run(path, args, bar) for path in bar}
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1), encoding="utf-8")
    console = Console()
    console.width = max(console.width, 170)
    for key in [key for key in args.policies if key not in ("lookup", "full")]:
        console.print(show(reports, key))
    return 0


if __name__ == "__main__":
    sys.exit(main())
