"""The first face: accuracy, latency and violations under a budget for each request.

Shapes: S samples, P budgets, U runs, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.outcomes import GROUP, LOOKUP, ORACLE, PREDICT, Contender, EvaluationData, Outcomes, outcomes
from budgetvlm.evaluation.records import AtBudget, Estimate, Room, SettingShare
from budgetvlm.policies import States

LEAST_ROOM = 1e-3  # below a tenth of a point of accuracy a share of the room means nothing


@dataclass(frozen=True, eq=False)
class CeilingMetrics:
    """Per contender: its outcomes, and the resampled means of accuracy, latency and violations, ``[R, P]`` each."""

    bench: EvaluationData
    shares: tuple[float, ...]
    found: dict[str, Outcomes]
    accuracy_RP: dict[str, np.ndarray]
    latency_RP: dict[str, np.ndarray]
    violations_RP: dict[str, np.ndarray]

    @classmethod
    def measure(
        cls,
        bench: EvaluationData,
        contenders: Sequence[Contender],
        shares: Sequence[float],
        price: float,
        progress: Callable[[str], None],
    ) -> CeilingMetrics:
        """Let every contender choose for every evaluated sample under every budget."""
        budgets = np.array(shares) * bench.expected.reference_ms
        requests = [States.under_budget(bench.test, bench.test_features, bench.guard, b, price) for b in budgets]
        found, accuracy, latency, violations = {}, {}, {}, {}
        timed_R = np.maximum(bench.bootstrap.means(bench.timed), 1e-9)[:, None]
        for contender in contenders:
            progress(f"under a budget: {contender.name}")
            result = outcomes(contender, bench.test, requests)
            found[contender.name] = result
            accuracy[contender.name] = bench.bootstrap.means(result.sample_accuracy)
            latency[contender.name] = bench.bootstrap.means(result.sample_latency)
            over = result.sample_violations(budgets) * bench.timed[:, None]
            violations[contender.name] = bench.bootstrap.means(over) / timed_R
        return cls(bench, tuple(shares), found, accuracy, latency, violations)

    @property
    def budgets_ms(self) -> np.ndarray:
        """``[P]``."""
        return np.array(self.shares) * self.bench.expected.reference_ms

    def at_budgets(self, name: str) -> tuple[AtBudget, ...]:
        """One record a budget."""
        return tuple(self._at_budget(name, p) for p in range(len(self.shares)))

    def room(self, name: str, room_shares: Sequence[float]) -> Room:
        """Means over the named budgets, and the gain as a share of what the bounds gain.

        There is no such share for a policy that breaks more budgets than the lookup table by more than the guard
        tolerates: its gain was bought with violations.
        """
        columns = np.array([self.shares.index(share) for share in room_shares])
        gain = self._difference(name, LOOKUP, columns)
        violations = self._violations(name)[columns].mean()
        comparable = self.comparable(name, room_shares)
        violations_R = self.violations_RP[name][:, columns].mean(axis=1)
        lookup_R = self.violations_RP[LOOKUP][:, columns].mean(axis=1)
        lookup = self._violations(LOOKUP)[columns].mean()
        return Room(
            accuracy_gain=self._estimate(*gain),
            room_closed=self._share(gain, ORACLE, columns) if comparable else None,
            visible_room_closed=self._share(gain, GROUP, columns) if comparable else None,
            vs_predict=self._estimate(*self._difference(name, PREDICT, columns)) if PREDICT in self.found else None,
            violation_rate=self._estimate(violations, violations_R),
            violations_vs_lookup=self._estimate(violations - lookup, violations_R - lookup_R),
        )

    def comparable(self, name: str, room_shares: Sequence[float]) -> bool:
        """Whether a policy breaks at most as many budgets as the lookup table, plus what the guard tolerates."""
        columns = np.array([self.shares.index(share) for share in room_shares])
        late, lookup = (self._violations(n)[columns].mean() for n in (name, LOOKUP))
        return bool(late <= lookup + 1 - self.bench.guard.quantile)

    def gain(self, name: str, other: str, room_shares: Sequence[float]) -> Estimate:
        """Paired difference in accuracy, mean over the named budgets."""
        return self._estimate(*self._difference(name, other, np.array([self.shares.index(s) for s in room_shares])))

    def _at_budget(self, name: str, p: int) -> AtBudget:
        result = self.found[name]
        latency = result.latency_ms[:, p]
        p50, p95 = np.quantile(latency, [0.5, 0.95])
        return AtBudget(
            budget_share=self.shares[p],
            budget_ms=float(self.budgets_ms[p]),
            accuracy=self._estimate(self._accuracy(name)[p], self.accuracy_RP[name][:, p]),
            vs_lookup=self._estimate(*self._difference(name, LOOKUP, np.array([p]))),
            mean_ms=self._estimate(latency.mean(), self.latency_RP[name][:, p]),
            p50_ms=float(p50),
            p95_ms=float(p95),
            violation_rate=self._estimate(self._violations(name)[p], self.violations_RP[name][:, p]),
            settings=self._settings(result.chosen[:, p]),
        )

    def _accuracy(self, name: str) -> np.ndarray:
        return self.found[name].accuracy.mean(axis=(0, 2))

    def _violations(self, name: str) -> np.ndarray:
        return self.found[name].sample_violations(self.budgets_ms)[self.bench.timed].mean(axis=0)

    def _difference(self, name: str, other: str, columns: np.ndarray) -> tuple[float, np.ndarray]:
        """Paired difference in accuracy, mean over some budgets: the number and its resamples ``[R]``."""
        value = (self._accuracy(name) - self._accuracy(other))[columns].mean()
        return float(value), (self.accuracy_RP[name] - self.accuracy_RP[other])[:, columns].mean(axis=1)

    def _share(self, gain: tuple[float, np.ndarray], bound: str, columns: np.ndarray) -> Estimate | None:
        """A gain over the lookup table as a share of a bound's; None where the bound gains next to nothing."""
        if bound not in self.found:
            return None
        room, room_R = self._difference(bound, LOOKUP, columns)
        if room < LEAST_ROOM:
            return None
        return self._estimate(gain[0] / room, gain[1] / np.where(room_R > 0, room_R, np.nan))

    def _estimate(self, value: float, resampled: np.ndarray) -> Estimate:
        low, high = self.bench.bootstrap.interval(resampled)
        return Estimate(float(value), float(low), float(high))

    def _settings(self, chosen: np.ndarray) -> tuple[SettingShare, ...]:
        """Settings chosen, the most frequent first."""
        space = self.bench.test.knob_space
        count = np.bincount(chosen.reshape(-1), minlength=space.num_settings)
        order = [k for k in np.argsort(-count, kind="stable") if count[k]]
        return tuple(SettingShare(dict(space.settings[k]), float(count[k] / chosen.size)) for k in order)
