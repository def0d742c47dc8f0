"""How far above its predicted time a request's bound lies: a quantile of recent scores, whose level is controlled.

The score of a finished request is log(its time / the predicted time of a long answer), from each moment at which a
setting is chosen: when the overview is encoded, and when the whole image is. The bound is exp(q) times that predicted
time, q being the (1 - a) quantile of that moment's last scores. Scores follow the machine's noise and forget it, so
that a noisy spell leaves nothing behind. No assumption tells what a should be: a setting is chosen, budgets leave room,
the noise changes. So it follows adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170): after each
request

    a <- a + rate (target - missed)

where missed is 1 for a late request and less for an answer that was cut short to be in time (`Margin.cut_cost`),
in one offset for each of the request's groups (groups that overlap: Gibbs, Cherian and Candes 2023, arXiv 2305.12616).
Below the level that the scores reach, q grows on in proportion to what a lacks, so that misses always raise it. An
offset is a sum over its group's requests: over T of them the share missed differs from the target by (change of the
offset) / (rate T), whatever the world does.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from budgetvlm.guard.bounds import MOMENTS, Moment
from budgetvlm.guard.kernels import (
    BEYOND_SCORES,
    HIGHEST_LOG_MARGIN,
    LOWEST_LOG_MARGIN,
    log_margin,
    score_quantile,
)

MIN_SCORES = 100
SCORES_PER_MISS = 2.0  # the window holds this many scores for each one that is expected to be above the bound
CUT_SHARE = 0.05  # of the answers may be cut short, where alpha is smaller: fewer would cost more answers than they are
RATE = 0.2  # of a level, as a share of what may be missed
# As a share of what may be missed (the geometric mean, where fewer may be late than cut): budgets leave room and
# answers are hurried, so that more scores may lie above bounds than may miss.
HIGHEST_LEVEL = 8.0
MAX_GROUPS = 4096  # that have an offset of their own


class Scores:
    """The last scores of each of `MOMENTS`, N at the most.

    Attributes:
        arrived: in the order in which they came, for each moment.
        ascending, counts: the same, sorted, ``[2, N]``, and how many there are, int64 ``[2]``; these arrays stay where
            they are, because the compiled loops read them.
    """

    def __init__(self, size: int, given: Mapping[Moment, Iterable[float]]) -> None:
        self.arrived = [deque(given.get(moment, ()), maxlen=size) for moment in MOMENTS]
        self.ascending = np.zeros((len(MOMENTS), size))
        self.counts = np.array([len(arrived) for arrived in self.arrived])
        for row, arrived in zip(self.ascending, self.arrived, strict=True):
            row[: len(arrived)] = sorted(arrived)

    @property
    def size(self) -> int:
        """The most scores of a moment."""
        return self.ascending.shape[1]


class Margin:
    """The margin of one guard.

    A group has a number (`number`), by which its offset is found.

    Attributes:
        level: the share of scores that may lie above the bound, before a request's groups move it.
        offsets: what each group adds to the level, by its number; the array stays where it is.
        scores: see `Scores`.

    Args:
        alpha: the rate that is promised.
        scores: to begin with, oldest first, of each of `MOMENTS`.
        level: None: alpha.
    """

    def __init__(
        self, alpha: float, scores: Mapping[Moment, Iterable[float]] | None = None, level: float | None = None
    ) -> None:
        self.alpha, self.level = alpha, alpha if level is None else level
        self._may_miss = max(alpha, CUT_SHARE)
        self.rate = RATE * self._may_miss  # offsets go this far towards the target after each request
        self.highest_level = min(HIGHEST_LEVEL * math.sqrt(alpha * self._may_miss), 0.5)
        self._numbers: dict[str, int] = {}
        self._free = itertools.count()
        self.offsets = np.zeros(MAX_GROUPS)
        self.scores = Scores(max(MIN_SCORES, math.ceil(SCORES_PER_MISS / alpha)), scores or {})

    @property
    def cut_cost(self) -> float:
        """What an answer that is cut short counts, a late one being 1.

        Late and cut together, so counted, are kept at alpha: late ones at most alpha, cut ones `CUT_SHARE` or alpha.
        """
        return self.alpha / self._may_miss

    @property
    def group_offsets(self) -> dict[str, float]:
        """What each group that was learnt about adds to the level, by its name."""
        return {group: offset for group, number in self._numbers.items() if (offset := float(self.offsets[number]))}

    @classmethod
    def start(cls, alpha: float, scores: Mapping[Moment, np.ndarray], log_margin: float | None = None) -> Margin:
        """A margin that begins with the quantiles of these scores (of any shape).

        Args:
            log_margin: at the choice of a setting, at first; None: the (1 - alpha) quantile of the scores.
        """
        size = cls(alpha).scores.size
        margin = cls(alpha, {moment: _representative(given, size) for moment, given in scores.items()})
        if log_margin is not None:
            limited = max(LOWEST_LOG_MARGIN, min(log_margin, HIGHEST_LOG_MARGIN))
            margin.level = min(margin._level_of(limited), margin.highest_level)
        return margin

    def number(self, group: str) -> int:
        """The number of a group, by its name; where there are very many, the last ones have one number."""
        found = self._numbers.get(group)
        if found is None:  # counted, so that two threads that bring a new group each get two numbers
            found = self._numbers.setdefault(group, min(next(self._free), MAX_GROUPS - 1))
        return found

    def log_margin(self, groups: Sequence[int] = (), moment: Moment = "overview") -> float:
        """log(bound / predicted time) from this moment on, for a request of the groups with these numbers."""
        state = SimpleNamespace(
            level=self.level,
            highest_level=self.highest_level,
            group_offsets=self.offsets,
            sorted_scores=self.scores.ascending,
            score_counts=self.scores.counts,
        )
        return float(log_margin(state, groups, MOMENTS.index(moment)))

    def image_factors(self, factors: np.ndarray) -> np.ndarray:
        """The factors once the image is encoded that belong to these at the choice: of the same level, ``[F]``."""
        place = MOMENTS.index("image")
        count, ascending = int(self.scores.counts[place]), self.scores.ascending[place]
        levels = [self._level_of(log_factor) for log_factor in np.log(factors).tolist()]
        return np.exp([score_quantile(ascending, count, level) for level in levels])

    def _level_of(self, log_margin: float) -> float:
        """The level at which the quantile at the choice of a setting is this; 1 if all scores are above it."""
        place = MOMENTS.index("overview")
        count = int(self.scores.counts[place])
        ascending = self.scores.ascending[place, :count]
        if log_margin >= ascending[-1]:
            return float(1 / (count + 1) - (log_margin - ascending[-1]) / BEYOND_SCORES)
        above = int(np.searchsorted(ascending, log_margin, side="right"))
        if not above:
            return 1.0
        low, high = ascending[above - 1 : above + 1].tolist()
        return 1 - (above + (log_margin - low) / (high - low)) / (count + 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
        scores = {moment: list(self.scores.arrived[place]) for place, moment in enumerate(MOMENTS)}
        return {"level": self.level, "parts": self.group_offsets, "scores": scores}

    @classmethod
    def from_dict(cls, alpha: float, document: Mapping[str, Any]) -> Margin:
        """The margin of a `to_dict` document. Raises KeyError."""
        margin = cls(alpha, document["scores"], document["level"])
        for group, offset in document["parts"].items():
            margin.offsets[margin.number(str(group))] = float(offset)
        return margin


def _representative(scores: np.ndarray, size: int) -> list[float]:
    """At most ``size`` scores with about the same quantiles, in a random order, because the oldest leave first."""
    flat = np.sort(np.ravel(scores))
    even = np.quantile(flat, (np.arange(size) + 0.5) / size) if len(flat) > size else flat
    out: list[float] = np.random.default_rng(0).permutation(even).tolist()
    return out
