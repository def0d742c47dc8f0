"""One fitted policy of a comparison and every choice it makes, kept on disk.

An interrupted comparison goes on with what it finds there.
Shapes: P budgets, Q prices, S evaluated samples, T tuning samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from budgetvlm._io import atomic_path
from budgetvlm.comparison.fitting_data import FittingData
from budgetvlm.comparison.roster import Entry
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.errors import BudgetVLMError, DataError, MissingExtraError
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.policies import Policy, Restricted, States, free_settings

BLOCK = 100_000  # states that are chosen for at once
TIMED = 60  # single decisions that are timed
OK, NOT_INSTALLED, NO_FEATURES, NO_LABELS, FAILED = "ok", "not installed", "needs features", "needs labels", "failed"
_HEADER = "budgetvlm.compare"
_ARRAYS = ("budgets", "prices", "tuning_prices")


@dataclass(frozen=True)
class CellSpec:
    """What is fitted: an entry with a seed, and what is left out (only some knobs, a view, fewer samples)."""

    entry: Entry
    seed: int = 0
    knobs: tuple[str, ...] | None = None
    view: str | None = None
    samples: int | None = None

    @property
    def variant(self) -> str:
        """What is left out, as a part of a name; "" where nothing is."""
        parts = ["+".join(self.knobs) if self.knobs else "", self.view or "", str(self.samples or "")]
        return ",".join(part for part in parts if part)

    @property
    def section(self) -> str:
        """The section of the comparison that it belongs to."""
        return "samples" if self.samples else "knobs" if self.knobs else "features" if self.view else "policies"

    @property
    def name(self) -> str:
        """The name of its row, equal for all seeds."""
        return self.entry.name + (f" [{self.variant}]" if self.variant else "")

    @property
    def file(self) -> str:
        return f"{self.entry.key}{'.' + self.variant if self.variant else ''}.{self.seed}.safetensors"


def _no_choices() -> np.ndarray:
    return np.zeros((0, 0), dtype=np.int16)


@dataclass(frozen=True, eq=False)
class Cell:
    """What a fitted policy chose. Where ``status`` is not "ok" it chose nothing, and ``note`` says why.

    Attributes:
        fit_seconds: the time to fit it. decision_us: the median time of a single decision in microseconds.
        budgets, prices, tuning_prices: chosen settings ``[P, S]``, ``[Q, S]`` and ``[Q, T]``, int16.
    """

    spec: CellSpec
    status: str = OK
    note: str = ""
    fit_seconds: float = float("nan")
    decision_us: float = float("nan")
    budgets: np.ndarray = field(default_factory=_no_choices)
    prices: np.ndarray = field(default_factory=_no_choices)
    tuning_prices: np.ndarray = field(default_factory=_no_choices)

    def save(self, directory: Path) -> None:
        """Write the file whole or not at all. Raises OutputError."""
        header = {name: getattr(self, name) for name in ("status", "note", "fit_seconds", "decision_us")}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        with atomic_path(directory / self.spec.file) as temporary:
            temporary.write_bytes(to_bytes(arrays, metadata={_HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, spec: CellSpec, directory: Path) -> Cell | None:
        """The cell that was saved there, or None. Raises DataError if the file is damaged."""
        path = directory / spec.file
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                return cls(spec, **header, **{name: file.get_tensor(name) for name in _ARRAYS})
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, and it is made again") from None


def make_cell(spec: CellSpec, fitting: FittingData, data: EvaluationData, options: EvaluationOptions) -> Cell:
    """Fit a policy and let it choose for everything that is evaluated; what stands in the way becomes a status."""
    if spec.entry.features and fitting.features is None:
        return Cell(spec, NO_FEATURES, "the data has no features")
    if spec.entry.labels and not fitting.labels:
        wanted = ", ".join(options.labels)
        return Cell(spec, NO_LABELS, f"the table has none of the labels {wanted}")
    try:
        started = time.perf_counter()
        policy = spec.entry.fit(fitting, spec.seed)
        seconds = time.perf_counter() - started
        if spec.knobs:
            free = free_settings(fitting.table.knob_space, spec.knobs)
            policy = Restricted(policy, free, data.means.latency_ms)
        return _chosen(Cell(spec, fit_seconds=seconds), policy, fitting, data, options)
    except MissingExtraError as error:
        return Cell(spec, NOT_INSTALLED, str(error))
    except BudgetVLMError as error:
        return Cell(spec, FAILED, str(error))


def _chosen(cell: Cell, policy: Policy, fitting: FittingData, data: EvaluationData, options: EvaluationOptions) -> Cell:
    """The cell with the choices of its policy, which sees the features of ``fitting``."""
    if fitting.features is not None:
        test, tuning = (fitting.features.aligned(table.sample_ids) for table in (data.test, data.tuning))
        data = replace(data, test_features=test, tuning_features=tuning)
    under = data.under_budgets(options.budget_shares, options.price)
    prices = options.swept if cell.spec.entry.priced else ()
    return replace(
        cell,
        decision_us=_decision_us(policy, under[len(under) // 2]),
        budgets=_choose(policy, under),
        prices=_choose(policy, data.at_prices(prices, ceiling=options.ceiling)),
        tuning_prices=_choose(policy, data.at_prices(prices, tuning=True, ceiling=options.ceiling)),
    )


def _choose(policy: Policy, requests: Sequence[States]) -> np.ndarray:
    """Choices for lists of requests, several lists at once; int16 ``[len(requests), S]``."""
    if not requests:
        return _no_choices()
    size = len(requests[0].budget_ms)
    step = max(1, BLOCK // size)
    blocks = [requests[start : start + step] for start in range(0, len(requests), step)]
    return np.concatenate([policy.choose(States.joined(b)).reshape(len(b), size) for b in blocks]).astype(np.int16)


def _decision_us(policy: Policy, states: States) -> float:
    """Median time of a decision about one request, in microseconds."""
    decide = _one_by_one(policy)
    times = []
    for row in range(min(TIMED, len(states.budget_ms))):
        one = states.rows(slice(row, row + 1))
        started = time.perf_counter()
        decide(one)
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times))


def _one_by_one(policy: Policy) -> Callable[[States], object]:
    """How one request is decided; by a controller in the way that serves requests."""
    if not isinstance(policy, ControllerPolicy):
        return policy.choose
    from budgetvlm.controller.value_network import ValueNetwork

    network = ValueNetwork(policy.controller)

    def decide(one: States) -> int:
        values = network.values(one.image[0], one.language[0], float(one.budget_ms[0]), float(one.price[0]))
        return int(np.where(one.feasible[0], values, -np.inf).argmax())

    return decide
