"""How far above its predicted time a request's bound lies: a quantile of recent scores, whose level is controlled.

The score of a finished request is log(its time / the predicted time of a long answer), from each moment at which a
setting is chosen: when the overview is encoded, and when the whole image is. The bound is exp(q) times that predicted
time, q being the (1 - a) quantile of that moment's last scores. Scores follow the machine's noise and forget it, so
that a noisy spell leaves nothing behind. What a is, no assumption tells: a setting is chosen, budgets leave room, the
noise changes. So it follows adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170): after each request

    a <- a + step (target - missed)

where missed is 1 for a late request and less for an answer that was cut short to be in time (`Margin.cut_cost`),
in one part for each of the request's groups (groups that overlap: Gibbs, Cherian and Candes 2023, arXiv 2305.12616).
Below the level that the scores reach, q grows on in proportion to what a lacks, so that misses always raise it. A part
is a sum over its group's requests: over T of them the share missed differs from the target by (change of the part) /
(step T), whatever the world does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from budgetvlm._compiled import compiled

Moment = Literal["overview", "image"]  # what is encoded when a setting is chosen, and when it is revised
MOMENTS: tuple[Moment, ...] = ("overview", "image")
LEAST_Q, MOST_Q = math.log(0.7), math.log(20.0)
LEAST_SCORES = 100
SCORES_A_MISS = 2.0  # the window holds this many scores for each one that is expected to be above the bound
CUT_SHARE = 0.05  # of the answers may be cut short, where alpha is smaller: fewer would cost more answers than they are
STEP = 0.2  # of a level, as a share of what may be missed
# As a share of what may be missed (the geometric mean, where fewer may be late than cut): budgets leave room and
# answers are hurried, so that more scores may lie above bounds than may miss.
MOST_LEVEL = 8.0
MOST_GROUPS = 4096  # that have a part of their own
BEYOND = 5.0  # q grows by this for a level of 1 below what the scores reach: 0.05 for a miss more in 100


class Margin:
    """The margin of one guard.

    A group has a number (`number`), by which its part is found. The arrays stay where they are.

    Args:
        alpha: the rate that is promised.
        scores: to begin with, oldest first, of each of `MOMENTS`.
        level: the share of scores that may lie above the bound, to begin with; None: alpha.
    """

    def __init__(
        self, alpha: float, scores: Mapping[Moment, Iterable[float]] | None = None, level: float | None = None
    ) -> None:
        self.alpha, self.level = alpha, alpha if level is None else level
        self._may_miss = max(alpha, CUT_SHARE)
        self.rate = STEP * self._may_miss  # of the parts, which go so far towards the target after each request
        self.most_level = min(MOST_LEVEL * math.sqrt(alpha * self._may_miss), 0.5)
        self._numbers: dict[str, int] = {}
        self._free = itertools.count()
        self._parts = np.zeros(MOST_GROUPS)
        self._scores = Scores.of(max(LEAST_SCORES, math.ceil(SCORES_A_MISS / alpha)))
        for moment, given in (scores or {}).items():
            for score in given:
                self.add(score, moment)

    @property
    def cut_cost(self) -> float:
        """What an answer that is cut short counts, a late one being 1.

        Late and cut together, so counted, are kept at alpha: late ones at most alpha, cut ones `CUT_SHARE` or alpha.
        """
        return self.alpha / self._may_miss

    @property
    def parts(self) -> dict[str, float]:
        """What each group that was learnt of adds to the level."""
        return {group: part for group, number in self._numbers.items() if (part := float(self._parts[number]))}

    @classmethod
    def start(cls, alpha: float, scores: Mapping[Moment, np.ndarray], q: float | None = None) -> Margin:
        """A margin that begins with the quantiles of these scores (of any shape) and, at first, with this q.

        Args:
            q: at the choice of a setting; None: the (1 - alpha) quantile of the scores.
        """
        margin = cls(alpha)
        size = margin._scores.size
        begin = {moment: _representative(given, size) for moment, given in scores.items()}
        margin = cls(alpha, begin)
        if q is not None:
            margin.level = min(margin._level_of(_limited(q)), margin.most_level)
        return margin

    def number(self, group: str) -> int:
        """Of a group, by its name; the last ones, where there are very many, have one number."""
        found = self._numbers.get(group)
        if found is None:  # counted, so that two threads that bring a new group each get two numbers
            found = self._numbers.setdefault(group, min(next(self._free), MOST_GROUPS - 1))
        return found

    @property
    def state(self) -> tuple[float, float, np.ndarray, np.ndarray, np.ndarray]:
        """What `q_of` takes beside the groups: level, its limit, parts, scores in ascending order, how many."""
        return self.level, self.most_level, self._parts, self._scores.ascending, self._scores.counts

    @property
    def window(self) -> np.ndarray:
        """The scores in the order in which they came, as `learn_from` takes them."""
        return self._scores.window

    def q(self, groups: Sequence[int] = (), moment: Moment = "overview") -> float:
        """log(bound / predicted time) from this moment on, for a request of the groups with these numbers."""
        return q_of(np.array(groups, dtype=np.int64), MOMENTS.index(moment), *self.state)

    def image_factors(self, factors: np.ndarray) -> np.ndarray:
        """The factors once the image is encoded that belong to these at the choice: of the same level, ``[F]``."""
        place, (ascending, counts, _) = MOMENTS.index("image"), self._scores
        levels = [self._level_of(q) for q in np.log(factors).tolist()]
        return np.exp([_quantile(ascending[place], counts[place, 0], level) for level in levels])

    def _level_of(self, q: float) -> float:
        """The level at which the quantile at the choice of a setting is q; 1 if all scores are above it."""
        place = MOMENTS.index("overview")
        count = int(self._scores.counts[place, 0])
        ascending = self._scores.ascending[place, :count]
        if q >= ascending[-1]:
            return float(1 / (count + 1) - (q - ascending[-1]) / BEYOND)
        above = int(np.searchsorted(ascending, q, side="right"))
        if not above:
            return 1.0
        low, high = ascending[above - 1 : above + 1].tolist()
        return 1 - (above + (q - low) / (high - low)) / (count + 1)

    def learn(
        self,
        groups: Sequence[int],
        overview: float = math.nan,
        image: float = math.nan,
        missed: float = math.nan,
        target: float = 0.0,
    ) -> None:
        """Learn from a finished request of the groups with these numbers.

        Args:
            overview, image: its scores, from each of `MOMENTS` on; NaN: there is none.
            missed: from 0 to 1, where ``target`` may be missed on average; NaN: this is not judged.
        """
        learn_from(overview, image, groups, missed, target, self.rate, self.window, *self.state)

    def add(self, score: float, moment: Moment = "overview") -> None:
        """Learn the score of a finished request."""
        place = MOMENTS.index(moment)
        _add(score, *(array[place] for array in self._scores))

    def forget(self, count: int) -> None:
        """Drop the last scores, all but one at most: what they tell was the machine's new speed, not its noise."""
        forget(count, *self._scores)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
        scores = {moment: self._scores.of_moment(place) for place, moment in enumerate(MOMENTS)}
        return {"level": self.level, "parts": self.parts, "scores": scores}

    @classmethod
    def from_dict(cls, alpha: float, document: Mapping[str, Any]) -> Margin:
        """The margin of a `to_dict` document. Raises KeyError."""
        margin = cls(alpha, document["scores"], document["level"])
        for group, part in document["parts"].items():
            number = margin.number(str(group))
            margin._parts[number] = float(part)
        return margin


class Scores(NamedTuple):
    """The last scores of each of `MOMENTS`, of which there are at most N.

    Attributes:
        ascending: in order, ``[2, N]``.
        counts: how many there are, and the place of the next one in the window, int64 ``[2, 2]``.
        window: the same scores in a ring, oldest first, ``[2, N]``.
    """

    ascending: np.ndarray
    counts: np.ndarray
    window: np.ndarray

    @classmethod
    def of(cls, size: int) -> Scores:
        """None yet."""
        shape = len(MOMENTS), size
        return cls(np.zeros(shape), np.zeros((len(MOMENTS), 2), dtype=np.int64), np.zeros(shape))

    @property
    def size(self) -> int:
        """The most scores of a moment."""
        return self.window.shape[1]

    def of_moment(self, place: int) -> list[float]:
        """Oldest first."""
        count, following = self.counts[place].tolist()
        out: list[float] = np.roll(self.window[place], -following)[self.size - count :].tolist()
        return out


def _representative(scores: np.ndarray, size: int) -> list[float]:
    """At most so many scores with about the same quantiles, in a random order, because the oldest leave first."""
    flat = np.sort(np.ravel(scores))
    even = np.quantile(flat, (np.arange(size) + 0.5) / size) if len(flat) > size else flat
    out: list[float] = np.random.default_rng(0).permutation(even).tolist()
    return out


@compiled
def _limited(q: float) -> float:
    return max(LEAST_Q, min(q, MOST_Q))


@compiled
def q_of(
    groups: Any,
    place: int,
    level: float,
    most_level: float,
    parts: np.ndarray,
    ascending: np.ndarray,
    counts: np.ndarray,
) -> float:
    """See `Margin.q`; ``place`` is the moment's in `MOMENTS`, the others are `Margin.state`."""
    for group in groups:
        level += parts[group]
    return _limited(_quantile(ascending[place], counts[place, 0], min(level, most_level)))


@compiled
def _quantile(ascending: np.ndarray, count: int, level: float) -> float:
    """The (1 - level) quantile, at the rank (n + 1) (1 - level) of split conformal prediction; 0 without scores."""
    if count == 0:
        return 0.0
    rank = max((count + 1) * (1 - level) - 1, 0.0)
    if rank >= count - 1:
        return ascending[count - 1] + BEYOND * max(1 / (count + 1) - level, 0.0)
    below = int(rank)
    share = rank - below
    return (1 - share) * ascending[below] + share * ascending[below + 1]


@compiled
def learn_from(
    overview: float, image: float, groups: Any, missed: float, target: float, rate: float, window: np.ndarray,
    level: float, most_level: float, parts: np.ndarray, ascending: np.ndarray, counts: np.ndarray,
) -> None:  # fmt: skip
    """See `Margin.learn`; the last arguments are attributes of a margin."""
    if not math.isnan(overview):
        _add(overview, ascending[0], counts[0], window[0])
    if not math.isnan(image):
        _add(image, ascending[1], counts[1], window[1])
    if math.isnan(missed):
        return
    # A part that leads nowhere further would only take long to come back.
    now = level
    for group in groups:
        now += parts[group]
    if q_of(groups, 0, level, most_level, parts, ascending, counts) < MOST_Q if missed > 0 else now < most_level:
        for group in groups:
            parts[group] += rate * (target - missed)


@compiled
def _add(score: float, ascending: np.ndarray, counts: np.ndarray, window: np.ndarray) -> None:
    """See `Margin.add`; of one moment."""
    count, place = counts
    if count == len(window):
        count = _without(window[place], ascending, count)
    i = count
    while i > 0 and ascending[i - 1] > score:
        ascending[i] = ascending[i - 1]
        i -= 1
    ascending[i] = window[place] = score
    counts[0], counts[1] = count + 1, (place + 1) % len(window)


@compiled
def forget(number: int, ascending: np.ndarray, counts: np.ndarray, window: np.ndarray) -> None:
    """See `Margin.forget`; the arrays are those of `Scores`."""
    for place in range(len(window)):
        count = counts[place]
        for _ in range(min(number, count[0] - 1)):
            count[1] = (count[1] - 1) % window.shape[1]
            count[0] = _without(window[place, count[1]], ascending[place], count[0])


@compiled
def _without(score: float, ascending: np.ndarray, count: int) -> int:
    """Drop a score; how many are left."""
    i = 0
    while ascending[i] < score:
        i += 1
    for j in range(i, count - 1):
        ascending[j] = ascending[j + 1]
    return count - 1
