"""Weights without some of a model's blocks, from files of safetensors to files of safetensors.

Tensors are copied as bytes, piece by piece: nothing is converted, and memory stays flat however large the model is.
Shapes: L blocks before, n of them kept.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from budgetvlm._io import read_json, write_json
from budgetvlm.errors import CheckpointError, ConfigError, OutputError
from budgetvlm.vlm.detect import is_language

INDEX = "model.safetensors.index.json"
PIECE = 1 << 24  # bytes that are copied at once
PER_BLOCK = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}  # the axis that has a part for each block
_NUMBERED = re.compile(r"(?P<list>.*?)\.(?P<block>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is, and where its bytes lie."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def axis(self) -> int | None:
        """The axis that has a part for each block; None: the tensor is of all blocks or of one."""
        return next((axis for part, axis in PER_BLOCK.items() if part in self.name.split(".")), None)


@dataclass(frozen=True)
class KeptBlocks:
    """Which of a model's blocks stay: their numbers, ascending, of L."""

    numbers: tuple[int, ...]
    whole: int

    def place(self, number: int) -> int | None:
        """Return a block's new number; None: it goes. Blocks behind the last (of multi-token prediction) follow it."""
        if number >= self.whole:
            return number - self.whole + len(self.numbers)
        return self.numbers.index(number) if number in self.numbers else None


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a model's weights: one, those that the index names, or all.

    Raises CheckpointError: the index names none.
    """
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    places = read_json(directory / INDEX).get("weight_map")
    if not places:
        raise CheckpointError(
            f"{directory / INDEX} says of no weight where it lies (weight_map). Copy the model again."
        )
    return [directory / name for name in sorted(set(places.values()))]


def read_tensors(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Return what a file holds in the order of its bytes, and its metadata. Raises CheckpointError: it is damaged."""
    try:
        with safe_open(path, framework="np") as file:  # checks that the file is whole
            metadata = file.metadata() or {}
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the model again.") from None
    header.pop("__metadata__", None)
    found = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    return sorted(found, key=lambda one: one.begin), metadata


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    begin, end = (start + offset for offset in entry["data_offsets"])
    return StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), begin, end)


def list_of_blocks(names: Sequence[str], num_blocks: int) -> str:
    """Return what the names of the language model's blocks begin with. Raises ConfigError: it cannot be told."""
    found: dict[str, set[int]] = {}
    with_attention = set()
    for name in names:
        if match := _NUMBERED.match(name):
            found.setdefault(match["list"], set()).add(int(match["block"]))
            with_attention |= {match["list"]} if re.search("att|qkv", match["rest"]) else set()
    likely = [one for one in with_attention if is_language(one.replace("encoder", ""))]
    exact = [one for one in likely if found[one] == set(range(num_blocks))]
    likely = exact or [one for one in likely if found[one] > set(range(num_blocks))]
    certain = likely if len(likely) == 1 else [one for one in likely if is_language(one)]
    if len(certain) != 1:
        raise ConfigError(
            f"the weights of the language model's {num_blocks} blocks cannot be told from others by their names: "
            f"{', '.join(sorted(certain)) or 'none'} of {', '.join(sorted(found)) or 'no numbered names'} would fit. "
            "This checkpoint cannot be exported"
        )
    return certain[0]


def renamed(tensors: Sequence[StoredTensor], prefix: str, kept: KeptBlocks) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors that stay, with their new names."""
    for one in tensors:
        match = _NUMBERED.match(one.name)
        if not match or match["list"] != prefix:
            yield one.name, one
        elif (place := kept.place(int(match["block"]))) is not None:
            yield f"{prefix}.{place}.{match['rest']}", one


def cut_weights(directory: Path, target: Path, kept: KeptBlocks, progress: Any) -> None:
    """Write the weights of the kept blocks, and all others, in files like the original's.

    Args:
        progress: a context that yields something with `update`, made from the number of bytes to be written.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: blocks cannot be told by their names.
        OutputError: the disk has less space than is needed.
    """
    read = [read_tensors(path) for path in weight_files(directory)]
    prefix = list_of_blocks([one.name for tensors, _ in read for one in tensors], kept.whole)
    files = [(list(renamed(tensors, prefix, kept)), metadata) for tensors, metadata in read]
    files = [(named, metadata) for named, metadata in files if named]
    total = sum(_size(one, kept) for named, _ in files for _, one in named)
    if total > (free := shutil.disk_usage(target).free):
        raise OutputError(
            f"{total / 1e9:.1f} GB are to be written to {target.parent}, which has {free / 1e9:.1f} GB left"
        )
    names = [_file_name(i, len(files)) for i in range(len(files))]
    with progress(total) as bar:
        for name, (named, metadata) in zip(names, files, strict=True):
            _write(target / name, named, metadata, kept, bar)
    if len(files) > 1:
        places = {new: name for name, (named, _) in zip(names, files, strict=True) for new, _ in named}
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _size(one: StoredTensor, kept: KeptBlocks) -> int:
    size = one.end - one.begin
    return size if one.axis is None else size // kept.whole * len(kept.numbers)


def _write(
    path: Path, named: Sequence[tuple[str, StoredTensor]], metadata: Mapping[str, str], kept: KeptBlocks, bar: Any
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, one in named:
        shape = list(one.shape)
        if one.axis is not None:
            shape[one.axis] = shape[one.axis] // kept.whole * len(kept.numbers)
        end = begin + _size(one, kept)
        header[name] = {"dtype": one.dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns what follows
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, one in named:
            for piece in _pieces(one, kept):
                bar.update(file.write(piece))
        file.flush()
        os.fsync(file.fileno())


def _pieces(one: StoredTensor, kept: KeptBlocks) -> Iterator[bytes]:
    """Yield a tensor's bytes, or those of its parts that belong to kept blocks."""
    with open(one.path, "rb") as file:
        file.seek(one.begin)
        if one.axis is None:
            for begin in range(one.begin, one.end, PIECE):
                yield file.read(min(PIECE, one.end - begin))
            return
        rows = math.prod(one.shape[: one.axis])
        size = (one.end - one.begin) // rows
        step = max(1, PIECE // size)
        for row in range(0, rows, step):
            parts = np.frombuffer(file.read(min(step, rows - row) * size), np.uint8)
            yield parts.reshape(-1, kept.whole, size // kept.whole)[:, list(kept.numbers)].tobytes()
