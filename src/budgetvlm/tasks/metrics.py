"""Scores of one answer against its references, 0 to 1, as the authors of the data sets take them.

All but `cider` are functions ``(prediction, answers, options) -> float``, in `METRICS` by name. Each is compared with
an independent implementation on more than a thousand cases (tests/test_metrics.py).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from budgetvlm.tasks.answers import normalise_answer
from budgetvlm.tasks.choices import open_answer, parse_choice

Metric = Callable[[str, Sequence[str], Sequence[str]], float]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqa_accuracy(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return min(1, matches / 3), averaged over all ways to leave one annotator's answer out (VQA, TextVQA, OK-VQA).

    Ten annotators are usual. With n below four the divisor is n - 1, the number of others, and a single answer
    is simply to be matched.
    """
    given = normalise_answer(prediction)
    matches = [normalise_answer(answer) == given for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    total, needed = sum(matches), min(3, len(matches) - 1)
    return sum(min(1.0, (total - match) / needed) for match in matches) / len(matches)


def anls(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity (Biten et al., ICCV 2019) to the nearest reference; below 0.5 it is 0.

    As the evaluation server of DocVQA and ST-VQA: blanks and case do not count as edits, but blanks count as length.
    """
    best = max((_similarity(prediction, answer) for answer in answers), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(prediction.upper()), len(answer.upper()))
    edits = levenshtein(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
    return 1.0 - edits / length if length else 1.0


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
    """Return 1 for the same text but for case, punctuation and blanks at the ends."""
    given = _plain(prediction)
    return float(any(_plain(answer) == given for answer in answers))


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION).strip()


def yes_no(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Return 1 for the right one of yes and no, as the authors of POPE read answers (Li et al., EMNLP 2023).

    "No", "no" or "not" in the first sentence is a no, all else a yes; only an empty answer, which their code takes
    for a yes, is wrong.
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
