"""What a profile table offers a controller: how much each knob matters, and how much room the input shows.

All of it is computed from a table alone, without features or a controller. Hindsight is partly luck, so the room is
measured by a lookup by group labels (question kind and difficulty), which knows all that can be known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from budgetvlm.evaluation.evaluation_data import complete_rows
from budgetvlm.evaluation.evaluation_options import PRICE_SWEEP
from budgetvlm.evaluation.frontier import latency_at, mixing_path
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import GroupLookup, LookupTable, Oracle, Policy, States
from budgetvlm.policies.setting_means import SettingMeans, column_means
from budgetvlm.table import ProfileTable

ROOM_SHARES = (0.5, 0.6, 0.7, 0.85)


def visible_room(
    table: ProfileTable,
    labels: tuple[str, ...] = ("kind", "difficulty"),
    shares: Sequence[float] = ROOM_SHARES,
    accuracy_share: float = 0.98,
    guard_quantile: float = 0.95,
) -> dict[str, Any]:
    """The properties of a task and model that decide whether adapting can pay; learnt on "train", reported on "test".

    Args:
        table: a profile table with splits and the labels.
        labels: the labels that define a group; the first one is the kind of question.
        shares: budgets as shares of the full setting's median latency on the training samples.
        accuracy_share: the target for the mean latency at equal accuracy, as a share of the full setting's accuracy.

    Returns:
        a JSON-able dict: "full", "cheapest", "latency_ratio", "accuracy_by", "knobs", "budgets", "group_gain" (mean
        accuracy of the group lookup minus the lookup table), "equal_accuracy" (mean ms and the share saved).

    Raises:
        DataError: no "train" or "test" samples, a missing label, a setting without measurements where one is needed.
    """
    train, test = table.subset("train"), table.subset("test")
    expected, guard = SettingMeans.fit(train), StaticGuard.fit_table(train, guard_quantile)
    test = complete_rows(test, expected.measured & guard.measured)
    group = GroupLookup.fit(train, labels, expected)
    means = SettingMeans.fit(test)
    budgets = _under_budgets(test, guard, expected, group, shares)
    gain = np.mean(budgets["group_lookup"]["accuracy"]) - np.mean(budgets["lookup"]["accuracy"])
    return {
        "num_samples": {"train": train.num_samples, "test": test.num_samples},
        "full": _point(means, -1),
        "cheapest": _point(means, int(np.nanargmin(expected.latency_ms))),
        "latency_ratio": float(means.latency_ms[-1] / means.latency_ms[np.nanargmin(expected.latency_ms)]),
        "accuracy_by": {label: _accuracy_by(test, label) for label in labels},
        "knobs": {name: one_knob(table.knob_space, name, means) for name in table.knob_space.names},
        "budgets": budgets,
        "group_gain": float(gain),
        "equal_accuracy": _equal_accuracy(train, test, guard, expected, group, accuracy_share),
    }


def one_knob(space: KnobSpace, name: str, means: SettingMeans) -> dict[str, Any]:
    """Accuracy and latency by the values of one knob, all others at their largest.

    "accuracy_gain" is largest minus smallest value, "latency_saved" one minus smallest / largest, "monotonic" whether
    neither accuracy nor latency ever falls as the value grows.
    """
    full = dict(space.full)
    columns = [space.index({**full, name: value}) for value in space.values(name)]
    accuracy, latency = means.accuracy[columns], means.latency_ms[columns]
    return {
        "values": list(space.values(name)),
        "accuracy": accuracy.tolist(),
        "latency_ms": latency.tolist(),
        "accuracy_gain": float(accuracy[-1] - accuracy[0]),
        "latency_saved": float(1 - latency[0] / latency[-1]),
        "monotonic": bool((np.diff(accuracy) >= 0).all() and (np.diff(latency) >= 0).all()),
    }


def outcome(test: ProfileTable, chosen: np.ndarray) -> tuple[float, float]:
    """Mean accuracy and mean measured latency of the chosen settings ``[S]``."""
    rows = np.arange(test.num_samples)
    return float(test.accuracy[rows, chosen].mean()), float(test.latency_ms[rows, chosen].mean())


def _point(means: SettingMeans, column: int) -> dict[str, float]:
    return {"accuracy": float(means.accuracy[column]), "latency_ms": float(means.latency_ms[column])}


def _accuracy_by(test: ProfileTable, label: str) -> dict[str, float]:
    """Accuracy of the full setting for each value of a label."""
    names = np.array(test.groups[label])
    return {str(name): float(test.accuracy[names == name, -1].mean()) for name in np.unique(names)}


def _under_budgets(
    test: ProfileTable, guard: StaticGuard, expected: SettingMeans, group: GroupLookup, shares: Sequence[float]
) -> dict[str, Any]:
    """Accuracy of lookup table, group lookup and oracle at each budget, at price 0."""
    policies: dict[str, Policy] = {"lookup": LookupTable(expected), "group_lookup": group, "oracle": Oracle(expected)}
    budgets = [share * expected.reference_ms for share in shares]
    report: dict[str, Any] = {"shares": list(shares), "budgets_ms": budgets}
    for name, policy in policies.items():
        chosen = [policy.choose(States.under_budget(test, None, guard, budget, 0.0)) for budget in budgets]
        report[name] = {"accuracy": [outcome(test, c)[0] for c in chosen]}
        if name == "lookup":
            report[name]["settings"] = [str(test.knob_space.settings[int(c[0])]) for c in chosen]
    return report


def _equal_accuracy(
    train: ProfileTable,
    test: ProfileTable,
    guard: StaticGuard,
    expected: SettingMeans,
    group: GroupLookup,
    accuracy_share: float,
) -> dict[str, Any]:
    """Mean latency of the group lookup and of the best input-blind mix where both reach the same test accuracy."""
    target = accuracy_share * float(column_means(test.accuracy)[-1])
    hull = mixing_path(expected.latency_ms, expected.accuracy)
    blind_ms = float(latency_at(column_means(test.latency_ms)[hull], column_means(test.accuracy)[hull], target))
    fitted = np.array([outcome(train_rows, c) for train_rows, c in _sweep(train, guard, expected, group)])
    points = np.array([outcome(rows, c) for rows, c in _sweep(test, guard, expected, group)])
    best = mixing_path(fitted[:, 1], fitted[:, 0])
    group_ms = float(latency_at(points[best, 1], points[best, 0], target))
    return {
        "target_accuracy": target,
        "accuracy_share": accuracy_share,
        "blind_mix_ms": _known(blind_ms),
        "group_lookup_ms": _known(group_ms),
        "latency_saved": _known(1 - group_ms / blind_ms),
    }


def _sweep(
    table: ProfileTable, guard: StaticGuard, expected: SettingMeans, policy: Policy
) -> list[tuple[ProfileTable, np.ndarray]]:
    """What a policy chooses on the complete samples of a table at each price, without a budget."""
    rows = complete_rows(table, expected.measured & guard.measured)
    return [(rows, policy.choose(States.unlimited(rows, None, guard, price))) for price in PRICE_SWEEP]


def _known(number: float) -> float | None:
    """None for "not reached" (NaN)."""
    return number if np.isfinite(number) else None
