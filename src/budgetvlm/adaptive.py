"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

A bound is e + exp(q) u. Here e is the time that the request has taken already: a setting is chosen after the overview
is encoded, and revised after the whole image is (`budgetvlm.recourse`). u is the predicted rest with an answer as long
as all but a share alpha / 2 are expected to be, scaled by how fast this machine runs each stage now
(`budgetvlm.speed`), and q the margin (`budgetvlm.margin`). A request belongs to several groups: all, those by the size
of its image, by the length of its answer, and by its budget (as a share of the full setting's predicted time). Where
both start comes from calibration (`budgetvlm.conformal`).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from budgetvlm.conformal import samples_needed
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.guard import timed_rows
from budgetvlm.latency import LatencyModel, QuickLatency, Sizes
from budgetvlm.lengths import LengthModel
from budgetvlm.margin import Margin, Moment
from budgetvlm.recourse import SameImage
from budgetvlm.speed import AGREEING, StageSpeed
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 3
DEFAULT_ALPHA = 0.05
OTHER_RATE = 0.05  # share of the way that the cost of the rest goes towards one request's
IMAGE_STAGES = ("preprocess", "vision")  # of which the overview is a part
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
    """What a request has taken when a setting is chosen, in ms: in all, and of it the image (0: nothing encoded)."""

    total_ms: float = 0.0
    image_ms: float = 0.0


@dataclass(frozen=True, eq=False)
class Bounds:
    """What the guard says of one request.

    Attributes:
        bounds_ms: upper bound on each setting's time, or on that of the setting that it falls back on if encoding the
            image turns out slow, ``[K]``.
        rest_ms: the predicted rest of its time with a long answer, ``[K]``; of it answer_ms once the image is encoded.
        predicted_ms: its time with an answer of the expected length, ``[K]``.
        step_ms: one decoding step of it, ``[K]``.
        slowdown: time of the full setting on this machine now / when it was profiled.
        fastest: the setting with the smallest bound of its own.
        lengths: tokens of an answer as expected, and of a long one.
        groups: the requests that share parts of this one's margin.
        spent: when the bounds were made.
        moment: what was encoded by then.
    """

    bounds_ms: np.ndarray
    rest_ms: np.ndarray
    answer_ms: np.ndarray
    predicted_ms: np.ndarray
    step_ms: np.ndarray
    slowdown: float
    fastest: int
    lengths: tuple[float, int] = (1.0, 1)
    groups: Groups = ()
    spent: Spent = Spent()
    moment: Moment = "overview"

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Which settings a budget allows, bool ``[K]``; maybe none."""
        out: np.ndarray = self.bounds_ms <= budget_ms
        return out


class AdaptiveGuard:
    """See the module.

    ``cuts``: whether answers stop before a token that would be late. ``revises``: whether a choice is revised once the
    image is encoded.

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

    cuts = revises = True

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
        self._same_image = SameImage(latency.knob_space)
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
        known = scores[np.isfinite(scores)]
        return cls(latency, lengths, Margin.start(alpha, {"overview": known, "image": known}))

    def _compile(self) -> None:
        scale = np.exp(self.speed.log_scale)
        image = np.array([stage in IMAGE_STAGES for stage in self.latency.stages])
        self._quick = QuickLatency(self.latency, scale)
        self._image, self._reading = (QuickLatency(self.latency, scale * part) for part in (image, ~image))

    def bounds(
        self, request: Request, budget_ms: float, spent: Spent | None = None, known: np.ndarray | None = None
    ) -> Bounds:
        """Bounds on the time of every setting, for a request with this budget.

        Args:
            spent: with the overview's encoding; None: nothing has run yet.
            known: settings that may be chosen, bool ``[K]``; None: all.
        """
        expected, long = self.lengths.outlook(request.feature, 1 - self.alpha / 2)
        expected = max(expected, 1.0)
        first, step = self._quick.parts(request.vision, request.language)
        full_ms = float(first[-1] + (expected - 1) * step[-1])
        slowdown = full_ms / self._profiled.at(-1, float(request.vision[-1]), request.language, expected)
        image = f"image of up to {request.vision.max():.0f} visual tokens"
        groups = "all", image, f"up to {long} output tokens", _budget_group(budget_ms / full_ms)
        done_ms, taken = 0.0, spent or Spent()
        if taken.image_ms > 0:
            done_ms = self._image.at(0, float(request.vision.min()), 0.0, 1.0)
        pace = self._pace(done_ms, taken.image_ms)
        step = pace * step
        rest = pace * (first - done_ms) + self.other_ms
        long_rest = rest + (long - 1) * step
        out = Bounds(
            bounds_ms=_only(taken.total_ms + math.exp(self.margin.q(groups)) * long_rest, known),
            rest_ms=long_rest,
            answer_ms=pace * self._reading.parts(request.vision, request.language)[0] + (long - 1) * step,
            predicted_ms=_only(taken.total_ms + rest + (expected - 1) * step, known),
            step_ms=step,
            slowdown=pace * slowdown,
            fastest=0,
            lengths=(expected, long),
            groups=groups,
            spent=taken,
        )
        return self._with_recourse(out)

    def _with_recourse(self, bounds: Bounds) -> Bounds:
        """With what revising makes possible."""
        bounds_ms, fastest = bounds.bounds_ms, int(bounds.bounds_ms.argmin())
        if self.revises:
            margin = math.exp(self.margin.q(bounds.groups, "image")) - 1
            aimed = bounds.spent.total_ms + bounds.rest_ms + margin * bounds.answer_ms
            bounds_ms = self._same_image.reachable(bounds_ms, aimed)
        return replace(bounds, bounds_ms=bounds_ms, fastest=fastest)

    def revised(
        self, request: Request, bounds: Bounds, index: int, spent: Spent, known: np.ndarray | None = None
    ) -> Bounds:
        """Bounds once the image of the chosen setting is encoded; other images are out of reach.

        Args:
            bounds: that the setting was chosen by.
            spent: with the whole image's encoding.
            known: settings that may be chosen, bool ``[K]``; None: all.
        """
        expected, long = bounds.lengths
        done_ms = self._image.at(index, float(request.vision[index]), request.language, 1.0)
        pace = self._pace(done_ms, spent.image_ms)
        first, step = self._reading.parts(request.vision, request.language)
        rest, step = pace * first, pace * step
        long_rest = rest + (long - 1) * step
        here = self._same_image.of(index)
        here = here if known is None else here & known
        bounds_ms = _only(spent.total_ms + math.exp(self.margin.q(bounds.groups, "image")) * long_rest, here)
        return replace(
            bounds,
            bounds_ms=bounds_ms,
            rest_ms=long_rest,
            answer_ms=long_rest,
            predicted_ms=_only(spent.total_ms + rest + (expected - 1) * step, here),
            step_ms=step,
            fastest=int(bounds_ms.argmin()),
            spent=spent,
            moment="image",
        )

    def _pace(self, predicted_ms: float, took_ms: float) -> float:
        """Factor on predicted times at this moment, from a part of the request that is over; 0: none is."""
        known = predicted_ms > 0 and took_ms > 0
        return math.exp(self.speed.mood_after(math.log(took_ms / predicted_ms)) if known else self.speed.mood)

    def update(
        self,
        request: Request,
        looks: Sequence[Bounds],
        setting_index: int,
        stages_ms: Mapping[str, float],
        output_tokens: int,
        total_ms: float,
        *,
        late: bool,
        cut: bool = False,
        promised: bool = True,
    ) -> None:
        """Learn from a finished request.

        Args:
            looks: the bounds that its setting was chosen by and, if it was revised, those that it was revised by.
            stages_ms: what the stages took that the latency model knows; others are not read.
            total_ms: what it took in all.
            late: it broke its budget. cut: its answer was cut short to be in time.
            promised: a setting was allowed, so that this counts.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        rests = {f"rest after the {look.moment}": total_ms - look.spent.total_ms for look in looks}
        wrong = {name: ms for name, ms in {**stages_ms, **rests}.items() if not 0 <= ms < math.inf}
        if wrong:
            raise DataError(f"times have to be numbers of ms of 0 or more, given {wrong}; has the clock jumped?")
        for look in looks:
            # What was cut would have taken another step at least.
            took = total_ms - look.spent.total_ms + (float(look.step_ms[setting_index]) if cut else 0.0)
            if took > 0:
                self.margin.add(math.log(took / float(look.rest_ms[setting_index])), look.moment)
        # A broken budget that nothing was expected to keep breaks no promise; a kept one shows that bounds are wide.
        missed = late or cut
        if promised:
            self.credit = min(self.credit + self.alpha, MOST_CREDIT) - late
        if promised or not missed:
            self.margin.judge(looks[0].groups, missed, TARGET_SHARE * self.alpha)
        spent = looks[0].spent
        known = sum(ms for stage, ms in stages_ms.items() if stage in self.latency.stages) - spent.image_ms
        other = max(0.0, min(total_ms - spent.total_ms - known, 4 * self.other_ms + 1.0))
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


def _only(times: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Times with all but the known settings out of reach."""
    return times if known is None else np.where(known, times, np.inf)


def _budget_group(share: float) -> str:
    """Budgets of about one size, as a share of the full setting's time here."""
    step = round(math.log(max(0.05, min(share, 1.5))) / math.log(BUDGET_RATIO))
    return f"budget about {BUDGET_RATIO**step:.2f} x full"


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)
