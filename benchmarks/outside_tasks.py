"""Compare GRPO with its rivals on 11 tasks of others, with no tuning for any of them.

    python benchmarks/outside_tasks.py --tables DIR [--tasks FERPLUS YELP ...] [--output_dir DIR --resume] [--json]

DIR holds frugalml.npz, which is not part of this repository; benchmarks/data/README.md says what it is and whose. One
knob (which of four services answers), its price in the place of the latency, budgets just above each price, and as
features the cheapest service's answer and confidence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rivals.entries import RIVALS
from budgetvlm.comparison import CompareOptions, CompareReport, compare
from budgetvlm.errors import BudgetVLMError, ConfigError, DataError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.records import Estimate
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

FILE = "frugalml.npz"
SPLITS = {"train": 0.5, "validation": 0.1, "test": 0.4}
JUST_ABOVE = 1.001
POLICIES = (
    "grpo", "grpo_cold", "grpo_ensemble", "knn",
    "logistic", "trees", "predict", "predict_ensemble", "cross_entropy", "regret",
    "reinforce", "ppo", "dpo", "grpo_8", "grpo_8_group",
)  # fmt: skip
RIVAL_ENTRIES = {entry.key: entry for entry in RIVALS}


def tasks(path: Path) -> list[str]:
    """Names of the tasks in the file. Raises DataError: there is no such file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; benchmarks/data/README.md says where it comes from")
    with np.load(path) as arrays:
        return sorted({name.partition("/")[0] for name in arrays.files})


def load(path: Path, task: str, limit: int, seed: int = 0) -> tuple[ProfileTable, Features]:
    """A task as a table and features; services in the order of their prices, at most ``limit`` samples drawn."""
    with np.load(path) as arrays:
        cost, correct = arrays[f"{task}/cost_per_10k"], arrays[f"{task}/correct"]
        confidence, answer = arrays[f"{task}/conf"], arrays[f"{task}/pred"]
    rows = np.sort(np.random.default_rng(seed).permutation(len(correct))[:limit])
    order = np.argsort(cost, kind="stable")
    cheapest = order[0]
    labels, number = np.unique(answer[:, cheapest], return_inverse=True)
    answered = np.eye(len(labels), dtype=np.float32)[number.reshape(-1)]
    ids = [f"{task}-{row}" for row in rows]
    table = ProfileTable.from_arrays(
        KnobSpace({"service": list(range(1, len(cost) + 1))}),
        ids,
        correct[rows][:, order],
        np.tile(cost[order], (len(rows), 1)),
    ).with_splits(SPLITS, seed)
    sure = np.nan_to_num(confidence[rows][:, [cheapest]].astype(np.float32))
    return table, Features(tuple(ids), sure, answered[rows])


def run(task: str, args: argparse.Namespace, bar: tqdm[Any]) -> CompareReport:
    """One task's comparison."""
    table, features = load(args.tables / FILE, task, args.max_samples)
    prices = np.unique(table.latency_ms[0].astype(np.float64))
    evaluation = EvaluationOptions(
        budget_shares=tuple((JUST_ABOVE * prices / prices[-1]).tolist()), room_range=(0.0, np.inf)
    )
    policies = tuple(name for name in args.policies if name not in RIVAL_ENTRIES)
    entries = [RIVAL_ENTRIES[name] for name in args.policies if name in RIVAL_ENTRIES]
    options = CompareOptions(evaluation, policies, tuple(args.seeds), sections=("policies",))
    cells = args.output_dir and args.output_dir / task
    if cells and cells.exists() and not args.resume:
        raise ConfigError(
            f"{cells} holds an earlier comparison; add --resume to use it, or choose another --output_dir"
        )

    def show(done: int, total: int, what: str) -> None:
        bar.set_postfix_str(f"{task}: {what}")

    return compare(table, features, options, cells, show, entries)


def summary(task: str, report: CompareReport, key: str) -> dict[str, Any]:
    """Where one policy stands in a task."""
    row, lookup = report.row(key), report.row("lookup")
    assert row is not None and row.room is not None and lookup is not None
    ranked = [other for other in report.section("policies") if other.competes]
    difference = row.vs_best_other
    return {
        "task": task,
        "samples": report.counts["train_samples"],
        "lookup": float(np.mean([at.accuracy.value for at in lookup.at_budget])),
        "gain": row.room.accuracy_gain,
        "room": row.room.room_closed,
        "rank": report.ranks.get(key),
        "of": len(ranked),
        "best_other": row.best_other,
        "vs_best_other": difference,
        "first_or_within": difference is None or difference.high >= 0,
    }


def show(rows: list[dict[str, Any]], key: str) -> Table:
    """One line a task."""
    tied = sum(row["first_or_within"] for row in rows)
    table = Table(
        title=f"{key}: first, or within the 95% interval of the first, on {tied} of {len(rows)} tasks",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    for title in ("task", "best other"):
        table.add_column(title, no_wrap=True)
    for title in (
        "trained on",
        "lookup",
        "points over\nlookup",
        "hindsight\nroom",
        "rank",
        "points over\nbest other",
        "",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        room = row["room"]
        table.add_row(
            row["task"], row["best_other"], str(row["samples"]), f"{100 * row['lookup']:.1f}%", points(row["gain"]),
            "-" if room is None else f"{100 * room.value:.0f}%", f"{row['rank'] or '-'} of {row['of']}",
            points(row["vs_best_other"]), "" if row["first_or_within"] else "behind",
        )  # fmt: skip
    return table


def points(number: Estimate | None) -> str:
    if number is None:
        return "-"
    return f"{100 * number.value:+.2f} [{100 * number.low:+.2f}, {100 * number.high:+.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="where frugalml.npz lies")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of its tasks (default: all)")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="NAME", help="see compare_all.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--max_samples", type=int, default=8000, metavar="N", help="of each task (default: 8000)")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="keep what is finished there")
    parser.add_argument("--resume", action="store_true", help="use what is finished in --output_dir")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        known = tasks(args.tables / FILE)
        unknown = sorted({*(args.tasks or ())} - {*known})
        if unknown:
            raise ConfigError(f"there is no task {', '.join(unknown)}; choose from {', '.join(known)}")
        with tqdm(args.tasks or known, disable=None, file=sys.stderr, leave=False, unit="task") as bar:
            reports = {task: run(task, args, bar) for task in bar}
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept in --output_dir", file=sys.stderr)
        return 130
    keys = [key for key in ("grpo", "grpo_cold", "grpo_ensemble", "predict") if key in args.policies]
    if args.json:
        print(json.dumps({task: report.to_dict() for task, report in reports.items()}, allow_nan=False))
        return 0
    console = Console()
    console.width = max(console.width, 150)
    for key in keys:
        console.print(show([summary(task, report, key) for task, report in reports.items()], key))
    return 0


if __name__ == "__main__":
    sys.exit(main())
