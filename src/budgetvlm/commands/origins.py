"""What a command need not be told about model and data set, because the data or the checkpoint that it is given knows.

A flag that is given wins; then what `budgetvlm prepare` wrote (--data), then what the checkpoint was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import add_model_flags, forget_defaults

if TYPE_CHECKING:
    from budgetvlm.controller.provenance import TrainedOn
BUNDLED = "reference"


def add_opened_model(parser: Any) -> None:
    """Add the flags of the model that a controller was trained for."""
    add_model_flags(parser)
    parser.add_argument(
        "--allow_other_model", action="store_true",
        help="use a controller or a guard although it was made for other weights than the model's",
    )  # fmt: skip


def complete(args: argparse.Namespace) -> list[TrainedOn]:
    """Fill in the flags that were not given, and return the origins that they come from. Raises as `complete_from`."""
    forget_defaults(args, "model_path", "dataset_name", "split", "samples")
    data = getattr(args, "data", None)
    given = args.checkpoint if isinstance(args.checkpoint, list) else [args.checkpoint]
    checkpoint = given[0] if len(given) == 1 else None
    found = [origin for origin in _read(data, checkpoint) if origin.opened or origin.samples]
    complete_from(args, next((origin.opened for origin in found if "model_path" in origin.opened), {}))
    return found


def complete_from(args: argparse.Namespace, opened: Mapping[str, Any]) -> None:
    """Fill in the flags of model and data set that were not given by what is known; the rest gets its default.

    Raises:
        ConfigError: a flag of the data set that contradicts what was profiled.
    """
    args.model_path = args.model_path or opened.get("model_path") or BUNDLED
    same_data = not hasattr(args, "dataset_name") or _complete_task(args, opened)
    if same_data and "max_new_tokens" in opened and "max_new_tokens" not in getattr(args, "given", ("max_new_tokens",)):
        args.max_new_tokens = opened["max_new_tokens"]


def split_with_fresh_samples(known: list[TrainedOn]) -> str | None:
    """Return the task's split that has samples which were neither trained nor evaluated on, where the data tells."""
    splits = [str(origin.opened["calibration_split"]) for origin in known if "calibration_split" in origin.opened]
    return splits[0] if splits else None


def _complete_task(args: argparse.Namespace, opened: Mapping[str, Any]) -> bool:
    """Fill in the flags of the data set; whether it is the one that is known."""
    from budgetvlm.tasks.options import TaskOptions

    known = str(opened.get("dataset_name") or TaskOptions.dataset_name)
    given = {name: getattr(args, name) for name in ("data_files", "columns", "metric", "prompt", "repository")}
    options = TaskOptions(args.dataset_name or known, **given)
    args.dataset_name = options.dataset_name
    if options.name != TaskOptions(known).name or not opened:
        return False
    vars(args).update(options.remembered(opened.get("task", {})).to_dict())
    return True


def _read(data: Path | None, checkpoint: Path | None) -> Iterator[TrainedOn]:
    if data is None and checkpoint is None:
        return  # and nothing is imported
    from budgetvlm.controller.provenance import TrainedOn

    if data is not None:
        from budgetvlm.profiling.prepare.document import read_document, to_table

        yield TrainedOn.of_table(to_table(read_document(data), data))
    if checkpoint is not None:
        yield TrainedOn.read(Path(checkpoint))
