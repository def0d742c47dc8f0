"""Compare a controller with simple policies on held-out samples, under a budget and at equal accuracy.

Several checkpoints (one for each seed) are reported as their mean and one by one; without a checkpoint only the simple
policies and the bounds are reported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands import live
from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.commands.flags import OptionFlags, add_json_flag
from budgetvlm.commands.showing import check_output, show_report, write_report
from budgetvlm.commands.trained_policies import own_controllers, read_controllers
from budgetvlm.commands.verdicts import verdict_of
from budgetvlm.errors import ConfigError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from budgetvlm.evaluation.records import EvaluationReport
    from budgetvlm.features import Features
    from budgetvlm.policies import Policy
    from budgetvlm.table import ProfileTable

REPORT, PICTURE = "evaluation.json", "evaluation.png"
EVALUATION = OptionFlags(
    EvaluationOptions,
    "price",
    "mean_budgets",
    "mean_budget_ms",
    "ceiling",
    "labels",
    "resamples",
    "seed",
    budget_shares="budgets",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm evaluate`."""
    add_data_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="DIR", help="trained controllers, one for each seed"
    )
    parser.add_argument(
        "--split", default="test", choices=["test", "validation", "train"],
        help="samples to report (default: test); train only with --live, for data sets that have no other",
    )  # fmt: skip
    EVALUATION.add(parser)
    add_json_flag(parser)
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help=f"write {REPORT} and {PICTURE} there")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in --output_dir")
    live.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, evaluate, report."""
    if args.live:
        return live.run(args)
    from budgetvlm.evaluation.text_tables import tables
    from budgetvlm.html_report.result_charts import evaluation_charts

    options = _options(args)
    if not args.overwrite:
        remedy = "add --overwrite to replace them, or choose another --output_dir"
        check_output(args.output_dir, [REPORT, PICTURE], remedy)
    table, features = read_data(args)
    table, policies = read_controllers(args.checkpoint, table, features, options.split)
    own = own_controllers(args.checkpoint, table, features, options.split)
    report = evaluate_with_progress(table, features, policies, options, own)
    written = write_report(report, evaluation_charts, args.output_dir, REPORT, PICTURE)
    show_report(report, tables(report), args.json, written)
    for sentence in verdict_of(report, table):
        print(f"note: {sentence}", file=sys.stderr)
    return 0


def _options(args: argparse.Namespace) -> EvaluationOptions:
    if args.split == "train":
        raise ConfigError("--split train is what the controller was trained on; report test or validation")
    given = EVALUATION.read(args)
    given["budget_shares"] = tuple(sorted(given["budget_shares"]))
    return EvaluationOptions(split=args.split, **given)


def evaluate_with_progress(
    table: ProfileTable,
    features: Features,
    policies: dict[str, Policy],
    options: EvaluationOptions,
    own: Policy | None = None,
) -> EvaluationReport:
    """Evaluate with a line of progress on a terminal's standard error."""
    from tqdm import tqdm

    from budgetvlm.evaluation.evaluator import evaluate

    with tqdm(disable=None, bar_format="{desc} ({elapsed})", file=sys.stderr, leave=False) as bar:
        return evaluate(table, features, policies, options, progress=bar.set_description_str, own=own)
