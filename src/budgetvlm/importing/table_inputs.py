"""Questions and images of a table that brings no features: of a data set's samples, or out of the table's columns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from budgetvlm.errors import DataError
from budgetvlm.importing.flat_tables import INPUTS
from budgetvlm.profiling.prepare.made_features import Inputs, MakeOptions, Picture, inputs_of_samples
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SplitSample

LONGEST_SHOWN = 100  # characters of a name in a message
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def inputs_of(table: ProfileTable, samples: Sequence[SplitSample], options: MakeOptions) -> tuple[ProfileTable, Inputs]:
    """Take questions and images of a data set's samples, or out of the table's labels, where reading put them.

    Files of images become the table's ``image_id``. Raises DataError: there is neither, or an image is missing.
    """
    if samples:
        return table, inputs_of_samples(table.metadata.get("dataset_name", ""), samples)
    questions, names = (table.groups.get(label) for label in INPUTS)
    groups = {label: held for label, held in table.groups.items() if label not in INPUTS or label == table.unit}
    if names is not None:
        groups.setdefault("image_id", names)
    elif options.image_dir is not None:
        names = groups.get("image_id", table.sample_ids)
    if questions is None and names is None:
        raise DataError(
            "features are made from questions, and no column is called question. Say which one it is with --column "
            "question=NAME (import table; images: --column image=NAME or --image_dir DIR), or name the data set with "
            "--dataset_name"
        )
    pictures = None if names is None else _pictures(table.sample_ids, names, options)
    return replace(table, groups=groups), Inputs(questions or [""] * table.num_samples, pictures)


def _pictures(sample_ids: Sequence[str], names: Sequence[str], options: MakeOptions) -> list[Picture]:
    """Find the file of each sample's image. Raises DataError: there is none; the sample and its row are named."""
    folders = [folder for folder in (options.image_dir, options.beside) if folder is not None]
    found: dict[str, tuple[str, Path]] = {}
    pictures = []
    for row, (sample_id, name) in enumerate(zip(sample_ids, names, strict=True)):
        where = f"image of sample {sample_id} (number {row + 1})"
        if name not in found:
            path = next(filter(_is_file, _places(name, folders)), None)
            if path is None:
                shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}… ({len(name)} characters)"
                looked = " or ".join(map(str, folders)) or "the working directory"
                raise DataError(f"{where}: there is no file {shown} in {looked}. Give its folder with --image_dir.")
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest(), path
        key, path = found[name]
        pictures.append(Picture(key, where, partial(Path, path)))
    return pictures


def _places(name: str, folders: Iterable[Path]) -> list[Path]:
    """List where an image may lie: as it is named, or with the ending of a picture."""
    bases = [Path(name), *(folder / name for folder in folders)]
    return [base.with_name(base.name + ending) for base in bases if base.name for ending in ("", *PICTURES)]


def _is_file(path: Path) -> bool:
    """Whether there is such a file; what is too long for a name, such as an image's own bytes as text, is none."""
    try:
        return path.is_file()
    except OSError:
        return False
