"""Join the accuracy and the latency profile into training data, and extract the features.

Writes controller_training_data.json, and beside it the features (.features.safetensors) and the table
(.table.parquet). What is there already is used; --force_recompute makes it anew.
"""

from __future__ import annotations

import argparse
import shlex

from budgetvlm.commands.task_arguments import OPTIONS, add_task_arguments, task_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the guide's first step; `arguments` reads them back."""
    parser.add_argument("--exp5_dir", default="./results/profiling/exp5_accuracy", help="accuracy results")
    parser.add_argument("--exp6_dir", default="./results/profiling/exp6_latency", help="latency results")
    add_task_arguments(parser, answers=False)
    parser.add_argument("--model_path", default="reference", help="model directory, or the bundled 'reference'")
    parser.add_argument("--output_data_path", default="./data/controller_training_data.json", help="file to write")
    parser.add_argument("--force_recompute", action="store_true", help="make everything anew, features included")
    parser.add_argument("--train_split", type=float, default=0.8, help="share of train in train and validation")
    parser.add_argument("--test_split", type=float, default=0.0, help="share of images to hold out (default: none)")
    parser.add_argument(
        "--latency_fill",
        choices=("model", "settings", "none"),
        default="model",
        help="what exp6 did not time: predict samples (and cells left out by `profile latency --cells`) from token "
        "counts, whole settings as well, or stop (default: model)",
    )
    parser.add_argument("--feature_batch_size", type=int, default=32, help="images encoded at once")
    parser.add_argument("--device", default="cpu", help="where to extract features (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits")


def arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of `profiling.prepare.preparation.prepare`, from parsed flags that may hold others too."""
    probe = argparse.ArgumentParser(add_help=False)
    add_arguments(probe)
    given = {name: getattr(args, name) for name in vars(probe.parse_args([])) if name not in OPTIONS}
    return {**given, "task": task_options(args)}


def run(args: argparse.Namespace) -> int:
    """Prepare the data and say how to go on."""
    from budgetvlm.profiling.prepare.preparation import prepare

    prepared = prepare(**arguments(args))  # type: ignore[arg-type]
    print(f"next: budgetvlm train --data {shlex.quote(str(prepared.path))} --output_dir ./checkpoints/controller")
    return 0
