"""Training data in its files: the JSON document, and beside it the features and the same table as Parquet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetvlm._io import write_json
from budgetvlm._version import __version__
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.profiling.prepare.document import REMEDY, read_document, to_document, to_table
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions
from budgetvlm.table import ProfileTable

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Training data and where it lies.

    Attributes:
        table: the profile table, with splits.
        features: a row for each of the table's samples, in its order.
        path: the JSON document; `features_path` and `table_path` tell where the rest lies.
        reused: whether it was there already.
    """

    table: ProfileTable
    features: Features
    path: Path
    reused: bool = False


def write_prepared(
    options: PrepareOptions, table: ProfileTable, features: Features, how: Mapping[str, Any], say: Say
) -> PreparedData:
    """Write table and document, the document last; ``how``: what it is made of."""
    path = options.output_data_path
    document = to_document(
        table,
        {
            **how,
            "split_options": {name: getattr(options, name) for name in ("train_split", "test_split", "seed")},
            "files": {"features": features_path(path).name, "table": table_path(path).name},
            "made_by": f"budgetvlm {__version__}: prepare --exp5_dir {options.exp5_dir} --exp6_dir {options.exp6_dir}",
        },
    )
    table.save(table_path(path))
    write_json(path, document)
    sides = ", ".join(f"{name} {count}" for name, count in document["splits"]["samples"].items())
    say(
        f"wrote {path}: {table.num_samples} samples ({sides}; split by {document['splits']['by']}), "
        f"{table.metadata['measured_settings']} settings, {features.image.shape[1]} image and "
        f"{features.language.shape[1]} language features"
    )
    return PreparedData(table, features, path)


def load_prepared(path: str | Path) -> PreparedData:
    """Read what `prepare` wrote. Raises DataError: a file is missing, damaged, or does not belong to the others."""
    path = Path(path)
    document = read_document(path)
    table = to_table(document, path)
    features = Features.load(features_path(path))
    if features.metadata.get("key") != document.get("features_key"):
        raise DataError(f"{features_path(path)} was made for other data than {path}. {REMEDY}")
    return PreparedData(table, features.aligned(table.sample_ids), path, reused=True)


def features_path(path: str | Path) -> Path:
    """Return where the features of a JSON document lie."""
    return Path(path).with_suffix(".features.safetensors")


def table_path(path: str | Path) -> Path:
    """Return where the Parquet table of a JSON document lies."""
    return Path(path).with_suffix(".table.parquet")
