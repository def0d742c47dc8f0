"""Accuracy, latency and violations when each request has a latency ceiling, its budget.

Shapes: S samples, P budgets, U runs, R resamples; numbers with an interval are ``[1 + R, ...]``, see `intervals`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.intervals import ratio
from budgetvlm.evaluation.outcomes import GROUP, LOOKUP, ORACLE, OWN, PREDICT, Outcomes
from budgetvlm.evaluation.records import AtBudget, Estimate, OnDataset, Room, SettingShare
from budgetvlm.table import DATASET

LEAST_ROOM = 1e-3  # a share of a room that is not clearly above a tenth of a point of accuracy means nothing
ROOMS = {ORACLE: "hindsight", GROUP: "visible"}


@dataclass(frozen=True, eq=False)
class CeilingMetrics:
    """Each contender's outcomes by its name, and its mean accuracy, latency (ms) and violation rate ``[1 + R, P]``."""

    data: EvaluationData
    shares: tuple[float, ...]
    found: Mapping[str, Outcomes]
    accuracy: dict[str, np.ndarray]
    latency_ms: dict[str, np.ndarray]
    violations: dict[str, np.ndarray]

    @classmethod
    def measure(cls, data: EvaluationData, shares: Sequence[float], found: Mapping[str, Outcomes]) -> CeilingMetrics:
        """Average what the contenders chose under every budget (`EvaluationData.under_budgets`)."""
        mean, budgets_ms = data.bootstrap.mean, data.budgets_ms(shares)
        timed = data.timed[:, None].astype(np.float64)
        accuracy, latency, violations = {}, {}, {}
        for name, outcomes in found.items():
            accuracy[name] = mean(outcomes.sample_accuracy)
            latency[name] = mean(outcomes.sample_latency)
            violations[name] = ratio(mean(outcomes.sample_violations(budgets_ms) * timed), mean(timed))
        return cls(data, tuple(shares), found, accuracy, latency, violations)

    def at_budgets(self, name: str) -> tuple[AtBudget, ...]:
        """One record for each budget."""
        return tuple(self._at_budget(name, p) for p in range(len(self.shares)))

    def room(self, name: str, room_shares: Sequence[float]) -> Room:
        """Means over the named budgets, and the gain as a share of what the bounds gain.

        There is no such share for a policy that breaks more budgets than the lookup table by more than the guard
        tolerates: its gain was bought with violations.
        """
        estimate = self.data.bootstrap.estimate
        gain = self._difference(name, LOOKUP, room_shares)
        late, lookup_late = (self._over(self.violations[n], room_shares) for n in (name, LOOKUP))
        comparable = self.comparable(name, room_shares)
        return Room(
            accuracy_gain=estimate(gain),
            room_closed=self._share(gain, ORACLE, room_shares) if comparable else None,
            visible_room_closed=self._share(gain, GROUP, room_shares) if comparable else None,
            vs_predict=self.gain(name, PREDICT, room_shares) if PREDICT in self.found else None,
            violation_rate=estimate(late),
            violations_vs_lookup=estimate(late - lookup_late),
        )

    def on_datasets(self, name: str, room_shares: Sequence[float]) -> tuple[OnDataset, ...]:
        """One record for each data set; none where the table tells none apart."""
        labels = np.array(self.data.test.groups.get(DATASET, ()))
        names = np.unique(labels).tolist()
        return tuple(self._on_dataset(name, one, labels == one, room_shares) for one in names if len(names) > 1)

    def _on_dataset(self, name: str, dataset: str, rows: np.ndarray, room_shares: Sequence[float]) -> OnDataset:
        mean, estimate = self.data.bootstrap.mean, self.data.bootstrap.estimate
        budgets = [self.shares.index(share) for share in room_shares]

        def accuracy(of: str) -> np.ndarray:
            right = self.found[of].sample_accuracy[:, budgets].mean(axis=1)
            return ratio(mean(right * rows), mean(rows.astype(np.float64)))

        own = accuracy(name) - accuracy(OWN) if OWN in self.found and name != OWN else None
        return OnDataset(dataset, int(rows.sum()), estimate(accuracy(name)), None if own is None else estimate(own))

    def notes(self, room_shares: Sequence[float]) -> Iterator[str]:
        """Why shares of a room are not given."""
        for other, room in ROOMS.items():
            if other in self.found and not self.data.bootstrap.above(
                self._difference(other, LOOKUP, room_shares), LEAST_ROOM
            ):
                gain = self.gain(other, LOOKUP, room_shares)
                yield (
                    f"No share of the {room} room is given: the {other} is {100 * gain.value:+z.1f} points "
                    f"[{100 * gain.low:+z.1f}, {100 * gain.high:+z.1f}] from the lookup table, not clearly above it."
                )

    def comparable(self, name: str, room_shares: Sequence[float]) -> bool:
        """Whether a policy breaks at most as many budgets as the lookup table, plus what the guard tolerates."""
        late, lookup_late = (self._over(self.violations[n], room_shares)[0] for n in (name, LOOKUP))
        return bool(late <= lookup_late + 1 - self.data.guard.quantile)

    def gain(self, name: str, other: str, room_shares: Sequence[float]) -> Estimate:
        """Paired difference in accuracy, mean over the named budgets."""
        return self.data.bootstrap.estimate(self._difference(name, other, room_shares))

    def _at_budget(self, name: str, p: int) -> AtBudget:
        estimate, found = self.data.bootstrap.estimate, self.found[name]
        p50, p95 = np.quantile(found.latency_ms[:, p], [0.5, 0.95])
        return AtBudget(
            budget_share=self.shares[p],
            budget_ms=float(self.data.budgets_ms(self.shares)[p]),
            accuracy=estimate(self.accuracy[name][:, p]),
            vs_lookup=estimate(self.accuracy[name][:, p] - self.accuracy[LOOKUP][:, p]),
            mean_ms=estimate(self.latency_ms[name][:, p]),
            p50_ms=float(p50),
            p95_ms=float(p95),
            violation_rate=estimate(self.violations[name][:, p]),
            settings=self._settings(found.chosen[:, p]),
        )

    def _over(self, number: np.ndarray, room_shares: Sequence[float]) -> np.ndarray:
        """The mean over the named budgets, ``[1 + R, P]`` -> ``[1 + R]``."""
        mean: np.ndarray = number[:, [self.shares.index(share) for share in room_shares]].mean(axis=1)
        return mean

    def _difference(self, name: str, other: str, room_shares: Sequence[float]) -> np.ndarray:
        return self._over(self.accuracy[name] - self.accuracy[other], room_shares)

    def _share(self, gain: np.ndarray, bound: str, room_shares: Sequence[float]) -> Estimate | None:
        """A gain over the lookup table as a share of another's; None where that is not clearly above nothing."""
        if bound not in self.found:
            return None
        room = self._difference(bound, LOOKUP, room_shares)
        return self.data.bootstrap.estimate(ratio(gain, room)) if self.data.bootstrap.above(room, LEAST_ROOM) else None

    def _settings(self, chosen: np.ndarray) -> tuple[SettingShare, ...]:
        """Settings chosen, the most frequent first."""
        space = self.data.test.knob_space
        count = np.bincount(chosen.reshape(-1), minlength=space.num_settings)
        order = [k for k in np.argsort(-count, kind="stable") if count[k]]
        return tuple(SettingShare(dict(space.settings[k]), float(count[k] / chosen.size)) for k in order)
