"""A question as numbers without a model: hashed n-grams with TF-IDF weights and a truncated SVD, and a few counts.

Each row is computed from its own question alone, in one order of sums, so that a question has the same bits alone, in a
batch and in another process. Shapes: S questions, H columns of hashes for words and as many for characters, U columns
that training questions use, C components.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

SMALLEST = 1e-3  # share of the largest singular value; what lies below is rounding, and noise on new questions
ASKS = ("what", "which", "who", "where", "when", "why", "how", "how many", "is|are|was|were|do|does|did|has|have|can")
_ASKS = [re.compile(rf"\b(?:{word})\b", re.IGNORECASE) for word in ASKS]
_WORD, _NUMBER = re.compile(r"\w+"), re.compile(r"\d+")
_OPTION = re.compile(r"(?:^|\s)\(?[A-H][).:]\s")
NUM_COUNTS = 6 + len(ASKS)


@dataclass(frozen=True)
class NgramKind:
    """Which n-grams of a question are hashed into how many columns; shortest and longest of words and of characters."""

    hashed: int = 2**14
    words: tuple[int, int] = (1, 2)
    characters: tuple[int, int] = (2, 4)

    def counts(self, texts: Sequence[str]) -> Any:
        """Count n-grams, sparse float32 ``[S, 2H]``: those of words, then those of characters."""
        from scipy.sparse import hstack

        return hstack([hashing.transform(texts) for hashing in _hashings(self)], format="csr")


@cache
def _hashings(kind: NgramKind) -> list[Any]:
    from sklearn.feature_extraction.text import HashingVectorizer

    same = {"n_features": kind.hashed, "norm": None, "alternate_sign": False, "dtype": np.float32}
    return [
        HashingVectorizer(analyzer="word", token_pattern=_WORD.pattern, ngram_range=kind.words, **same),
        HashingVectorizer(analyzer="char_wb", ngram_range=kind.characters, **same),
    ]


@dataclass(frozen=True, eq=False)
class Ngrams:
    """N-grams of the training questions and the main directions in which those questions differ (latent semantics).

    N-grams that no training question has point nowhere, and leave less to the known ones beside them.

    Attributes:
        kind: which n-grams.
        columns: of the 2H columns those that training questions use, ``[U]``, ascending.
        idf: their weights and, last, that of n-grams that no training question has, float32 ``[U + 1]``.
        directions: float32 ``[U, C]``.
    """

    kind: NgramKind
    columns: np.ndarray
    idf: np.ndarray
    directions: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], kind: NgramKind, components: int, seed: int) -> Ngrams:
        """Fit on the training questions; where few of them differ there are fewer components."""
        from sklearn.decomposition import TruncatedSVD

        counts = kind.counts(texts)
        present = np.bincount(counts.indices, minlength=counts.shape[1])
        columns = np.flatnonzero(present)
        questions = np.append(present[columns], 0)
        idf = (np.log((1 + len(texts)) / (1 + questions)) + 1).astype(np.float32)
        found = cls(kind, columns, idf, np.zeros((len(columns), 0), np.float32))
        most = min(components, len(set(texts)), len(columns))
        if not most:
            return found
        with np.errstate(invalid="ignore"):  # equal questions have no variance to explain
            svd = TruncatedSVD(most, random_state=seed).fit(found.weighed(counts))
        kept = svd.singular_values_ > SMALLEST * svd.singular_values_[0]
        return cls(kind, columns, idf, np.ascontiguousarray(svd.components_[kept].T, np.float32))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 ``[S, C]``; a row of zeros for a question without a known n-gram."""
        projected: np.ndarray = self.weighed(self.kind.counts(texts)) @ self.directions
        return projected

    def weighed(self, counts: Any) -> Any:
        """Weigh counts ``[S, 2H]``: (1 + ln count) idf, rows of length 1, sparse float32 ``[S, U]``."""
        from scipy.sparse import csr_matrix

        at = self._position[counts.indices]
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        weights = (1 + np.log(counts.data)) * self.idf[at]
        lengths = np.sqrt(np.bincount(rows, weights * weights, minlength=counts.shape[0]))
        weights, known = (weights / lengths[rows]).astype(np.float32), at >= 0
        return csr_matrix((weights[known], (rows[known], at[known])), shape=(counts.shape[0], len(self.columns)))

    @cached_property
    def _position(self) -> np.ndarray:
        """Where a column stands among those used, int64 ``[2H]``, -1 where it is none of them."""
        position = np.full(2 * self.kind.hashed, -1)
        position[self.columns] = np.arange(len(self.columns))
        return position


def text_counts(text: str) -> list[float]:
    """Count what is simple: length, lines, numbers, options, and what is asked, ``[NUM_COUNTS]``; zeros if empty."""
    numbers = _NUMBER.findall(text)
    sizes = (len(text), len(_WORD.findall(text)), text.count("\n"), len(numbers), len(_OPTION.findall(text)))
    shares = sum(map(len, numbers)) / max(len(text), 1)
    return [*np.log1p(sizes).tolist(), shares, *(float(bool(word.search(text))) for word in _ASKS)]
