"""CIDEr-D of one caption, with the document frequencies of a whole corpus of references.

Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015. Of an image's caption c
and references s_j, over n-grams of n = 1 to 4, g(.) their counts weighted by log(images / images with the n-gram):

    CIDEr-D = 10 / 4  sum_n  mean_j  exp(-(len c - len s_j)^2 / 72)  min(g(c), g(s_j)) . g(s_j) / (|g(c)| |g(s_j)|)

That is 0 to 10; the score here is a tenth of it, so that it lies in 0..1 and ten times the mean is the usual figure.
The usual code also splits words as the Penn Treebank does, in Java; `tokenise` does what of that captions need.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

ORDERS = 4
_SIGMA = 6.0
_WORDS = re.compile(
    r"(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.(?=\s|$)"  # p.m., Mr.
    r"|\d+(?:[,:.]\d+)+"  # 1,000 and 3:30
    r"|[^\W_]+(?:[-./'][^\W_]+)*|[^\w\s]|_+"
)
_PARTS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$|^(can)(?=not$)|^(gon|wan)(?=na$)|^(got)(?=ta$)")
_DROPPED = frozenset("""' " ` . ? ! , : - ;""".split())
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # words, oddly

Gram = tuple[str, ...]


def tokenise(caption: str) -> list[str]:
    """Split a caption into words in lower case, without punctuation; "isn't" is two words, as is "dog's"."""
    words = []
    for word in _WORDS.findall(caption.lower()):
        words += [part for part in _PARTS.split(word) if part]
    return [_BRACKETS.get(word, word) for word in words if word not in _DROPPED]


class Cider:
    """Scores captions against references.

    Args:
        corpus: of each image of the split its references.
    """

    def __init__(self, corpus: Iterable[Sequence[str]]) -> None:
        images = 0
        self._frequency: Counter[Gram] = Counter()
        for references in corpus:
            images += 1
            self._frequency.update({gram for text in references for gram in _counts(tokenise(text))})
        self._log_images = math.log(max(1, images))

    def __call__(self, prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
        """Return a tenth of CIDEr-D, 0 to 1."""
        if not answers:
            return 0.0
        caption = tokenise(prediction)
        given = self._vectors(caption)
        total = 0.0
        for answer in answers:
            reference = tokenise(answer)
            penalty = math.exp(-((_length(caption) - _length(reference)) ** 2) / (2 * _SIGMA**2))
            pairs = zip(given, self._vectors(reference), strict=True)
            total += penalty * sum(_similarity(a, b) for a, b in pairs) / ORDERS
        return min(1.0, total / len(answers))

    def _vectors(self, words: Sequence[str]) -> list[dict[Gram, float]]:
        """Return weighted counts of the n-grams, for each n."""
        vectors: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _counts(words).items():
            idf = self._log_images - math.log(max(1, self._frequency[gram]))
            vectors[len(gram) - 1][gram] = count * idf
        return vectors


def _counts(words: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(words[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(words) - n + 1))


def _length(words: Sequence[str]) -> int:
    """Count bigrams, which is what the usual code compares as lengths."""
    return max(0, len(words) - 1)


def _similarity(given: dict[Gram, float], reference: dict[Gram, float]) -> float:
    """Return the cosine with the caption's weights clipped to the reference's."""
    norm = math.sqrt(sum(v * v for v in given.values()) * sum(v * v for v in reference.values()))
    dot = sum(min(value, reference[gram]) * reference[gram] for gram, value in given.items() if gram in reference)
    return dot / norm if norm else dot
