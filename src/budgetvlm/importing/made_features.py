"""Features made from questions and images, for a table that brings none.

What is costly (an image's statistics, an encoder's vectors) is kept beside the output by a digest of what it was made
from, so that it is computed once. Shapes: S samples, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import open_image
from budgetvlm._version import __version__
from budgetvlm.errors import ConfigError, DataError, InputError
from budgetvlm.features import Features, cheap
from budgetvlm.importing.flat_tables import INPUTS
from budgetvlm.profiling.prepare.encoders import Encoder
from budgetvlm.profiling.prepare.feature_extraction import in_batches
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SplitSample

Say = Callable[[str], None]
LONGEST_SHOWN = 100  # characters of a name in a message
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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


def inputs_of(table: ProfileTable, samples: Sequence[SplitSample], options: MakeOptions) -> tuple[ProfileTable, Inputs]:
    """Take questions and images of a data set's samples, or out of the table's labels, where reading put them.

    Files of images become the table's ``image_id``. Raises DataError: there is neither, or an image is missing.
    """
    if samples:
        own = [one.sample for one in samples]
        name = table.metadata.get("dataset_name", "")
        images = [Picture(f"{name}/{s.content or s.image_id}", f"sample {s.sample_id}", s.load_image) for s in own]
        return table, Inputs([sample.question for sample in own], images)
    questions, names = (table.groups.get(label) for label in INPUTS)
    groups = {label: held for label, held in table.groups.items() if label not in INPUTS or label == table.unit}
    if names is not None:
        groups.setdefault("image_id", names)
    elif options.image_dir is not None:
        names = groups.get("image_id", table.sample_ids)
    if questions is None and names is None:
        raise DataError(
            "features are made from questions, and no column is called question. Say which one it is with --column "
            "question=NAME (import table; images: --column image=NAME or --image_dir DIR), or name the data set with "
            "--dataset_name"
        )
    pictures = None if names is None else _pictures(table.sample_ids, names, options)
    return replace(table, groups=groups), Inputs(questions or [""] * table.num_samples, pictures)


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


def _pictures(sample_ids: Sequence[str], names: Sequence[str], options: MakeOptions) -> list[Picture]:
    """Find the file of each sample's image. Raises DataError: there is none; the sample and its row are named."""
    folders = [folder for folder in (options.image_dir, options.beside) if folder is not None]
    found: dict[str, tuple[str, Path]] = {}
    pictures = []
    for row, (sample_id, name) in enumerate(zip(sample_ids, names, strict=True)):
        where = f"image of sample {sample_id} (number {row + 1})"
        if name not in found:
            path = next(filter(_is_file, _places(name, folders)), None)
            if path is None:
                shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}… ({len(name)} characters)"
                looked = " or ".join(map(str, folders)) or "the working directory"
                raise DataError(f"{where}: there is no file {shown} in {looked}. Give its folder with --image_dir.")
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest(), path
        key, path = found[name]
        pictures.append(Picture(key, where, partial(Path, path)))
    return pictures


def _places(name: str, folders: Iterable[Path]) -> list[Path]:
    """List where an image may lie: as it is named, or with the ending of a picture."""
    bases = [Path(name), *(folder / name for folder in folders)]
    return [base.with_name(base.name + ending) for base in bases if base.name for ending in ("", *PICTURES)]


def _is_file(path: Path) -> bool:
    """Whether there is such a file; what is too long for a name, such as an image's own bytes as text, is none."""
    try:
        return path.is_file()
    except OSError:
        return False


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
