"""Features from a text or image encoder of Transformers, in place of the cheap ones of that side.

Shapes: B questions or images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from budgetvlm._io import open_image, read_json
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.features.cheap import CheapFeatures, extractor_file
from budgetvlm.vlm.fingerprint import model_fingerprint
from budgetvlm.vlm.loading import model_directory

LONGEST = 512  # tokens of a question that are read at most


class Encoder:
    """A frozen encoder of questions, of images, or (like CLIP) of both.

    Args:
        name: a directory, or a name of the hub's cache.
        device: of torch.

    Raises:
        ConfigError: there is no such encoder, or it encodes neither texts nor images.
    """

    def __init__(self, name: str, device: str = "cpu"):
        from transformers import AutoConfig, AutoModel

        self.name, self.device = name, device
        try:
            self.directory = model_directory(name)
            self.config = AutoConfig.from_pretrained(self.directory)
            model = AutoModel.from_pretrained(self.directory, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:  # a ConfigError too
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--encoder {name} cannot be opened as an encoder of Transformers: {reason}") from None
        both = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
        sees = both or model.main_input_name == "pixel_values"
        if not sees and model.main_input_name != "input_ids":
            raise ConfigError(f"--encoder {name} reads {model.main_input_name}; it has to read texts or images")
        if not both and getattr(self.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model = model.to(device).eval()
        self.sides = (("image",) if sees else ()) + (("language",) if both or not sees else ())
        self._of = {"language": getattr(model, "get_text_features", model), "image": model}
        if both:
            self._of["image"] = model.get_image_features

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weights."""
        return model_fingerprint(self.directory)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.directory)

    @torch.inference_mode()
    def language(self, texts: Sequence[str]) -> np.ndarray:
        """Encode questions, float32 ``[B, D]``; an empty one has zeros."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None) or LONGEST
        longest = min(positions, self._tokenizer.model_max_length, LONGEST)
        # An encoder that is given no mask reads the padding, so all questions get as much as it was trained with.
        padding = "longest" if "attention_mask" in self._tokenizer.model_input_names else "max_length"
        batch = self._tokenizer(
            [text or " " for text in texts], padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        known = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        found = _pooled(self._of["language"](**known), known.get("attention_mask"), self.sides == ("language",))
        filled = torch.tensor([bool(text.strip()) for text in texts], device=found.device)
        vectors: np.ndarray = (found * filled[:, None]).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def image(self, images: Sequence[str | Path | Image.Image]) -> np.ndarray:
        """Encode images, float32 ``[B, D]``. Raises InputError: one cannot be read."""
        opened = [open_image(image) for image in images]
        pixels = self._image_processor(images=opened, return_tensors="pt")["pixel_values"].to(self.device)
        vectors: np.ndarray = _pooled(self._of["image"](pixel_values=pixels), None, False).cpu().numpy()
        return vectors


def _pooled(output: Any, mask: Tensor | None, mean: bool) -> Tensor:
    """Return a vector for each input ``[B, D]``: its own, or (asked for, or without one) the mean of its states."""
    own = getattr(output, "pooler_output", None)
    if own is not None and not mean:
        return own.flatten(1).float()
    states: Tensor = output.last_hidden_state.float()
    if states.ndim == 4:  # channels, rows, columns
        return states.mean(dim=(2, 3))
    weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
    return (states * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


class EncodedFeatures:
    """Cheap features of which an encoder replaces its sides; called like `CheapFeatures`."""

    def __init__(self, cheap: CheapFeatures, encoder: Encoder):
        self.cheap, self.encoder = cheap, encoder

    def __call__(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Features:
        """Make features of questions and images. Raises InputError."""
        features = self.cheap(texts, images)
        given = {"language": texts, "image": images}
        encoders = {side: getattr(self.encoder, side) for side in self.encoder.sides if given[side] is not None}
        return replace(features, **{side: encode(given[side]) for side, encode in encoders.items()})

    def of_image(self, image: Any) -> np.ndarray:
        """Make the feature of one image, float32 ``[Di]``. Raises InputError."""
        encodes = "image" in self.encoder.sides and self.cheap.shades is not None
        return self.encoder.image([image])[0] if encodes else self.cheap.of_image(image)

    def of_question(self, text: str) -> np.ndarray:
        """Make the feature of one question, float32 ``[Dl]``."""
        return self.encoder.language([text])[0] if "language" in self.encoder.sides else self.cheap.of_question(text)


def load(checkpoint: str | Path, device: str = "cpu") -> EncodedFeatures:
    """Return what made the features that a controller was trained on with ``--encoder``.

    Raises DataError: it was trained on others; ConfigError: the encoder is not there, or its weights are others.
    """
    path = extractor_file(checkpoint)
    document = read_json(path)
    made = document.pop("encoder", None) if isinstance(document, dict) else None
    if made is None:
        raise DataError(f"{path} names no encoder; open it with budgetvlm.features.cheap.load")
    if not isinstance(made, dict) or not {"name", "fingerprint"} <= set(made):
        raise DataError(f"{path} names no encoder with its fingerprint ({made!r}). Train again.")
    encoder = Encoder(made["name"], device)
    if encoder.fingerprint != made["fingerprint"]:
        raise ConfigError(
            f"the encoder {made['name']} has other weights ({encoder.fingerprint}) than those that {path} was made "
            f"with ({made['fingerprint']}), so its features mean something else. Give that encoder back its weights."
        )
    return EncodedFeatures(CheapFeatures.from_dict(document), encoder)
