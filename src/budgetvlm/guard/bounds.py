"""What the guard says of one request: `Bounds`, and the loops that compute them in one call at each moment.

Shapes: G stages, K settings, L lengths of answers, Dl language features. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.guard.answer_length import outlook
from budgetvlm.guard.margin import Margin, Moment, q_of
from budgetvlm.guard.recourse import bound_of, reachable_of
from budgetvlm.guard.request_latency import overview_of, terms_of
from budgetvlm.guard.speed import pace_after

BUDGET_RATIO = 1.25  # budgets this far apart are in different groups
LEAST_SHARE, MOST_SHARE = 0.05, 1.5  # of the full setting's time: budgets beyond are in the groups of these
SLOWED = 2.0  # times as long as when it was calibrated: the machine is under load, and requests are in other groups
UNUSUAL = 2.0  # times as long as expected: an image that takes so long to prepare is large
BOUND, REST, STEP, READ = 0, 3, 6, 7  # rows of `Bounds.times`
_ROWS = 8

Groups = tuple[int, int, int, int]
"""Numbers of `Margin.number`."""


class Request(NamedTuple):
    """What is known of a request before anything runs.

    Attributes:
        vision: visual tokens at each setting, float64 ``[K]``. What follows from it is remembered, so it never changes;
            images of one size best share one array.
        language: the prompt's other tokens.
        feature: language feature ``[Dl]``.
    """

    vision: np.ndarray
    language: float
    feature: np.ndarray


class Spent(NamedTuple):
    """What a request has taken when a setting is chosen, in ms.

    Attributes:
        total_ms: in all. image_ms: of it the image; 0: nothing is encoded.
        prepared_ms: of that its overview, before it was encoded; 0: not known.
    """

    total_ms: float = 0.0
    image_ms: float = 0.0
    prepared_ms: float = 0.0


# `Spent` and `Bounds` from tuples of their fields: the classes themselves run a function in Python, which takes some
# microseconds in a request.
quick_spent = partial(tuple.__new__, Spent)


class Bounds(NamedTuple):
    """What the guard says of one request.

    Attributes:
        times: rows of numbers, one a setting, ``[8, K]``; each has a property here.
        slowdown: time of the full setting on this machine now / when it was profiled.
        fastest: the setting that may be chosen whose rest is predicted to be the shortest.
        lengths: tokens of an answer as expected, and of a long one.
        groups: the requests that share parts of this one's margin.
        terms: of `budgetvlm.guard.request_latency.terms_of`; None: these are fixed bounds.
        moment: what was encoded when the bounds were made.
        spent: by then.
        profiled: times of each stage by the profile, see `budgetvlm.guard.request_latency.Sized`.
        large: the image is so large that preparing it takes much longer than the profile knows.
    """

    times: np.ndarray
    slowdown: float
    fastest: int
    lengths: tuple[float, int] = (1.0, 1)
    groups: Groups = (0, 0, 0, 0)
    terms: np.ndarray | None = None
    moment: Moment = "overview"
    spent: Spent = Spent()
    profiled: np.ndarray | None = None
    large: bool = False

    @classmethod
    def fixed(cls, bounds_ms: np.ndarray) -> Bounds:
        """Of settings that take so long whatever is asked, ``[K]``."""
        nothing = np.zeros_like(bounds_ms)
        rows = *[bounds_ms] * 5, *[nothing] * 3
        return cls(np.stack(rows), 1.0, int(bounds_ms.argmin()))

    @property
    def bounds_ms(self) -> np.ndarray:
        """Upper bound on each setting's time, or on that of the setting it falls back on if its image takes long."""
        return self.times[BOUND]

    @property
    def predicted_ms(self) -> np.ndarray:
        """Its time with an answer of the expected length."""
        return self.times[2]

    @property
    def rest_ms(self) -> np.ndarray:
        """The predicted rest of its time with a long answer."""
        return self.times[REST]

    @property
    def answer_ms(self) -> np.ndarray:
        """Of that, what comes once the image is encoded."""
        return self.times[4]

    @property
    def saving_ms(self) -> np.ndarray:
        """What hurrying would save of that."""
        return self.times[5]

    @property
    def step_ms(self) -> np.ndarray:
        """One decoding step."""
        return self.times[STEP]

    @property
    def longer_ms(self) -> np.ndarray:
        """What a long answer takes beyond one of the expected length."""
        out: np.ndarray = (self.lengths[1] - self.lengths[0]) * self.step_ms
        return out

    @property
    def read_ms(self) -> np.ndarray:
        """Reading the prompt."""
        return self.times[READ]

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Which settings a budget allows, bool ``[K]``; maybe none."""
        out: np.ndarray = self.bounds_ms <= budget_ms
        return out


quick_bounds = partial(tuple.__new__, Bounds)


class GroupNumbers:
    """Numbers of the groups that a request may be in.

    It is in four at a time: that of all; by the size of its image; by its budget, as a share of the full setting's
    time; by the length of its answer. While the machine is slowed down it is in others of the same kinds.

    Attributes:
        fixed: of all, of each step of budgets, of each length, int64 ``[2, 1 + steps + L]``; the second row is of a
            machine that is slowed down.
    """

    def __init__(self, margin: Margin, lengths: Sequence[float]) -> None:
        steps = range(_budget_step(LEAST_SHARE), _budget_step(MOST_SHARE) + 1)
        names = [
            "all",
            *(f"budget about {BUDGET_RATIO**step:.2f} x full" for step in steps),
            *(f"up to {length:.0f} output tokens" for length in lengths),
        ]
        self._margin = margin
        self._of_images: dict[float, tuple[int, int]] = {}
        self.fixed = np.array([self._of(name) for name in names]).T.copy()

    def of_image(self, most: float) -> tuple[int, int]:
        """Of an image that can get so many visual tokens, and where the machine is slowed down."""
        found = self._of_images.get(most)
        if found is None:
            self._of_images[most] = found = self._of(f"image of up to {most:.0f} visual tokens")
        return found

    def _of(self, name: str) -> tuple[int, int]:
        return self._margin.number(name), self._margin.number(f"{name}, slowed down")


@compiled
def look(
    budget_ms: float, feature: np.ndarray, times: np.ndarray, least: float, tiled: np.ndarray,
    image_groups: tuple[int, int], known: np.ndarray, taken_ms: float, image_ms: float, prepared_ms: float,
    revises: bool, account: np.ndarray, tail: float, weight: np.ndarray, bias: np.ndarray, lengths: np.ndarray,
    now: np.ndarray, factors: np.ndarray, of_image: np.ndarray, overview: np.ndarray, prepare: int,
    fixed_groups: np.ndarray, level: float, most_level: float, parts: np.ndarray, ascending: np.ndarray,
    counts: np.ndarray, quickest: np.ndarray, members: np.ndarray,
) -> tuple[np.ndarray, float, int, tuple[float, int], Groups, np.ndarray, bool]:  # fmt: skip
    """Bounds when a setting is chosen: times, slowdown, fastest, lengths, groups, terms and large of `Bounds`.

    Args:
        feature: of the question, ``[Dl]``.
        times, least, tiled: see `budgetvlm.guard.request_latency.Sized`.
        known: settings that may be chosen, bool ``[K]``.
        taken_ms, image_ms, prepared_ms: see `Spent`.
        revises: whether the choice will be revised.
        account: its first number is what comes beside the model's own stages, in ms.
        tail, weight, bias, lengths: of the answer's length, see `budgetvlm.guard.answer_length.outlook`.
        now, factors: of `budgetvlm.guard.speed.StageSpeed`.
        of_image, overview: of `budgetvlm.guard.request_latency.QuickLatency`.
        prepare: number of the stage that prepares the image; negative: there is none.
        image_groups, fixed_groups: see `GroupNumbers`.
        level, most_level, parts, ascending, counts: `Margin.state`.
        quickest: the settings that are hurried at, int64 ``[K]``.
        members: of `SameImage`.
    """
    mean, length = outlook(feature, tail, weight, bias, lengths)
    expected, long = max(mean, 1.0), lengths[length]
    terms = terms_of(times, factors, of_image)
    full_ms = terms[0, -1] + terms[1, -1] + (expected - 1) * terms[2, -1]
    profiled_ms = terms[3, -1] + (expected - 1) * terms[4, -1]
    done_ms = overview_of(overview, factors, of_image, least) if image_ms > 0 else 0.0
    excess_ms = 0.0
    if prepared_ms > 0 and prepare >= 0:
        usual_ms = factors[prepare] * (overview[0, prepare] + least * overview[1, prepare])
        took_ms = prepared_ms / math.exp(now[0])
        if took_ms > UNUSUAL * usual_ms:
            excess_ms = took_ms - usual_ms
            done_ms += excess_ms
            for k in range(len(tiled)):  # the whole image is read again to cut its tiles
                terms[0, k] += excess_ms * (2.0 if tiled[k] else 1.0)
    pace = pace_after(now[0], done_ms, image_ms)
    slowed = int(now[1] > SLOWED)
    step = _budget_step(budget_ms / full_ms) - _budget_step(LEAST_SHARE)
    fixed = fixed_groups[slowed]
    groups = fixed[0], image_groups[slowed], fixed[len(fixed) - len(lengths) + length], fixed[1 + step]
    q = q_of(groups, 0, level, most_level, parts, ascending, counts)
    later_q = q_of(groups, 1, level, most_level, parts, ascending, counts)
    out, fastest = _times(
        terms, pace, 1.0, account[0] - pace * done_ms, taken_ms, expected, long, math.exp(q), math.exp(later_q),
        quickest, known, known,
    )  # fmt: skip
    if revises:
        reachable = reachable_of(out[0], out[1], members)
        for k in range(len(reachable)):
            out[0, k] = reachable[k]
    return out, pace * full_ms / profiled_ms, fastest, (expected, int(long)), groups, terms, excess_ms > 0


@compiled
def look_again(
    terms: np.ndarray, index: int, lengths: tuple[float, int], groups: Groups,
    same_image: np.ndarray, known: np.ndarray, taken_ms: float, image_ms: float, now: np.ndarray, quickest: np.ndarray,
    level: float, most_level: float, parts: np.ndarray, ascending: np.ndarray, counts: np.ndarray,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Bounds once the image of setting ``index`` is encoded: `Bounds.times` and the fastest setting.

    Args:
        terms, lengths, groups: of the bounds that it was chosen by.
        same_image: settings with its image, bool ``[K]``.
        taken_ms: by now; of it image_ms for the image.
        others: as `look` has them.
    """
    pace = pace_after(now[0], terms[0, index], image_ms)
    factor = math.exp(q_of(groups, 1, level, most_level, parts, ascending, counts))
    return _times(
        terms, pace, 0.0, 0.0, taken_ms, lengths[0], lengths[1], factor, factor, quickest, known, same_image
    )  # fmt: skip


@compiled
def _times(
    terms: np.ndarray,
    pace: float,
    image_share: float,
    more_ms: float,
    taken_ms: float,
    expected: float,
    long: float,
    factor: float,
    later_factor: float,
    quickest: np.ndarray,
    known: np.ndarray,
    possible: np.ndarray,
) -> tuple[np.ndarray, int]:
    """`Bounds.times`, and the fastest setting.

    The second row is what a setting is aimed at. The first three are infinite where a setting may not be chosen.

    Args:
        terms: to be multiplied by ``pace``.
        image_share: 1: the image is yet to be encoded; 0: it is encoded.
        more_ms: beside the model's own stages. taken_ms: by now.
        expected, long: tokens of an answer.
        factor, later_factor: of the margin, on the rest now and on the answer once the image is encoded.
        quickest: the settings that are hurried at, int64 ``[K]``.
        known, possible: settings that may be chosen are both, bool ``[K]``.
    """
    out = np.full((_ROWS, terms.shape[1]), np.inf)
    fastest, least = 0, np.inf
    for k in range(terms.shape[1]):
        image, first, step = image_share * pace * terms[0, k], pace * terms[1, k], pace * terms[2, k]
        answer = first + (long - 1) * step
        rest = image + answer + more_ms
        quick = quickest[k]
        saving = max(first - pace * terms[1, quick], 0.0) + (long - 1) * max(step - pace * terms[2, quick], 0.0)
        if known[k] and possible[k]:
            longer = (long - expected) * step
            out[0, k] = taken_ms + bound_of(factor, rest, saving, longer)
            out[1, k] = taken_ms + image + more_ms + bound_of(later_factor, answer, saving, longer)
            out[2, k] = taken_ms + rest - longer
        out[3, k], out[4, k], out[5, k], out[6, k], out[7, k] = rest, answer, saving, step, first
        if rest < least and out[0, k] < np.inf:
            fastest, least = k, rest
    return out, fastest


@compiled
def _budget_step(share: float) -> int:
    """Budgets of about one size have one number; they are given as a share of the full setting's time here."""
    return round(math.log(max(LEAST_SHARE, min(share, MOST_SHARE))) / math.log(BUDGET_RATIO))
