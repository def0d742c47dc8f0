"""Join the accuracy and the latency profile into training data, and extract the features.

Writes controller_training_data.json, and beside it the features (.features.safetensors) and the table
(.table.parquet). What is there already is used; --force_recompute makes it anew.
"""

from __future__ import annotations

import argparse
import shlex

from budgetvlm.commands.flags import OptionFlags
from budgetvlm.commands.task_arguments import add_task_arguments, task_options
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions

WHERE = OptionFlags(PrepareOptions, "exp5_dir", "exp6_dir", "model_path", "output_data_path")
HOW = OptionFlags(
    PrepareOptions, "train_split", "test_split", "latency_fill", "feature_batch_size", "device", "seed"
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the guide's first step."""
    WHERE.add(parser)
    add_task_arguments(parser, answers=False)
    parser.add_argument("--force_recompute", action="store_true", help="make everything anew, features included")
    HOW.add(parser)


def run(args: argparse.Namespace) -> int:
    """Prepare the data and say how to go on."""
    from budgetvlm.profiling.prepare.preparation import prepare

    options = PrepareOptions(**WHERE.read(args), **HOW.read(args), task=task_options(args))
    prepared = prepare(options, force_recompute=args.force_recompute)
    print(f"next: budgetvlm train --data {shlex.quote(str(prepared.path))} --output_dir ./checkpoints/controller")
    return 0
