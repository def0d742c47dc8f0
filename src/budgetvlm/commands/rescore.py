"""Score the answers of an accuracy sweep (exp5) by another metric, without measuring again.

Writes one JSON file a setting, as `budgetvlm profile accuracy` does; `budgetvlm prepare --exp5_dir` takes them together
with the latencies that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from budgetvlm.commands.profile import DIRECTORIES
from budgetvlm.commands.task_arguments import add_task_arguments, task_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add_task_arguments(parser, answers=False)
    add("--exp5_dir", type=Path, default=DIRECTORIES["accuracy"], metavar="DIR", help="results (default: %(default)s)")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="where the new results go")
    add("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Score anew and say how the accuracies changed."""
    from budgetvlm.profiling.prepare.rescoring import rescore

    paths = rescore(Path(args.exp5_dir), task_options(args), args.output_dir, overwrite=args.overwrite)
    print(f"{len(paths)} result files in {paths[0].parent}")
    return 0
