"""Trained controllers as policies on a table that they fit and whose evaluated samples they have not seen."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.errors import BudgetVLMWarning, CheckpointError, ConfigError, KnobSpaceError

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.features import Features
    from budgetvlm.policies import Policy
    from budgetvlm.policies.by_label import ByLabel
    from budgetvlm.table import ProfileTable


def read_controllers(
    paths: list[Path], table: ProfileTable, features: Features, split: str
) -> tuple[ProfileTable, dict[str, Policy]]:
    """The table, and one policy for each checkpoint, named after its path.

    A table without splits gets those that the first controller was trained with, or would be.

    Args:
        split: of the table, that they are to be measured on.

    Raises:
        CheckpointError, KnobSpaceError: a checkpoint cannot be read or does not fit the data.
        DataError: it was trained on samples of this split.
    """
    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.controller.training import with_splits

    controllers = {name: load_controller(path) for name, path in zip(checkpoint_names(paths), paths, strict=True)}
    if table.split is None:
        first = next(iter(controllers.values()), None)
        table = first.trained_on.with_splits(table, str(paths[0])) if first else with_splits(table)
        print("note: the table stores no splits; those that training draws are used", file=sys.stderr)
    named = zip(controllers.items(), paths, strict=True)
    return table, {name: _policy(one, path, table, features, split) for (name, one), path in named}


def _policy(controller: GRPOController, path: Path, table: ProfileTable, features: Features, split: str) -> Policy:
    from budgetvlm.controller.policy import ControllerPolicy
    from budgetvlm.controller.provenance import TrainedOn

    if controller.knob_space != table.knob_space:
        raise KnobSpaceError(
            f"the checkpoint {path} was trained for another knob space ({controller.knob_space}) than the table's "
            f"({table.knob_space}); give the table that it was trained on, or train on this one"
        )
    wanted = (controller.config["image_feat_dim"], controller.config["lang_feat_dim"])
    given = (features.image.shape[1], features.language.shape[1])
    if wanted != given:
        raise CheckpointError(
            f"the checkpoint {path} reads {wanted[0]} image and {wanted[1]} language features a sample; the features "
            f"given have {given[0]} and {given[1]}. Give the features that it was trained on, or train on these."
        )
    controller.trained_on.require_unseen(table, split, str(path))
    measured = TrainedOn.of_table(table).model
    if None not in (measured, controller.trained_on.model) and measured != controller.trained_on.model:
        warnings.warn(
            f"the checkpoint {path} was trained for other weights than those that this data was measured with, so its "
            "figures say how it carries over, not how good it is",
            BudgetVLMWarning,
            stacklevel=2,
        )
    return ControllerPolicy(controller)


def checkpoint_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or the whole path where the last parts do not differ."""
    short = [path.name or str(path) for path in paths]
    names = short if len(set(short)) == len(paths) else [str(path) for path in paths]
    if len(set(names)) != len(names):
        raise ConfigError(f"the same checkpoint is given twice: {', '.join(names)}; give each seed once")
    return names


def own_controllers(paths: list[Path], table: ProfileTable, features: Features, split: str) -> ByLabel | None:
    """The controllers that lie beside one which was trained on all data sets; None where they do not.

    Raises as `read_controllers`.
    """
    from budgetvlm.controller.run_directory import EACH
    from budgetvlm.policies.by_label import ByLabel
    from budgetvlm.table import DATASET

    names = data_sets_of(table)
    places = [paths[0] / EACH / name for name in names] if len(paths) == 1 else []
    if len(names) < 2 or not all(place.is_dir() for place in places):
        return None
    _, policies = read_controllers(places, table, features, split)
    return ByLabel(DATASET, dict(zip(names, policies.values(), strict=True)))


def data_sets_of(table: ProfileTable) -> list[str]:
    """The data sets of a table, sorted; none where it tells none apart."""
    from budgetvlm.table import DATASET

    return sorted(set(table.groups.get(DATASET, ())))
