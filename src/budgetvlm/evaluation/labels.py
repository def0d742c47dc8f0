"""Labels that tell people about a sample: they have few values and do not record how the sample was measured."""

from __future__ import annotations

from budgetvlm.guard.static import LATENCY_SOURCE
from budgetvlm.table import ProfileTable

BOOKKEEPING = ("image_id", "split", LATENCY_SOURCE)
MOST_VALUES = 12  # that can be told apart in a picture


def readable_labels(table: ProfileTable) -> dict[str, tuple[str, ...]]:
    """The values of every label that has 2 to `MOST_VALUES` of them, numbers in order of size before words."""
    found = {}
    for label, values in table.groups.items():
        names = tuple(sorted(set(values), key=natural))
        if label not in (*BOOKKEEPING, table.unit) and 1 < len(names) <= MOST_VALUES:
            found[label] = names
    return found


def natural(name: str) -> tuple[float, str]:
    """A sort key that puts numbers in order of size and words after them."""
    return (float(name), name) if name.replace(".", "", 1).isdecimal() else (float("inf"), name)
