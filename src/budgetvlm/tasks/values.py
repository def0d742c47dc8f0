"""What a cell of a data set means, in whatever type it is stored: a text, an id, answers, options, an image.

A cell that cannot be understood is a DataError, whose caller names the row; nothing becomes the text of a list.
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import numpy as np

from budgetvlm._io import shortened
from budgetvlm.errors import DataError, InputError
from budgetvlm.tasks.choices import letters

GAPS = frozenset({"", "nan", "NaN", "<NA>", "NaT"})  # what gaps of pandas become when they are written as text
SPOKEN = {True: ("yes", "true"), False: ("no", "false")}
YES_NO = {"yes": "yes", "true": "yes", "1": "yes", "y": "yes", "no": "no", "false": "no", "0": "no", "n": "no"}
_ANSWER_FIELDS = ("answer", "text")
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")  # how PNG, JPEG, GIF, WEBP, BMP, TIFF begin
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|\)|[.:)]\)?)")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])(?:\)|[.:])\s*(\S.*)", re.DOTALL)
_WHOLE_NUMBER = re.compile(r"0|[1-9]\d*")


def is_gap(value: Any) -> bool:
    """Tell whether a cell holds nothing: None, NaN, an empty text, or the text that pandas makes of a gap."""
    if isinstance(value, str):
        return value.strip() in GAPS
    return value is None or (isinstance(value, float | np.floating | Decimal) and value != value)


def as_text(value: Any) -> str:
    """Return a cell as text: 3.0 is "3", a gap is empty.

    Raises:
        DataError: a list, an object, an infinite number, or bytes that are not UTF-8.
    """
    if is_gap(value):
        return ""
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"it holds {len(value)} bytes that are no UTF-8 text") from None
    if isinstance(value, list | tuple | Mapping | np.ndarray):
        raise DataError(f"{shortened(repr(value))} is no text")
    if isinstance(value, float | np.floating | Decimal) and not math.isfinite(value):
        raise DataError(f"it holds the number {value}; leave it empty, or write it as a text")
    if isinstance(value, Decimal):
        return str(int(value)) if value == int(value) else f"{value:f}"
    if isinstance(value, float | np.floating):  # never 1e-05, and .1 whatever its precision
        return np.format_float_positional(value, trim="-").removeprefix("-" if value == 0 else "")
    return str(value).strip()


def as_id(value: Any) -> str:
    """Return an id as text: "007" stays so, and 7.0, which pandas makes of 7 in a column with gaps, is 7."""
    text = as_text(value)
    return text.removesuffix(".0") if is_index(text.removesuffix(".0")) else text


def joined_id(values: Mapping[str, Any], columns: tuple[str, ...] | None) -> str:
    """Return values of some columns as one id; empty where one is missing."""
    parts = [as_id(values.get(column)) for column in columns or ()]
    return "" if "" in parts else "-".join(parts)


def is_index(name: str) -> bool:
    """Tell whether an id can be a number of a row: a whole number as it is usually written, unlike "007"."""
    return _WHOLE_NUMBER.fullmatch(name) is not None


def unpacked(value: Any) -> Any:
    """Return a list or an object also where it is written as text (JSON or Python); all else as it is.

    Raises:
        DataError: a text that begins like a list or an object of values and is none, for example that of a NumPy array.
    """
    if isinstance(value, np.ndarray):
        return value.tolist()
    text = value.strip() if isinstance(value, str) else ""
    if not (text[:1] + text[-1:] in ("[]", "{}") or text.startswith("array(")):
        return value
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        parsed = ast.literal_eval(text)
        if isinstance(parsed, list | tuple | dict) and not _joins_texts(text):
            return parsed
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if not re.match(r"""array\(|[\[{]\s*['"\d\[{-]""", text):
            return value  # a text in brackets, like [illegible]
    raise DataError(f"{shortened(text)} looks like a list, but cannot be read as one. Write it as JSON")


def _joins_texts(text: str) -> bool:
    """Tell whether two texts stand side by side, which Python makes one of: NumPy writes arrays so."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    return any(a == b == tokenize.STRING for a, b in pairwise(kinds))


def entries(value: Any) -> list[Any]:
    """Return the answers of a cell: one, a list, a list of objects, an object of lists, or these written as text.

    Raises:
        DataError: an object without a field "answer" or "text", a list within a list.
    """
    value = unpacked(value)
    if isinstance(value, Mapping):
        return entries(_answer_field(value))
    if isinstance(value, list | tuple):
        value = [_answer_field(entry) if isinstance(entry, Mapping) else entry for entry in value]
        if any(isinstance(entry, list | tuple | Mapping) for entry in value):
            raise DataError(f"{shortened(repr(value))} is a list of lists, and answers are texts")
        return [entry for entry in value if not is_gap(entry)]
    return [] if is_gap(value) else [value]


def _answer_field(fields: Mapping[str, Any]) -> Any:
    found = next((name for name in _ANSWER_FIELDS if name in fields), None)
    if found is None:
        raise DataError(
            f"an object with {', '.join(map(str, fields)) or 'no fields'} has no field {' or '.join(_ANSWER_FIELDS)}"
        )
    return fields[found]


def as_answers(value: Any, metric: str) -> tuple[str, ...]:
    """Return reference answers as texts.

    Booleans are yes and no. Where any of several answers is right, so are true and false, also as texts: nobody knows
    whether "True or false: ..." was asked.

    Raises:
        DataError: see `entries`; for the metric yes_no, an answer that is neither.
    """
    found = [entry for entry in entries(value) if isinstance(entry, bool | np.bool_) or as_text(entry)]
    if metric == "yes_no":
        return tuple(_yes_or_no(entry) for entry in found)
    if metric in ("vqa", "cider"):
        return tuple(SPOKEN[bool(e)][0] if isinstance(e, bool | np.bool_) else as_text(e) for e in found)
    said = {"true": SPOKEN[True], "false": SPOKEN[False]}
    return tuple(text for e in found for text in said.get(as_text(e).lower(), (as_text(e),)))


def _yes_or_no(answer: Any) -> str:
    said = YES_NO.get(as_text(answer).lower().strip(" .!"))
    if said is None:
        raise DataError(
            f"the metric yes_no needs yes or no (or true, false, 1, 0), and its answer is {shortened(repr(answer))}. "
            "Give another --metric"
        )
    return said


def as_options(value: Any) -> tuple[str, ...]:
    """Return the options of a question: a list, an object of letters, labels and texts, or these written as text.

    Raises:
        DataError: options that are understood half: a single one, a gap between two, labels that are no letters.
    """
    value = unpacked(value)
    if isinstance(value, list | tuple) and value and all(isinstance(option, Mapping) for option in value):
        value = {name: [option.get(name) for option in value] for name in value[0]}
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        value = dict(zip(value["label"], value["text"], strict=True))
    if isinstance(value, Mapping):
        names = sorted(value, key=str)
        if [str(name).upper() for name in names] != letters(len(names)):
            raise DataError(f"its options are called {', '.join(map(str, names))}, and have to be A, B, C ...")
        value = [value[name] for name in names]
    if is_gap(value):
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(f"its options are the text {shortened(str(value))!r}; write them as a list, in JSON")
    options = [as_text(option) for option in value]
    while options and not options[-1]:
        options.pop()
    if "" in options or len(options) == 1:
        raise DataError(f"its options are {shortened(repr(options))}; two at least are needed, without a gap")
    return _without_letters(options)


def _without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Return options that begin with their own letters, "B. green", in the order of these letters and without them."""
    found = [match for match in map(_LETTER_AND_TEXT.fullmatch, options) if match]
    if sorted(match[1].upper() for match in found) != letters(len(options)):
        return tuple(options)
    return tuple(match[2] for match in sorted(found, key=lambda match: match[1].upper()))


def right_letter(answer: Any, options: Sequence[str], *, numbered: bool = False, strict: bool = True) -> str:
    """Return the letter of the right option, given as its letter, its number from 0 on, or its text.

    ``numbered``: it is a number wherever it can be one. ``strict``: an answer that means one option as a letter or
    number and another one as a text is an error; else it is the letter, and then the text. Raises DataError: it is none
    of the options, or could be two of them.
    """
    names = letters(len(options))
    texts = SPOKEN[bool(answer)] if isinstance(answer, bool | np.bool_) else (as_text(answer),)
    by_number = [names[int(t)] for t in texts if is_index(t) and int(t) < len(options)]
    by_letter = [found[1].upper() for t in texts if (found := _LETTER.fullmatch(t))]
    plain = [option.strip().casefold() for option in options]
    by_text = [names[i] for t in texts for i, option in enumerate(plain) if option == t.casefold()]
    for t in texts:
        if (found := _LETTER_AND_TEXT.fullmatch(t)) and found[2].strip().casefold() in plain:
            by_text += {found[1].upper(), names[plain.index(found[2].strip().casefold())]}
    if numbered and by_number:
        return by_number[0]
    readings = [name for name in (*by_letter, *by_text, *by_number) if name in names]
    if not readings or (strict and len(set(readings)) > 1):
        which = f"could be option {' or '.join(sorted(set(readings)))}" if readings else "is none of its options"
        raise DataError(
            f"its answer {shortened(repr(answer))} {which}: {shortened(repr(list(options)), 200)}. Give the letter, "
            "the number from 0 on, or the text of the right one"
        )
    return readings[0]


def as_questions(value: Any) -> list[Mapping[str, Any]]:
    """Return the questions about one image: a list of objects, an object of lists, or these written as text.

    Raises:
        DataError: anything else.
    """
    value = unpacked(value)
    if isinstance(value, Mapping) and all(isinstance(part, list | tuple) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    value = [] if is_gap(value) else value
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"its questions are {shortened(repr(value))}; write them as a list of objects")
    return list(value)


def as_label(value: Any) -> str:
    """Return a label; those of a list are joined, booleans are true and false."""
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    value = unpacked(value)
    return "+".join(filter(None, map(as_text, value if isinstance(value, list | tuple) else [value])))


def image_file(value: Any) -> tuple[bytes | None, str | None]:
    """Return the contents and the name of an image's file, as far as a cell, or a list of one, holds them.

    Raises InputError: several images; DataError: a cell that is no image.
    """
    value = unpacked(value)
    if isinstance(value, list | tuple):
        value = [one for one in value if not is_gap(one)]
        if value and not isinstance(value[0], str | bytes | Mapping):
            raise DataError("its image is an array of numbers; give a file's name, or its contents")
        if len(value) > 1:
            raise InputError(f"it has {len(value)} images, and a question is about one")
        return image_file(value[0]) if value else (None, None)
    if isinstance(value, Mapping):
        if not {"bytes", "path"} & set(value):
            raise DataError(f"its image is an object with {', '.join(map(str, value))}, without bytes or path")
        data, (encoded, name) = image_file(value.get("bytes"))[0], image_file(value.get("path"))
        return data or encoded, name
    if is_gap(value) or (isinstance(value, bytes | bytearray) and not value):
        return None, None
    if isinstance(value, str) and value[:2] in ("b'", 'b"'):  # bytes as Python writes them
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _from_base64(bytes(value).decode("latin-1")) or bytes(value), None
    if not isinstance(value, str | PurePath):
        raise DataError(f"its image is {shortened(repr(value))}; it has to be a file's name or its contents")
    if re.match("https?://", str(value)):
        raise InputError(f"its image is the address {shortened(str(value))}; fetch it first and give the file's name")
    data = _from_base64(str(value).strip())
    return data, None if data else str(value).removeprefix("file://")


def _from_base64(text: str) -> bytes | None:
    """Return what a text that holds an image in base64 stands for; None for any other text."""
    text = text.partition("base64,")[2] if text.startswith("data:") else text
    if len(text) < 64 or not text.startswith(_BASE64):
        return None
    text = "".join(text.split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
