"""`train --check_each`: a controller for each data set alone, and how far the common one is from it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from budgetvlm.commands.trained_policies import data_sets_of, own_controllers
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.controller.training_options import TrainingConfig
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable


def require_several(table: ProfileTable) -> None:
    """Raise ConfigError where there is one data set."""
    if len(data_sets_of(table)) < 2:
        raise ConfigError("--check_each compares data sets, and this is one; leave it out")


def train_each(args: argparse.Namespace, config: TrainingConfig, table: ProfileTable, features: Features) -> None:
    """Train a controller for each data set alone, as the common one was."""
    import sys

    import numpy as np

    from budgetvlm.controller.run_directory import EACH
    from budgetvlm.live.guarded_training import train
    from budgetvlm.table import DATASET

    labels = np.array(table.groups[DATASET])
    for name in data_sets_of(table):
        print(f"for {name} alone:")
        train(
            table.subset(labels == name), features, config, args.output_dir / EACH / name,
            members=args.ensemble, resume=args.resume, overwrite=args.overwrite, progress=sys.stderr.isatty(),
        )  # fmt: skip


def say_who_is_sacrificed(
    args: argparse.Namespace, controller: GRPOController, table: ProfileTable, features: Features
) -> None:
    """Print each data set's accuracy with the common controller and with its own, on samples that neither has seen."""
    from budgetvlm.controller.policy import ControllerPolicy
    from budgetvlm.evaluation.data_sets import on_data_sets, said_of_data_sets
    from budgetvlm.evaluation.evaluation_options import EvaluationOptions
    from budgetvlm.evaluation.text_tables import dataset_tables, plain_text

    split = "test" if "test" in (table.split or ()) else "validation"
    own = own_controllers([args.output_dir], table, features, split)
    assert own is not None
    results = on_data_sets(table, features, ControllerPolicy(controller), own, EvaluationOptions(split=split))
    for part in dataset_tables(results):
        print(plain_text(part))
    for sentence in said_of_data_sets(results):
        print(f"note: {sentence} ({split} samples)" if split == "validation" else f"note: {sentence}")
