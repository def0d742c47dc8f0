"""The guard at run time: bounds on every setting's latency for one request, that learn from each finished one.

A bound is exp(q) u. Here u is the predicted time with an answer as long as all but a share alpha / 2 are expected to
be, each stage scaled by how fast this machine runs it now. A request belongs to several groups, one by the length of
its answer, one by its budget (as a share of the full setting's predicted time); q is the calibrated start and the sum
of the groups' parts. After a request the scales move towards what was measured, and every part follows adaptive
conformal inference

    part <- part + step (missed - target)

(Gibbs and Candes 2021, arXiv 2106.00170, on the logarithm of the bound; groups that overlap: Gibbs, Cherian and Candes
2023, arXiv 2305.12616). Missed means late, or cut short to be in time. A part is a sum over its group's requests, so
over T of them, whatever the world does, the share missed differs from the target by at most (range of the part) /
(step T). Where the bounds start comes from calibration (`budgetvlm.conformal`).

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
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 1
OTHER = "other"  # what a request costs beside the model's stages: features, the controller, the guard
STEP = 0.05  # of q
SCALE_RATE = 0.05  # share of the way that a scale goes towards one request's ratio
LARGEST_JUMP = 1.0  # of a log ratio, so that one hiccup of the machine is not taken for its new speed
LEAST_Q, MOST_Q = math.log(0.7), math.log(20.0)
TARGET_SHARE = 0.85  # of alpha: the promise is "at most", and q wanders a little
DRIFTED = math.log(1.2)  # a scale this far from that of the calibration is reported

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
class Bounds:
    """What the guard says of one request.

    Attributes:
        bounds_ms: upper bound on each setting's time, ``[K]``.
        predicted_ms: its time with an answer of the expected length, ``[K]``.
        step_ms: one decoding step of it, ``[K]``.
        slowdown: time of the full setting on this machine now / when it was profiled.
        groups: the requests that share parts of this one's calibration.
    """

    bounds_ms: np.ndarray
    predicted_ms: np.ndarray
    step_ms: np.ndarray
    slowdown: float
    groups: Groups

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
        alpha: the share of requests that may break their budgets.
        factor: what calibration multiplies the predicted times by, to begin with.
        other_ms: the cost of features, controller and guard, to begin with.
        calibrated_on: how many requests calibrated it; without any it promises nothing.

    Raises:
        ConfigError: an alpha outside (0, 1), a factor or cost that cannot be.
    """

    cuts = True

    def __init__(
        self,
        latency: LatencyModel,
        lengths: LengthModel,
        alpha: float = 0.05,
        factor: float = 1.0,
        other_ms: float = 0.0,
        calibrated_on: int = 0,
    ) -> None:
        samples_needed(alpha)
        if not 0 < factor < math.inf or not 0 <= other_ms < math.inf:
            raise ConfigError(f"factor={factor!r} has to be above 0 and other_ms={other_ms!r} 0 or more")
        self.latency, self.lengths, self.alpha = latency, lengths, alpha
        self.calibrated_on = calibrated_on
        self.start = _limited(math.log(factor))
        self.parts: dict[str, float] = {}
        self.log_scale = np.zeros(len(latency.stages))
        self.calibrated_scale = self.log_scale.copy()
        self.other_ms = other_ms
        self._profiled = QuickLatency(latency)
        self._compile()

    @classmethod
    def fit(cls, table: ProfileTable, features: Features, alpha: float = 0.05) -> AdaptiveGuard:
        """A guard from profiles alone; the factor is the quantile of measured / predicted on the same samples.

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
        ratio = measured.latency_ms / upper
        return cls(latency, lengths, alpha, float(np.quantile(ratio[np.isfinite(ratio)], 1 - alpha)))

    def _compile(self) -> None:
        self._quick = QuickLatency(self.latency, np.exp(self.log_scale))

    def bounds(self, request: Request, budget_ms: float) -> Bounds:
        """Bounds on the time of every setting, for a request with this budget."""
        probabilities, lengths = self.lengths.probabilities(request.feature), self.lengths.lengths
        long = lengths[min(int((probabilities.cumsum() < 1 - self.alpha / 2).sum()), len(lengths) - 1)]
        expected = max(float(probabilities @ lengths), 1.0)
        first, step = self._quick.parts(request.vision, request.language)
        typical, upper = first + (expected - 1) * step, first + (long - 1) * step
        slowdown = typical[-1] / self._profiled.total(request.vision, request.language, expected)[-1]
        groups = f"up to {int(long)} output tokens", _budget_group(budget_ms / typical[-1])
        factor = math.exp(self._q(groups))
        return Bounds(factor * (upper + self.other_ms), typical + self.other_ms, step, float(slowdown), groups)

    def _q(self, groups: Groups) -> float:
        return _limited(self.start + sum(self.parts.get(group, 0.0) for group in groups))

    def update(
        self,
        request: Request,
        bounds: Bounds,
        setting_index: int,
        stages_ms: Mapping[str, float],
        output_tokens: int,
        missed: bool,
        promised: bool = True,
    ) -> None:
        """Learn from a finished request.

        Args:
            stages_ms: what each stage took; those the latency model does not know count as other costs.
            missed: it was late, or its answer was cut short to be in time.
            promised: a setting was allowed, so that this counts.

        Raises:
            DataError: a time that is negative or no number; nothing is learnt from it.
        """
        wrong = {name: ms for name, ms in stages_ms.items() if not 0 <= ms < math.inf}
        if wrong:
            raise DataError(f"times have to be numbers of ms of 0 or more, given {wrong}; has the clock jumped?")
        self._follow(request, setting_index, stages_ms, output_tokens)
        # Where nothing is allowed no promise can be broken; the bound shrinks, so that something is allowed again.
        error = missed and promised
        change = STEP * (error - TARGET_SHARE * self.alpha)
        inside = LEAST_Q < self.start + sum(self.parts.get(g, 0.0) for g in bounds.groups) + change < MOST_Q
        for group in bounds.groups:
            self.parts[group] = self.parts.get(group, 0.0) + (change if inside else 0.0)

    def _follow(self, request: Request, index: int, stages_ms: Mapping[str, float], output_tokens: int) -> None:
        """Move the scales towards this request's speed."""
        predicted = self.latency.stages_of(index, request.vision[index], request.language, output_tokens)
        for g, stage in enumerate(self.latency.stages):
            if stages_ms.get(stage, 0.0) > 0 and predicted[g] > 0:
                ratio = math.log(stages_ms[stage] / predicted[g]) - self.log_scale[g]
                self.log_scale[g] += SCALE_RATE * max(-LARGEST_JUMP, min(ratio, LARGEST_JUMP))
        other = sum(ms for stage, ms in stages_ms.items() if stage not in self.latency.stages)
        self.other_ms += SCALE_RATE * (min(other, 4 * self.other_ms + 1.0) - self.other_ms)
        self._compile()

    def set_scales(self, log_scale: np.ndarray) -> None:
        """Take these logarithms of the stages' scales for this machine's normal speed; drift is reported against it."""
        self.log_scale = np.array(log_scale, dtype=np.float64)
        self.calibrated_scale = self.log_scale.copy()
        self._compile()

    @property
    def drift(self) -> dict[str, float]:
        """Stages that run at another speed than when calibrated: stage -> factor (2: takes twice as long)."""
        moved = self.log_scale - self.calibrated_scale
        return {s: float(math.exp(m)) for s, m in zip(self.latency.stages, moved, strict=True) if abs(m) > DRIFTED}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document with all that was learnt; `from_dict` takes it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "latency": self.latency.to_dict(),
            "lengths": self.lengths.to_dict(),
            "alpha": self.alpha,
            "calibrated_on": self.calibrated_on,
            "start": self.start,
            "parts": dict(self.parts),
            "log_scale": self.log_scale.tolist(),
            "calibrated_scale": self.calibrated_scale.tolist(),
            "other_ms": self.other_ms,
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
            factor = math.exp(document["start"])
            guard = cls(latency, lengths, document["alpha"], factor, document["other_ms"], document["calibrated_on"])
            guard.parts = {str(group): float(part) for group, part in document["parts"].items()}
            guard.log_scale = np.array(document["log_scale"], dtype=np.float64)
            guard.calibrated_scale = np.array(document["calibrated_scale"], dtype=np.float64)
        except KeyError as error:
            raise DataError(f"the guard lacks the field {error.args[0]}; calibrate again") from None
        if guard.log_scale.shape != (len(latency.stages),) or not np.isfinite(guard.log_scale).all():
            raise DataError(f"the guard's scales {guard.log_scale} do not fit its latency model; calibrate again")
        guard._compile()
        return guard


def _budget_group(share: float) -> str:
    """Budgets of about one size, as a share of the full setting's time here."""
    step = round(math.log(max(0.05, min(share, 1.5))) / math.log(BUDGET_RATIO))
    return f"budget about {BUDGET_RATIO**step:.2f} x full"


def answer_lengths(table: ProfileTable) -> np.ndarray:
    """Output tokens of each sample at the full setting, ``[S]``; 1 where a table does not know them."""
    tokens = Sizes.of_table(table).output[:, -1]
    return np.maximum(np.round(tokens), 1.0)


def _limited(q: float) -> float:
    return max(LEAST_Q, min(q, MOST_Q))
