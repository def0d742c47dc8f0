"""Train a controller with GRPO on a profile table and its samples' features.

The best controller on the validation split is kept. Without --group_size every setting of a state is weighed (exact
gradient); with it, that many are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.training import TrainingResult
    from budgetvlm.controller.training_options import TrainingConfig
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

WIDTH, MEMBER_WIDTH = 256, 128  # an ensemble of narrow controllers decides as quickly as a wide one
REWARD_WEIGHTS = {
    "alpha": (1.0, "accuracy"),
    "beta": (0.5, "soft latency penalty"),
    "gamma": (10.0, "penalty for a violated budget"),
    "delta": (0.1, "bonus for what is left of the budget"),
    "epsilon": (0.05, "penalty for complexity"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm train`."""
    add_data_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="checkpoints, figures and logs")
    add_training_arguments(parser, group_size=None)


def add_training_arguments(parser: argparse.ArgumentParser, *, group_size: int | None) -> None:
    """The flags that the guide's script has too; only the default of --group_size differs."""
    training = parser.add_argument_group("training")
    training.add_argument("--batch_size", type=int, default=64, metavar="N", help="states an update (default: 64)")
    training.add_argument("--num_epochs", type=int, default=100, metavar="N", help="default: 100")
    training.add_argument("--lr", type=float, default=1e-4, metavar="X", help="learning rate (default: 1e-4)")
    drawn = f"default: {group_size}" if group_size else "default: all settings, exactly"
    training.add_argument(
        "--group_size", type=int, default=group_size, metavar="G", help=f"settings drawn for each state ({drawn})"
    )
    training.add_argument(
        "--train_split", type=float, default=0.8, metavar="X",
        help="share of training samples, the rest is for validation; unused where the data has its own splits "
        "(default: 0.8)",
    )  # fmt: skip
    training.add_argument(
        "--scale_rewards", default="none", choices=["none", "group", "batch"],
        help="divide advantages by the std of the group or the batch; none learns, group collapses to the cheapest "
        "setting (default: none)",
    )  # fmt: skip
    training.add_argument("--beta", type=float, default=0.0, metavar="X", help="weight of the KL term (default: 0)")
    training.add_argument(
        "--entropy_coef", type=float, default=0.05, metavar="X", help="weight of the entropy bonus (default: 0.05)"
    )
    training.add_argument(
        "--patience", type=int, default=15, metavar="N",
        help="stop after so many epochs without a better validation reward; 0 never stops early (default: 15)",
    )  # fmt: skip
    training.add_argument(
        "--teachers", type=int, default=1, metavar="N",
        help="start from the accuracies that N supervised networks predict; 0: from the lookup table (default: 1)",
    )  # fmt: skip
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    training.add_argument(
        "--ensemble", type=int, default=1, metavar="N",
        help="train N controllers with different seeds and average them in one checkpoint (default: 1)",
    )  # fmt: skip
    training.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    _add_network_arguments(parser)
    _add_objective_arguments(parser)
    earlier = parser.add_argument_group("an earlier run in --output_dir")
    earlier.add_argument("--resume", action="store_true", help="continue it")
    earlier.add_argument("--overwrite", action="store_true", help="replace it")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden_dim", type=int, metavar="N",
        help=f"default: {WIDTH}, and {MEMBER_WIDTH} for the members of an ensemble",
    )  # fmt: skip
    network.add_argument("--dropout", type=float, default=0.5, metavar="X", help="default: 0.5")
    network.add_argument(
        "--feature_dim", type=int, metavar="N",
        help="reduce each feature to N principal components, fitted on the training split (default: no reduction)",
    )  # fmt: skip


def _add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--objective", default="constrained", choices=["constrained", "reward"],
        help="constrained: accuracy minus a price for latency, among the settings that the budget allows; reward: the "
        "guide's formula with the --reward_* weights, where the budget is a penalty (default: constrained)",
    )  # fmt: skip
    objective.add_argument(
        "--price", type=float, default=0.01, metavar="P",
        help="constrained: accuracy given for one full latency; a small one breaks ties (default: 0.01)",
    )  # fmt: skip
    for name, (default, meaning) in REWARD_WEIGHTS.items():
        text = f"reward: {meaning} (default: {default:g})"
        objective.add_argument(f"--reward_{name}", type=float, default=default, metavar="X", help=text)


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """The options of these flags.

    Raises:
        ConfigError: flags that cannot work, before any data is read.
    """
    from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, StatePlan, TrainingConfig

    if args.ensemble < 1:
        raise ConfigError(f"--ensemble {args.ensemble} is no number of controllers; give 1 or more")
    return TrainingConfig(
        grpo=GRPOConfig(
            objective=args.objective,
            num_generations=args.group_size,
            beta=args.beta,
            scale_rewards=args.scale_rewards,
            entropy_coef=args.entropy_coef,
            learning_rate=args.lr,
            batch_size=args.batch_size,
            num_epochs=args.num_epochs,
        ),
        weights=RewardWeights(**{name: getattr(args, f"reward_{name}") for name in REWARD_WEIGHTS}),
        plan=StatePlan(default_price=args.price),
        hidden_dim=_width(args),
        dropout=args.dropout,
        feature_dim=args.feature_dim,
        train_split=args.train_split,
        patience=args.patience or None,
        teachers=args.teachers,
        seed=args.seed,
        device=args.device,
    )


def _width(args: argparse.Namespace) -> int:
    if args.hidden_dim is not None:
        return int(args.hidden_dim)
    return MEMBER_WIDTH if args.ensemble > 1 else WIDTH


def run(args: argparse.Namespace) -> int:
    """Read, train, say where it lies."""
    config = training_config(args)
    table, features = read_data(args)
    train_and_report(args, config, table, features)
    return 0


def train_and_report(
    args: argparse.Namespace, config: TrainingConfig, table: ProfileTable, features: Features
) -> TrainingResult:
    """Train as the flags say, with lines on standard output and a bar on a terminal."""
    import sys

    from budgetvlm.controller.ensembling import train_ensemble
    from budgetvlm.controller.training import train

    how = {"resume": args.resume, "overwrite": args.overwrite, "progress": sys.stderr.isatty()}
    if args.ensemble > 1:
        return train_ensemble(table, features, config, args.output_dir, args.ensemble, **how)
    return train(table, features, config, args.output_dir, **how)
