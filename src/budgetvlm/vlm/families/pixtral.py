"""Families with a Pixtral vision tower, which sees an image at its own shape: Mistral 3, Pixtral, LightOnOCR.

One crop is `TOKENS_PER_CROP` visual tokens ("tokens_per_crop" in knobs.json sets another number). There is no overview
crop. The controller reads the image at one crop; where the setting shows it at the same size, that is reused.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from budgetvlm.vlm.families.base import Family, Images
from budgetvlm.vlm.families.mrope import TOKENS_PER_CROP
from budgetvlm.vlm.image_layout import ImageLayout


class PixtralImages(Images):
    """Pixels are the whole resized image, ``[1, 3, H, W]``; a mark ends each row of tokens, another the last one."""

    marks: tuple[int, ...]
    pixel_names = ("pixel_values", "image_sizes")

    def prepare(self) -> None:
        config = self.model.config
        self._side = int(config.vision_config.patch_size) * int(getattr(config, "spatial_merge_size", 1))
        self._longest = int(self.processor.size["longest_edge"])
        self._crop_pixels = int(self.knobs.get("tokens_per_crop", TOKENS_PER_CROP)) * self._side**2
        self.most_crops = max(1, self._longest**2 // self._crop_pixels)
        names = [getattr(self.tokenizer, f"image_{end}_token", f"[IMG_{end.upper()}]") for end in ("break", "end")]
        self.marks = tuple(self.tokenizer.convert_tokens_to_ids(names))

    def encode_one(self, pixels: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        size = torch.tensor([pixels.shape[-2:]], device=pixels.device)
        return self.model.model.get_image_features(pixels.to(self.model.dtype), image_sizes=size).pooler_output[0]

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"size": {"longest_edge": self._edge(max_crops)}, "patch_size": self._side}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        rows, columns = self._grid(height, width, max_crops)
        return ImageLayout.of(self.ids(rows, columns), self.placeholder, (rows, columns), (height, width))

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the token ids of an image of these rows and columns of tokens."""
        ends, last = self.marks
        return (*((self.placeholder,) * columns + (ends,)) * (rows - 1), *(self.placeholder,) * columns, last)

    def _edge(self, max_crops: int) -> int:
        """Return the longest side in pixels; at the most crops that of the untouched processor."""
        return self._longest if max_crops >= self.most_crops else math.isqrt(max_crops * self._crop_pixels)

    def _grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return rows and columns of tokens: the image shrunk to the longest side, and then filled up to whole ones."""
        edge = self._edge(max_crops)
        ratio = max(height / edge, width / edge, 1)
        rows, columns = ((max(1, math.floor(side / ratio)) - 1) // self._side + 1 for side in (height, width))
        return rows, columns


class LightOnImages(PixtralImages):
    """No marks between rows."""

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        return (self.placeholder,) * (rows * columns)


class Mistral3(Family):
    name: ClassVar = "Mistral 3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    crop_meaning: ClassVar = f"`longest_edge`: {TOKENS_PER_CROP} visual tokens a crop of a square image"
    images_type: ClassVar[type[PixtralImages]] = PixtralImages


class LightOnOCR(Mistral3):
    name: ClassVar = "LightOnOCR"
    model_types: ClassVar = ("lighton_ocr",)
    images_type: ClassVar = LightOnImages
