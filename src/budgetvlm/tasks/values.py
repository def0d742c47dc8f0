"""What a cell of a data set means: an image, an id, a list of answers, the letter of an option."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from budgetvlm.tasks.choices import letters
from budgetvlm.tasks.sources import Row


def image_file(value: Any) -> tuple[bytes | None, str | None]:
    """Return the contents and the name of an image's file, as far as a cell, or a list of one, holds them."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
    return (
        bytes(data) if isinstance(data, bytes | bytearray) and data else None,
        name if isinstance(name, str) and name else None,
    )


def first_value(values: Mapping[str, Any], columns: tuple[str, ...] | None) -> Any:
    return values.get(columns[0]) if columns else None


def joined_id(values: Row, columns: tuple[str, ...] | None) -> str:
    """Return values of some columns as one id; empty where one is missing."""
    parts = [values.get(column) for column in columns or ()]
    return "" if None in parts or "" in parts else "-".join(map(str, parts))


def as_list(value: Any) -> list[Any]:
    """Return a list, also of one written as text; anything else as a list of one, nothing as an empty one."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = _parsed(value)
    if isinstance(value, list | tuple):
        return [entry for entry in value if entry is not None]
    return [] if value is None or value == "" else [value]


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError):
            continue
        return found if isinstance(found, list) else text
    return text


def as_texts(value: Any) -> tuple[str, ...]:
    """Return answers or options as texts; an answer may be an object with the text under "answer"."""
    entries = (entry.get("answer") if isinstance(entry, Mapping) else entry for entry in as_list(value))
    return tuple(str(entry).strip() for entry in entries if entry is not None and str(entry).strip())


def right_letter(answer: Any, options: Sequence[str], index: bool) -> str | None:
    """Return the letter of the right option, given as its number, its letter or its text."""
    names, text = letters(len(options)), str(answer).strip()
    if (index or isinstance(answer, int)) and text.isdigit():
        return names[int(text)] if int(text) < len(names) else None
    if text in names:
        return text
    return names[list(options).index(text)] if text in options else None


def as_label(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, as_list(value)))
