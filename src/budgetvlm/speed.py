"""How fast each stage runs here and now, compared with the profile.

Each stage has a scale, the factor on its predicted time. It goes a little of the way towards every request's own ratio,
so that slow drift is followed; where several requests in a row agree that the speed is another one (a load that came
or went), it goes there at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from budgetvlm.errors import DataError

RATE = 0.05  # share of the way that a scale goes towards one request's ratio
LARGEST_STEP = 0.2  # of a log ratio, so that one hiccup of the machine is not taken for its new speed
AGREEING = 4  # requests in a row that tell of a jump
JUMP = math.log(1.35)  # the least change that is one
DRIFTED = math.log(1.2)  # a scale this far from that of the calibration is reported


class StageSpeed:
    """Scales of stages, as logarithms.

    Attributes:
        log_scale: now, ``[stages]``.
        normal: this machine's normal speed, when the guard was calibrated; drift is reported against it.
    """

    def __init__(self, stages: Sequence[str], normal: np.ndarray | None = None) -> None:
        self.stages = tuple(stages)
        self.normal = np.zeros(len(self.stages)) if normal is None else np.array(normal, dtype=np.float64)
        self.log_scale = self.normal.copy()
        self._recent = [deque[float](maxlen=AGREEING) for _ in self.stages]

    def follow(self, predicted_ms: np.ndarray, stages_ms: Mapping[str, float]) -> bool:
        """Learn from one request's times; whether any stage's speed has jumped.

        Args:
            predicted_ms: of each stage, by the profile, ``[stages]``.
            stages_ms: what each stage took; one that is not known or took nothing teaches nothing.
        """
        jumped = False
        for g, stage in enumerate(self.stages):
            took = stages_ms.get(stage, 0.0)
            if took > 0 and predicted_ms[g] > 0:
                jumped |= self._follow(g, math.log(took / float(predicted_ms[g])))
        return jumped

    def _follow(self, g: int, log_ratio: float) -> bool:
        error = log_ratio - self.log_scale[g]
        recent = self._recent[g]
        recent.append(log_ratio)
        errors = [ratio - self.log_scale[g] for ratio in recent]
        if len(errors) == AGREEING and (min(errors) > JUMP or max(errors) < -JUMP):
            self.log_scale[g] += float(np.median(errors))
            recent.clear()
            return True
        self.log_scale[g] += RATE * max(-LARGEST_STEP, min(error, LARGEST_STEP))
        return False

    @property
    def drift(self) -> dict[str, float]:
        """Stages that run at another speed than when calibrated: stage -> factor (2: takes twice as long)."""
        moved = self.log_scale - self.normal
        return {s: float(math.exp(m)) for s, m in zip(self.stages, moved, strict=True) if abs(m) > DRIFTED}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
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
