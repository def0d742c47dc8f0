"""Features of samples from a model: what the controller sees, extracted once.

The image side is encoded once an image, however many questions share it, the language side once a question.
Shapes: S samples, Di and Dl dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from budgetvlm._version import __version__
from budgetvlm.engines.opening import fingerprint_of, open_model
from budgetvlm.errors import ConfigError, KnobSpaceError
from budgetvlm.features import Features
from budgetvlm.profiling.measure.out_of_memory import for_each_batch
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Sample, SplitSample, Task, TaskOptions, load_task
from budgetvlm.vlm import VLM

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """Where tasks and models come from; a parameter, so that other models and tests can bring their own.

    Attributes:
        open_task: data set's name, or its options -> task.
        open_vlm: (model path, device) -> model.
        fingerprint: model path -> digest of model and processor, without opening the model.
    """

    open_task: Callable[[TaskOptions], Task] = load_task
    open_vlm: Callable[[str, str], VLM] = field(default=lambda path, device: open_model(path, device=device))
    fingerprint: Callable[[str], str] = fingerprint_of


def features_of_table(
    table: ProfileTable,
    samples: Sequence[SplitSample],
    model_path: str,
    backend: Backend,
    *,
    device: str,
    batch_size: int,
    metadata: dict[str, Any],
    say: Callable[[str], None],
) -> Features:
    """Open the model that a table is of and extract the features of its samples; see `extract_features`.

    Raises:
        KnobSpaceError: the table has a value of a knob that the model does not know.
    """
    vlm = backend.open_vlm(model_path, device)
    for name, values in table.knob_space.knobs:
        unknown = set(values) - set(vlm.knob_space.values(name))
        if unknown:
            raise KnobSpaceError(
                f"the results have {name} = {', '.join(map(str, sorted(unknown)))}, which {model_path} does "
                f"not know (its space: {vlm.knob_space}). They are of another model; give that model's --model_path."
            )
    metadata = {"budgetvlm": __version__, **metadata}
    return extract_features(vlm, [one.sample for one in samples], batch_size=batch_size, metadata=metadata, say=say)


def extract_features(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    metadata: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Features:
    """Extract the pooled overview crop of each image and the mean of each question's token embeddings.

    ``batch_size``: images held and encoded at once; halved, with a message, whenever memory runs out. Raises
    ConfigError: ``batch_size`` is below 1, or one image alone does not fit into memory; DataError: a feature is not
    finite.
    """
    by_image = {sample.content or sample.image_id: sample for sample in samples}
    by_question = dict.fromkeys(sample.question for sample in samples)
    images = in_batches(list(by_image.values()), partial(_image_features, vlm), batch_size, "image features", say)
    questions = in_batches(
        list(by_question),
        lambda texts: np.stack([vlm.question_feature(text) for text in texts]),
        batch_size,
        "language features",
        say,
    )
    image_row = {name: row for row, name in enumerate(by_image)}
    question_row = {text: row for row, text in enumerate(by_question)}
    return Features(
        tuple(sample.sample_id for sample in samples),
        images[[image_row[sample.content or sample.image_id] for sample in samples]],
        questions[[question_row[sample.question] for sample in samples]],
        metadata or {},
    )


def in_batches(
    items: Sequence[T],
    encode: Callable[[Sequence[T]], np.ndarray],
    batch_size: int,
    name: str,
    say: Callable[[str], None] = print,
) -> np.ndarray:
    """Encode all items ``[n] -> [n, D]``. Raises ConfigError: ``batch_size`` is below 1, or one item is too large."""
    if batch_size < 1:
        raise ConfigError(f"feature_batch_size={batch_size} cannot work; it has to be 1 at least")
    parts: list[np.ndarray] = []
    with tqdm(total=len(items), desc=name, unit="sample", mininterval=0.5) as bar:
        for part in for_each_batch(items, batch_size, lambda batch, size: [encode(batch)], say):
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts)


def _image_features(vlm: VLM, samples: Sequence[Sample]) -> np.ndarray:
    """Return ``[n, Di]``, float32."""
    images = [sample.load_image() for sample in samples]
    encode_overviews = getattr(vlm, "encode_overviews", None)  # not every model can encode several in one pass
    overviews = encode_overviews(images) if encode_overviews else [vlm.encode_overview(image) for image in images]
    return np.stack([overview.feature for overview in overviews])
