"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

A bound is e + exp(q) u. Here e is the time that the request has taken already: a setting is chosen after the overview
is encoded, and revised after the whole image is (`guard.recourse`). u is the predicted rest with an answer as long
as all but a share alpha / 2 are expected to be, scaled by how fast this machine runs each stage now
(`guard.speed`), and q the margin (`guard.margin`). A request belongs to several groups: all, those by the size
of its image, by the length of its answer, and by its budget (as a share of the full setting's predicted time); while
the machine is slowed down, by a load beside it, to others of the same kinds, so that what is learnt then does not stay
when the load has gone. Where both start comes from calibration (`budgetvlm.guard.conformal`).

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.controller.decision import Decider
from budgetvlm.decide import choose, choose_again
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.guard.answer_length import LengthModel
from budgetvlm.guard.bounds import (
    REST,
    STEP,
    Bounds,
    GroupNumbers,
    Groups,
    Request,
    Spent,
    look,
    look_again,
    quick_bounds,
)
from budgetvlm.guard.conformal import samples_needed
from budgetvlm.guard.latency_model import LatencyModel, Sizes
from budgetvlm.guard.margin import Margin, forget, learn_from
from budgetvlm.guard.recourse import Hurry, SameImage
from budgetvlm.guard.request_latency import QuickLatency
from budgetvlm.guard.speed import AGREEING, StageSpeed, follow_from
from budgetvlm.guard.static import timed_rows
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 4
DEFAULT_ALPHA = 0.05
MOST_SAMPLES = 20_000  # that are fitted on; more say nothing more of a machine
OTHER_RATE = 0.05  # share of the way that the cost of the rest goes towards one request's
PREPARE = "preprocess"
IMAGE_STAGES = (PREPARE, "vision")  # of which the overview is a part
TARGET_SHARE = 0.85  # of alpha: the promise is "at most", and the margin wanders a little
SIZES_KEPT = 256  # of requests
MOST_CREDIT = 10.0  # late answers that a quiet spell can save up


class _Sized(NamedTuple):
    """Of requests of one size: `Request.vision`, three of `guard.request_latency.Sized`, `GroupNumbers.of_image`."""

    vision: np.ndarray
    times: np.ndarray
    least: float
    tiled: np.ndarray
    groups: tuple[int, int]


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
        other_ms: what a request takes beside the model's stages, to begin with.
        calibrated_on: how many requests calibrated it; without any it promises nothing.
        hurries: whether an answer may go on at quicker settings where it would be late.

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
        margin = Margin(DEFAULT_ALPHA) if margin is None else margin
        samples_needed(margin.alpha)
        if not 0 <= other_ms < math.inf:
            raise ConfigError(f"other_ms={other_ms!r} is no cost in ms; give 0 or more")
        self.latency, self.lengths = latency, lengths
        self._quick = QuickLatency(latency, IMAGE_STAGES)
        self._prepares = latency.stages.index(PREPARE) if PREPARE in latency.stages else -1
        self.calibrated_on = calibrated_on
        self._account = np.array([other_ms, 1.0])
        self._same_image, self.hurry = SameImage(latency.knob_space), Hurry(latency.knob_space)
        self._same_images = [self._same_image.of(index) for index in range(len(latency.knob_space))]
        self.hurries = hurries
        self._quickest = self.hurry.last if hurries else np.arange(len(latency.knob_space))
        self._all = np.ones(len(latency.knob_space), dtype=bool)
        self._feature_width = len(lengths.mean)
        self._nothing_saved = (0.0,) * len(latency.stages)
        self._speed = StageSpeed(latency.stages) if speed is None else speed
        self.margin = margin

    def _prepare(self) -> None:
        """What compiled loops take beside a request, ready to be passed on: finding it costs more than using it."""
        quick, margin, speed = self._quick, self._margin, self._speed
        self._looks_by: tuple[Any, ...] = (
            self._account, 1 - self.alpha / 2, *self.lengths.folded, speed.now, speed.factors, quick.of_image,
            quick.overview, self._prepares, self._groups.fixed, *margin.state, self._quickest, self._same_image.members,
        )  # fmt: skip
        self._looks_again_by: tuple[Any, ...] = speed.now, self._quickest, *margin.state
        self._learns_by: tuple[Any, ...] = (
            self._account, self._prepares, self.alpha, margin.cut_cost, margin.rate, margin.window, *margin.state,
            *speed.state,
        )  # fmt: skip

    @property
    def margin(self) -> Margin:
        """How far bounds lie above predicted times."""
        return self._margin

    @margin.setter
    def margin(self, margin: Margin) -> None:
        self._margin, self._groups = margin, GroupNumbers(margin, self.lengths.lengths.tolist())
        self._sizes: dict[tuple[int, float], _Sized] = {}
        self._prepare()

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
        self._prepare()

    @property
    def other_ms(self) -> float:
        """What a request takes beside the model's stages, as it is now: features, controller, guard."""
        return self._account.item(0)

    @other_ms.setter
    def other_ms(self, other_ms: float) -> None:
        self._account[0] = other_ms

    @property
    def credit(self) -> float:
        """How many late answers the promise still allows."""
        return self._account.item(1)

    @credit.setter
    def credit(self, credit: float) -> None:
        self._account[1] = credit

    @property
    def may_be_late(self) -> bool:
        """Whether one more late answer keeps the promise.

        Each promised request earns alpha, each late one costs 1, so over T of them at most 1 + alpha T are late.
        """
        return self.credit >= 1.0

    @classmethod
    def fit(cls, table: ProfileTable, features: Features, alpha: float = DEFAULT_ALPHA) -> AdaptiveGuard:
        """A guard from profiles alone; its margin is that of measured / predicted times on the same samples.

        It promises nothing before it is calibrated on requests that it was not fitted on (`live.calibration`).

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
        spent = Spent() if spent is None else spent
        asked, profiled = self._asked(request, spent, known)
        times, slowdown, fastest, lengths, groups, terms, large = look(float(budget_ms), *asked, *self._looks_by)
        return Bounds(times, slowdown, fastest, lengths, groups, terms, "overview", spent, profiled, large)

    def choose(
        self, decider: Decider, request: Request, image: np.ndarray, budget_ms: float, spent: Spent,
        price: float | None = None, waited_ms: float = 0.0, known: np.ndarray | None = None,
    ) -> tuple[Bounds, np.ndarray, int]:  # fmt: skip
        """`bounds`, a controller's values of every setting ``[K]``, and the best setting by both; -1 if there is none.

        Args:
            image: feature ``[Di]``, float32.
            price: see `Decider`. waited_ms: of the budget, before the request began.
        """
        asked, profiled = self._asked(request, spent, known)
        image, language = decider.state(image, request.feature)
        found = choose(image, language, budget_ms, waited_ms, *asked, *self._looks_by, *decider.weights(price))
        times, slowdown, fastest, lengths, groups, terms, large, values, best = found
        bounds = quick_bounds((times, slowdown, fastest, lengths, groups, terms, "overview", spent, profiled, large))
        return bounds, values, best

    def _asked(self, request: Request, spent: Spent, known: np.ndarray | None) -> tuple[tuple[Any, ...], np.ndarray]:
        """What `look` takes of a request beside its budget, and its times as profiled."""
        vision, language, feature = request
        sized = self._sizes.get((id(vision), language))
        if sized is None or sized.vision is not vision:
            sized = self._sized(request)
        if len(feature) != self._feature_width:
            self.lengths.check(feature)
        known = self._all if known is None else known
        asked = feature, sized.times, sized.least, sized.tiled, sized.groups, known, *spent, self.revises
        return asked, sized.times

    def _sized(self, request: Request) -> _Sized:
        """What follows from its size alone; kept, because images are of few sizes and questions of few lengths."""
        if len(self._sizes) >= SIZES_KEPT:
            self._sizes.clear()
        sized = self._quick.size(request.vision, request.language)
        groups = self._groups.of_image(sized.most)
        made = _Sized(request.vision, sized.times, sized.least, sized.tiled, groups)
        self._sizes[id(request.vision), request.language] = made
        return made

    def revised(self, bounds: Bounds, index: int, spent: Spent, known: np.ndarray | None = None) -> Bounds:
        """Bounds once the image of the chosen setting is encoded; other images are out of reach.

        Args:
            bounds: that the setting was chosen by.
            spent: with the whole image's encoding.
            known: settings that may be chosen, bool ``[K]``; None: all.
        """
        seen = self._seen_again(bounds, index, spent, known)
        times, fastest = look_again(*seen, *self._looks_again_by)
        return self._again(bounds, times, fastest, spent)

    def choose_again(
        self, bounds: Bounds, index: int, values: np.ndarray, budget_ms: float, spent: Spent,
        known: np.ndarray | None = None,
    ) -> tuple[Bounds, int]:  # fmt: skip
        """`revised`, and the best setting for these values ``[K]`` by them; -1 if there is none."""
        seen = self._seen_again(bounds, index, spent, known)
        times, fastest, best = choose_again(values, budget_ms, *seen, *self._looks_again_by)
        return self._again(bounds, times, fastest, spent), best

    def _seen_again(self, bounds: Bounds, index: int, spent: Spent, known: np.ndarray | None) -> tuple[Any, ...]:
        """What `look_again` takes of a request."""
        assert bounds.terms is not None
        known = self._all if known is None else known
        terms, lengths, groups = bounds.terms, bounds.lengths, bounds.groups
        return terms, index, lengths, groups, self._same_images[index], known, spent.total_ms, spent.image_ms

    @staticmethod
    def _again(bounds: Bounds, times: np.ndarray, fastest: int, spent: Spent) -> Bounds:
        """The same request's, later."""
        return quick_bounds((
            times, bounds.slowdown, fastest, bounds.lengths, bounds.groups, bounds.terms, "image", spent,
            bounds.profiled, bounds.large,
        ))  # fmt: skip

    def quicker(self, index: int) -> tuple[int, ...]:
        """The settings that an answer may go on at, each quicker than the one before; maybe none."""
        return self.hurry.steps[index] if self.hurries else ()

    def update(
        self,
        looks: Sequence[Bounds],
        setting_index: int,
        stages_ms: Mapping[str, float],
        output_tokens: int,
        total_ms: float,
        *,
        late: bool,
        cut: bool = False,
        promised: bool = True,
        saved_ms: Mapping[str, float] | None = None,
    ) -> None:
        """Learn from a finished request.

        Args:
            looks: the bounds that its setting was chosen by and, if it was revised, those that it was revised by.
            stages_ms: what the stages took that the latency model knows; others are not read.
            total_ms: what it took in all.
            late: it broke its budget. cut: its answer was cut short to be in time.
            promised: a setting was allowed, so that this counts.
            saved_ms: how much longer what was hurried of each stage would have taken at its own setting, as predicted.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        first, last = looks[0], looks[-1]
        assert first.profiled is not None
        learnt = _learn(
            first.profiled, first.times, last.times, setting_index, first.groups, first.spent.total_ms,
            first.spent.image_ms, last.spent.total_ms if len(looks) > 1 else math.nan, first.large,
            self._speed.by_stage(stages_ms),
            self._speed.by_stage(saved_ms) if saved_ms else self._nothing_saved, float(output_tokens), float(total_ms),
            late, cut, promised, *self._learns_by,
        )  # fmt: skip
        if not learnt:
            _complain(stages_ms, looks, total_ms)

    def copy(self) -> AdaptiveGuard:
        """A guard that learns on its own from here."""
        return type(self).from_dict(self.to_dict())

    def follow(
        self, request: Request, index: int, stages_ms: Mapping[str, float], output_tokens: float, large: bool = False
    ) -> bool:
        """Learn this machine's speed from a request, and nothing else; whether a stage's speed has jumped.

        Args:
            large: see `Bounds`; what preparing such an image took says nothing of the machine.
        """
        if large:
            stages_ms = {**stages_ms, PREPARE: 0.0}
        return self.speed.follow(self.profiled(request), index, output_tokens, stages_ms)

    def profiled(self, request: Request) -> np.ndarray:
        """Times of each stage by the profile, see `budgetvlm.guard.request_latency.Sized`."""
        return self._asked(request, Spent(), None)[1]

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
def _learn(
    profiled: np.ndarray, first: np.ndarray, last: np.ndarray, index: int, groups: Groups,
    spent_ms: float, overview_ms: float, revised_ms: float, large: bool, took_ms: tuple[float, ...],
    saved_ms: tuple[float, ...], output_tokens: float, total_ms: float, late: bool, cut: bool, promised: bool,
    account: np.ndarray, prepare: int, alpha: float, cut_cost: float, rate: float, window: np.ndarray,
    level: float, most_level: float, parts: np.ndarray, ascending: np.ndarray, counts: np.ndarray,
    now: np.ndarray, log_scale: np.ndarray, factors: np.ndarray, normal_factors: np.ndarray, recent: np.ndarray,
    known: np.ndarray, predicted_ms: np.ndarray,
) -> bool:  # fmt: skip
    """See `AdaptiveGuard.update`; False where a time cannot be, and nothing is learnt.

    Args:
        profiled, groups, large: of `Bounds`.
        first, last: `Bounds.times` when the setting was chosen, and revised if it was.
        spent_ms, overview_ms: when it was chosen. revised_ms: spent when it was revised; NaN: it was not.
        took_ms, saved_ms: of each stage, ``[G]``. prepare: see `look`.
        account: the cost of the rest, and the credit.
        others: of the guard's margin and speed.
    """
    rest_ms, later_ms = total_ms - spent_ms, total_ms - revised_ms
    known_ms = 0.0
    for ms in took_ms:
        if not ms >= 0:
            return False
        known_ms += ms
    if not rest_ms >= 0 or later_ms < 0 or not known_ms + total_ms < np.inf:
        return False
    # What was cut would have taken another step at least.
    missing_ms = later_missing_ms = sum(saved_ms)
    if cut:
        missing_ms, later_missing_ms = missing_ms + first[STEP, index], missing_ms + last[STEP, index]
    score = later_score = np.nan
    if rest_ms + missing_ms > 0:
        score = math.log((rest_ms + missing_ms) / first[REST, index])
    if later_ms + later_missing_ms > 0:
        later_score = math.log((later_ms + later_missing_ms) / last[REST, index])
    if promised:
        account[1] = min(account[1] + alpha, MOST_CREDIT) - late
    # A broken budget that nothing was expected to keep breaks no promise; a kept one shows that bounds are wide.
    missed = 1.0 if late else cut_cost if cut else 0.0
    judged = missed if promised or missed == 0 else np.nan
    learn_from(
        score, later_score, groups, judged, TARGET_SHARE * alpha, rate, window, level, most_level, parts, ascending,
        counts,
    )  # fmt: skip
    other_ms = max(0.0, min(rest_ms - (known_ms - overview_ms), 4 * account[0] + 1.0))
    account[0] += OTHER_RATE * (other_ms - account[0])
    needed_ms = np.array(took_ms) + np.array(saved_ms)
    if large:  # see `AdaptiveGuard.follow`
        needed_ms[prepare] = 0.0
    if follow_from(
        profiled, index, output_tokens, needed_ms, now, log_scale, factors, normal_factors, recent, known, predicted_ms
    ):
        forget(AGREEING, ascending, counts, window)
    return True


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)
