"""Features made from questions and images, for a table that brings none and for models that are served elsewhere.

What is costly (an image's statistics, an encoder's vectors) is kept beside the output by a digest of what it was made
from, so that it is computed once. Shapes: S samples, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import open_image
from budgetvlm._version import __version__
from budgetvlm.engines.encoders import Encoder
from budgetvlm.errors import ConfigError, DataError, InputError
from budgetvlm.features import Features, cheap
from budgetvlm.profiling.prepare.feature_extraction import in_batches
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SplitSample

Say = Callable[[str], None]


@dataclass(frozen=True)
class MakeOptions:
    """How features are made.

    Attributes:
        encoder: a text or image encoder of Transformers whose vectors replace the cheap ones of its side; None: none.
        image_dir: where images lie that are named relatively; without a column of images, those of the image ids.
        beside: the folder that the table came from: relative names are also looked for there.
        batch_size: images or questions at once. device: of the encoder.
    """

    encoder: str | None = None
    image_dir: Path | None = None
    beside: Path | None = None
    batch_size: int = 32
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that is opened when it is needed: equal keys mean equal images."""

    key: str
    where: str
    load: Callable[[], Any]

    def opened(self) -> Any:
        """Return the decoded image. Raises InputError, naming whose image it is."""
        try:
            return open_image(self.load())
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What features are made from, a row a sample: questions, and images or None."""

    questions: Sequence[str]
    images: Sequence[Picture] | None


def inputs_of_samples(dataset_name: str, samples: Sequence[SplitSample]) -> Inputs:
    """Return the questions and images of a data set's samples."""
    own = [one.sample for one in samples]
    images = [Picture(f"{dataset_name}/{s.content or s.image_id}", f"sample {s.sample_id}", s.load_image) for s in own]
    return Inputs([sample.question for sample in own], images)


def made_features(table: ProfileTable, inputs: Inputs, options: MakeOptions, output: Path, say: Say) -> Features:
    """Make the features of a table with splits; what is fitted is fitted on its training rows.

    ``output``: the file beside which vectors are kept. The extractor travels in the metadata, as a document. Raises
    InputError: an image cannot be read; ConfigError: the encoder cannot be opened, or reads what there is not.
    """
    empty = sum(not question.strip() for question in inputs.questions)
    if empty:
        say(f"{empty} of {table.num_samples} questions are empty: their text features are zeros")
    kept = KeptVectors(output, options.batch_size, say)
    statistics = None
    if inputs.images is not None:
        statistics = kept.of_images(inputs.images, f"statistics {__version__}", cheap.statistics_of)
    extractor = cheap.CheapFeatures.fit(inputs.questions, statistics, table.rows_of("train"))
    features = extractor(inputs.questions, statistics, table.sample_ids)
    document = extractor.to_dict()
    if options.encoder is not None:
        encoder = Encoder(options.encoder, options.device)
        vectors = _encoded(encoder, inputs, kept)
        image, language = (vectors.get(side, getattr(features, side)) for side in ("image", "language"))
        features = replace(features, image=image, language=language)
        document["encoder"] = {"name": encoder.name, "fingerprint": encoder.fingerprint}
    return replace(features, metadata={**features.metadata, "budgetvlm": __version__, "extractor": document})


def _encoded(encoder: Encoder, inputs: Inputs, kept: KeptVectors) -> dict[str, np.ndarray]:
    """Encode the sides that an encoder reads and that are there. Raises ConfigError: there is none."""
    found = {}
    if "language" in encoder.sides:
        keys = [hashlib.sha256(question.encode(errors="replace")).hexdigest() for question in inputs.questions]
        found["language"] = kept.vectors("language", encoder.fingerprint, keys, inputs.questions, encoder.language)
    if "image" in encoder.sides and inputs.images is not None:
        found["image"] = kept.of_images(inputs.images, encoder.fingerprint, encoder.image)
    if not found:
        raise ConfigError(
            f"--encoder {encoder.name} reads images, and the table names none; give --column image=NAME or --image_dir"
        )
    return found


@dataclass(frozen=True)
class KeptVectors:
    """Vectors that lie beside an output, by who made them and of what.

    Attributes:
        output: the file beside which they lie.
        batch_size: of what is made at once.
        say: takes the lines for the user.
    """

    output: Path
    batch_size: int
    say: Say

    def of_images(self, images: Sequence[Picture], maker: str, encode: Callable[[list[Any]], np.ndarray]) -> np.ndarray:
        """As `vectors`, of images that are opened where they are new."""

        def opened(batch: Sequence[Picture]) -> np.ndarray:
            return encode([one.opened() for one in batch])

        return self.vectors("image", maker, [one.key for one in images], images, opened)

    def vectors(
        self, side: str, maker: str, keys: Sequence[str], items: Sequence[Any],
        encode: Callable[[Sequence[Any]], np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """Return a vector for each item, float32 ``[S, D]``: those that lie there, and new ones of all others.

        ``maker``: what makes the vectors; those of another are left alone. ``keys``: equal for equal items.
        """
        name = f"{side}-{hashlib.sha256(maker.encode()).hexdigest()[:12]}"
        path = self.output.with_suffix(f".{name}.safetensors")
        known = _read_kept(path)
        first = dict(zip(reversed(keys), reversed(items), strict=True))  # a fault is named where it first occurs
        new = {key: first[key] for key in keys if key not in known}
        if new:
            made = in_batches(list(new.values()), encode, self.batch_size, f"{side} features", self.say)
            known |= dict(zip(new, made, strict=True))
            Features(tuple(known), np.stack(list(known.values())), np.zeros((len(known), 1))).save(path)
        return np.stack([known[key] for key in keys])


def _read_kept(path: Path) -> dict[str, np.ndarray]:
    try:
        kept = Features.load(path)
    except DataError:  # there are none, or the file is damaged: they are made anew
        return {}
    return dict(zip(kept.sample_ids, kept.image, strict=True))
