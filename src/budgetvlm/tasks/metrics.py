"""Scores of one answer against its references, 0 to 1, as the authors of the data sets take them.

All but `cider` are functions ``(prediction, answers, options) -> float``, in `METRICS` by name. Each is compared with
an independent implementation on more than a thousand cases (tests/test_metrics.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal

from budgetvlm.tasks.answers import normalise_answer
from budgetvlm.tasks.choices import open_answer, parse_choice

Metric = Callable[[str, Sequence[str], Sequence[str]], float]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
# marks that are no punctuation: between digits, and a sign or a point before a number (with or without a currency)
_MARKS_OF_NUMBERS = re.compile(
    r"(?<=\d)[.,:/-](?=\d)|(?<!\S)[-+.](?=[$€£]?\.?\d)|(?<=[$€£+-])[-+.](?=\d)|(?<=\de)[-+](?=\d)"
)
_GROUPS_OF_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PUNCTUATION = frozenset(string.punctuation)
_PLAIN_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)?(?:\.\d+)?(?:(?<=\d)e[-+]?\d{1,3})?")


def vqa_accuracy(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return min(1, matches / 3), averaged over all ways to leave one annotator's answer out (VQA, TextVQA, OK-VQA).

    Ten annotators are usual. With n below four the divisor is n - 1, the number of others, and a single answer
    is simply to be matched. What the normalisation leaves nothing of ("?") is compared as it is: otherwise an empty
    answer would be right.
    """
    given = _normal(prediction)
    matches = [_normal(answer) == given for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total, needed = sum(matches), min(3, len(matches) - 1)
    return sum(min(1.0, (total - match) / needed) for match in matches) / len(matches)


def _normal(text: str) -> str:
    return normalise_answer(text) or text.strip().lower()


def anls(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity (Biten et al., ICCV 2019) to the nearest reference; below 0.5 it is 0.

    As the evaluation server of DocVQA and ST-VQA, but for runs of blanks. There they count as length and not as edits,
    so that blanks behind a wrong answer make it a better one; here they are one blank, and none at the ends.
    """
    best = max((_similarity(prediction, answer) for answer in answers), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    given, wanted = " ".join(prediction.split()), " ".join(answer.split())
    length = max(len(given.upper()), len(wanted.upper()))
    return 1.0 - levenshtein(given.lower(), wanted.lower()) / length if length else 1.0


def levenshtein(first: str, second: str) -> int:
    """Return the fewest insertions, deletions and replacements of characters that make one text of the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def relaxed_accuracy(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return 1 for a number within 5% of a reference, or for the same text (Masry et al., "ChartQA", ACL 2022)."""
    return float(any(_relaxed_match(prediction.strip(), answer.strip()) for answer in answers))


def _relaxed_match(prediction: str, answer: str) -> bool:
    given, wanted = _number(prediction), _number(answer)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def multiple_choice(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return 1 for the right letter (see `choices.parse_choice`); without options a question is open, as in MMMU."""
    if not options:
        return open_answer(prediction, answers)
    return float(parse_choice(prediction, options) in answers)


def exact_match(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return 1 for the same text but for case, punctuation and blanks at the ends, or for the same number.

    Marks of a number are no punctuation: 1.5 is not 15, -5 not 5, 3:30 not 330, 1e-5 not 1e5. 1,240 is 1240, 3.0 is 3.
    """
    given = _plain(prediction)
    return float(any(_plain(answer) == given for answer in answers))


def _plain(text: str) -> str | Decimal:
    """Return a number's value, or a text in lower case without punctuation; one of punctuation alone as it is."""
    text = text.lower().replace("\N{MINUS SIGN}", "-").strip()
    text = _GROUPS_OF_DIGITS.sub(lambda found: found[0].replace(",", ""), text)
    kept = {found.start() for found in _MARKS_OF_NUMBERS.finditer(text)}
    plain = "".join(mark for at, mark in enumerate(text) if mark not in _PUNCTUATION or at in kept).strip()
    if _PLAIN_NUMBER.fullmatch(plain) and any(map(str.isdigit, plain)):
        return Decimal(plain)
    return plain or text


def yes_no(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return 1 for the right one of yes and no, as the authors of POPE read answers (Li et al., EMNLP 2023).

    "No", "no" or "not" in the first sentence is a no, all else a yes; only an empty answer, which their code takes
    for a yes, is wrong. References are "yes" or "no".
    """
    if not prediction.strip():
        return 0.0
    words = prediction.split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "no", "not"} & set(words) else "yes"
    return float(said in {answer.strip().lower() for answer in answers})


METRICS: dict[str, Metric] = {
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "multiple_choice": multiple_choice,
    "exact_match": exact_match,
    "yes_no": yes_no,
}
