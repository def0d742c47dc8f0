"""Features for tables that bring none: from the question's text and the image, without a model.

    extractor = CheapFeatures.fit(questions, images, rows=training_rows)
    features = extractor(questions, images)  # and later the same for a single request: extractor([question], [image])

What is fitted (weights of n-grams, main directions of text and image) is fitted on the training rows alone.
Shapes: S samples, Dl language dimensions, Di image dimensions.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import read_json
from budgetvlm.errors import BudgetVLMWarning, ConfigError, DataError, InputError
from budgetvlm.features.arrays import Features
from budgetvlm.features.image_statistics import NUM_MEASURES, NUM_STATISTICS, THUMBNAIL, image_statistics
from budgetvlm.features.text_statistics import NgramKind, Ngrams, text_counts

SCHEMA_VERSION = 1
EXTRACTOR = "extractor.json"  # beside a controller that was trained on such features


@dataclass(frozen=True)
class CheapOptions:
    """What is computed; a ConfigError names what cannot be.

    Attributes:
        components: of the n-grams, at most.
        shades: components of the grey thumbnail, at most.
        hashed: columns of hashes, for n-grams of words and of characters each.
        longest: characters of a question that are read; the rest costs nothing and counts for nothing.
        seed: of the truncated SVD.
    """

    components: int = 64
    shades: int = 8
    hashed: int = 2**14
    longest: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        small = [f"{name}={value}" for name, value in asdict(self).items() if name != "seed" and value < 1]
        if small:
            raise ConfigError(f"cheap features cannot be made with {', '.join(small)}; give 1 or more")


@dataclass(frozen=True, eq=False)
class CheapFeatures:
    """A fitted extractor; called with questions and images it makes their features.

    Attributes:
        options: as it was fitted.
        ngrams: of the training questions.
        shades: mean ``[1 + C, THUMBNAIL**2]`` of the thumbnails, then their main directions; None without images.
    """

    options: CheapOptions
    ngrams: Ngrams
    shades: np.ndarray | None

    @classmethod
    def fit(
        cls,
        texts: Sequence[str | None],
        images: Sequence[Any] | np.ndarray | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        options: CheapOptions | None = None,
    ) -> CheapFeatures:
        """Fit on the training rows; nothing of the others is looked at.

        Args:
            texts: the questions ``[S]``; None and NaN count as empty.
            images: None, or files, their contents or PIL images ``[S]``, or what `statistics_of` made of them.
            rows: numbers (or a mask) of the training rows; None for all.

        Raises:
            InputError: a question that is no text, an image that is missing or cannot be read; the row is named.
            ConfigError: there are no training rows.
        """
        options = options or CheapOptions()
        _require_lists(texts, images)
        numbers = np.arange(len(texts))[slice(None) if rows is None else np.asarray(rows, None if len(rows) else int)]
        if not len(numbers):
            raise ConfigError("there are no training rows to fit cheap features on; give at least one")
        known = [_text(texts[row], int(row), options.longest) for row in numbers]
        if images is None and len(set(known)) == 1:
            warnings.warn(
                f"all {len(known)} training questions are {'empty' if known == [''] * len(known) else 'equal'}, so "
                "their features say nothing and a controller cannot tell requests apart; name another column",
                BudgetVLMWarning,
                stacklevel=2,
            )
        ngrams = Ngrams.fit(known, NgramKind(options.hashed), options.components, options.seed)
        return cls(options, ngrams, None if images is None else _directions(_taken(images, numbers), options.shades))

    def __call__(
        self,
        texts: Sequence[str | None],
        images: Sequence[Any] | np.ndarray | None = None,
        sample_ids: Sequence[str] | None = None,
    ) -> Features:
        """Make features of questions and images; an empty question has zeros, without images Di is one zero.

        ``sample_ids``: None numbers them. Raises InputError as `fit`, or images where the extractor knows none and the
        other way round.
        """
        _require_lists(texts, images)
        if (images is None) != (self.shades is None):
            raise InputError(
                f"these features were fitted {'without' if self.shades is None else 'with'} images and are asked for "
                f"{'without' if images is None else 'with'}; give the same, or fit them again"
            )
        known = [_text(text, row, self.options.longest) for row, text in enumerate(texts)]
        image = np.zeros((len(known), 1), np.float32)
        if images is not None and self.shades is not None:
            image = _with_directions(_taken(images, np.arange(len(known))), self.shades)
        return Features(
            tuple(sample_ids or map(str, range(len(known)))), image, self._language(known), {"made_by": __name__}
        )

    def of_image(self, image: Any) -> np.ndarray:
        """Make the feature of one image as in a call, float32 ``[Di]``. Raises InputError."""
        if self.shades is None:
            return np.zeros(1, np.float32)
        found: np.ndarray = _with_directions(_taken([image], np.arange(1)), self.shades)[0]
        return found

    def of_question(self, text: str) -> np.ndarray:
        """Make the feature of one question as in a call, float32 ``[Dl]``."""
        return self._language([_text(text, 0, self.options.longest)])[0]

    def _language(self, texts: Sequence[str]) -> np.ndarray:
        return np.hstack([np.array([text_counts(text) for text in texts], np.float32), self.ngrams(texts)])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able document; arrays as base64 of their bytes."""
        arrays = {"columns": self.ngrams.columns, "idf": self.ngrams.idf, "directions": self.ngrams.directions}
        arrays |= {} if self.shades is None else {"shades": self.shades}
        return {
            "schema_version": SCHEMA_VERSION,
            "options": asdict(self.options),
            "arrays": {name: _packed(array) for name, array in arrays.items()},
        }

    @classmethod
    def from_dict(cls, document: Any) -> CheapFeatures:
        """Return the extractor of a `to_dict` document. Raises DataError: it is none, or of another version."""
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != SCHEMA_VERSION:
            raise DataError(
                f"an extractor of schema version {found}; this version reads {SCHEMA_VERSION}. Fit it again."
            )
        try:
            options = CheapOptions(**document["options"])
            arrays = {name: _unpacked(packed) for name, packed in document["arrays"].items()}
            ngrams = Ngrams(NgramKind(options.hashed), arrays["columns"], arrays["idf"], arrays["directions"])
            _require_shapes(ngrams, arrays.get("shades"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"an extractor that cannot be read ({error}). Fit it again.") from None
        return cls(options, ngrams, arrays.get("shades"))


def load(checkpoint: str | Path) -> CheapFeatures:
    """Return the extractor that lies beside a controller: `train` puts it there. Raises DataError: there is none."""
    path = extractor_file(checkpoint)
    try:
        document = read_json(path)
        if isinstance(document, dict) and "encoder" in document:
            raise DataError("an encoder made these features; open it with budgetvlm.engines.encoders.load")
        return CheapFeatures.from_dict(document)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def extractor_file(checkpoint: str | Path) -> Path:
    """Return where the extractor of a controller lies; ``checkpoint``: its directory or a file in it."""
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent) / EXTRACTOR


def _require_shapes(ngrams: Ngrams, shades: np.ndarray | None) -> None:
    """Raise ValueError for arrays that do not fit each other, or whose numbers are not finite."""
    columns, used = ngrams.columns, len(ngrams.columns)
    fits = columns.ndim == 1 and columns.dtype.kind == "i" and ngrams.idf.shape == (used + 1,)
    fits &= ngrams.directions.ndim == 2 and len(ngrams.directions) == used
    fits &= shades is None or (shades.ndim == 2 and len(shades) > 0 and shades.shape[1] == THUMBNAIL**2)
    if not fits or (used and not 0 <= columns.min() <= columns.max() < 2 * ngrams.kind.hashed):
        raise ValueError("its arrays do not fit each other")
    arrays = [ngrams.idf, ngrams.directions, *([] if shades is None else [shades])]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("it has numbers that are not finite")


def statistics_of(images: Iterable[Any]) -> np.ndarray:
    """Measure images once, for `CheapFeatures.fit` and for calling it, float32 ``[S, NUM_STATISTICS]``."""
    measured = [_statistics(image, row) for row, image in enumerate(images)]
    return np.array(measured, np.float32).reshape(-1, NUM_STATISTICS)


def _require_lists(texts: Sequence[Any], images: Sequence[Any] | np.ndarray | None) -> None:
    if isinstance(texts, str):
        raise InputError(f"a list of questions is needed; given the text {texts!r}. Put it in a list.")
    if not len(texts):
        raise InputError("there are no questions to make features of; give at least one")
    if images is not None and len(images) != len(texts):
        raise InputError(f"{len(texts)} questions but {len(images)} images; give one image for every question")


def _text(text: Any, row: int, longest: int) -> str:
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return ""
    if not isinstance(text, str):
        raise InputError(f"question {row} is {text!r}, which is no text; give a string, or None where there is none")
    return text[:longest].encode(errors="replace").decode()  # a half of a surrogate pair is no character


def _taken(images: Sequence[Any] | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the statistics of some images, float32 ``[rows, NUM_STATISTICS]``."""
    if isinstance(images, np.ndarray) and images.dtype == np.float32:
        return images[rows]
    return np.stack([_statistics(images[row], int(row)) for row in rows])


def _statistics(image: Any, row: int) -> np.ndarray:
    if image is None:
        raise InputError(f"image {row} is missing; give one for every question, or none at all")
    try:
        return image_statistics(image)
    except InputError as error:
        raise InputError(f"image {row}: {error}") from None


def _directions(statistics: np.ndarray, most: int) -> np.ndarray:
    """Return the thumbnails' mean and main directions, float32 ``[1 + C, THUMBNAIL**2]``."""
    thumbnails = statistics[:, NUM_MEASURES:].astype(np.float64)
    mean = thumbnails.mean(axis=0)
    _, sizes, directions = np.linalg.svd(thumbnails - mean, full_matrices=False)
    kept = directions[:most][sizes[:most] > 1e-3 * max(sizes[0], 1e-9)]
    return np.vstack([mean, kept]).astype(np.float32)


def _with_directions(statistics: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """Put measures and the thumbnail's components side by side; row by row, so that each has the same bits alone."""
    centred = statistics[:, NUM_MEASURES:] - shades[0]
    components = [(shades[1:] * row).sum(axis=1) for row in centred]
    return np.hstack([statistics[:, :NUM_MEASURES], np.array(components, np.float32).reshape(len(statistics), -1)])


def _packed(array: np.ndarray) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": little.dtype.str, "shape": array.shape, "data": base64.b64encode(little.tobytes()).decode("ascii")}


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["dtype"]))
    return flat.reshape(packed["shape"])
