"""How fast each stage runs here and now, compared with the profile.

Two things are followed. Each stage has a scale, the factor on its predicted time, which goes a little of the way
towards every request's own ratio; where several requests in a row agree that the speed is another one (a load that came
or went), it goes there at once. And all stages share a mood: machines have quick and slow moments that last some
requests (on 2 shared cores the error of a prediction correlates by 0.7 from one request to the next), so it goes far
towards the last request's ratio, and, within a request, towards that of the overview's encoding, which is over before a
setting has to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from budgetvlm._compiled import compiled
from budgetvlm.errors import DataError

RATE = 0.05  # share of the way that a scale goes towards one request's ratio
MOOD_RATE = 0.3  # the same of the mood
PROBE_RATE = 0.6  # the same of the mood towards the overview of the request itself
LARGEST_STEP = 0.2  # of a log ratio, so that one hiccup of the machine is not taken for its new speed
AGREEING = 4  # requests in a row that tell of a jump
JUMP = math.log(1.35)  # the least change that is one
DRIFTED = math.log(1.2)  # a scale this far from that of the calibration is reported


class StageSpeed:
    """Scales of stages and the mood, as logarithms.

    Attributes:
        log_scale: now, ``[stages]``.
        factors: exp(log_scale), the same array all the time.
        now: mood and slowdown, the same array all the time.
        normal: this machine's normal speed, when the guard was calibrated; drift is reported against it.
    """

    def __init__(
        self, stages: Sequence[str], normal: np.ndarray | None = None, log_scale: np.ndarray | None = None
    ) -> None:
        self.stages = tuple(stages)
        self.normal = np.zeros(len(self.stages)) if normal is None else np.array(normal, dtype=np.float64)
        self.log_scale = self.normal.copy() if log_scale is None else log_scale
        self.factors = np.exp(self.log_scale)
        self.now = np.array([0.0, 1.0])
        self._normal_factors = np.exp(self.normal)
        self._recent = np.empty((len(self.stages), AGREEING))  # log ratios of the last requests
        self._known = np.zeros(len(self.stages), dtype=np.int64)  # how many of them
        self._predicted_ms = np.empty(len(self.stages))  # of the last request

    @property
    def mood(self) -> float:
        """On top of all scales, of the last requests."""
        return float(self.now[0])

    @mood.setter
    def mood(self, mood: float) -> None:
        self.now[0] = mood

    @property
    def slowdown(self) -> float:
        """How many times as long as normal the last request was to be expected to take."""
        return float(self.now[1])

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """What `follow_from` takes beside a request."""
        return (
            self.now, self.log_scale, self.factors, self._normal_factors, self._recent, self._known, self._predicted_ms,
        )  # fmt: skip

    def follow(self, times_ms: np.ndarray, index: int, output_tokens: float, stages_ms: Mapping[str, float]) -> bool:
        """Learn from one request's times; whether any stage's speed has jumped.

        Args:
            times_ms: of a request of this size by the profile, see `budgetvlm.guard.request_latency.Sized`.
            index: number of its setting.
            stages_ms: what each stage took; one that is not known or took nothing teaches nothing.
        """
        return follow_from(times_ms, index, float(output_tokens), np.array(self.by_stage(stages_ms)), *self.state)

    def by_stage(self, times_ms: Mapping[str, float]) -> tuple[float, ...]:
        """What a request took in each stage; 0 where it is not known."""
        return tuple([float(times_ms.get(stage, 0.0)) for stage in self.stages])

    @property
    def drift(self) -> dict[str, float]:
        """Stages that run at another speed than when calibrated: stage -> factor (2: takes twice as long)."""
        moved = self.log_scale - self.normal
        return {s: float(math.exp(m)) for s, m in zip(self.stages, moved, strict=True) if abs(m) > DRIFTED}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back. The mood is not kept: it is over before it could be read."""
        return {"log_scale": self.log_scale.tolist(), "normal": self.normal.tolist()}

    @classmethod
    def from_dict(cls, stages: Sequence[str], document: Mapping[str, Any]) -> StageSpeed:
        """The speed of a `to_dict` document. Raises DataError, KeyError."""
        scales = {name: np.array(document[name], dtype=np.float64) for name in ("normal", "log_scale")}
        for name, values in scales.items():
            if values.shape != (len(stages),) or not np.isfinite(values).all():
                raise DataError(f"the guard's scales {name} {values} do not fit its latency model; calibrate again")
        return cls(stages, scales["normal"], scales["log_scale"])


@compiled
def pace_after(mood: float, predicted_ms: float, took_ms: float) -> float:
    """Factor on predicted times, from a part of the request itself that is over; 0: none is."""
    if predicted_ms > 0 and took_ms > 0:
        mood += PROBE_RATE * _limited(math.log(took_ms / predicted_ms) - mood)
    return math.exp(mood)


@compiled
def follow_from(
    times_ms: np.ndarray,
    index: int,
    output_tokens: float,
    took_ms: np.ndarray,
    now: np.ndarray,
    log_scale: np.ndarray,
    factors: np.ndarray,
    normal_factors: np.ndarray,
    recent: np.ndarray,
    known: np.ndarray,
    predicted_ms: np.ndarray,
) -> bool:
    """See `StageSpeed.follow`; from ``now`` on it is `StageSpeed.state`, which changes in place.

    All stages are learnt from, also behind one that has jumped.
    """
    steps, took, predicted = max(output_tokens - 1.0, 0.0), 0.0, 0.0
    for g in range(len(took_ms)):
        predicted_ms[g] = times_ms[g, index] + steps * times_ms[len(took_ms) + g, index]
    for g in range(len(took_ms)):
        if took_ms[g] > 0 and predicted_ms[g] > 0:
            took += took_ms[g]
            predicted += predicted_ms[g] * factors[g]
    if took == 0:
        return False
    now[0] += MOOD_RATE * _limited(math.log(took / predicted) - now[0])
    jumped = False
    for g in range(len(took_ms)):
        if took_ms[g] > 0 and predicted_ms[g] > 0:
            jumped |= _follow_stage(math.log(took_ms[g] / predicted_ms[g]), g, log_scale, recent[g], known)
            factors[g] = math.exp(log_scale[g])
    if jumped:
        now[0] = 0.0
    expected = normal = 0.0
    for g in range(len(took_ms)):
        expected += predicted_ms[g] * factors[g]
        normal += predicted_ms[g] * normal_factors[g]
    now[1] = math.exp(now[0]) * expected / normal
    return jumped


@compiled
def _follow_stage(log_ratio: float, g: int, log_scale: np.ndarray, recent: np.ndarray, known: np.ndarray) -> bool:
    """Whether this stage has jumped; ``recent`` is its own, ``[AGREEING]``."""
    if known[g] < AGREEING:
        known[g] += 1
    count = known[g]
    least = most = total = log_ratio
    for i in range(count - 1):  # the latest comes first
        log_ratio, recent[i] = recent[i], log_ratio
    recent[count - 1] = log_ratio
    for i in range(1, count):
        least, most, total = min(least, recent[i]), max(most, recent[i]), total + recent[i]
    if count == AGREEING and (least - log_scale[g] > JUMP or most - log_scale[g] < -JUMP):
        log_scale[g] = (total - least - most) / (AGREEING - 2)  # their median
        known[g] = 0
        return True
    log_scale[g] += RATE * _limited(recent[0] - log_scale[g])
    return False


@compiled
def _limited(log_ratio: float) -> float:
    return max(-LARGEST_STEP, min(log_ratio, LARGEST_STEP))
