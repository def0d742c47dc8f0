"""What features made from text are worth, against TF-IDF with logistic regression, on tables of real models' answers.

    python benchmarks/cheap_features.py --tables DIR [--components 16 32 64] [--folds 5]

The tables are those of benchmarks/outside_tables.py. Each is cut into folds by group, and nothing is fitted on a fold's
test samples. Printed, as means over the folds: log loss of the predicted accuracies, and the accuracy of the best
setting at a price by these predictions, minus that of the best blind mix, at mean budgets in the middle of the range.
Then: how long fitting takes, and one question.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.outside_tables import MIDDLE, OutsideTable
from budgetvlm.features import Features
from budgetvlm.features.cheap import CheapFeatures, CheapOptions
from budgetvlm.policies.predictor import PredictorConfig, fit_predictors
from budgetvlm.table import ProfileTable

SEEDS = (0, 1, 2)
Predict = Callable[[ProfileTable, Sequence[str]], np.ndarray]  # a table with splits, its texts -> [test samples, K]


def tfidf(table: ProfileTable, texts: Sequence[str]) -> np.ndarray:
    """Words and pairs of words, one logistic regression for each setting."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows, test = table.rows_of("train"), table.rows_of("test")
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    known = vectoriser.fit_transform([texts[row] for row in rows])
    asked = vectoriser.transform([texts[row] for row in test])
    right = table.accuracy[rows] >= 0.5
    columns = [LogisticRegression(max_iter=300).fit(known, column).predict_proba(asked)[:, 1] for column in right.T]
    return np.stack(columns, axis=1)


def cheap(components: int | None) -> Predict:
    """Cheap features and the mean of three of the package's own predictors."""

    def predict(table: ProfileTable, texts: Sequence[str]) -> np.ndarray:
        options = CheapOptions() if components is None else CheapOptions(components=components)
        extractor = CheapFeatures.fit(texts, rows=table.rows_of("train"), options=options)
        features = extractor(texts, sample_ids=table.sample_ids)
        sides: list[ProfileTable | Features] = []
        for side in ("train", "validation"):
            part = table.subset(side)
            sides += [part, features.aligned(part.sample_ids)]
        test = features.aligned(table.subset("test").sample_ids)
        fitted = fit_predictors(*sides, PredictorConfig(), SEEDS)
        return np.mean([policy.predict(test.image, test.language) for policy in fitted], axis=0)

    return predict


def measure(table: ProfileTable, predicted: np.ndarray) -> tuple[float, float]:
    """Log loss, and accuracy above the best blind mix, which here is picked on the test samples themselves."""
    test, cost = table.subset("test"), np.nanmean(table.subset("train").latency_ms, axis=0)
    p, right = predicted.clip(1e-3, 1 - 1e-3), test.accuracy
    loss = -np.mean(right * np.log(p) + (1 - right) * np.log1p(-p))
    gains = []
    for share in MIDDLE:
        budget = cost.min() + share * (cost.max() - cost.min())
        chosen = _at_mean(predicted, cost, budget)
        gains.append(right[np.arange(len(right)), chosen].mean() - _best_mix(cost, right.mean(axis=0), budget))
    return float(loss), float(np.mean(gains))


def _at_mean(predicted: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The choices at the smallest price whose mean cost is within a budget, ``[S]``."""
    prices = np.concatenate([[0.0], np.geomspace(1e-4, 100, 400)])
    for price in prices:
        chosen = (predicted - price * cost / cost.max()).argmax(axis=1)
        if cost[chosen].mean() <= budget:
            break
    return chosen


def _best_mix(cost: np.ndarray, accuracy: np.ndarray, budget: float) -> float:
    """The most accurate mix of two settings of this mean cost."""
    cheaper, apart = cost[:, None] <= budget, np.maximum(cost[None] - cost[:, None], 1e-12)
    share = np.where(cost[None] > budget, (budget - cost[:, None]) / apart, 0.0)
    return float(np.where(cheaper, accuracy[:, None] + share * (accuracy[None] - accuracy[:, None]), -1).max())


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each table and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="tables, by name (default: all)")
    parser.add_argument("--components", type=int, nargs="*", default=[], metavar="N", help="beside the default")
    parser.add_argument("--folds", type=int, default=5, metavar="N")
    args = parser.parse_args(argv)
    ways: dict[str, Predict] = {"TF-IDF, logistic": tfidf, "cheap, predictor": cheap(None)}
    ways |= {f"cheap with {number}": cheap(number) for number in args.components}
    for path in sorted(args.tables.glob("*.npz")):
        if path.stem == "frugalml" or (args.only and path.stem not in args.only):
            continue
        outside = OutsideTable.load(path)
        folds = [outside.fold(number, args.folds)[0] for number in range(args.folds)]
        for name, predict in ways.items():
            loss, gain = np.mean([measure(fold, predict(fold, outside.texts)) for fold in folds], axis=0)
            print(f"{path.stem:22s} {name:20s} log loss {loss:.4f}  over the best mix {100 * gain:+.2f}", flush=True)
        print(f"{path.stem:22s} {_times(outside.texts)}", flush=True)
    return 0


def _times(texts: Sequence[str]) -> str:
    begun = time.perf_counter()
    extractor = CheapFeatures.fit(texts)
    fitted = time.perf_counter() - begun
    each = []
    for text in texts[:300]:
        begun = time.perf_counter()
        extractor([text])
        each.append(time.perf_counter() - begun)
    return f"fitted on {len(texts)} questions in {fitted:.1f} s; one question {1000 * np.median(each):.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
