"""The room that can be seen, on a table worked out by hand.

Two knobs of two values: (lo, lo) 10 ms, (lo, hi) 20 ms, (hi, lo) 20 ms, (hi, hi) 40 ms. Questions of kind "a" need the
first knob high, those of kind "b" the second.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.visible_room import visible_room
from budgetvlm.errors import DataError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"tiles": [1, 4], "depth": [2, 8]})


def two_kinds(labels: bool = True) -> ProfileTable:
    accuracy = np.tile(np.array([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=np.float32), (20, 1))
    latency = np.tile(np.array([10, 20, 20, 40], dtype=np.float32), (40, 1))
    groups = {"kind": ("a", "b") * 20, "difficulty": ("easy",) * 40} if labels else {}
    return ProfileTable.from_arrays(
        SPACE,
        [f"s{i}" for i in range(40)],
        accuracy,
        latency,
        groups=groups,
        split=["train"] * 20 + ["test"] * 20,
    )


def test_properties_of_a_table_worked_out_by_hand() -> None:
    room = visible_room(two_kinds())
    assert room["full"] == {"accuracy": 1.0, "latency_ms": 40.0}
    assert room["latency_ratio"] == pytest.approx(4.0)
    assert room["accuracy_by"]["kind"] == {"a": 1.0, "b": 1.0}
    assert room["budgets"]["lookup"]["accuracy"] == [0.5] * 4
    assert room["budgets"]["group_lookup"]["accuracy"] == [1.0] * 4
    assert room["group_gain"] == pytest.approx(0.5)


def test_each_knob_alone() -> None:
    tiles = visible_room(two_kinds())["knobs"]["tiles"]
    assert tiles["accuracy"] == [0.5, 1.0] and tiles["latency_ms"] == [20.0, 40.0]
    assert tiles["accuracy_gain"] == 0.5 and tiles["latency_saved"] == 0.5 and tiles["monotonic"] is True


def test_latency_at_equal_accuracy() -> None:
    equal = visible_room(two_kinds())["equal_accuracy"]
    # Blind mix: .98 lies 24/25 of the way from (20, .5) to (40, 1). Group lookup: from (10, 0) to (20, 1).
    assert equal["blind_mix_ms"] == pytest.approx(39.2)
    assert equal["group_lookup_ms"] == pytest.approx(19.8)
    assert equal["latency_saved"] == pytest.approx(1 - 19.8 / 39.2)


def test_the_document_is_json() -> None:
    json.dumps(visible_room(two_kinds()), allow_nan=False)


def test_missing_labels_are_named() -> None:
    with pytest.raises(DataError, match="kind, difficulty"):
        visible_room(two_kinds(labels=False))
