"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

`budgetvlm.guard.specification` says what a bound is. A request belongs to several groups (`budgetvlm.guard.groups`),
each of which moves the margin of its requests. Calibration (`budgetvlm.guard.conformal`) says where margin and speed
start.

Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.guard import specification
from budgetvlm.guard.answer_length import LengthModel
from budgetvlm.guard.bounds import REST, STEP, Bounds, Outcome, Request, Spent
from budgetvlm.guard.conformal import samples_needed
from budgetvlm.guard.groups import Groups
from budgetvlm.guard.latency_model import LatencyModel, Sizes
from budgetvlm.guard.learning import NUM_AGREEING, follow_load, follow_speed, forget_scores, learn_margin
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.recourse import Hurry
from budgetvlm.guard.rule import GUARDED, Rule
from budgetvlm.guard.speed import StageSpeed
from budgetvlm.guard.state import guard_state
from budgetvlm.guard.static import timed_rows
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 4
DEFAULT_ALPHA = 0.05
MAX_SAMPLES = 20_000  # that are fitted on; more say nothing more about a machine
TARGET_SHARE = 0.85  # of alpha is aimed at: the promise is "at most", and the margin wanders a little
OWN_COST_RATE = 0.05  # share of the way that the cost beside the model's stages goes towards one request's
MAX_CREDIT = 10.0  # late answers that a quiet spell can save up


class AdaptiveGuard:
    """See the module.

    Attributes:
        origin: fingerprint of the "model" and digests of the "samples" that it was fitted to; empty where not known.
        latency, lengths, margin, speed, rule: its parts. state, state_tuple: what the specification and the compiled
            loops read.

    Args:
        latency: predicts times.
        lengths: predicts how long answers are.
        margin: how far bounds lie above predicted times; its alpha is the share of requests that may break their
            budgets.
        speed: of this machine's stages; None: that of the profile.
        own_ms: what a request takes beside the model's stages, to begin with.
        calibrated_on: how many requests calibrated it; without any it promises nothing.
        rule: what it may do about a request.

    Raises:
        ConfigError: an alpha outside (0, 1), a cost that cannot be, parts that do not fit together.
    """

    def __init__(
        self,
        latency: LatencyModel,
        lengths: LengthModel,
        margin: Margin | None = None,
        speed: StageSpeed | None = None,
        own_ms: float = 0.0,
        calibrated_on: int = 0,
        rule: Rule = GUARDED,
    ) -> None:
        self.latency, self.lengths, self.rule = latency, lengths, rule
        self.margin = Margin(DEFAULT_ALPHA) if margin is None else margin
        self.speed = StageSpeed(latency.stages) if speed is None else speed
        self.calibrated_on = calibrated_on
        self.origin: dict[str, Any] = {}
        samples_needed(self.margin.alpha)
        if not 0 <= own_ms < math.inf:
            raise ConfigError(f"own_ms={own_ms!r} is no cost in ms; give 0 or more")
        self.groups = Groups(self.margin, lengths.lengths.tolist())
        self._image_groups: dict[float, tuple[int, int]] = {}
        self._account = np.array([own_ms, 1.0])
        self._faster = Hurry(latency.knob_space).steps
        parts = self.speed, self.margin, self.groups
        self.state = guard_state(latency, lengths, *parts, self._account, rule)
        self.state_tuple = tuple(self.state)

    def replaced(self, *, margin: Margin | None = None, rule: Rule | None = None) -> AdaptiveGuard:
        """Another guard with these parts in place of its own; it shares the others with this one."""
        made = AdaptiveGuard(
            self.latency,
            self.lengths,
            self.margin if margin is None else margin,
            self.speed,
            self.own_ms,
            self.calibrated_on,
            self.rule if rule is None else rule,
        )
        made.credit, made.origin = self.credit, self.origin
        return made

    @property
    def knob_space(self) -> KnobSpace:
        """Of the settings."""
        return self.latency.knob_space

    @property
    def alpha(self) -> float:
        """The share of requests that may break their budgets."""
        return self.margin.alpha

    @property
    def own_ms(self) -> float:
        """What a request takes beside the model's stages, as it is now: features, controller, guard."""
        return float(self._account[0])

    @own_ms.setter
    def own_ms(self, own_ms: float) -> None:
        self._account[0] = own_ms

    @property
    def credit(self) -> float:
        """How many late answers the promise still allows."""
        return float(self._account[1])

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
        measured = (table.subset(timed) if timed.any() else table).thinned(MAX_SAMPLES)
        latency = LatencyModel.fit(measured)
        some = table.thinned(MAX_SAMPLES)
        lengths = LengthModel.fit(features.aligned(some.sample_ids).language, answer_lengths(some))
        sizes = Sizes.of_table(measured)
        long = lengths.quantile(features.aligned(measured.sample_ids).language, 1 - alpha / 2)
        upper = latency.predict(replace(sizes, output=np.broadcast_to(long[:, None], sizes.output.shape)))
        scores = np.log(measured.latency_ms / upper)
        known = scores[np.isfinite(scores)]
        guard = cls(latency, lengths, Margin.start(alpha, {"overview": known, "image": known}))
        guard.origin = {"model": table.metadata.get("model_fingerprint")}
        return guard

    def image_groups(self, request: Request) -> tuple[int, int]:
        """The groups of this request's image: usually, and on an overloaded machine. Raises DataError."""
        if len(request.feature) != len(self.lengths.mean):
            self.lengths.check(request.feature)
        key = max(request.vision.tolist()) if request.images == 1 else -1 - request.images
        found = self._image_groups.get(key)
        if found is None:
            found = self._image_groups[key] = self.groups.of_image(key, request.images)
        return found

    def among(self, in_flight: int) -> AdaptiveGuard:
        """The guard as it judges one of this number of requests in flight; it is for choosing alone."""
        if in_flight <= 1:
            return self
        made = copy.copy(self)
        made.state = self.state._replace(pace=self.speed.pace_among(in_flight))
        made.state_tuple = tuple(made.state)
        return made

    def bounds_at_choice(self, request: Request, budget_ms: float, spent: Spent, known: np.ndarray) -> Bounds:
        """Bounds on the time of every setting, for a request with this budget.

        Args:
            spent: with the overview's encoding; ``Spent()``: nothing has run yet.
            known: settings that may be chosen, bool ``[K]``.
        """
        groups = self.image_groups(request)
        return specification.bounds_at_choice(self.state, request, groups, known, budget_ms, spent)

    def bounds_at_revision(self, chosen: Bounds, index: int, spent: Spent, known: np.ndarray) -> Bounds:
        """Bounds once the image of the chosen setting is encoded; other images are out of reach.

        Args:
            chosen: that the setting was chosen by.
            spent: with the whole image's encoding.
        """
        return specification.bounds_at_revision(self.state, chosen, index, known, spent)

    def faster_settings(self, index: int) -> tuple[int, ...]:
        """The settings that an answer may go on at, each faster than the one before; maybe none."""
        return self._faster[index] if self.rule.hurries else ()

    def update(self, index: int, decided_by: Sequence[Bounds], outcome: Outcome) -> None:
        """Learn from a finished request, if the rule says so.

        Args:
            index: of its setting.
            decided_by: the bounds that the setting was chosen by and, if it was revised, those that it was revised by.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        if not self.rule.learns:
            return
        stages, saved, chosen = self.latency.stages, outcome.saved_ms, decided_by[0]
        took_ms = [outcome.stages_ms.get(stage, 0.0) for stage in stages]
        known_ms, rest_ms = sum(took_ms), outcome.total_ms - chosen.spent.total_ms
        least_ms = min(*took_ms, rest_ms, outcome.total_ms - decided_by[-1].spent.total_ms)
        if not (least_ms >= 0 and known_ms + outcome.total_ms < math.inf):
            _complain(decided_by, outcome)

        # The margin: how far above its prediction the request was, and whether it missed its budget.
        missing_ms = sum(saved.values()) if saved else 0.0
        scored = decided_by if outcome.whole else ()  # predictions are of whole answers
        scores = {bounds.moment: _score(bounds, index, outcome, missing_ms) for bounds in scored}
        # Of those that were stopped in time nobody knows whether they would have stayed in time: only late ones count.
        counts = outcome.limited and (outcome.late or not outcome.stopped)
        if outcome.promised and counts:
            self.credit = min(self.credit + self.alpha, MAX_CREDIT) - outcome.late
        missed = 1.0 if outcome.late else self.margin.cut_cost if outcome.cut else 0.0
        # A broken budget that nothing was expected to keep breaks no promise; a kept one shows that bounds are wide.
        judged = missed if counts and (outcome.promised or missed == 0) else None
        learn_margin(self.margin, chosen.forecast.groups, scores, judged, TARGET_SHARE * self.alpha)

        # What it took beside the model's stages; one request may say no more than four times what was known.
        own_ms = self._account.item(0)
        beside_ms = max(0.0, min(rest_ms - (known_ms - chosen.spent.image_ms), 4 * own_ms + 1.0))
        self._account[0] = own_ms + OWN_COST_RATE * (beside_ms - own_ms)

        # How fast the machine runs each stage.
        if saved:
            took_ms = [ms + saved.get(stage, 0.0) for stage, ms in zip(stages, took_ms, strict=True)]
        self.follow(chosen, index, took_ms, outcome.output_tokens, outcome.among)

    def follow(
        self, chosen: Bounds, index: int, took_ms: Sequence[float], output_tokens: float, among: int = 1
    ) -> bool:
        """Learn this machine's speed from a request, and nothing else; whether a stage's speed has jumped.

        Args:
            chosen: the bounds that its setting was chosen by.
            took_ms: by stage, ``[G]``.
            among: requests in flight, this one among them.
        """
        forecast = chosen.forecast
        if forecast.large:  # preparing such an image says nothing about the machine
            took_ms = [0.0 if g == self.state.prepare_stage else ms for g, ms in enumerate(took_ms)]
        first_ms, step_ms = forecast.profiled_ms[:, :, index].tolist()
        more = max(output_tokens - 1, 0)
        predicted_ms = [first + more * step for first, step in zip(first_ms, step_ms, strict=True)]
        took_ms = follow_load(self.speed, predicted_ms, took_ms, among)
        jumped = follow_speed(self.speed, predicted_ms, took_ms)
        if jumped:
            forget_scores(self.margin.scores, NUM_AGREEING)
        return jumped

    def copy(self) -> AdaptiveGuard:
        """A guard that learns on its own from here."""
        made = type(self).from_dict(self.to_dict())
        return made.replaced(rule=self.rule)

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
            "other_ms": self.own_ms,
            "credit": self.credit,
            "hurries": self.rule.hurries,
            "origin": self.origin,
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
            rule = Rule(hurries=bool(document["hurries"]))
            guard = cls(latency, lengths, margin, speed, document["other_ms"], document["calibrated_on"], rule)
            guard.credit, guard.origin = float(document["credit"]), dict(document.get("origin", {}))
            return guard
        except KeyError as error:
            raise DataError(f"the guard lacks the field {error.args[0]}; calibrate again") from None


def _score(bounds: Bounds, index: int, outcome: Outcome, saved_ms: float) -> float | None:
    """log(time / prediction) of the rest from this moment on, had nothing been hurried or cut; None: there was none."""
    rest_ms = outcome.total_ms - bounds.spent.total_ms + saved_ms
    if outcome.cut:  # what was cut would have taken another step at least
        rest_ms += bounds.times.item(STEP, index)
    return math.log(rest_ms / bounds.times.item(REST, index)) if rest_ms > 0 else None


def _complain(decided_by: Sequence[Bounds], outcome: Outcome) -> NoReturn:
    """Raise DataError, naming the times that cannot be: a clock that jumped teaches nothing."""
    times = dict(outcome.stages_ms)
    for bounds in decided_by:
        times[f"rest after the {bounds.moment}"] = outcome.total_ms - bounds.spent.total_ms
    wrong = {name: ms for name, ms in times.items() if not 0 <= ms < math.inf}
    raise DataError(f"times have to be numbers of ms of 0 or more, given {wrong}; has the clock jumped?")


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)
