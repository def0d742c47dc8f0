"""Features of samples as arrays: what the controller sees of the image and of the question.

Shapes: S samples, Di image dimensions, Dl language dimensions. On disk: one safetensors file, ids in its header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from budgetvlm._io import atomic_path, check_schema, first_few, header_text
from budgetvlm.errors import DataError

SCHEMA_VERSION = 1
_HEADER = "budgetvlm.features"


@dataclass(frozen=True, eq=False)
class Features:
    """Image and language features, a row a sample.

    Attributes:
        sample_ids: ``[S]``, unique.
        image: float32 ``[S, Di]``, finite.
        language: float32 ``[S, Dl]``, finite.
        metadata: how they were made; JSON-able.

    Raises:
        DataError: anything above does not hold; all problems are named at once.
    """

    sample_ids: tuple[str, ...]
    image: np.ndarray
    language: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", tuple(str(name) for name in self.sample_ids))
        for name in ("image", "language"):
            try:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
            except (TypeError, ValueError) as error:
                raise DataError(f"the {name} features are not an array of numbers: {error}") from None
        problems = list(_problems(self))
        if problems:
            raise DataError("not usable as features: " + "; ".join(problems))

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.sample_ids)

    def __len__(self) -> int:
        return self.num_samples

    def aligned(self, sample_ids: Sequence[str]) -> Features:
        """Return the rows of these samples, in this order.

        Raises:
            DataError: a sample has no features; the ids are named.
        """
        if tuple(sample_ids) == self.sample_ids:
            return self
        row_of = {name: row for row, name in enumerate(self.sample_ids)}
        missing = set(sample_ids) - row_of.keys()
        if missing:
            raise DataError(
                f"{len(missing)} of {len(sample_ids)} samples have no features: {first_few(missing)}. "
                "Table and features have to come from the same data; prepare them again."
            )
        rows = np.array([row_of[name] for name in sample_ids], dtype=np.int64)
        return Features(tuple(sample_ids), self.image[rows], self.language[rows], self.metadata)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            OutputError: the directory cannot be written or the disk is full.
            DataError: the metadata is not JSON.
        """
        header = {"schema_version": SCHEMA_VERSION, "sample_ids": self.sample_ids, "metadata": self.metadata}
        tensors = {"image": np.ascontiguousarray(self.image), "language": np.ascontiguousarray(self.language)}
        data = to_bytes(tensors, metadata={_HEADER: header_text(header, "features")})
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read features that `save` wrote.

        Raises:
            DataError: the file is missing, truncated, or not such features.
        """
        path = Path(path)
        header, tensors = _read(path)
        check_schema(path, header, SCHEMA_VERSION)
        try:
            return cls(tuple(header["sample_ids"]), tensors["image"], tensors["language"], header["metadata"])
        except (KeyError, DataError) as error:
            raise DataError(f"{path} holds no usable features: {error}. Make it again.") from error


def _problems(features: Features) -> Iterator[str]:
    ids = features.sample_ids
    if not ids:
        yield "there are no samples"
    if len(set(ids)) != len(ids):
        yield "sample ids occur more than once"
    for name, values in (("image", features.image), ("language", features.language)):
        if values.ndim != 2 or len(values) != len(ids) or values.shape[1] < 1:
            yield f"{name} has shape {values.shape}; {len(ids)} samples need ({len(ids)}, dimensions)"
        elif not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            yield f"{name} of sample {ids[row]} is not finite"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; `budgetvlm prepare` and `import` write features (.safetensors)")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_HEADER)
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        tensors = _tensors(path, shapes)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a safetensors file, or truncated ({error}). Make it again.") from None
    if text is None:
        raise DataError(f"{path} is a safetensors file but holds no features; write them with Features.save()")
    header: dict[str, Any] = json.loads(text)
    return header, tensors


def _tensors(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Read the float32 tensors of a safetensors file that was found sound.

    The library maps the file and copies from there, so that the features would be in memory twice. Layout: the header's
    length in 8 bytes, the header, the data (https://github.com/huggingface/safetensors#format).
    """
    with path.open("rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    for name in shapes:
        if header[name]["dtype"] != "F32":
            raise DataError(f"{path} holds {header[name]['dtype']} numbers as {name}, not float32; make it again")
    places = {name: start + header[name]["data_offsets"][0] for name in shapes}
    return {
        name: np.fromfile(path, np.dtype("<f4"), math.prod(shape), offset=places[name]).reshape(shape)
        for name, shape in shapes.items()
    }
