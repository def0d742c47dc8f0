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
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
        mood: on top of all scales, of the last requests.
        normal: this machine's normal speed, when the guard was calibrated; drift is reported against it.
    """

    def __init__(self, stages: Sequence[str], normal: np.ndarray | None = None) -> None:
        self.stages = tuple(stages)
        self.normal = np.zeros(len(self.stages)) if normal is None else np.array(normal, dtype=np.float64)
        self.log_scale = self.normal.copy()
        self.mood = 0.0
        self._recent = [deque[float](maxlen=AGREEING) for _ in self.stages]

    def mood_after(self, log_ratio: float) -> float:
        """The mood, given log(measured / predicted) of a part of the request itself; the prediction with scales."""
        return self.mood + PROBE_RATE * _limited(log_ratio - self.mood)

    def follow(self, predicted_ms: Sequence[float], stages_ms: Mapping[str, float]) -> bool:
        """Learn from one request's times; whether any stage's speed has jumped.

        Args:
            predicted_ms: of each stage, by the profile, ``[stages]``.
            stages_ms: what each stage took; one that is not known or took nothing teaches nothing.
        """
        took_ms = [stages_ms.get(stage, 0.0) for stage in self.stages]
        known = [g for g, (took, ms) in enumerate(zip(took_ms, predicted_ms, strict=True)) if took > 0 and ms > 0]
        if not known:
            return False
        scales = self.log_scale.tolist()
        together = sum(took_ms[g] for g in known) / sum(predicted_ms[g] * math.exp(scales[g]) for g in known)
        self.mood += MOOD_RATE * _limited(math.log(together) - self.mood)
        # All are learnt from, also behind one that has jumped.
        jumps = [self._follow(g, scales[g], math.log(took_ms[g] / predicted_ms[g])) for g in known]
        if any(jumps):
            self.mood = 0.0
        return any(jumps)

    def _follow(self, g: int, scale: float, log_ratio: float) -> bool:
        recent = self._recent[g]
        recent.append(log_ratio)
        least, most = min(recent) - scale, max(recent) - scale
        if len(recent) == AGREEING and (least > JUMP or most < -JUMP):
            self.log_scale[g] = statistics.median(recent)
            recent.clear()
            return True
        self.log_scale[g] = scale + RATE * _limited(log_ratio - scale)
        return False

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
        speed = cls(stages, scales["normal"])
        speed.log_scale = scales["log_scale"]
        return speed


def _limited(log_ratio: float) -> float:
    return max(-LARGEST_STEP, min(log_ratio, LARGEST_STEP))
