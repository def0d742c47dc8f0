"""Features of samples from a model: what the controller sees, extracted once.

The image side is encoded once an image, however many questions share it, the language side once a question.
Shapes: S samples, Di and Dl dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError, DataError, KnobSpaceError
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.measure.out_of_memory import halved
from budgetvlm.table import ProfileTable, first_few
from budgetvlm.tasks import Sample, Task
from budgetvlm.vlm import VLM, Overview

FINGERPRINTED = (".json", ".safetensors", ".model", ".txt", ".jinja")


@runtime_checkable
class EncodesBatches(Protocol):
    """A `VLM` that can also encode the overview crops of several images in one pass."""

    def encode_overviews(self, images: Sequence[Image.Image]) -> list[Overview]:
        """The same as `VLM.encode_overview` one by one."""
        ...


@dataclass(frozen=True)
class Located:
    """A sample and the split of the task that it comes from."""

    sample: Sample
    split: str


def locate(task: Task, sample_ids: Sequence[str], splits: Iterable[str]) -> list[Located]:
    """Find samples by id in some splits of a task; the order is that of ``sample_ids``.

    Raises:
        DataError: an id is in none of the splits, or in two.
        ConfigError: there is no such split.
    """
    wanted, found = set(sample_ids), dict[str, Located]()
    splits = list(splits)
    for split in splits:
        for sample in task.samples(split):
            if sample.sample_id not in wanted:
                continue
            if sample.sample_id in found:
                other = found[sample.sample_id].split
                raise DataError(
                    f"sample {sample.sample_id} of {task.name} is in split {other} and in {split}, so that its "
                    "results cannot be told apart. Profile one split at a time."
                )
            found[sample.sample_id] = Located(sample, split)
    missing = wanted - found.keys()
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} profiled samples are not in {task.name} ({', '.join(splits)}): "
            f"{first_few(missing)}. The results are of another data set or version; profile this one."
        )
    return [found[name] for name in sample_ids]


def locate_by_index(task: Task, numbers: Sequence[int], split: str, world_size: int = 1) -> dict[int, Located]:
    """The samples with these numbers, a number being the place in the split, from 0 on.

    Args:
        world_size: ranks that shared the samples; to be of equal length they may have gone round to the first samples
            again, whose numbers, from the split's size on, are then left out of the result.

    Raises:
        DataError: a number beyond the split.
        ConfigError: there is no such split.
    """
    wanted, size = set(numbers), task.num_samples(split)
    first = islice(task.samples(split), max(wanted) + 1)
    found = {number: Located(sample, split) for number, sample in enumerate(first) if number in wanted}
    rounded_up = -(-size // world_size) * world_size
    beyond = sorted(n for n in wanted - found.keys() if not size <= n < rounded_up)
    if beyond:
        raise DataError(
            f"sample_id {beyond[0]} is a number and so an index in the split, but {split} of {task.name} has {size} "
            f"samples, 0 to {size - 1} ({len(beyond)} such ids). The results are of another data set, version or split."
        )
    return found


def with_the_tasks_ids(
    task: Task, table: ProfileTable, split: str, world_size: Any, say: Callable[[str], None]
) -> tuple[ProfileTable, list[Located]]:
    """A table whose sample ids are indices in a split, with the task's ids instead, and where its samples are.

    Raises:
        DataError, ConfigError: see `locate_by_index`.
    """
    numbers = [int(name) for name in table.sample_ids]
    found = locate_by_index(task, numbers, split, world_size if isinstance(world_size, int) else 1)
    rows = [row for row, number in enumerate(numbers) if number in found]
    say(f"the numbers of the samples are taken as their index in {split} of {task.name}")
    if len(rows) < len(numbers):
        say(f"{len(numbers) - len(rows)} samples were repeated to give each rank equally many; left out")
    located = [found[numbers[row]] for row in rows]
    return replace(table.subset(rows), sample_ids=tuple(place.sample.sample_id for place in located)), located


def require_known_values(space: KnobSpace, vlm: VLM, model_path: str) -> None:
    """Raise `KnobSpaceError` where results have a value of a knob that the model does not know."""
    for name, values in space.knobs:
        unknown = set(values) - set(vlm.knob_space.values(name))
        if unknown:
            raise KnobSpaceError(
                f"the results have {name} = {', '.join(map(str, sorted(unknown)))}, which {model_path} does "
                f"not know (its space: {vlm.knob_space}). They are of another model; give that model's --model_path."
            )


def extract_features(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    metadata: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Features:
    """Image feature: the pooled overview crop; language feature: the mean of the question's token embeddings.

    Args:
        batch_size: images held and encoded at once; halved, with a message, whenever memory runs out.

    Raises:
        ConfigError: ``batch_size`` is below 1, or one image alone does not fit into memory.
        DataError: a feature is not finite.
    """
    by_image = {sample.image_id: sample for sample in samples}
    by_question = {sample.question: sample for sample in samples}
    images = in_batches(
        list(by_image.values()), lambda batch: _image_features(vlm, batch), batch_size, "image features", say
    )
    questions = in_batches(
        list(by_question.values()), lambda batch: _question_features(vlm, batch), batch_size, "language features", say
    )
    image_row = {name: row for row, name in enumerate(by_image)}
    question_row = {text: row for row, text in enumerate(by_question)}
    return Features(
        tuple(sample.sample_id for sample in samples),
        images[[image_row[sample.image_id] for sample in samples]],
        questions[[question_row[sample.question] for sample in samples]],
        metadata or {},
    )


def in_batches(
    samples: Sequence[Sample],
    encode: Callable[[Sequence[Sample]], np.ndarray],
    batch_size: int,
    name: str,
    say: Callable[[str], None] = print,
) -> np.ndarray:
    """``encode`` over all samples ``[n] -> [n, D]``, in batches that are halved whenever memory runs out.

    Raises:
        ConfigError: ``batch_size`` is below 1, or a single sample does not fit into memory.
    """
    if batch_size < 1:
        raise ConfigError(f"feature_batch_size={batch_size} cannot work; it has to be 1 at least")
    parts: list[np.ndarray] = []
    done = 0
    with tqdm(total=len(samples), desc=name, unit="sample", mininterval=0.5) as bar:
        while done < len(samples):
            batch = samples[done : done + batch_size]
            try:
                parts.append(encode(batch))
            except (MemoryError, RuntimeError) as error:
                batch_size = halved(batch_size, error, say)
                continue
            done += len(batch)
            bar.update(len(batch))
    return np.concatenate(parts)


def model_fingerprint(model_directory: Path) -> str:
    """A short digest of the files that make features what they are: configuration, processor, tokenizer, weights.

    Of a file above 32 MB the size and both ends count, so that large weights cost no time.
    """
    digest = hashlib.sha256()
    for path in sorted(model_directory.iterdir()):
        if path.suffix in FINGERPRINTED and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 24))
                file.seek(max(file.tell(), size - (1 << 24)))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _image_features(vlm: VLM, samples: Sequence[Sample]) -> np.ndarray:
    """``[n, Di]``, float32."""
    if isinstance(vlm, EncodesBatches):
        overviews = vlm.encode_overviews([sample.load_image() for sample in samples])
    else:
        overviews = [vlm.encode_overview(sample.load_image()) for sample in samples]
    return np.stack([overview.feature for overview in overviews])


def _question_features(vlm: VLM, samples: Sequence[Sample]) -> np.ndarray:
    """``[n, Dl]``, float32."""
    return np.stack([vlm.question_feature(sample.question) for sample in samples])
