"""The profiled data that a command works on: a table and its features, or what `budgetvlm prepare` wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable
REMEDY = "give either --table and --features, or --data alone; they say what to work on"


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--table, --features and --data."""
    data = parser.add_argument_group("data (either --table and --features, or --data)")
    data.add_argument(
        "--table", type=Path, metavar="FILE", help="profile table (.parquet), or one of each data set: a,b"
    )
    data.add_argument("--features", type=Path, metavar="FILE", help="its samples' features (.safetensors), or a,b")
    data.add_argument("--data", type=Path, metavar="FILE", help="controller_training_data.json of `budgetvlm prepare`")
    data.add_argument(
        "--groups", metavar="LABEL",
        help="label whose samples belong together, so that no split and no resample parts them: image_id, a document, "
        "a template; sample_id: each by itself (default: what the table was made with, or the image)",
    )  # fmt: skip


def read_data(args: argparse.Namespace) -> tuple[ProfileTable, Features]:
    """The table and its features. Raises ConfigError for flags that name neither or both, DataError for their files."""
    table, features = read_table(args)
    if features is None:
        raise ConfigError(REMEDY)
    return table, features


def read_table(args: argparse.Namespace) -> tuple[ProfileTable, Features | None]:
    """As `read_data`, but a table may come without features."""
    table, features = _read(args)
    if not args.groups:
        return table, features
    if args.groups not in (*table.groups, "sample_id"):
        known = ", ".join((*table.groups, "sample_id"))
        raise ConfigError(f"--groups {args.groups} is no label of the table; it has {known}")
    try:
        return table.grouped_by(args.groups), features
    except DataError as error:
        raise DataError(
            f"--groups {args.groups} does not fit the splits of this table ({error}); import or prepare it again with "
            "--groups, which draws them by it"
        ) from None


def _read(args: argparse.Namespace) -> tuple[ProfileTable, Features | None]:
    if args.data is not None and args.table is None and args.features is None:
        from budgetvlm.profiling.prepare.prepared_data import load_prepared

        prepared = load_prepared(args.data)
        return prepared.table, prepared.features
    if args.table is None or args.data is not None:
        raise ConfigError(REMEDY)
    from budgetvlm.features import Features
    from budgetvlm.profiling.prepare.joined_tables import join_features, join_tables
    from budgetvlm.table import ProfileTable

    paths = several_files(args.table)
    loaded = [ProfileTable.load(path) for path in paths]
    tables = {str(t.metadata.get("dataset_name", path.stem)): t for path, t in zip(paths, loaded, strict=True)}
    if len(tables) < len(paths):
        raise ConfigError(f"--table {args.table} names a data set twice; give the files other names, or each once")
    if args.features is None:
        return join_tables(tables, say), None
    given = several_files(args.features)
    if len(given) != len(paths):
        raise ConfigError(f"{len(given)} files of features for {len(paths)} tables; give one of each, in one order")
    features = {name: Features.load(path) for name, path in zip(tables, given, strict=True)}
    return join_tables(tables, say), join_features(features)


def several_files(path: Path) -> list[Path]:
    """The files that a flag names, separated by commas."""
    return [path] if path.exists() else [Path(part.strip()) for part in str(path).split(",")]


def say(text: str) -> None:
    """Print a line beside what the command prints."""
    print(f"note: {text}", file=sys.stderr)
