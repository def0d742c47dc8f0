"""What the library `datasets` stores beside the numbers of a file: names of class labels, cells that are JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that a Parquet file says it has, by column; empty where it says none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        stored = json.loads(text) if text else {}
    except ValueError:
        stored = {}
    found = dict((stored.get("info") or {}).get("features") or {})
    found |= {field.name: {"_type": "Json"} for field in schema if str(field.type).startswith("extension<arrow.json")}
    return encoded_only(found)


def encoded_only(features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features whose values do not stand for themselves."""
    return {name: feature for name, feature in features.items() if re.search("ClassLabel|Json", json.dumps(feature))}


def decoded(feature: Any, value: Any) -> Any:
    """Return a value with class labels by their names, whatever lists and objects they lie in, and with JSON read.

    Args:
        feature: as `datasets` writes it: {"_type": "ClassLabel", "names": [...]}, {"_type": "List", "feature": ...}, an
            object of features, or a list of one.
    """
    if value is None or not feature:
        return value
    kind = feature.get("_type") if isinstance(feature, Mapping) else None
    if kind in ("ClassLabel", "Json") and not isinstance(value, list):
        return _from_json(value) if kind == "Json" else _label_name(feature, value)
    inner = feature if kind in ("ClassLabel", "Json") else _inner(feature)
    if isinstance(value, list):
        return [decoded(inner, one) for one in value]
    if isinstance(value, Mapping) and isinstance(inner, Mapping):  # perhaps of lists
        return {name: decoded(inner.get(name), part) for name, part in value.items()}
    return value


def _inner(feature: Any) -> Any:
    """Return the feature of the entries of a list, or the object's own features."""
    if isinstance(feature, list):
        return feature[0]
    return feature.get("feature") if isinstance(feature.get("_type"), str) else feature


def _label_name(feature: Mapping[str, Any], value: Any) -> str | None:
    names = feature.get("names") or ()
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None  # -1 is no label


def _from_json(value: Any) -> Any:
    """Return what a text says in JSON; a text that is none ("007") was stored as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain_numbers(table: pa.Table) -> pa.Table:
    """Return a table with numbers of low precision as the shortest texts that mean them: .1, not .10000000149."""
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if pa.types.is_float16(field.type):  # which Arrow writes with all digits
            numbers = [None if v is None else np.float16(v) for v in column.to_pylist()]
            texts = [None if v is None else np.format_float_positional(v, trim="-") for v in numbers]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_float32(field.type):
            table = table.set_column(place, field.name, column.cast(pa.string()))
        elif pa.types.is_list(field.type) and pa.types.is_float32(field.type.value_type):
            table = table.set_column(place, field.name, column.cast(pa.list_(pa.string())))
    return table
