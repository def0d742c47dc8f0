"""`budgetvlm adapt --from`: a controller of a new model, from earlier tables and a few labelled samples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.data_arguments import read_data, several_files
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable
MEMBERS, WIDTH = 5, 128  # of the ensemble, which is better than one network where samples are few


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--from."""
    model = parser.add_argument_group("to a new model, or new knob values")
    model.add_argument(
        "--from", dest="earlier", metavar="FILE[,FILE]",
        help="prepared data (.json) or imported tables (.parquet, their features beside them) of earlier models with "
        "the same knobs; --data is then a few labelled samples (100) of the new one, and a controller is trained",
    )  # fmt: skip


def to_model(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train in --output_dir; return what is known, for programs and for people."""
    from budgetvlm.adaptation.new_model import NewModel
    from budgetvlm.live.guarded_training import train

    if args.output_dir is None:
        raise ConfigError("--from trains a controller of the new model; say where it goes with --output_dir DIR")
    made = NewModel.of([_read(path) for path in several_files(Path(args.earlier))], *read_data(args), args.seed)
    config = TrainingConfig(hidden_dim=WIDTH, seed=args.seed)
    said: list[str] = []
    train(
        made.table, made.features, config, args.output_dir,
        members=MEMBERS, overwrite=args.overwrite, say=said.append, progress=sys.stderr.isatty(),
    )  # fmt: skip
    found = {**made.report, "output_dir": str(args.output_dir)}
    following = f"next, on this machine: budgetvlm calibrate --checkpoint {args.output_dir} --data {args.data}"
    return found, "\n".join([*_lines(found), said[-1], following])


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    error = found["error"]
    carried = ", ".join(f"{share:.0%}" for share in found["carried_over"])
    yield (
        f"from {found['labelled']} labelled samples, {found['shared']} of which an earlier table has too; "
        f"{found['samples']} samples to learn from"
    )
    yield f"what tells inputs apart in the earlier models' accuracies counts {carried}"
    yield (
        f"error (root mean square) on labels held out in turn: {error['carried_over']:.3f}; "
        f"{error['unchanged']:.3f} if nothing had changed, {error['labels_alone']:.3f} by the labels' means alone"
    )
    yield "expected accuracy of each setting, with the half of its 95% interval:"
    for one in found["settings"]:
        words = ", ".join(f"{name}={value:g}" for name, value in one["setting"].items())
        yield f"{one['accuracy']:7.1%} ± {one['half_width']:5.1%}  {words}"


def _read(path: Path) -> tuple[ProfileTable, Features]:
    """A table and its features. Raises DataError."""
    if path.suffix == ".parquet":
        from budgetvlm.controller.training import with_splits
        from budgetvlm.features import Features
        from budgetvlm.table import ProfileTable

        table = with_splits(ProfileTable.load(path))
        return table, Features.load(path.with_suffix(".features.safetensors")).aligned(table.sample_ids)
    from budgetvlm.profiling.prepare.prepared_data import load_prepared

    prepared = load_prepared(path)
    return prepared.table, prepared.features
