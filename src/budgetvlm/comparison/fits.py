"""One cell of a comparison: a policy fitted with one seed, and every choice it makes. Kept on disk, so that an
interrupted comparison goes on where it stopped.

Shapes: P budgets, Q prices, S evaluated samples, T tuning samples, K settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from budgetvlm._io import atomic_path
from budgetvlm.comparison.fitting_data import FittingData
from budgetvlm.comparison.roster import ROSTER
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.errors import BudgetVLMError, DataError, MissingExtraError
from budgetvlm.evaluation.outcomes import EvaluationData
from budgetvlm.features import Features
from budgetvlm.policies import Policy, Restricted, States, free_settings
from budgetvlm.table import ProfileTable

BLOCK = 100_000  # states that are chosen for at once
TIMED = 60  # single decisions that are timed
OK, NOT_INSTALLED, NO_FEATURES, NO_LABELS, FAILED = "ok", "not installed", "needs features", "needs labels", "failed"
_HEADER = "budgetvlm.compare"


@dataclass(frozen=True)
class Spec:
    """Which cell: a key of `ROSTER`, a seed, and what is left out (knobs that may move, a view, samples)."""

    policy: str
    seed: int
    knobs: tuple[str, ...] | None = None
    view: str | None = None
    samples: int | None = None

    @property
    def variant(self) -> str:
        """What is left out, as a part of a name; "" for nothing."""
        parts = ["+".join(self.knobs) if self.knobs else "", self.view or "", str(self.samples or "")]
        return ",".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """What its contender is called: equal for all seeds."""
        return ROSTER[self.policy].name + (f" [{self.variant}]" if self.variant else "")

    @property
    def file(self) -> str:
        return f"{self.policy}{'.' + self.variant if self.variant else ''}.{self.seed}.safetensors"


@dataclass(frozen=True, eq=False)
class Cell:
    """What came out. Where ``status`` is not "ok" nothing was chosen, and ``note`` says why.

    Attributes:
        budgets, prices, tuning_prices: chosen settings ``[P, S]``, ``[Q, S]`` and ``[Q, T]``, int16.
        fit_seconds: of learning. decision_us: median of single decisions.
    """

    spec: Spec
    status: str
    note: str
    fit_seconds: float
    decision_us: float
    budgets: np.ndarray
    prices: np.ndarray
    tuning_prices: np.ndarray

    def save(self, directory: Path) -> None:
        """Write whole or not at all. Raises OutputError."""
        header = {
            "status": self.status, "note": self.note, "fit_seconds": self.fit_seconds, "decision_us": self.decision_us,
        }  # fmt: skip
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("budgets", "prices", "tuning_prices")}
        with atomic_path(directory / self.spec.file) as temporary:
            temporary.write_bytes(to_bytes(arrays, metadata={_HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, spec: Spec, directory: Path) -> Cell | None:
        """The cell that was saved there, or None. Raises DataError for a damaged file."""
        path = directory / spec.file
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                arrays = {name: file.get_tensor(name) for name in ("budgets", "prices", "tuning_prices")}
            return cls(spec, **header, **arrays)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, and it is made again") from None


@dataclass(frozen=True, eq=False)
class Recorded:
    """A policy that repeats the choices of a cell; asked about anything else it raises KeyError."""

    evaluated: ProfileTable
    choices: dict[tuple[bool, float, float], np.ndarray]
    name: str = "recorded"

    @classmethod
    def of(
        cls, cell: Cell, bench: EvaluationData, shares: Sequence[float], price: float, prices: Sequence[float]
    ) -> Recorded:
        reference = bench.expected.reference_ms
        choices = {(True, share * reference, price): row for share, row in zip(shares, cell.budgets, strict=True)}
        if len(cell.prices):
            for number, value in enumerate(prices):
                choices[True, np.inf, value] = cell.prices[number]
                choices[False, np.inf, value] = cell.tuning_prices[number]
        return cls(bench.test, choices)

    def choose(self, states: States) -> np.ndarray:
        evaluated = states.table is self.evaluated
        key = (evaluated, float(states.budget_ms[0]), float(states.price[0]))
        return self.choices[key].astype(np.int64)


def make_cell(
    spec: Spec,
    material: FittingData,
    bench: EvaluationData,
    shares: Sequence[float],
    price: float,
    prices: Sequence[float],
) -> Cell:
    """Fit a policy and let it choose for everything that is evaluated. What the user cannot help becomes a status."""
    entry = ROSTER[spec.policy]
    if entry.features and material.features is None:
        return _empty(spec, NO_FEATURES, "the data has no features")
    try:
        started = time.perf_counter()
        policy = entry.fit(material, spec.seed)
        seconds = time.perf_counter() - started
        if spec.knobs:
            free = free_settings(material.table.knob_space, spec.knobs)
            policy = Restricted(policy, free, bench.expected.latency_ms)
        return _chosen(spec, policy, material.features, bench, seconds, shares, price, prices)
    except MissingExtraError as error:
        return _empty(spec, NOT_INSTALLED, str(error))
    except BudgetVLMError as error:
        return _empty(spec, NO_LABELS if "no label" in str(error) else FAILED, str(error))


def _chosen(
    spec: Spec,
    policy: Policy,
    features: Features | None,
    bench: EvaluationData,
    seconds: float,
    shares: Sequence[float],
    price: float,
    prices: Sequence[float],
) -> Cell:
    test = None if features is None else features.aligned(bench.test.sample_ids)
    tuning = None if features is None else features.aligned(bench.tuning.sample_ids)
    reference = bench.expected.reference_ms
    under = [States.under_budget(bench.test, test, bench.guard, share * reference, price) for share in shares]
    priced = prices if ROSTER[spec.policy].priced else ()
    unlimited = [States.unlimited(bench.test, test, bench.guard, value) for value in priced]
    tuned = [States.unlimited(bench.tuning, tuning, bench.guard, value) for value in priced]
    return Cell(
        spec, OK, "", seconds, _decision_us(policy, under), _choose(policy, under), _choose(policy, unlimited),
        _choose(policy, tuned),
    )  # fmt: skip


def _choose(policy: Policy, requests: Sequence[States]) -> np.ndarray:
    """Choices for lists of requests, several lists at once; int16 ``[len(requests), S]``."""
    if not requests:
        return np.zeros((0, 0), dtype=np.int16)
    size = len(requests[0].budget_ms)
    step = max(1, BLOCK // size)
    blocks = [requests[start : start + step] for start in range(0, len(requests), step)]
    return np.concatenate([policy.choose(_joined(block)).reshape(len(block), size) for block in blocks]).astype("i2")


def _joined(requests: Sequence[States]) -> States:
    return replace(
        requests[0],
        sample_index=np.concatenate([states.sample_index for states in requests]),
        budget_ms=np.concatenate([states.budget_ms for states in requests]),
        feasible=np.concatenate([states.feasible for states in requests]),
        price=np.concatenate([states.price for states in requests]),
    )


def _decision_us(policy: Policy, requests: Sequence[States]) -> float:
    """Median time of a decision about one request, in microseconds; of a controller by what serves requests."""
    decide = _one_by_one(policy)
    states = requests[len(requests) // 2]
    times = []
    for row in range(min(TIMED, len(states.budget_ms))):
        one = replace(
            states,
            sample_index=states.sample_index[row : row + 1],
            budget_ms=states.budget_ms[row : row + 1],
            feasible=states.feasible[row : row + 1],
            price=states.price[row : row + 1],
        )
        started = time.perf_counter()
        decide(one)
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times))


def _one_by_one(policy: Policy):  # type: ignore[no-untyped-def]
    if not isinstance(policy, ControllerPolicy):
        return policy.choose
    from budgetvlm.controller.decision import Decider

    decider = Decider(policy.controller)

    def decide(one: States) -> int:
        return decider.choose(
            one.image[0], one.language[0], float(one.budget_ms[0]), float(one.price[0]), one.feasible[0]
        )

    return decide


def failed_cell(spec: Spec, note: str) -> Cell:
    """A cell that could not be made from this data, and why."""
    return _empty(spec, FAILED, note)


def _empty(spec: Spec, status: str, note: str) -> Cell:
    nothing = np.zeros((0, 0), dtype=np.int16)
    return Cell(spec, status, note, float("nan"), float("nan"), nothing, nothing, nothing)
