"""How fast each stage runs here and now, compared with the profile.

Two things are followed. Each stage has a scale, the factor on its predicted time, which goes a little of the way
towards every request's own ratio; where several requests in a row agree that the speed is another one (a load that came
or went), it goes there at once. And all stages share a recent slowdown: machines have quick and slow moments that last
some requests (on 2 shared cores the error of a prediction correlates by 0.7 from one request to the next), so it goes
far towards the last request's ratio, and, within a request, towards that of the overview's encoding, which is over
before a setting has to be chosen (`budgetvlm.guard.kernels.pace_after`).

Where a model is served elsewhere, several requests are in flight and slow each other down. How much so is learnt for
each number of them, so that a burst is foreseen and not only followed.

Shapes: G stages. Times in ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from budgetvlm.errors import DataError

MOST_IN_FLIGHT = 32  # that are told apart
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
        load: log of what a number of requests in flight lengthens each by, and how often it was seen,
            ``[2, MOST_IN_FLIGHT + 1]``.
        normal_scale: exp(normal). recent: log ratios of the last requests of each stage, the last first.
    """

    def __init__(
        self, stages: Sequence[str], normal: np.ndarray | None = None, log_scale: np.ndarray | None = None
    ) -> None:
        self.stages = tuple(stages)
        self.normal = np.zeros(len(self.stages)) if normal is None else np.array(normal, dtype=np.float64)
        self.log_scale = self.normal.copy() if log_scale is None else np.array(log_scale, dtype=np.float64)
        self.scale = np.exp(self.log_scale)
        self.pace = np.array([0.0, 1.0])
        self.load = np.zeros((2, MOST_IN_FLIGHT + 1))
        self.normal_scale: list[float] = np.exp(self.normal).tolist()
        self.recent: list[list[float]] = [[] for _ in self.stages]  # log ratios of the last requests, the last first

    @property
    def slowdown(self) -> float:
        """How many times as long as when it was calibrated the last request was to be expected to take."""
        return float(self.pace[1])

    def log_load(self, in_flight: int) -> float:
        """What a number of requests in flight, or the next smaller one that was seen, lengthens each by, as a log."""
        seen = np.flatnonzero(self.load[1, : in_flight + 1])
        return float(self.load[0, seen[-1]]) if len(seen) else 0.0

    def pace_among(self, in_flight: int) -> np.ndarray:
        """The pace of one of this number of requests in flight, ``[2]``."""
        return self.pace + np.array([self.log_load(in_flight), 0.0])

    def by_stage(self, times_ms: Mapping[str, float]) -> list[float]:
        """What a request took in each stage, ``[G]``; 0 where it is not known."""
        return [float(times_ms.get(stage, 0.0)) for stage in self.stages]

    def snapshot(self) -> SpeedSnapshot:
        """The speed as it is now; `restore` goes back to it."""
        return SpeedSnapshot(self.log_scale.copy(), self.pace.copy(), tuple(map(tuple, self.recent)))

    def restore(self, snapshot: SpeedSnapshot) -> None:
        """Go back to an earlier speed."""
        self.log_scale[:], self.pace[:] = snapshot.log_scale, snapshot.pace
        self.scale[:] = np.exp(snapshot.log_scale)
        self.recent = [list(recent) for recent in snapshot.recent]

    @property
    def drift(self) -> dict[str, float]:
        """Stages that run at another speed than when calibrated: stage -> factor (2: takes twice as long)."""
        moved = self.log_scale - self.normal
        return {s: float(math.exp(m)) for s, m in zip(self.stages, moved, strict=True) if abs(m) > DRIFTED}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back. The recent slowdown is over before it could be read."""
        return {"log_scale": self.log_scale.tolist(), "normal": self.normal.tolist(), "load": self.load.tolist()}

    @classmethod
    def from_dict(cls, stages: Sequence[str], document: Mapping[str, Any]) -> StageSpeed:
        """The speed of a `to_dict` document. Raises DataError, KeyError."""
        scales = {name: np.array(document[name], dtype=np.float64) for name in ("normal", "log_scale")}
        for name, values in scales.items():
            if values.shape != (len(stages),) or not np.isfinite(values).all():
                raise DataError(f"the guard's scales {name} {values} do not fit its latency model; calibrate again")
        made = cls(stages, scales["normal"], scales["log_scale"])
        if "load" in document:
            made.load[:] = document["load"]
        return made
