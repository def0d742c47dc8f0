"""Compare the controller with simple and strong policies on one table: identical splits, budgets and guard.

What is finished is kept in --output_dir, one file for each policy and seed, so that --resume goes on after an
interruption. Without features only policies that read no input are compared.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.cluster_arguments import add_ray_flags, ray_crew_of
from budgetvlm.commands.data_arguments import add_data_arguments, read_table
from budgetvlm.commands.flags import OptionFlags, add_json_flag
from budgetvlm.commands.showing import check_output, show_report, write_report
from budgetvlm.comparison.compare_options import CompareOptions
from budgetvlm.errors import ConfigError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from budgetvlm.cluster.hand_out import StartCrew
    from budgetvlm.comparison import CompareReport, Entry
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

REPORT, PICTURE, CELLS = "comparison.json", "comparison.png", "cells"
QUICK_EPOCHS = 30
EVALUATION = OptionFlags(
    EvaluationOptions, "mean_budgets", "mean_budget_ms", "ceiling", "labels", "resamples", budget_shares="budgets"
)
COMPARED = OptionFlags(CompareOptions, "seeds", "sections", "num_epochs", "members")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm compare`."""
    add_data_arguments(parser)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--policies", nargs="+", metavar="NAME", help="some of them; --policies help lists all")
    what.add_argument(
        "--quick", action="store_true",
        help=f"the quick policies, one seed, {QUICK_EPOCHS} epochs, nothing left out; other flags win over it",
    )  # fmt: skip
    COMPARED.add(what, seeds=None, sections=None, num_epochs=None)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--split", default="test", choices=["test", "validation"], help="samples to report (default: test)"
    )
    EVALUATION.add(how)
    add_json_flag(parser)
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help=f"write {REPORT}, {PICTURE} and {CELLS}/ there")
    add_ray_flags(parser)
    parser.add_argument("--resume", action="store_true", help="use what is finished in --output_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in --output_dir")


def run(args: argparse.Namespace, rivals: Sequence[Entry] = ()) -> int:
    """Read, compare, report; ``rivals`` are further policies that --policies may name."""
    from budgetvlm.comparison import ROSTER
    from budgetvlm.comparison.comparison_tables import tables
    from budgetvlm.html_report.result_charts import comparison_charts

    known = [*ROSTER.values(), *rivals]
    if args.policies == ["help"]:
        return _list_policies(known)
    keys = _chosen_keys(args, known)
    options = _options(args, tuple(key for key in keys if key in ROSTER))
    _open_output(args)
    crew = ray_crew_of(args)
    table, features = read_table(args)
    entries = [entry for entry in rivals if entry.key in keys]
    report = _compare(table, features, options, args.output_dir, entries, crew)
    written = write_report(report, comparison_charts, args.output_dir, REPORT, PICTURE)
    show_report(report, tables(report), args.json, written)
    return 0


def _list_policies(known: Sequence[Entry]) -> int:
    width = max(len(entry.key) for entry in known)
    for entry in known:
        print(f"{entry.key:<{width}}  {entry.name}: {entry.note}")
    return 0


def _chosen_keys(args: argparse.Namespace, known: Sequence[Entry]) -> list[str]:
    """The keys of the policies asked for. Raises ConfigError for one that does not exist."""
    if args.policies is None:
        return [entry.key for entry in known if entry.quick or not args.quick]
    keys = [entry.key for entry in known]
    unknown = [name for name in args.policies if name not in keys]
    if unknown:
        raise ConfigError(f"there is no policy {', '.join(unknown)}; choose from {', '.join(keys)}")
    return list(args.policies)


def _options(args: argparse.Namespace, policies: tuple[str, ...]) -> CompareOptions:
    given = EVALUATION.read(args)
    given["budget_shares"] = tuple(sorted(given["budget_shares"]))
    quick: dict[str, Any] = {"seeds": (0,), "sections": ("policies",), "num_epochs": QUICK_EPOCHS} if args.quick else {}
    chosen = quick | COMPARED.read(args)
    return CompareOptions(EvaluationOptions(split=args.split, **given), policies, **chosen)


def _open_output(args: argparse.Namespace) -> None:
    """Raise OutputError before any work is done; remove what is to be replaced."""
    directory: Path | None = args.output_dir
    if args.resume and args.overwrite:
        raise ConfigError("--resume continues what lies in --output_dir and --overwrite replaces it; give one")
    if directory is None and (args.resume or args.overwrite):
        raise ConfigError("--resume and --overwrite speak of an earlier comparison in --output_dir; give it too")
    if not (args.resume or args.overwrite):
        remedy = "add --resume to use what is finished there, --overwrite to replace it, or choose another --output_dir"
        check_output(directory, [REPORT, PICTURE, CELLS], remedy)
    if directory is not None and args.overwrite:
        (directory / REPORT).unlink(missing_ok=True)
        (directory / PICTURE).unlink(missing_ok=True)
        shutil.rmtree(directory / CELLS, ignore_errors=True)


def _compare(
    table: ProfileTable,
    features: Features | None,
    options: CompareOptions,
    directory: Path | None,
    entries: Sequence[Entry],
    crew: StartCrew | None,
) -> CompareReport:
    """Compare with a progress bar on a terminal's standard error."""
    from tqdm import tqdm

    from budgetvlm.comparison import compare

    with tqdm(disable=None, file=sys.stderr, leave=False, unit="cell") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        return compare(table, features, options, directory and directory / CELLS, show, entries, crew)
