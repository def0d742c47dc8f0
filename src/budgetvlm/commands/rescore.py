"""Score the answers of an accuracy sweep (exp5) by another metric, without measuring again.

Writes one JSON file a setting, as `budgetvlm profile accuracy` does; `budgetvlm prepare --exp5_dir` takes them together
with the latencies that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from budgetvlm.commands.task_arguments import add_task_arguments, task_options
from budgetvlm.profiling.results.places import default_directory, find_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add_task_arguments(parser, answers=False)
    add("--exp5_dir", type=Path, default=default_directory("accuracy"), metavar="DIR",
        help="accuracy results (default: %(default)s, or where those of the data set's only model are)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="where the new results go")
    add("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Score anew and say how the accuracies changed."""
    from budgetvlm.profiling.prepare.rescoring import rescore

    options = task_options(args)
    results = find_results(args.exp5_dir, options.dataset_name, "accuracy", None)
    paths = rescore(results, options, args.output_dir, overwrite=args.overwrite)
    print(f"{len(paths)} result files in {paths[0].parent}")
    return 0
