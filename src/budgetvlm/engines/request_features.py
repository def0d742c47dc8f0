"""Features of a request without the model: what made those that a controller was trained on, given to its model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from budgetvlm._io import read_json
from budgetvlm.engines import encoders
from budgetvlm.features import cheap
from budgetvlm.vlm import VLM, Conversation, Overview


class Extractor(Protocol):
    """Makes the features of one request: `CheapFeatures`, or `EncodedFeatures`."""

    def of_image(self, image: Any) -> np.ndarray:
        """Return float32 ``[Di]``."""

    def of_question(self, text: str) -> np.ndarray:
        """Return float32 ``[Dl]``."""


def extractor_beside(checkpoint: Path, device: str = "cpu") -> Extractor | None:
    """Open what made the features of a controller; None: its model did.

    Raises DataError: it is damaged; ConfigError: the encoder is not there, or its weights are others.
    """
    path = cheap.extractor_file(checkpoint)
    if not path.is_file():
        return None
    document = read_json(path)
    encoded = isinstance(document, dict) and "encoder" in document
    return encoders.load(checkpoint, device) if encoded else cheap.load(checkpoint)


def with_features(vlm: VLM, extractor: Extractor | None) -> VLM:
    """Return the model with features by an extractor in place of its own; an engine, which has none, is given it."""
    if extractor is None:
        return vlm
    if hasattr(vlm, "features"):
        vlm.features = extractor
        return vlm
    return cast(VLM, FeaturedModel(vlm, extractor))


class FeaturedModel:
    """A model whose features an extractor makes; that of the image takes part of "preprocess", as the overview does."""

    def __init__(self, vlm: VLM, extractor: Extractor) -> None:
        self._vlm, self._extractor = vlm, extractor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)

    def encode_overview(self, image: Image.Image) -> Overview:
        """Do as the model does, with the extractor's feature."""
        overview, began = self._vlm.encode_overview(image), time.perf_counter()
        feature = self._extractor.of_image(image)
        took_ms = (time.perf_counter() - began) * 1e3
        return overview._replace(feature=feature, preprocess_ms=overview.preprocess_ms + took_ms)

    def question_feature(self, question: str | Conversation) -> np.ndarray:
        """Return the extractor's feature; of a conversation, the last question's."""
        return self._extractor.of_question(question.question if isinstance(question, Conversation) else question)
