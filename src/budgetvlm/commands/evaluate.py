"""Compare a controller with simple policies on held-out samples, under a budget and at equal accuracy.

Several checkpoints (one for each seed) are reported as their mean and one by one; without a checkpoint only the simple
policies and the bounds are reported.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands import live
from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.commands.flags import OptionFlags, add_json_flag
from budgetvlm.commands.showing import check_output, show_report, write_report
from budgetvlm.commands.verdicts import verdict_of
from budgetvlm.errors import BudgetVLMWarning, CheckpointError, ConfigError, KnobSpaceError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
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
    report = evaluate_with_progress(table, features, policies, options)
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


def read_controllers(
    paths: list[Path], table: ProfileTable, features: Features, split: str
) -> tuple[ProfileTable, dict[str, Policy]]:
    """The table, and one policy for each checkpoint, named after its path.

    A table without splits gets those that the first controller was trained with, or would be.

    Args:
        split: of the table, that they are to be measured on.

    Raises:
        CheckpointError, KnobSpaceError: a checkpoint cannot be read or does not fit the data.
        DataError: it was trained on samples of this split.
    """
    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.controller.training import with_splits

    controllers = {name: load_controller(path) for name, path in zip(checkpoint_names(paths), paths, strict=True)}
    if table.split is None:
        first = next(iter(controllers.values()), None)
        table = first.trained_on.with_splits(table, str(paths[0])) if first else with_splits(table)
        print("note: the table stores no splits; those that training draws are used", file=sys.stderr)
    named = zip(controllers.items(), paths, strict=True)
    return table, {name: _policy(one, path, table, features, split) for (name, one), path in named}


def _policy(controller: GRPOController, path: Path, table: ProfileTable, features: Features, split: str) -> Policy:
    from budgetvlm.controller.policy import ControllerPolicy
    from budgetvlm.controller.provenance import TrainedOn

    if controller.knob_space != table.knob_space:
        raise KnobSpaceError(
            f"the checkpoint {path} was trained for another knob space ({controller.knob_space}) than the table's "
            f"({table.knob_space}); give the table that it was trained on, or train on this one"
        )
    wanted = (controller.config["image_feat_dim"], controller.config["lang_feat_dim"])
    given = (features.image.shape[1], features.language.shape[1])
    if wanted != given:
        raise CheckpointError(
            f"the checkpoint {path} reads {wanted[0]} image and {wanted[1]} language features a sample; the features "
            f"given have {given[0]} and {given[1]}. Give the features that it was trained on, or train on these."
        )
    controller.trained_on.require_unseen(table, split, str(path))
    measured = TrainedOn.of_table(table).model
    if None not in (measured, controller.trained_on.model) and measured != controller.trained_on.model:
        warnings.warn(
            f"the checkpoint {path} was trained for other weights than those that this data was measured with, so its "
            "figures say how it carries over, not how good it is",
            BudgetVLMWarning,
            stacklevel=2,
        )
    return ControllerPolicy(controller)


def checkpoint_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or the whole path where the last parts do not differ."""
    short = [path.name or str(path) for path in paths]
    names = short if len(set(short)) == len(paths) else [str(path) for path in paths]
    if len(set(names)) != len(names):
        raise ConfigError(f"the same checkpoint is given twice: {', '.join(names)}; give each seed once")
    return names


def evaluate_with_progress(
    table: ProfileTable, features: Features, policies: dict[str, Policy], options: EvaluationOptions
) -> EvaluationReport:
    """Evaluate with a line of progress on a terminal's standard error."""
    from tqdm import tqdm

    from budgetvlm.evaluation.evaluator import evaluate

    with tqdm(disable=None, bar_format="{desc} ({elapsed})", file=sys.stderr, leave=False) as bar:
        return evaluate(table, features, policies, options, progress=bar.set_description_str)
