"""What latency bounds for each input are worth, beside one bound a setting, on tables whose times were measured.

    python benchmarks/input_bounds.py [--tables DIR] [--splits 5] [--json FILE]

Without tables of others (benchmarks/data/README.md says which), two planted ones are measured: in the first the input
tells the time, in the second it does not. Each table is cut into folds by group; bounds are fitted and taken, or not,
on a fold's training samples, and measured on its test samples with the lookup table's choices at the usual budgets, or
at others between the bounds where those leave no choice. Differences are paired and pooled over the folds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.outside_tables import OutsideTable
from budgetvlm.errors import BudgetVLMError
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import LookupTable
from budgetvlm.policies.budget_grid import BUDGET_SHARES, grid_with_choice
from budgetvlm.table import ProfileTable

FIGURES = ("right in time", "right", "late")
SAMPLES = 2000  # of a planted table


def planted(signal: float, noise: float) -> tuple[ProfileTable, Features]:
    """A table of four settings; the first of ten features multiplies all times by exp(signal x feature)."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(SAMPLES, 10))
    latency = np.array([20.0, 35.0, 60.0, 100.0]) * np.exp(
        signal * image[:, :1] + noise * rng.normal(size=(SAMPLES, 4))
    )
    right = rng.random((SAMPLES, 4)) < np.array([0.4, 0.55, 0.68, 0.78])
    table = ProfileTable.from_arrays(KnobSpace({"tiles": [1, 2, 4, 8]}), range(SAMPLES), right, latency)
    return table, Features(table.sample_ids, image, np.zeros((SAMPLES, 1)))


def folds(table: ProfileTable, features: Features, count: int) -> Iterator[tuple[ProfileTable, Features]]:
    """Folds of a planted table, as those of `OutsideTable`."""
    number = np.arange(table.num_samples) % count
    for fold in range(count):
        yield replace(table, split=tuple(np.where(number == fold, "test", "train").tolist())), features


def measured(table: ProfileTable, features: Features) -> tuple[np.ndarray, np.ndarray, str]:
    """The `FIGURES` of each test sample with one bound a setting and with those that were taken, ``[2, 3, S]``.

    Further: the number of each sample's group, and why which bounds were taken.
    """
    options = EvaluationOptions(resamples=1)
    pooled, taken = (EvaluationData.of(table, given, options) for given in (None, features))
    grid = grid_with_choice(BUDGET_SHARES, pooled.test_bounds_ms, pooled.means.reference_ms)
    found = np.stack([_lookup(data, grid) for data in (pooled, taken)])
    return found, np.unique(taken.test.units, return_inverse=True)[1], taken.guard.why


def _lookup(data: EvaluationData, grid: tuple[float, ...]) -> np.ndarray:
    """What became of the lookup table's choices, mean over the budgets, ``[3, S]``."""
    policy, rows, played = LookupTable(data.means), np.arange(data.test.num_samples), []
    for states in data.under_budgets(grid, 0.01):
        chosen = policy.choose(states)
        right, late = data.test.accuracy[rows, chosen], data.test.latency_ms[rows, chosen] > states.budget_ms
        played.append(np.stack([right * ~late, right, late]))
    mean: np.ndarray = np.mean(played, axis=0)
    return mean


def pooled_over_folds(found: list[tuple[np.ndarray, np.ndarray, str]]) -> dict[str, Any]:
    """Means before and after, and their difference with two standard errors over groups, for each figure."""
    before, after = np.concatenate([values for values, _, _ in found], axis=2)
    offsets = np.cumsum([0, *(unit.max() + 1 for _, unit, _ in found)])
    unit = np.concatenate([number + offset for (_, number, _), offset in zip(found, offsets[:-1], strict=True)])
    out: dict[str, Any] = {"taken": sum("depend on the input" in why for _, _, why in found), "splits": len(found)}
    for row, name in enumerate(FIGURES):
        gain = after[row] - before[row]
        error = np.sqrt((np.bincount(unit, gain - gain.mean()) ** 2).sum()) / len(gain)
        figures = before[row].mean(), after[row].mean(), gain.mean(), 2 * error
        out[name] = dict(
            zip(("one bound a setting", "taken", "change", "two_errors"), map(float, figures), strict=True)
        )
    return out | {"why": [why for _, _, why in found]}


def show(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Lookup table: bounds that were taken against one bound a setting, points")
    for column in ("table", "taken", *FIGURES):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, report in reports.items():
        cells = []
        for figure in FIGURES:
            at = report[figure]
            change = f"{100 * at['change']:+.1f} ± {100 * at['two_errors']:.1f}"
            cells.append(f"{100 * at['one bound a setting']:.1f} → {100 * at['taken']:.1f} ({change})")
        table.add_row(name, f"{report['taken']} of {report['splits']}", *cells)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", type=Path, metavar="DIR", help="tables of others; None: the planted ones alone")
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="folds of each table (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    console, reports = Console(), {}
    for name, plan in (("planted: the input tells", (0.5, 0.1)), ("planted: it does not", (0.0, 0.3))):
        reports[name] = pooled_over_folds([measured(*fold) for fold in folds(*planted(*plan), args.splits)])
    for path in sorted(args.tables.glob("*_*.npz")) if args.tables else ():
        try:
            outside = OutsideTable.load(path)
            found = [measured(*outside.fold(number, args.splits)) for number in range(args.splits)]
        except BudgetVLMError as error:
            console.print(f"{path.name}: {error}")
            continue
        reports[path.stem] = pooled_over_folds(found)
    console.print(show(reports))
    for name, report in reports.items():
        console.print(f"{name}: {report['why'][0]}")
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
