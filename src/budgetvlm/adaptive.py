"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

A bound is e + exp(q) u. Here e is the time that the request has taken already: a setting is chosen after the overview
is encoded. u is the predicted rest with an answer as long as all but a share alpha / 2 are expected to be, scaled by
how fast this machine runs each stage now (`budgetvlm.speed`), and q the margin (`budgetvlm.margin`). A request belongs
to several groups: all, those by the length of its answer, those by its budget (as a share of the full setting's
predicted time). Where both start comes from calibration (`budgetvlm.conformal`).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from budgetvlm.conformal import samples_needed
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.guard import timed_rows
from budgetvlm.latency import LatencyModel, QuickLatency, Sizes
from budgetvlm.lengths import LengthModel
from budgetvlm.margin import Margin
from budgetvlm.speed import AGREEING, StageSpeed
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 2
DEFAULT_ALPHA = 0.05
OTHER_RATE = 0.05  # share of the way that the cost of the rest goes towards one request's
OVERVIEW_STAGES = ("preprocess", "vision")  # of which the overview is a part
TARGET_SHARE = 0.85  # of alpha: the promise is "at most", and the margin wanders a little
MOST_CREDIT = 10.0  # late answers that a quiet spell can save up
BUDGET_RATIO = 1.25  # budgets this far apart are in different groups

Groups = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """What is known of a request before anything runs.

    Attributes:
        vision: visual tokens at each setting, float64 ``[K]``.
        language: the prompt's other tokens.
        feature: language feature ``[Dl]``.
    """

    vision: np.ndarray
    language: float
    feature: np.ndarray


@dataclass(frozen=True, eq=False)
class Spent:
    """What a request has taken when its setting is chosen, in ms: in all, and its overview alone (0: not encoded)."""

    total_ms: float = 0.0
    overview_ms: float = 0.0


@dataclass(frozen=True, eq=False)
class Bounds:
    """What the guard says of one request.

    Attributes:
        bounds_ms: upper bound on each setting's time, ``[K]``.
        rest_ms: the predicted rest of it with a long answer, ``[K]``; the bound is what was spent and a factor of it.
        predicted_ms: its time with an answer of the expected length, ``[K]``.
        step_ms: one decoding step of it, ``[K]``.
        slowdown: time of the full setting on this machine now / when it was profiled.
        groups: the requests that share parts of this one's margin.
        spent: when the bounds were made.
    """

    bounds_ms: np.ndarray
    rest_ms: np.ndarray
    predicted_ms: np.ndarray
    step_ms: np.ndarray
    slowdown: float
    groups: Groups = ()
    spent: Spent = Spent()

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Which settings a budget allows, bool ``[K]``; maybe none."""
        out: np.ndarray = self.bounds_ms <= budget_ms
        return out

    def only(self, known: np.ndarray) -> Bounds:
        """The same with all other settings (bool ``[K]``) out of reach."""
        return replace(
            self,
            bounds_ms=np.where(known, self.bounds_ms, np.inf),
            predicted_ms=np.where(known, self.predicted_ms, np.inf),
        )

    @property
    def fastest(self) -> int:
        """The setting with the smallest bound."""
        return int(self.bounds_ms.argmin())


class AdaptiveGuard:
    """See the module. ``cuts``: whether answers stop before a token that would be late.

    Args:
        latency: predicts times.
        lengths: predicts how long answers are.
        margin: how far bounds lie above predicted times; its alpha is the share of requests that may break their
            budgets.
        speed: of this machine's stages; None: that of the profile.
        other_ms: the cost of features, controller and guard, to begin with.
        calibrated_on: how many requests calibrated it; without any it promises nothing.

    Raises:
        ConfigError: an alpha outside (0, 1), a cost that cannot be.
    """

    cuts = True

    def __init__(
        self,
        latency: LatencyModel,
        lengths: LengthModel,
        margin: Margin | None = None,
        speed: StageSpeed | None = None,
        other_ms: float = 0.0,
        calibrated_on: int = 0,
    ) -> None:
        self.margin = Margin(DEFAULT_ALPHA) if margin is None else margin
        samples_needed(self.alpha)
        if not 0 <= other_ms < math.inf:
            raise ConfigError(f"other_ms={other_ms!r} is no cost in ms; give 0 or more")
        self.latency, self.lengths = latency, lengths
        self.speed = StageSpeed(latency.stages) if speed is None else speed
        self.other_ms, self.calibrated_on = other_ms, calibrated_on
        self.credit = 1.0
        self._profiled = QuickLatency(latency)
        self._compile()

    @property
    def alpha(self) -> float:
        """The share of requests that may break their budgets."""
        return self.margin.alpha

    @property
    def may_be_late(self) -> bool:
        """Whether one more late answer keeps the promise.

        Each promised request earns alpha, each late one costs 1, so over T of them at most 1 + alpha T are late.
        """
        return self.credit >= 1.0

    @classmethod
    def fit(cls, table: ProfileTable, features: Features, alpha: float = DEFAULT_ALPHA) -> AdaptiveGuard:
        """A guard from profiles alone; its margin is that of measured / predicted times on the same samples.

        It promises nothing before it is calibrated on requests that it was not fitted on (`budgetvlm.calibrate`).

        Args:
            table: profiled samples, usually the training split; those that were timed are fitted on.
            features: of these samples.

        Raises:
            DataError: no latency was measured.
        """
        timed = timed_rows(table)
        measured = table.subset(timed) if timed.any() else table
        latency = LatencyModel.fit(measured)
        lengths = LengthModel.fit(features.aligned(table.sample_ids).language, answer_lengths(table))
        sizes = Sizes.of_table(measured)
        long = lengths.quantile(features.aligned(measured.sample_ids).language, 1 - alpha / 2)
        upper = latency.predict(replace(sizes, output=np.broadcast_to(long[:, None], sizes.output.shape)))
        scores = np.log(measured.latency_ms / upper)
        return cls(latency, lengths, Margin.start(alpha, scores[np.isfinite(scores)]))

    def _compile(self) -> None:
        scale = np.exp(self.speed.log_scale)
        self._quick = QuickLatency(self.latency, scale)
        overview = [stage in OVERVIEW_STAGES for stage in self.latency.stages]
        self._overview = QuickLatency(self.latency, scale * overview)

    def bounds(self, request: Request, budget_ms: float, spent: Spent | None = None) -> Bounds:
        """Bounds on the time of every setting, for a request with this budget.

        Args:
            spent: None: nothing has run yet.
        """
        expected, long = self.lengths.outlook(request.feature, 1 - self.alpha / 2)
        expected = max(expected, 1.0)
        first, step = self._quick.parts(request.vision, request.language)
        full_ms = float(first[-1] + (expected - 1) * step[-1])
        slowdown = full_ms / self._profiled.at(-1, float(request.vision[-1]), request.language, expected)
        groups = "all", f"up to {long} output tokens", _budget_group(budget_ms / full_ms)
        done_ms, mood, taken = 0.0, self.speed.mood, spent or Spent()
        if taken.overview_ms > 0:
            done_ms = self._overview.at(0, float(request.vision.min()), 0.0, 1.0)
            mood = self.speed.mood_after(math.log(taken.overview_ms / done_ms)) if done_ms > 0 else mood
        pace = math.exp(mood)
        step = pace * step
        rest = pace * (first - done_ms) + self.other_ms
        long_rest = rest + (long - 1) * step
        return Bounds(
            bounds_ms=taken.total_ms + math.exp(self.margin.q(groups)) * long_rest,
            rest_ms=long_rest,
            predicted_ms=taken.total_ms + rest + (expected - 1) * step,
            step_ms=step,
            slowdown=pace * slowdown,
            groups=groups,
            spent=taken,
        )

    def update(
        self,
        request: Request,
        bounds: Bounds,
        setting_index: int,
        stages_ms: Mapping[str, float],
        output_tokens: int,
        rest_ms: float,
        *,
        late: bool,
        cut: bool = False,
        promised: bool = True,
    ) -> None:
        """Learn from a finished request.

        Args:
            bounds: those that its setting was chosen by.
            stages_ms: what the stages took that the latency model knows; others are not read.
            rest_ms: what it took in all after its setting was chosen.
            late: it broke its budget. cut: its answer was cut short to be in time.
            promised: a setting was allowed, so that this counts.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        times = {**stages_ms, "rest": rest_ms}
        wrong = {name: ms for name, ms in times.items() if not 0 <= ms < math.inf}
        if wrong:
            raise DataError(f"times have to be numbers of ms of 0 or more, given {wrong}; has the clock jumped?")
        # What was cut would have taken another step at least.
        took = rest_ms + (float(bounds.step_ms[setting_index]) if cut else 0.0)
        if took > 0:
            self.margin.add(math.log(took / float(bounds.rest_ms[setting_index])))
        # A broken budget that nothing was expected to keep breaks no promise; a kept one shows that bounds are wide.
        missed = late or cut
        if promised:
            self.credit = min(self.credit + self.alpha, MOST_CREDIT) - late
        if promised or not missed:
            self.margin.judge(bounds.groups, missed, TARGET_SHARE * self.alpha)
        known = sum(ms for stage, ms in stages_ms.items() if stage in self.latency.stages) - bounds.spent.overview_ms
        other = max(0.0, min(rest_ms - known, 4 * self.other_ms + 1.0))
        self.other_ms += OTHER_RATE * (other - self.other_ms)
        if self.follow(request, setting_index, stages_ms, output_tokens):
            self.margin.forget(AGREEING)

    def follow(self, request: Request, index: int, stages_ms: Mapping[str, float], output_tokens: float) -> bool:
        """Learn this machine's speed from a request, and nothing else; whether a stage's speed has jumped."""
        predicted = self.latency.stages_of(index, request.vision[index], request.language, output_tokens)
        jumped = self.speed.follow(predicted, stages_ms)
        self._compile()
        return jumped

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document with all that was learnt; `from_dict` takes it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "latency": self.latency.to_dict(),
            "lengths": self.lengths.to_dict(),
            "alpha": self.alpha,
            "calibrated_on": self.calibrated_on,
            "margin": self.margin.to_dict(),
            "speed": self.speed.to_dict(),
            "other_ms": self.other_ms,
            "credit": self.credit,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> AdaptiveGuard:
        """The guard of a `to_dict` document. Raises DataError."""
        if document.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"a guard of schema version {document.get('schema_version')!r} cannot be read; this version reads "
                f"{SCHEMA_VERSION}. Calibrate again."
            )
        try:
            latency, lengths = LatencyModel.from_dict(document["latency"]), LengthModel.from_dict(document["lengths"])
            margin = Margin.from_dict(document["alpha"], document["margin"])
            speed = StageSpeed.from_dict(latency.stages, document["speed"])
            guard = cls(latency, lengths, margin, speed, document["other_ms"], document["calibrated_on"])
            guard.credit = float(document["credit"])
            return guard
        except KeyError as error:
            raise DataError(f"the guard lacks the field {error.args[0]}; calibrate again") from None


def _budget_group(share: float) -> str:
    """Budgets of about one size, as a share of the full setting's time here."""
    step = round(math.log(max(0.05, min(share, 1.5))) / math.log(BUDGET_RATIO))
    return f"budget about {BUDGET_RATIO**step:.2f} x full"


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)
