"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

A bound is e + exp(q) u. Here e is the time that the request has taken already: a setting is chosen after the overview
is encoded, and revised after the whole image is (`budgetvlm.recourse`). u is the predicted rest with an answer as long
as all but a share alpha / 2 are expected to be, scaled by how fast this machine runs each stage now
(`budgetvlm.speed`), and q the margin (`budgetvlm.margin`). A request belongs to several groups: all, those by the size
of its image, by the length of its answer, and by its budget (as a share of the full setting's predicted time); while
the machine is slowed down, by a load beside it, to others of the same kinds, so that what is learnt then does not stay
when the load has gone. Where both start comes from calibration (`budgetvlm.conformal`).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.conformal import samples_needed
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.guard import timed_rows
from budgetvlm.latency import LatencyModel, Sizes
from budgetvlm.lengths import LengthModel
from budgetvlm.margin import Margin, Moment
from budgetvlm.quick_latency import QuickLatency
from budgetvlm.recourse import Hurry, SameImage, bound_of
from budgetvlm.speed import AGREEING, StageSpeed
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 4
DEFAULT_ALPHA = 0.05
MOST_SAMPLES = 20_000  # that are fitted on; more say nothing more of a machine
OTHER_RATE = 0.05  # share of the way that the cost of the rest goes towards one request's
IMAGE_STAGES = ("preprocess", "vision")  # of which the overview is a part
TARGET_SHARE = 0.85  # of alpha: the promise is "at most", and the margin wanders a little
MOST_CREDIT = 10.0  # late answers that a quiet spell can save up
BUDGET_RATIO = 1.25  # budgets this far apart are in different groups
SLOWED = 2.0  # times as long as when it was calibrated: the machine is under load, and requests are in other groups

Groups = tuple[str, ...]


class Request(NamedTuple):
    """What is known of a request before anything runs.

    Attributes:
        vision: visual tokens at each setting, float64 ``[K]``.
        language: the prompt's other tokens.
        feature: language feature ``[Dl]``.
    """

    vision: np.ndarray
    language: float
    feature: np.ndarray


class Spent(NamedTuple):
    """What a request has taken when a setting is chosen, in ms: in all, and of it the image (0: nothing encoded)."""

    total_ms: float = 0.0
    image_ms: float = 0.0


class Bounds(NamedTuple):
    """What the guard says of one request.

    Attributes:
        bounds_ms: upper bound on each setting's time, or on that of the setting that it falls back on if encoding the
            image turns out slow, ``[K]``.
        rest_ms: the predicted rest of its time with a long answer, ``[K]``; of it answer_ms once the image is encoded.
        saving_ms: what hurrying would save of that, ``[K]``.
        predicted_ms: its time with an answer of the expected length, ``[K]``.
        step_ms: one decoding step of it, ``[K]``.
        slowdown: time of the full setting on this machine now / when it was profiled.
        fastest: the setting with the smallest bound of its own.
        lengths: tokens of an answer as expected, and of a long one.
        groups: the requests that share parts of this one's margin.
        spent: when the bounds were made.
        moment: what was encoded by then.
        terms: of `QuickLatency.terms`; None: these are fixed bounds.
    """

    bounds_ms: np.ndarray
    rest_ms: np.ndarray
    answer_ms: np.ndarray
    saving_ms: np.ndarray
    predicted_ms: np.ndarray
    step_ms: np.ndarray
    slowdown: float
    fastest: int
    lengths: tuple[float, int] = (1.0, 1)
    groups: Groups = ()
    spent: Spent = Spent()
    moment: Moment = "overview"
    terms: np.ndarray | None = None

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Which settings a budget allows, bool ``[K]``; maybe none."""
        out: np.ndarray = self.bounds_ms <= budget_ms
        return out


class AdaptiveGuard:
    """See the module.

    ``cuts``: whether answers stop before a token that would be late. ``revises``: whether a choice is revised once the
    image is encoded.

    Attributes:
        hurry: how the later tokens of an answer are hurried.

    Args:
        latency: predicts times.
        lengths: predicts how long answers are.
        margin: how far bounds lie above predicted times; its alpha is the share of requests that may break their
            budgets.
        speed: of this machine's stages; None: that of the profile.
        other_ms: the cost of features, controller and guard, to begin with.
        calibrated_on: how many requests calibrated it; without any it promises nothing.
        hurries: whether tokens may be made at quicker settings where an answer would be late.

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
        hurries: bool = True,
    ) -> None:
        self.margin = Margin(DEFAULT_ALPHA) if margin is None else margin
        samples_needed(self.alpha)
        if not 0 <= other_ms < math.inf:
            raise ConfigError(f"other_ms={other_ms!r} is no cost in ms; give 0 or more")
        self.latency, self.lengths = latency, lengths
        self._quick = QuickLatency(latency, IMAGE_STAGES)
        self.speed = StageSpeed(latency.stages) if speed is None else speed
        self.other_ms, self.calibrated_on = other_ms, calibrated_on
        self.credit = 1.0
        self._same_image, self.hurry = SameImage(latency.knob_space), Hurry(latency.knob_space)
        self.hurries = hurries
        self._quickest = self.hurry.last if hurries else np.arange(len(latency.knob_space))
        self._all = np.ones(len(latency.knob_space), dtype=bool)

    @property
    def alpha(self) -> float:
        """The share of requests that may break their budgets."""
        return self.margin.alpha

    @property
    def speed(self) -> StageSpeed:
        """How fast this machine runs each stage now."""
        return self._speed

    @speed.setter
    def speed(self, speed: StageSpeed) -> None:
        self._speed = speed
        self._quick.scale(speed.factors)

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
        measured = (table.subset(timed) if timed.any() else table).thinned(MOST_SAMPLES)
        latency = LatencyModel.fit(measured)
        some = table.thinned(MOST_SAMPLES)
        lengths = LengthModel.fit(features.aligned(some.sample_ids).language, answer_lengths(some))
        sizes = Sizes.of_table(measured)
        long = lengths.quantile(features.aligned(measured.sample_ids).language, 1 - alpha / 2)
        upper = latency.predict(replace(sizes, output=np.broadcast_to(long[:, None], sizes.output.shape)))
        scores = np.log(measured.latency_ms / upper)
        known = scores[np.isfinite(scores)]
        return cls(latency, lengths, Margin.start(alpha, {"overview": known, "image": known}))

    def bounds(
        self, request: Request, budget_ms: float, spent: Spent | None = None, known: np.ndarray | None = None
    ) -> Bounds:
        """Bounds on the time of every setting, for a request with this budget.

        Args:
            spent: with the overview's encoding; None: nothing has run yet.
            known: settings that may be chosen, bool ``[K]``; None: all.
        """
        taken = spent or Spent()
        expected, long = self.lengths.outlook(request.feature, 1 - self.alpha / 2)
        expected = max(expected, 1.0)
        sized = self._quick.size(request.vision, request.language)
        terms, full, overview_ms = self._quick.request(sized)
        image_ms, first_ms, step_ms, profiled_ms, profiled_step_ms = full
        full_ms = image_ms + first_ms + (expected - 1) * step_ms
        groups = _groups(sized.most, long, _budget_step(budget_ms / full_ms), self.speed.slowdown > SLOWED)
        done_ms = overview_ms if taken.image_ms > 0 else 0.0
        pace = self._pace(done_ms, taken.image_ms)
        q, later_q = self.margin.both(groups)
        times, fastest = _times(
            terms, pace, 1.0, self.other_ms - pace * done_ms, taken.total_ms, expected, float(long), math.exp(q),
            math.exp(later_q), self._quickest, self._all if known is None else known,
        )  # fmt: skip
        bounds_ms, aimed_ms, predicted_ms, rest_ms, answer_ms, saving_ms, steps_ms = times
        return Bounds(
            self._same_image.reachable(bounds_ms, aimed_ms) if self.revises else bounds_ms,
            rest_ms,
            answer_ms,
            saving_ms,
            predicted_ms,
            steps_ms,
            pace * full_ms / (profiled_ms + (expected - 1) * profiled_step_ms),
            fastest,
            (expected, long),
            groups,
            taken,
            terms=terms,
        )

    def revised(self, bounds: Bounds, index: int, spent: Spent, known: np.ndarray | None = None) -> Bounds:
        """Bounds once the image of the chosen setting is encoded; other images are out of reach.

        Args:
            bounds: that the setting was chosen by.
            spent: with the whole image's encoding.
            known: settings that may be chosen, bool ``[K]``; None: all.
        """
        (expected, long), terms = bounds.lengths, bounds.terms
        assert terms is not None
        pace = self._pace(float(terms[0, index]), spent.image_ms)
        here = self._same_image.of(index)
        factor = math.exp(self.margin.q(bounds.groups, "image"))
        times, fastest = _times(
            terms, pace, 0.0, 0.0, spent.total_ms, expected, float(long), factor, factor, self._quickest,
            here if known is None else here & known,
        )  # fmt: skip
        bounds_ms, _, predicted_ms, rest_ms, answer_ms, saving_ms, steps_ms = times
        return Bounds(
            bounds_ms, rest_ms, answer_ms, saving_ms, predicted_ms, steps_ms, bounds.slowdown, fastest, bounds.lengths,
            bounds.groups, spent, "image", terms,
        )  # fmt: skip

    def quicker(self, index: int) -> tuple[int, ...]:
        """The settings that an answer's later tokens may be made at, each quicker than the one before; maybe none."""
        return self.hurry.steps[index] if self.hurries else ()

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
        saved_ms: float = 0.0,
    ) -> None:
        """Learn from a finished request.

        Args:
            looks: the bounds that its setting was chosen by and, if it was revised, those that it was revised by.
            stages_ms: what the stages took that the latency model knows; others are not read.
            total_ms: what it took in all.
            late: it broke its budget. cut: its answer was cut short to be in time.
            promised: a setting was allowed, so that this counts.
            saved_ms: how much longer its hurried tokens would have taken at its own setting, as predicted.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        times_ms = [*stages_ms.values(), *(total_ms - look.spent.total_ms for look in looks)]
        if not (min(times_ms) >= 0 and sum(times_ms) < math.inf):
            _complain(stages_ms, looks, total_ms)
        for look in looks:
            # What was cut would have taken another step at least.
            missing_ms = saved_ms + (float(look.step_ms[setting_index]) if cut else 0.0)
            took = total_ms - look.spent.total_ms + missing_ms
            if took > 0:
                self.margin.add(math.log(took / look.rest_ms.item(setting_index)), look.moment)
        # A broken budget that nothing was expected to keep breaks no promise; a kept one shows that bounds are wide.
        missed = 1.0 if late else self.margin.cut_cost if cut else 0.0
        if promised:
            self.credit = min(self.credit + self.alpha, MOST_CREDIT) - late
        if promised or not missed:
            self.margin.judge(looks[0].groups, missed, TARGET_SHARE * self.alpha)
        spent = looks[0].spent
        known = sum(ms for stage, ms in stages_ms.items() if stage in self.latency.stages) - spent.image_ms
        other = max(0.0, min(total_ms - spent.total_ms - known, 4 * self.other_ms + 1.0))
        self.other_ms += OTHER_RATE * (other - self.other_ms)
        if saved_ms:
            stages_ms = {**stages_ms, "decode": stages_ms["decode"] + saved_ms}
        if self.follow(request, setting_index, stages_ms, output_tokens):
            self.margin.forget(AGREEING)

    def rehearse(self, request: Request) -> None:
        """Run all that a request runs, on a twin, so that the first real one need not wait for compiled code."""
        twin = AdaptiveGuard.from_dict(self.to_dict())
        looks = [twin.bounds(request, 100.0, Spent(1.0, 1.0))]
        looks.append(twin.revised(looks[0], looks[0].fastest, Spent(2.0, 2.0)))
        stages = dict.fromkeys(twin.latency.stages, 1.0)
        twin.update(request, looks, looks[0].fastest, stages, 2, 100.0, late=False)

    def follow(self, request: Request, index: int, stages_ms: Mapping[str, float], output_tokens: float) -> bool:
        """Learn this machine's speed from a request, and nothing else; whether a stage's speed has jumped."""
        sized = self._quick.size(request.vision, request.language)
        return self.speed.follow(self._quick.stages_at(sized, index, output_tokens), stages_ms)

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
            "hurries": self.hurries,
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
            guard = cls(
                latency, lengths, margin, speed, document["other_ms"], document["calibrated_on"], document["hurries"]
            )
            guard.credit = float(document["credit"])
            return guard
        except KeyError as error:
            raise DataError(f"the guard lacks the field {error.args[0]}; calibrate again") from None


def _complain(stages_ms: Mapping[str, float], looks: Sequence[Bounds], total_ms: float) -> NoReturn:
    """Raise DataError, naming the times that cannot be."""
    rests = {f"rest after the {look.moment}": total_ms - look.spent.total_ms for look in looks}
    wrong = {name: ms for name, ms in {**stages_ms, **rests}.items() if not 0 <= ms < math.inf}
    raise DataError(f"times have to be numbers of ms of 0 or more, given {wrong}; has the clock jumped?")


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
) -> tuple[np.ndarray, int]:
    """What `Bounds` says of every setting, and the setting with the smallest bound.

    In rows, ``[7, K]``: its bound; what it is aimed at; its time as expected; the rest with a long answer; of that what
    comes after the image, and what hurrying would save; a decoding step. The first three are infinite where a setting
    may not be chosen.

    Args:
        terms: of `QuickLatency.terms`, to be multiplied by ``pace``.
        image_share: 1: the image is yet to be encoded; 0: it is encoded.
        more_ms: beside the model's own stages. taken_ms: by now.
        expected, long: tokens of an answer.
        factor, later_factor: of the margin, on the rest now and on the answer once the image is encoded.
        quickest: the settings that are hurried at, int64 ``[K]``.
        known: settings that may be chosen, bool ``[K]``.
    """
    out = np.full((7, terms.shape[1]), np.inf)
    fastest = 0
    for k in range(terms.shape[1]):
        image, first, step = image_share * pace * terms[0, k], pace * terms[1, k], pace * terms[2, k]
        answer = first + (long - 1) * step
        rest = image + answer + more_ms
        saving = (long - 1) * max(step - pace * terms[2, quickest[k]], 0.0)
        if known[k]:
            out[0, k] = taken_ms + bound_of(factor, rest, saving)
            out[1, k] = taken_ms + image + more_ms + bound_of(later_factor, answer, saving)
            out[2, k] = taken_ms + image + first + (expected - 1) * step + more_ms
        out[3, k], out[4, k], out[5, k], out[6, k] = rest, answer, saving, step
        if out[0, k] < out[0, fastest]:
            fastest = k
    return out, fastest


@lru_cache(maxsize=1024)
def _groups(most: float, long: int, budget_step: int, slowed: bool) -> Groups:
    groups = (
        "all",
        f"image of up to {most:.0f} visual tokens",
        f"up to {long} output tokens",
        f"budget about {BUDGET_RATIO**budget_step:.2f} x full",
    )
    return tuple(f"{group}, slowed down" for group in groups) if slowed else groups


def _budget_step(share: float) -> int:
    """Budgets of about one size have one number; they are given as a share of the full setting's time here."""
    return round(math.log(max(0.05, min(share, 1.5))) / math.log(BUDGET_RATIO))


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)
