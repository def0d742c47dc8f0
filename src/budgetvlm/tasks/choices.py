"""Free text read as the answer to a multiple-choice or an open question, by the rules of MMMU.

Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark", CVPR 2024, evaluation
code of the benchmark. Where its code finds no option it draws one at random; here such an answer is read further (an
option's letter with a mark behind it, or exactly an option's text), and is wrong if that finds none either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TRIVIAL = frozenset(":,.!?;'")
_KEYWORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def letters(count: int) -> list[str]:
    """Return the names of ``count`` options: A, B, C ..."""
    return [chr(ord("A") + i) for i in range(count)]


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that a response chooses; None where it chooses none.

    In this order: letters in brackets, letters as words of their own, in a response of more than five words the
    options' texts. If several are found, the last one in the response counts.
    """
    text = response
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    names = letters(len(options))
    for shape in ("({})", " {} "):
        found = {text.rfind(shape.format(name)): name for name in names if shape.format(name) in text}
        if found:
            return found[max(found)]
    if len(text.split()) > 5:
        places = [text.lower().rfind(option.lower()) for option in options]
        if max(places, default=-1) >= 0:
            return names[places.index(max(places))]
    return _parse_further(response, options)


def _parse_further(response: str, options: Sequence[str]) -> str | None:
    """Recognise a letter at the start with a mark behind it ("b", "B.", "B) a cat"), or exactly an option's text."""
    plain = response.strip().strip(".").lower()
    texts = [option.strip().strip(".").lower() for option in options]
    if plain and plain in texts:
        return letters(len(options))[texts.index(plain)]
    start = re.match(r"\s*\(?([A-Za-z])(?:[.):,]|\s*$)", response)
    name = start[1].upper() if start else None
    return name if name in letters(len(options)) else None


def open_answer(response: str, answers: Sequence[str]) -> float:
    """Return 1 if a reference is found in the telling parts of a response, or equals a number in them; else 0."""
    golds = [gold for answer in answers for gold in _normalise(answer)]
    for found in _candidates(response):
        if isinstance(found, float):
            if found in golds:
                return 1.0
        elif any(isinstance(gold, str) and gold in found for gold in golds):
            return 1.0
    return 0.0


def _candidates(response: str) -> list[str | float]:
    parts = _telling_parts(response)
    numbers = [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return [value for text in (*parts, *numbers) for value in _normalise(text)]


def _telling_parts(response: str) -> list[str]:
    """Return of each line what comes behind its keywords ("so", "is", "answer" ...), or all where there are none."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    parts = []
    for number, line in enumerate(lines):
        keywords = (*_KEYWORDS, "=") if number == len(lines) - 1 else _KEYWORDS
        tails = [line.split(word)[-1].strip() for word in keywords if word in line]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [response]


def _normalise(text: str) -> list[str | float]:
    """Return a number to two decimals, or the text in lower case; a single letter with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
