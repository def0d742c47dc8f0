"""A split of a data set once its columns are known, and the images of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.errors import DataError, InputError
from budgetvlm.tasks.found_columns import Columns
from budgetvlm.tasks.sources import Source, TextSource
from budgetvlm.tasks.values import image_file, joined_id

_LONGEST_REFERENCE = 64  # characters of a cell that can be another row's id


@dataclass(frozen=True)
class OpenedSplit:
    """A split opened: its rows, the columns that each role takes, how many samples each row makes ``[rows]``."""

    source: Source
    columns: Columns
    counts: np.ndarray

    @property
    def text_columns(self) -> list[str]:
        """What is read of each row: all but the image, unless that is only a file's name."""
        roles = [role for role in self.columns if role != "image" or isinstance(self.source, TextSource)]
        return list(dict.fromkeys(name for role in roles for name in self.columns[role]))

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each id: in tables of VLMEvalKit, a cell that is another row's id stands for that row's image."""
        names = self.columns.get("sample_id", ())
        return {joined_id(values, names): row for row, values in self.source.rows(names)} if names else {}

    def picture(self, row: int, value: Any) -> bytes | Path | None:
        """Return a row's image file, its contents or where it lies; None for an empty cell. Raises as `image_file`."""
        data, name = image_file(value)
        if data is not None or name is None:
            return data
        path = (self.source.folder(row) or Path()) / name
        short = len(name) <= _LONGEST_REFERENCE and isinstance(self.source, TextSource)
        if short and not path.exists() and name in self.row_of:
            data = image_file(self.source.value(self.row_of[name], self.columns["image"][0]))[0]
        return path if data is None else data

    def load_image(self, row: int, cell: Any, name: str, problem: str) -> Image.Image:
        """Load and decode the image of a sample, perhaps from a ``cell`` that was read already.

        Raises InputError, with the sample's ``name``, for whatever is wrong; ``problem`` says what is, whatever its
        image.
        """
        if problem:
            raise InputError(f"{name} cannot be used: {problem}")
        try:
            value = cell if cell is not None else self.source.value(row, self.columns["image"][0])
            found = value if isinstance(value, Image.Image) else self.picture(row, value)
            if found is None:
                raise InputError("it has no image")
            return open_image(found)
        except (InputError, DataError) as error:
            raise InputError(f"{name} cannot be used: {error}") from None
