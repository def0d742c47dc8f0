"""Join the accuracy and the latency profile into training data, and extract the features.

Writes controller_training_data.json, and beside it the features (.features.safetensors) and the table
(.table.parquet). What is there already is used; --force_recompute makes it anew.
"""

from __future__ import annotations

import argparse
import shlex

from budgetvlm.commands.flags import OptionFlags, forget_defaults
from budgetvlm.commands.task_arguments import add_task_arguments, task_options
from budgetvlm.commands.verdicts import useless_accuracies
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions

WHERE = OptionFlags(PrepareOptions, "exp5_dir", "exp6_dir", "model_path", "output_data_path")
HOW = OptionFlags(
    PrepareOptions, "groups", "train_split", "test_split", "calibration_samples", "latency_fill", "feature_batch_size",
    "device", "encoder", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the guide's first step."""
    WHERE.add(parser, model_path="reference")
    add_task_arguments(parser, answers=False)
    parser.add_argument("--force_recompute", action="store_true", help="make everything anew, features included")
    HOW.add(parser, test_split=0.0)


def run(args: argparse.Namespace) -> int:
    """Prepare the data and say how to go on."""
    from budgetvlm.profiling.prepare.preparation import prepare
    from budgetvlm.profiling.results.places import measured_dataset

    forget_defaults(args, "model_path", "dataset_name", "test_split")
    args.dataset_name = args.dataset_name or measured_dataset(args.exp5_dir)
    options = PrepareOptions(**WHERE.read(args), **HOW.read(args), task=task_options(args))
    prepared = prepare(options, force_recompute=args.force_recompute)
    if useless := useless_accuracies(prepared.table.accuracy):
        print(f"note: {useless}")
    print(f"next: budgetvlm train --data {shlex.quote(str(prepared.path))} --output_dir ./checkpoints/controller")
    return 0
