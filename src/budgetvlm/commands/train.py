"""Train a controller with GRPO on a profile table and its samples' features.

The best controller on the validation split is kept. Without --group_size every setting of a state is weighed (exact
gradient); with it, that many are drawn.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands.check_each import require_several, say_who_is_sacrificed, train_each
from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.commands.flags import OptionFlags
from budgetvlm.commands.verdicts import choices_on_validation, useless_accuracies
from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, StatePlan, TrainingConfig
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.training import TrainingResult
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

WIDTH, MEMBER_WIDTH = TrainingConfig.hidden_dim, 128  # an ensemble of narrow controllers decides as fast as a wide one
ALGORITHM = OptionFlags(
    GRPOConfig, "batch_size", "num_epochs", "scale_rewards", "beta", "entropy_coef",
    learning_rate="lr", num_generations="group_size",
)  # fmt: skip
RUN = OptionFlags(TrainingConfig, "train_split", "patience", "teachers", "seed", "device")
NETWORK = OptionFlags(TrainingConfig, "dropout", "feature_dim")
OBJECTIVE = OptionFlags(GRPOConfig, "objective")
PRICE = OptionFlags(StatePlan, default_price="price")
REWARD = OptionFlags(RewardWeights, **{field.name: f"reward_{field.name}" for field in fields(RewardWeights)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm train`."""
    add_data_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="checkpoints, figures and logs")
    add_training_arguments(parser, group_size=None)


def add_training_arguments(parser: argparse.ArgumentParser, *, group_size: int | None) -> None:
    """Add the flags that the guide's script has too; only the default of --group_size differs."""
    training = parser.add_argument_group("training")
    ALGORITHM.add(training, num_generations=group_size)
    RUN.add(training)
    training.add_argument(
        "--ensemble", type=int, default=1, metavar="N",
        help="train N controllers with different seeds and average them in one checkpoint (default: 1)",
    )  # fmt: skip
    training.add_argument(
        "--check_each", action="store_true",
        help="of several data sets: also train a controller for each alone, in each/ in --output_dir, and say how far "
        "the common one is from it",
    )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden_dim", type=int, metavar="N",
        help=f"width of the hidden layers (default: {WIDTH}, and {MEMBER_WIDTH} for the members of an ensemble)",
    )  # fmt: skip
    NETWORK.add(network)
    objective = parser.add_argument_group("objective")
    for flags in (OBJECTIVE, PRICE, REWARD):
        flags.add(objective)
    objective.add_argument(
        "--mean_budget_ms", type=float, metavar="N",
        help="make the price at which validation samples take this on average the controller's default",
    )  # fmt: skip
    earlier = parser.add_argument_group("an earlier run in --output_dir")
    earlier.add_argument("--resume", action="store_true", help="continue it")
    earlier.add_argument("--overwrite", action="store_true", help="replace it")


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """The options of these flags. Raises ConfigError: flags that cannot work, before any data is read."""
    if args.ensemble < 1:
        raise ConfigError(f"--ensemble {args.ensemble} is not a number of controllers; give 1 or more")
    width = MEMBER_WIDTH if args.ensemble > 1 else WIDTH
    run = RUN.read(args) | NETWORK.read(args)
    return TrainingConfig(
        grpo=GRPOConfig(**ALGORITHM.read(args), **OBJECTIVE.read(args)),
        weights=RewardWeights(**REWARD.read(args)),
        plan=StatePlan(**PRICE.read(args)),
        hidden_dim=width if args.hidden_dim is None else args.hidden_dim,
        **run | {"patience": args.patience or None},
    )


def run(args: argparse.Namespace) -> int:
    """Read, train, say where it lies."""
    train_and_report(args, training_config(args), *read_data(args))
    return 0


def train_and_report(
    args: argparse.Namespace, config: TrainingConfig, table: ProfileTable, features: Features
) -> TrainingResult:
    """Train as the flags say, with lines on standard output and a bar on a terminal, and say how to go on."""
    import sys

    from budgetvlm.controller.training import with_splits
    from budgetvlm.live.guarded_training import train

    if args.check_each:
        require_several(table)
    drawn = table.split is None
    table = with_splits(table, config)
    if drawn:
        print(f"note: the table stores no splits; drawn by {table.unit_name}: {_counts(table)}")
    result = train(
        table, features, config, args.output_dir,
        members=args.ensemble, resume=args.resume, overwrite=args.overwrite, progress=sys.stderr.isatty(),
        mean_budget_ms=args.mean_budget_ms,
    )  # fmt: skip
    if args.check_each:
        train_each(args, config, table, features)
        say_who_is_sacrificed(args, result.controller, table, features)
    useless = useless_accuracies(table.accuracy) or choices_on_validation(result.controller, table, features)
    if useless:
        print(f"note: {useless}")
    print(f"next: {next_command(args, table)}")
    return result


def _counts(table: ProfileTable) -> str:
    """The number of samples of each split, and whether any are held out."""
    from budgetvlm.table import LEAST_UNITS, SPLITS

    counts = {side: (table.split or ()).count(side) for side in SPLITS}
    said = ", ".join(f"{side} {count}" for side, count in counts.items() if count)
    few = f"; fewer than {LEAST_UNITS} {table.unit_name}s are too few to hold some out for a test"
    return said + ("" if counts["test"] else few)


def next_command(args: argparse.Namespace, table: ProfileTable) -> str:
    """The command that evaluates what was trained, on the same data."""
    given = {"data": getattr(args, "output_data_path", None)} | vars(args)
    words = [word for name in ("data", "table", "features") if given.get(name) for word in (f"--{name}", given[name])]
    held_out = [] if "test" in (table.split or ()) else ["--split", "validation"]
    words += ["--checkpoint", args.output_dir, *held_out]
    return "budgetvlm evaluate " + shlex.join(map(str, words))
