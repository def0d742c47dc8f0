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

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

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
BEYOND = 5.0  # q grows by this for a level of 1 below what the scores reach: 0.05 for a miss more in 100


class Scores:
    """The last scores of one moment, and their quantiles."""

    def __init__(self, size: int, scores: Iterable[float] = ()) -> None:
        self._window: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        for score in scores:
            self.add(score)

    def fill(self, scores: np.ndarray) -> None:
        """Begin with the quantiles of these scores, of any shape."""
        size = self._window.maxlen or 0
        flat = np.sort(np.ravel(scores))
        even = np.quantile(flat, (np.arange(size) + 0.5) / size) if len(flat) > size else flat
        # In a random order, because the oldest leave first.
        for score in np.random.default_rng(0).permutation(even):
            self.add(float(score))

    def quantile(self, level: float) -> float:
        """The (1 - level) quantile, at the rank (n + 1) (1 - level) of split conformal prediction; 0 without scores."""
        count = len(self._sorted)
        if not count:
            return 0.0
        rank = max((count + 1) * (1 - level) - 1, 0.0)
        if rank >= count - 1:
            return self._sorted[-1] + BEYOND * max(1 / (count + 1) - level, 0.0)
        below = int(rank)
        share = rank - below
        return (1 - share) * self._sorted[below] + share * self._sorted[below + 1]

    def level_of(self, q: float) -> float:
        """The level at which `quantile` is q; 1 if all scores are above it."""
        count = len(self._sorted)
        if q >= self._sorted[-1]:
            return 1 / (count + 1) - (q - self._sorted[-1]) / BEYOND
        above = bisect_right(self._sorted, q)
        if not above:
            return 1.0
        low, high = self._sorted[above - 1 : above + 1]
        return 1 - (above + (q - low) / (high - low)) / (count + 1)

    def add(self, score: float) -> None:
        """Learn the score of a finished request."""
        if len(self._window) == self._window.maxlen:
            self._drop(self._window[0])
        self._window.append(score)
        insort(self._sorted, score)

    def forget(self, count: int) -> None:
        """Drop the last scores, all but one at most."""
        for _ in range(min(count, len(self._window) - 1)):
            self._drop(self._window.pop())

    def _drop(self, score: float) -> None:
        del self._sorted[bisect_left(self._sorted, score)]

    def to_list(self) -> list[float]:
        """Oldest first."""
        return list(self._window)


class Margin:
    """The margin of one guard.

    Args:
        alpha: the rate that is promised.
        scores: to begin with, oldest first, of each of `MOMENTS`.
        level: the share of scores that may lie above the bound, to begin with; None: alpha.
    """

    def __init__(
        self, alpha: float, scores: Mapping[Moment, Iterable[float]] | None = None, level: float | None = None
    ) -> None:
        self.alpha, self.level = alpha, alpha if level is None else level
        self.parts: dict[str, float] = {}
        self._may_miss = max(alpha, CUT_SHARE)
        self._most_level = min(MOST_LEVEL * math.sqrt(alpha * self._may_miss), 0.5)
        size = max(LEAST_SCORES, math.ceil(SCORES_A_MISS / alpha))
        self._scores = {moment: Scores(size, (scores or {}).get(moment, ())) for moment in MOMENTS}

    @property
    def cut_cost(self) -> float:
        """What an answer that is cut short counts, a late one being 1.

        Late and cut together, so counted, are kept at alpha: late ones at most alpha, cut ones `CUT_SHARE` or alpha.
        """
        return self.alpha / self._may_miss

    @classmethod
    def start(cls, alpha: float, scores: Mapping[Moment, np.ndarray], q: float | None = None) -> Margin:
        """A margin that begins with the quantiles of these scores (of any shape) and, at first, with this q.

        Args:
            q: at the choice of a setting; None: the (1 - alpha) quantile of the scores.
        """
        margin = cls(alpha)
        for moment, given in scores.items():
            margin._scores[moment].fill(given)
        if q is not None:
            margin.level = min(margin._scores["overview"].level_of(_limited(q)), margin._most_level)
        return margin

    def q(self, groups: Sequence[str], moment: Moment = "overview") -> float:
        """log(bound / predicted time) from this moment on, for a request of these groups."""
        return _limited(self._scores[moment].quantile(self._level(groups)))

    def both(self, groups: Sequence[str]) -> tuple[float, float]:
        """`q` from each of `MOMENTS` on."""
        level = self._level(groups)
        overview, image = (_limited(self._scores[moment].quantile(level)) for moment in MOMENTS)
        return overview, image

    def image_factors(self, factors: np.ndarray) -> np.ndarray:
        """The factors once the image is encoded that belong to these at the choice: of the same level, ``[F]``."""
        overview, image = (self._scores[moment] for moment in MOMENTS)
        return np.exp([image.quantile(overview.level_of(q)) for q in np.log(factors).tolist()])

    def _level(self, groups: Sequence[str]) -> float:
        return min(self.level + sum(self.parts.get(group, 0.0) for group in groups), self._most_level)

    def judge(self, groups: Sequence[str], missed: float, target: float) -> None:
        """Learn what a request of these groups missed, from 0 to 1, where ``target`` may be missed on average."""
        # A part that leads nowhere further would only take long to come back.
        if self.q(groups) >= MOST_Q if missed else self._level(groups) >= self._most_level:
            return
        for group in groups:
            self.parts[group] = self.parts.get(group, 0.0) + STEP * self._may_miss * (target - missed)

    def add(self, score: float, moment: Moment = "overview") -> None:
        """Learn the score of a finished request."""
        self._scores[moment].add(score)

    def forget(self, count: int) -> None:
        """Drop the last scores: what they tell was the machine's new speed, not its noise."""
        for scores in self._scores.values():
            scores.forget(count)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
        scores = {moment: kept.to_list() for moment, kept in self._scores.items()}
        return {"level": self.level, "parts": dict(self.parts), "scores": scores}

    @classmethod
    def from_dict(cls, alpha: float, document: Mapping[str, Any]) -> Margin:
        """The margin of a `to_dict` document. Raises KeyError."""
        margin = cls(alpha, document["scores"], document["level"])
        margin.parts = {str(group): float(part) for group, part in document["parts"].items()}
        return margin


def _limited(q: float) -> float:
    return max(LEAST_Q, min(q, MOST_Q))
