"""Which cells (sample, setting) the accuracy sweep measures where it does not measure all, decided as it goes.

Settings come in stages (`stages_of`), those with the fewest tiles first. In each stage a cell is taken where its
outcome is least certain. What is expected of it follows from what was measured of the sample at settings nearby and
from what its setting gave so far: two neighbours that agree leave little to learn of the setting between them, two that
differ leave much. Settings that were taken least come first. Half of the cells are random (`budgetvlm.knobs.is_drawn`):
without them nothing would tell how samples do that look certain, and predictions are checked on some of them.

What is known is never chosen again, so a sweep that was stopped, or grows, goes on from what there is.

Shapes: S samples, K settings, n samples of a choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import DRAWN, KnobSpace, Setting, is_drawn
from budgetvlm.table import TEST_SHARE
from budgetvlm.tasks import SplitSample

REACH = 0.5  # distance of two settings, in ranges of a knob, at which one tells 1/e as much of the other
PRIOR = 1.0  # outcomes that the mean of a setting counts as
BALANCE = 2.0  # how much settings that were taken often stand back
AT_RANDOM = 0.5  # share of the cells that are measured whatever is expected: with fewer, means of settings are biased
STAGES = 3  # where no knob sets the number of tiles
AT_ONCE = 1 / 8  # share of the samples that get a cell before it is worked out again what is least certain


class CellSelection:
    """Chooses cells, stage by stage.

    Args:
        space: the knob space; scores have a column for each of its settings.
        samples: all samples of the sweep.
        scores: what is known, ``[S, K]``, NaN where not measured. The sweep adds what it measures.
        cells: share of the cells that are measured of samples that are not measured in full.
        stages: numbers of the settings that are asked for, stage after stage.

    Raises:
        ConfigError: a share that cannot be, or one that leaves a setting without a measurement.
    """

    def __init__(
        self,
        space: KnobSpace,
        samples: Sequence[SplitSample],
        scores: np.ndarray,
        cells: float,
        stages: Sequence[Sequence[int]],
    ) -> None:
        self.scores, self.cells, self.stages = scores, cells, [list(stage) for stage in stages]
        self.whole = measured_in_full(samples) if cells < 1 else np.ones(len(samples), dtype=bool)
        _require_enough(cells, int((~self.whole).sum()))
        names = [str(setting) for setting in space.settings]
        share = max(DRAWN, AT_RANDOM * cells)
        self.drawn = np.array([[is_drawn(place.sample.sample_id, name, share) for name in names] for place in samples])
        ranks = space.value_indices / np.maximum(np.array(space.sizes) - 1, 1)
        self.nearness = np.exp(-np.abs(ranks[:, None] - ranks[None]).sum(axis=-1) / REACH)

    @property
    def total(self) -> int:
        """How many cells will be known at the end, or a few more."""
        whole, asked = int(self.whole.sum()), sum(map(len, self.stages))
        return asked * whole + round(self.cells * asked * (len(self.whole) - whole))

    @property
    def description(self) -> str:
        """What is measured, for the user."""
        whole, asked = int(self.whole.sum()), sum(map(len, self.stages))
        return (
            f"measuring about {self.total:,} of {len(self.whole) * asked:,} cells (sample, setting): all of {whole} "
            f"test samples, because an evaluation needs them, and {self.cells:.0%} of {len(self.whole) - whole} others"
        )

    def choose(self, rows: Sequence[int], stage: int) -> np.ndarray:
        """Choose which cells of these samples are measured now, bool ``[n, K]``: of one stage, and none that is known.

        ``rows``: their numbers; ``stage``: its number.
        """
        columns, known = np.array(self.stages[stage]), np.isfinite(self.scores[rows])
        parted = np.flatnonzero(~self.whole[rows])
        chosen = known.copy()
        chosen[:, columns] |= self.whole[rows][:, None]
        if len(parted):
            some = np.asarray(rows)[parted]
            chosen[np.ix_(parted, columns)] |= self.drawn[np.ix_(some, columns)]
            quota = self._quota(known[parted], stage) - int(chosen[np.ix_(parted, columns)].sum())
            chosen[parted] = self._with_uncertain(some, chosen[parted], columns, quota)
        return chosen & ~known

    def _quota(self, known: np.ndarray, stage: int) -> int:
        """How many cells a stage has of samples with these ``known`` ones ``[n, K]``: its part of what is left."""
        earlier, rest = (list(chain(*part)) for part in (self.stages[:stage], self.stages[stage:]))
        left = self.cells * len(known) * (len(earlier) + len(rest)) - known[:, earlier].sum()
        return round(float(left) * len(self.stages[stage]) / len(rest))

    def _with_uncertain(self, rows: np.ndarray, chosen: np.ndarray, columns: np.ndarray, quota: int) -> np.ndarray:
        """Add the ``quota`` cells that are least certain to what is chosen, ``[n, K]``.

        An outcome counts as nearness to outcomes that were seen, so it is a Beta variable, and its standard deviation
        is how uncertain it is. A cell that is chosen but not measured yet counts with what is expected of it.
        """
        seen = np.isfinite(self.scores)
        means = (0.5 + np.where(seen, self.scores, 0.0).sum(axis=0)) / (1.0 + seen.sum(axis=0))
        taken = seen[~self.whole].sum(axis=0) + (chosen & ~seen[rows]).sum(axis=0)
        outcome = np.where(chosen, np.where(seen[rows], self.scores[rows], means), 0.0)
        while quota > 0 and not chosen[:, columns].all():
            right = PRIOR * means + outcome @ self.nearness
            count = PRIOR + chosen @ self.nearness
            expected = right / count
            uncertainty = np.sqrt(expected * (1 - expected) / (count + 1))[:, columns]
            often = taken[columns] / max(taken[columns].mean(), 1.0)
            uncertainty = (uncertainty + (taken[columns] == 0)) / (1 + often) ** BALANCE
            uncertainty[chosen[:, columns]] = -1.0
            best = columns[uncertainty.argmax(axis=1)]
            most = min(quota, max(1, int(AT_ONCE * len(rows))))
            for row in np.argsort(-uncertainty.max(axis=1), kind="stable")[:most]:
                if not chosen[row, best[row]]:
                    chosen[row, best[row]], outcome[row, best[row]] = True, expected[row, best[row]]
                    taken[best[row]] += 1
                    quota -= 1
        return chosen


def stages_of(space: KnobSpace, settings: Sequence[Setting], cells: float) -> list[list[Setting]]:
    """Part settings into stages: those with one number of tiles, which they share encoded, or by their complexity.

    Where all cells are measured nothing is to be decided, and settings of one number of tiles are one stage.
    """
    crops = [int(setting.get("max_crops", 0)) for setting in settings]
    if cells == 1 or len(set(crops)) > 1:
        return [[s for s, own in zip(settings, crops, strict=True) if own == stage] for stage in sorted(set(crops))]
    ordered = sorted(settings, key=lambda setting: float(space.complexity[space.index(setting)]))
    parts = np.array_split(np.arange(len(ordered)), min(STAGES, len(ordered)))
    return [[ordered[place] for place in part] for part in parts]


def measured_in_full(samples: Sequence[SplitSample]) -> np.ndarray:
    """Return which samples are measured at every setting, bool ``[S]``, because policies are evaluated on them.

    They are the test split. Where there is none they are a fifth of the images, of the validation split if the samples
    have one beside others; `budgetvlm prepare` makes them the test split.
    """
    splits = [place.split for place in samples]
    if "test" in splits:
        return np.array([split == "test" for split in splits])
    held = images_in_full([place.sample.image_id for place in samples], splits)
    return np.array([place.sample.image_id in held for place in samples])


def images_in_full(images: Sequence[str], splits: Sequence[str]) -> set[str]:
    """Return which images are measured at every setting where no sample is of a test split.

    They follow from the images alone. ``images``, ``splits``: of the samples, ``[S]``.
    """
    both = {"train", "validation"} <= set(splits)
    own = {image for image, split in zip(images, splits, strict=True) if not both or split == "validation"}
    order = sorted(own, key=lambda image: hashlib.sha256(f"test {image}".encode()).digest())
    share = 0.5 if both else TEST_SHARE
    return set(order[: max(1, round(share * len(order)))])


def _require_enough(cells: float, parted: int) -> None:
    if not 0 < cells <= 1:
        raise ConfigError(f"cells={cells:g} is no share of the cells; give a number above 0 and up to 1, like 0.2")
    if cells < 1 and cells * parted < 1:
        raise ConfigError(
            f"cells={cells:g} of {parted} samples that are not measured in full leaves some settings without a "
            "measurement. "
            + (f"Give {1 / parted:.2g} or more, or profile more samples." if parted else "Profile more splits.")
        )
