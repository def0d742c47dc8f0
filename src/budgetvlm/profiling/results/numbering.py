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

from budgetvlm.errors import DataError
from budgetvlm.profiling.results.result_files import Kind, SettingResult


def number_by_split(kind: Kind, parts: Sequence[SettingResult]) -> Sequence[SettingResult]:
    """Number the samples of the files of one setting by their index in the split, where they are not already.

    Numbers are a batch's or a rank's own if more of them repeat than the ranks could have samples in common: W ranks
    repeat at most W - 1, to be of equal length.

    Raises:
        DataError: a merged file that does not show where one rank ends and the next begins.
    """
    world_size = parts[0].config.get("world_size")
    if not all(part.indexed for part in parts) or not isinstance(world_size, int) or world_size < 1:
        return parts
    merged = [part for part in parts if part.rank is None]
    numbers = list(chain.from_iterable(_numbers(part) for part in merged or parts))
    if kind == "accuracy":  # 0, 1, 2, ... again and again
        own = numbers[0] == 0 and all(b in (0, a + 1) for a, b in pairwise(numbers))
    else:  # only several ranks can have the same numbers
        own = world_size > 1
    if not own or len(numbers) - len(set(numbers)) < world_size:
        return parts
    return [_renumbered(kind, part, world_size) for part in parts]


def _renumbered(kind: Kind, part: SettingResult, world_size: int) -> SettingResult:
    numbers = _numbers(part)
    if part.rank is None:
        runs = dict(enumerate(_ranks_of_merged(kind, part, numbers, world_size)))
    else:
        runs = {part.rank: list(range(len(numbers))) if kind == "accuracy" else numbers}
    indices = [local * world_size + rank for rank, run in runs.items() for local in run]
    named = (replace(r, sample_id=str(index)) for r, index in zip(part.records, indices, strict=True))
    return replace(part, records=tuple(named))


def _ranks_of_merged(kind: Kind, part: SettingResult, numbers: list[int], world_size: int) -> list[list[int]]:
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


def _numbers(part: SettingResult) -> list[int]:
    return [int(record.sample_id) for record in part.records]
