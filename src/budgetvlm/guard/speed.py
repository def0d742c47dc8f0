"""How fast each stage runs here and now, compared with the profile.

Two things are followed. Each stage has a scale, the factor on its predicted time, which goes a little of the way
towards every request's own ratio; where several requests in a row agree that the speed is another one (a load that came
or went), it goes there at once. And all stages share a recent slowdown: machines have quick and slow moments that last
some requests (on 2 shared cores the error of a prediction correlates by 0.7 from one request to the next), so it goes
far towards the last request's ratio, and, within a request, towards that of the overview's encoding, which is over
before a setting has to be chosen (`budgetvlm.guard.kernels.pace_after`).

Shapes: G stages. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.guard.kernels import LARGEST_STEP

SCALE_RATE = 0.05  # share of the way that a scale goes towards one request's ratio
SLOWDOWN_RATE = 0.3  # the same of the recent slowdown
NUM_AGREEING = 4  # requests in a row that tell of a jump
JUMP = math.log(1.35)  # the smallest change of a log ratio that is a jump
DRIFTED = math.log(1.2)  # a scale this far from that of the calibration is reported


class SpeedSnapshot(NamedTuple):
    """The machine's speed at one moment, see `StageSpeed`."""

    log_scale: np.ndarray
    pace: np.ndarray
    recent: tuple[tuple[float, ...], ...]


class StageSpeed:
    """The scales of the stages, and the recent slowdown.

    Attributes:
        log_scale: now, ``[G]``.
        scale: exp(log_scale); the array stays where it is.
        pace: log of the recent slowdown, and how many times as long as when it was calibrated the last request was to
            be expected to take, ``[2]``; the array stays where it is.
        normal: log scales of this machine when the guard was calibrated; drift is reported against them.
    """

    def __init__(
        self, stages: Sequence[str], normal: np.ndarray | None = None, log_scale: np.ndarray | None = None
    ) -> None:
        self.stages = tuple(stages)
        self.normal = np.zeros(len(self.stages)) if normal is None else np.array(normal, dtype=np.float64)
        self.log_scale = self.normal.copy() if log_scale is None else np.array(log_scale, dtype=np.float64)
        self.scale = np.exp(self.log_scale)
        self.pace = np.array([0.0, 1.0])
        self._normal_scale = np.exp(self.normal)
        self._recent: list[list[float]] = [[] for _ in self.stages]  # log ratios of the last requests, the last first

    @property
    def recent_slowdown(self) -> float:
        """Logarithm of the factor on top of all scales, from the last requests."""
        return float(self.pace[0])

    @recent_slowdown.setter
    def recent_slowdown(self, log_factor: float) -> None:
        self.pace[0] = log_factor

    @property
    def slowdown(self) -> float:
        """How many times as long as when it was calibrated the last request was to be expected to take."""
        return float(self.pace[1])

    def follow(self, predicted_ms: np.ndarray, took_ms: np.ndarray) -> bool:
        """Learn from one request's times; whether the speed of any stage has jumped.

        Args:
            predicted_ms: of each stage by the profile, ``[G]``.
            took_ms: what each stage took, ``[G]``; one that took nothing teaches nothing.
        """
        learnt = [g for g in range(len(self.stages)) if took_ms[g] > 0 and predicted_ms[g] > 0]
        if not learnt:
            return False
        expected = float(sum(predicted_ms[g] * self.scale[g] for g in learnt))
        ratio = math.log(float(sum(took_ms[g] for g in learnt)) / expected)
        self.pace[0] += SLOWDOWN_RATE * max(-LARGEST_STEP, min(ratio - self.recent_slowdown, LARGEST_STEP))
        # All stages are learnt from, also behind one that has jumped.
        jumps = [self._follow_stage(g, math.log(float(took_ms[g] / predicted_ms[g]))) for g in learnt]
        if any(jumps):
            self.pace[0] = 0.0
        here, normal = float(predicted_ms @ self.scale), float(predicted_ms @ self._normal_scale)
        self.pace[1] = math.exp(self.recent_slowdown) * here / normal
        return any(jumps)

    def _follow_stage(self, g: int, log_ratio: float) -> bool:
        """Learn one stage's ratio; whether its speed has jumped."""
        recent = self._recent[g]
        recent.insert(0, log_ratio)
        del recent[NUM_AGREEING:]
        now = float(self.log_scale[g])
        jumped = len(recent) == NUM_AGREEING and (min(recent) - now > JUMP or max(recent) - now < -JUMP)
        if jumped:
            now = (sum(recent) - min(recent) - max(recent)) / (NUM_AGREEING - 2)  # their median
            recent.clear()
        else:
            now += SCALE_RATE * max(-LARGEST_STEP, min(log_ratio - now, LARGEST_STEP))
        self.log_scale[g], self.scale[g] = now, math.exp(now)
        return jumped

    def by_stage(self, times_ms: Mapping[str, float]) -> np.ndarray:
        """What a request took in each stage, ``[G]``; 0 where it is not known."""
        return np.array([float(times_ms.get(stage, 0.0)) for stage in self.stages])

    def snapshot(self) -> SpeedSnapshot:
        """The speed as it is now; `restore` goes back to it."""
        return SpeedSnapshot(self.log_scale.copy(), self.pace.copy(), tuple(map(tuple, self._recent)))

    def restore(self, snapshot: SpeedSnapshot) -> None:
        """Go back to an earlier speed."""
        self.log_scale[:], self.pace[:] = snapshot.log_scale, snapshot.pace
        self.scale[:] = np.exp(snapshot.log_scale)
        self._recent = [list(recent) for recent in snapshot.recent]

    @property
    def drift(self) -> dict[str, float]:
        """Stages that run at another speed than when calibrated: stage -> factor (2: takes twice as long)."""
        moved = self.log_scale - self.normal
        return {s: float(math.exp(m)) for s, m in zip(self.stages, moved, strict=True) if abs(m) > DRIFTED}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back. The recent slowdown is over before it could be read."""
        return {"log_scale": self.log_scale.tolist(), "normal": self.normal.tolist()}

    @classmethod
    def from_dict(cls, stages: Sequence[str], document: Mapping[str, Any]) -> StageSpeed:
        """The speed of a `to_dict` document. Raises DataError, KeyError."""
        scales = {name: np.array(document[name], dtype=np.float64) for name in ("normal", "log_scale")}
        for name, values in scales.items():
            if values.shape != (len(stages),) or not np.isfinite(values).all():
                raise DataError(f"the guard's scales {name} {values} do not fit its latency model; calibrate again")
        return cls(stages, scales["normal"], scales["log_scale"])
