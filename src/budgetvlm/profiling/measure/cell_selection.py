"""Which cells (sample, setting) the accuracy sweep measures where it does not measure all.

What costs is encoding an image at a tiling, which all settings with that `max_crops` share. So cells are drawn in two
stages: a sample's tilings, and at each of them some settings. A tiling is drawn with a probability that falls with the
square root of its cost, and the more settings are asked at it, the more its encoding costs beside an answer: optimum
allocation and subsampling (Cochran, Sampling Techniques, 1977, chapters 5 and 10). A share of the cells is a share of
the work: cheap ones are measured more often, expensive ones less.

Names alone decide, with known probabilities. So means are unbiased, a larger share holds a smaller one, and a sweep
that was stopped, or grows, goes on from what there is. Choosing by what was measured before, where an outcome seems
least certain, was tried: the other cells and the means of settings come out no better, and mostly worse.

Shapes: S samples, n settings that are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import Setting
from budgetvlm.table import TEST_SHARE
from budgetvlm.tasks import SplitSample

MORE_AT_ONCE = 2.8  # sqrt((1 - r) / r), r the correlation of what settings of one tiling tell beyond the other tilings


@dataclass(frozen=True, eq=False)
class Work:
    """What measuring one sample costs, in any unit.

    Attributes:
        encoding: what encoding its image costs, ``[n]``, once for all settings with one `max_crops`; 0: not shared.
        answers: what an answer costs then, ``[n]``.
    """

    encoding: np.ndarray
    answers: np.ndarray


def by_tiling(settings: Sequence[Setting]) -> list[np.ndarray]:
    """Return the places of the settings that show the model the same tiles, the fewest tiles first."""
    crops = np.array([int(setting.get("max_crops", 0)) for setting in settings])
    return [np.flatnonzero(crops == own) for own in np.unique(crops)]


def plan_cells(
    samples: Sequence[SplitSample], settings: Sequence[Setting], cells: float, work: Work, groups: str = "image_id"
) -> np.ndarray:
    """Return which cells are measured, bool ``[S, n]``: all of some samples, and a share of the others' work.

    ``groups``: label of the samples that are measured in full together, as `measured_in_full` says.

    Raises ConfigError: a share that cannot be, or one that leaves a setting without a measurement.
    """
    if not 0 < cells <= 1:
        raise ConfigError(f"cells={cells:g} is no share of the cells; give a number above 0 and up to 1, like 0.2")
    whole = measured_in_full(samples, groups)
    shares = bool(work.encoding.any())
    labels = np.array([f"{s.get('max_crops')} tiles" if shares else str(s) for s in settings])
    shared = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    _require_enough(cells, shared, work, int((~whole).sum()))
    tilings, answers = chances(cells, shared, work)
    place = np.full((len(samples), len(settings)), np.inf)
    for row in np.flatnonzero(~whole):
        name = samples[int(row)].sample.sample_id
        of_label = {label: _uniform(f"{name}|{label}") for label in set(labels)}
        of_setting = np.array([_uniform(f"{name}|{setting}") for setting in settings])
        place[row] = np.maximum(np.array([of_label[label] for label in labels]) / tilings, of_setting / answers)
    return np.asarray(whole[:, None] | (place <= np.maximum(1.0, place.min(axis=0))))  # chance leaves no setting out


def chances(cells: float, groups: Sequence[np.ndarray], work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Return with what probability a setting's tiling is encoded, and the setting is answered then, ``[n]`` each.

    The expected work is the share ``cells`` of all. ``groups``: places of the settings that share an encoding.
    """
    tilings, answers = np.ones((2, len(work.answers)))
    wanted = cells * (sum(work.encoding[group[0]] for group in groups) + work.answers.sum())
    low, high = -40.0, 40.0
    while high - low > 1e-6:
        middle, spent = (low + high) / 2, 0.0
        for group in groups:
            encoding, each = float(work.encoding[group[0]]), work.answers[group]
            weights = each**-0.5 / (each**-0.5).sum()
            at_once = max(1.0, MORE_AT_ONCE * (encoding / each.mean()) ** 0.5)
            cost = encoding + (np.minimum(1.0, at_once * weights) * each).sum()
            scale = np.exp(middle) * cost**-0.5
            tilings[group] = min(1.0, scale)
            answers[group] = np.minimum(1.0, at_once * max(1.0, scale) * weights)
            spent += tilings[group[0]] * (encoding + (answers[group] * each).sum())
        low, high = (middle, high) if spent < wanted else (low, middle)
    return tilings, answers


def _uniform(name: str) -> float:
    """Return a number in 0..1 that looks random and is always the same for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2.0**64


def measured_in_full(samples: Sequence[SplitSample], groups: str = "image_id") -> np.ndarray:
    """Return which samples are measured at every setting, bool ``[S]``, because policies are evaluated on them.

    They are the test split. Where there is none they are a fifth of the images (or of what the label ``groups`` tells
    apart), of the validation split if the samples have one beside others; `budgetvlm prepare` makes them the test
    split. Raises ConfigError: samples without that label.
    """
    splits = [place.split for place in samples]
    if "test" in splits:
        return np.array([split == "test" for split in splits])
    labels = [place.groups.get(groups) for place in samples]
    if None in labels:
        known = ", ".join(samples[labels.index(None)].groups)
        raise ConfigError(f"samples cannot be grouped by {groups!r}: the labels are {known}")
    held = units_in_full(labels, splits)
    return np.array([label in held for label in labels])


def units_in_full(units: Sequence[str | None], splits: Sequence[str]) -> set[str | None]:
    """Return which images, or other units, are measured at every setting where no sample is of a test split.

    They follow from the units' names alone. ``units``, ``splits``: of the samples, ``[S]``.
    """
    both = {"train", "validation"} <= set(splits)
    own = {unit for unit, split in zip(units, splits, strict=True) if not both or split == "validation"}
    order = sorted(own, key=lambda unit: hashlib.sha256(f"test {unit}".encode()).digest())
    share = 0.5 if both else TEST_SHARE
    return set(order[: max(1, round(share * len(order)))])


def _require_enough(cells: float, groups: Sequence[np.ndarray], work: Work, parted: int) -> None:
    """Raise ConfigError where a setting is expected to be measured less than once on ``parted`` samples."""

    def enough(share: float) -> bool:
        return float(np.multiply(*chances(share, groups, work)).min()) * parted >= 1

    if not enough(cells):
        least = next((share for share in np.arange(1, 101) / 100 if share > cells and enough(share)), None)
        raise ConfigError(
            f"cells={cells:g} of {parted} samples that are not measured in full leaves some settings without a "
            "measurement. "
            + (f"Give {least:g} or more, or profile more samples." if least else "Profile more samples or splits.")
        )
