"""The knob values that a model can take: derived where none are given, checked where some are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import KNOBS, KnobSpace
from budgetvlm.vlm import blocks
from budgetvlm.vlm.attention import unknown_kinds
from budgetvlm.vlm.families.base import Family, Images

ORDINARY_SIZES = (480, 640), (640, 480), (720, 1280), (1024, 1024), (3024, 4032)  # height, width


def derive_knob_space(family: Family, model: Any, images: Images) -> KnobSpace:
    """Make a knob space for a model that brings none: powers and the most of crops, shares of experts and of blocks.

    A knob that the model lacks is left out; so is one that could take one value only, and values of `max_crops` that
    change nothing.

    Raises ConfigError: no knob is left.
    """
    num_blocks = family.num_blocks(model)
    knobs: dict[str, list[int]] = {"max_crops": distinct_crops(images, images.crop_values())}
    dials = family.dials(model)
    if dials:
        knobs["top_k"] = _shares(min(dial.get() for dial in dials), (0.25, 0.5, 1.0), least=1)
    if not unknown_kinds(family.language(model)):
        least = blocks.least_depth(num_blocks, family.fixed_blocks(model))
        knobs["num_active_blocks"] = _shares(num_blocks, (0.5, 0.75, 1.0), least=least)
    useful = {name: values for name, values in knobs.items() if len(values) > 1}
    if not useful:
        raise ConfigError(
            f"this model has no knob to turn: its images have one size, {len(dials)} routers were found, and its "
            f"{num_blocks} blocks cannot be skipped"
        )
    return KnobSpace(useful)


def distinct_crops(images: Images, values: Sequence[int]) -> list[int]:
    """Leave out values of `max_crops` that show every ordinary image as the value before does; the largest stays."""
    shown = {value: [_shown(images, *size, value) for size in ORDINARY_SIZES] for value in values}
    kept = [values[0]]
    for value in values[1:]:
        if shown[value] != shown[kept[-1]]:
            kept.append(value)
        elif value == values[-1]:
            kept[-1] = value
    return kept


def _shown(images: Images, height: int, width: int, max_crops: int) -> tuple[int, tuple[int, int]] | None:
    """Return the length of an image in the prompt and its grid; None where it is refused."""
    try:
        layout = images.layout_of_size(height, width, max_crops)
    except InputError:
        return None
    return len(layout.ids), layout.grid


def check_knobs(space: KnobSpace, family: Family, model: Any, name: str) -> None:
    """Check that a model can take all values of a knob space. Raises ConfigError, with all problems at once."""
    num_blocks = family.num_blocks(model)
    problems = list(_problems(space, family, model, num_blocks))
    if problems:
        raise ConfigError(f"the knobs of {name} do not fit the model: " + "; ".join(problems))
    if depths(space)[:1] not in ([], [num_blocks]):
        family.check_blocks(model)


def depths(space: KnobSpace) -> list[int]:
    """Return the values of num_active_blocks; none where it is no knob."""
    return [int(n) for n in space.values("num_active_blocks")] if "num_active_blocks" in space.names else []


def _problems(space: KnobSpace, family: Family, model: Any, num_blocks: int) -> Iterator[str]:
    unknown = [name for name in space.names if name not in KNOBS]
    if unknown:
        yield f"it has no knob {', '.join(unknown)}, only {', '.join(KNOBS)}"
    for name in set(space.names) & set(KNOBS):
        if any(value != int(value) for value in space.values(name)):
            yield f"{name} needs whole numbers: {list(space.values(name))}"
    given = depths(space)
    least = blocks.least_depth(num_blocks, family.fixed_blocks(model))
    if given and (given[0] < least or given[-1] > num_blocks):
        yield f"num_active_blocks={given} is outside {least} to {num_blocks}"
    if "top_k" in space.names:
        most = min((dial.most for dial in family.dials(model)), default=0)
        if max(space.values("top_k")) > most:
            yield f"top_k={list(space.values('top_k'))} exceeds the model's {most} experts"


def _shares(whole: int, shares: Sequence[float], least: int) -> list[int]:
    """Return shares of a whole, rounded up, at least ``least``, ascending."""
    return sorted({max(least, math.ceil(share * whole)) for share in shares})
