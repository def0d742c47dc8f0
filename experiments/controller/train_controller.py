"""The guide's main script: prepare the data, then train the controller.

Without --output_dir it prepares the data, stops, and prints the command that trains. Data that is there already is
used; --force_recompute makes it anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from budgetvlm.commands.parser import Parser
from budgetvlm.commands.prepare import WHERE
from budgetvlm.commands.task_arguments import add_task_arguments, task_options
from budgetvlm.commands.train import add_training_arguments, train_and_report, training_config
from budgetvlm.errors import BudgetVLMError, ConfigError

GROUP_SIZE = 8


def parser() -> argparse.ArgumentParser:
    """The guide's flags."""
    result = Parser(prog="train_controller.py", description=__doc__)
    data = result.add_argument_group("data")
    WHERE.add(data, model_path="reference")
    add_task_arguments(data, answers=False)
    data.add_argument("--force_recompute", action="store_true", help="make the data anew, features included")
    result.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="checkpoints, figures and logs; without it nothing is trained"
    )
    add_training_arguments(result, group_size=GROUP_SIZE)
    return result


def run(args: argparse.Namespace) -> int:
    """Check the flags, prepare, train."""
    from budgetvlm.controller.run_directory import open_output
    from budgetvlm.profiling.prepare.preparation import prepare
    from budgetvlm.profiling.prepare.prepare_options import PrepareOptions

    config = training_config(args)
    if args.output_dir is None and (args.resume or args.overwrite):
        raise ConfigError("--resume and --overwrite speak of an earlier run in --output_dir; give --output_dir too")
    if args.output_dir is not None:
        open_output(args.output_dir, resume=args.resume, overwrite=args.overwrite, remove=False)
    options = PrepareOptions(
        **WHERE.read(args),
        train_split=args.train_split,
        task=task_options(args),
        device=args.device,  # the seed is training's alone: runs with several seeds share one split
    )
    prepared = prepare(options, force_recompute=args.force_recompute)
    if args.output_dir is None:
        print(f"the data is ready; train with:\n\n{training_command(args)}\n")
        return 0
    train_and_report(args, config, prepared.table, prepared.features)
    return 0


def training_command(args: argparse.Namespace) -> str:
    """The command that trains on this data: the flags given, less --force_recompute, and an --output_dir."""
    always = (
        "exp5_dir",
        "exp6_dir",
        "dataset_name",
        "model_path",
        "output_data_path",
        "batch_size",
        "num_epochs",
        "lr",
    )
    default = vars(parser().parse_args([]))
    words = ["python", "experiments/controller/train_controller.py"]
    lines = []
    for name, value in {**vars(args), "output_dir": args.output_dir or "./checkpoints/controller"}.items():
        wanted = name in (*always, "output_dir", "group_size") or value != default[name]
        if wanted and name not in ("force_recompute", "given"):
            lines.append(f"--{name} {shlex.quote(str(value))}")
    return " \\\n    ".join([" ".join(words), *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake that the user can mend, 130 interrupted."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
