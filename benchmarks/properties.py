"""What the bundled task and model offer a controller, beside what the project wants of them.

    python benchmarks/properties.py results/quickstart/data/controller_training_data.table.parquet [--json]

The table is one that `budgetvlm prepare` wrote, of the splits train, validation and test. Exit code 1 if a figure
misses what is wanted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visible_room import visible_room

from budgetvlm.errors import BudgetVLMError
from budgetvlm.table import ProfileTable

Row = tuple[str, float, float]


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """(what, measured, wanted at least), shares as fractions."""
    yield "accuracy at the full setting", found["full"]["accuracy"], 0.88
    for kind, accuracy in found["accuracy_by"]["kind"].items():
        yield f"accuracy on {kind}", accuracy, 0.75
    yield "full setting's latency / cheapest's", found["latency_ratio"], 4.0
    for name, knob in found["knobs"].items():
        yield f"{name} alone: accuracy gained", knob["accuracy_gain"], 0.08
        yield f"{name} alone: latency saved", knob["latency_saved"], 0.25
        yield f"{name} alone: monotonic", float(knob["monotonic"]), 1.0
    yield "accuracy of the lookup by kind and difficulty over the blind lookup", found["group_gain"], 0.05
    saved = found["equal_accuracy"]["latency_saved"]
    yield "latency it saves at 98% of the full accuracy", float("nan") if saved is None else saved, 0.35


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE.parquet")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        found = visible_room(ProfileTable.load(args.table))
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    missed = [what for what, measured, wanted in rows(found) if not measured >= wanted]
    if args.json:
        print(json.dumps({**found, "missed": missed}))
    else:
        for what, measured, wanted in rows(found):
            print(f"{what:70} {measured:7.3f}  wanted {wanted:.2f}{'' if measured >= wanted else '  MISSED'}")
        for name, knob in found["knobs"].items():
            values = zip(knob["values"], knob["accuracy"], knob["latency_ms"], strict=True)
            print(f"{name} alone: " + ", ".join(f"{v}: {a:.1%} in {ms:.1f} ms" for v, a, ms in values))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
