"""Samples that a file numbers instead of naming them: which sample of the split each number means.

A whole number is a sample's index in the split. Some tools, though, number the samples of each batch or of each rank
from 0 on. Where the ranks took turns (rank r of W has the samples r, r + W, r + 2W, ... of the split), the index can be
told all the same: from the place in the file (accuracy, where no sample is left out) or from the rank's own number
(latency, where a sample that failed is left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

from budgetvlm.errors import DataError
from budgetvlm.profiling.results.layout import FORMATS, Kind, SettingResult


def rank_of(result: SettingResult[Any], kind: Kind) -> int | None:
    """Return the rank in the file's name; None in a file that holds all of them."""
    match = FORMATS[kind].pattern.fullmatch(result.paths[0].name)
    return int(match[4]) if match and match[4] is not None else None


def number_by_split(kind: Kind, parts: Sequence[SettingResult[Any]]) -> list[SettingResult[Any]]:
    """Number the samples of the files of one setting by their index in the split, where they are not already.

    Numbers are a batch's or a rank's own if more of them repeat than the ranks could have samples in common: W ranks
    repeat at most W - 1, to be of equal length.

    Raises:
        DataError: a merged file that does not show where one rank ends and the next begins.
    """
    world_size = parts[0].config.get("world_size")
    if not all(part.indexed for part in parts) or not isinstance(world_size, int) or world_size < 1:
        return list(parts)
    merged = [part for part in parts if rank_of(part, kind) is None]
    numbers = list(chain.from_iterable(_numbers(part) for part in merged or parts))
    if len(numbers) - len(set(numbers)) < world_size or not _start_again(kind, numbers, world_size):
        return list(parts)
    return [_renumbered(kind, part, world_size) for part in parts]


def _start_again(kind: Kind, numbers: Sequence[int], world_size: int) -> bool:
    """Tell whether numbers start again with each batch or rank, and are not of samples that occur twice by mistake.

    Accuracy: 0, 1, 2, ... again and again. Latency: only several ranks can have the same numbers.
    """
    if kind == "latency":
        return world_size > 1
    return numbers[0] == 0 and all(b in (0, a + 1) for a, b in pairwise(numbers))


def _renumbered(kind: Kind, part: SettingResult[Any], world_size: int) -> SettingResult[Any]:
    rank = rank_of(part, kind)
    numbers = _numbers(part)
    if rank is not None:
        runs = {rank: list(range(len(numbers))) if kind == "accuracy" else numbers}
    else:
        runs = dict(enumerate(_ranks_of_merged(kind, part, numbers, world_size)))
    indices = [local * world_size + rank for rank, run in runs.items() for local in run]
    named = (replace(r, sample_id=str(index)) for r, index in zip(part.records, indices, strict=True))
    return replace(part, records=tuple(named))


def _ranks_of_merged(kind: Kind, part: SettingResult[Any], numbers: list[int], world_size: int) -> list[list[int]]:
    """Return the numbers of each rank within a file that holds one rank after the other."""
    if kind == "accuracy":
        share, rest = divmod(len(numbers), world_size)
        runs = [list(range(share))] * world_size if not rest else []
    else:
        starts = [0, *(place for place, (a, b) in enumerate(pairwise(numbers), 1) if b <= a), len(numbers)]
        runs = [numbers[start:end] for start, end in pairwise(starts)]
    if len(runs) != world_size:
        raise DataError(
            f"{part.paths[0]}: field sample_id starts again and again, and the {len(numbers)} samples do not show "
            f"where each of the {world_size} ranks (field config.world_size) begins, so that nobody can tell which "
            "sample of the split each is. Number the samples by their index in the split, or give the ranks' own files."
        )
    return runs


def _numbers(part: SettingResult[Any]) -> list[int]:
    return [int(record.sample_id) for record in part.records]
