"""Llama 4: a canvas of tiles whose shape fits the image best, and behind them the whole image in one tile.

A canvas of one tile stands alone: the image padded to a square. An image that needs more has an overview squeezed into
a square, so that for such an image the features cost one tile at max_crops=1 and nothing elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch.nn.functional import pad

from budgetvlm.vlm.families.base import Dial, Family, TiledImages
from budgetvlm.vlm.families.without_torchvision import InPlace, TileProcessor, cells, least_change, resized, to_pixels
from budgetvlm.vlm.image_layout import ImageLayout

_IMAGE, _PATCH = "<|image|>", "<|patch|>"
_MARKS = ("<|image_start|>", "<|image_end|>", _IMAGE, _PATCH, "<|tile_x_separator|>", "<|tile_y_separator|>")


@dataclass(frozen=True)
class Canvas(TileProcessor):
    """Llama 4's image processor; `largest` tells whether an image may be enlarged to fill its canvas."""

    side: int = 336
    max_patches: int = 16
    largest: bool = False
    title: ClassVar = "Llama 4's image processor"
    keys: ClassVar = {"largest": "resize_to_max_canvas"}

    def grid(self, height: int, width: int, max_patches: int) -> tuple[int, int]:
        """Return the shape of the canvas that shrinks the image least, or else enlarges it least; then the smallest."""
        return least_change(self.side, height, width, max_patches, largest=self.largest)

    def tiles(self, image: Image.Image, max_patches: int) -> torch.Tensor:
        """Cut the canvas row by row, then the overview where there are several tiles ``[n, 3, side, side]``."""
        pixels, (rows, columns) = to_pixels(image), self.grid(image.height, image.width, max_patches)
        height, width = self._size(image.height, image.width, rows, columns)
        small = resized(pixels, height, width, antialias=True)
        whole = pad(small, (0, columns * self.side - width, 0, rows * self.side - height))
        cut = cells(whole, self.side)
        more = [self._squeezed(pixels)] if len(cut) > 1 else []
        return self._normalised(torch.cat([cut, *more]))

    def overview(self, image: Image.Image) -> torch.Tensor:
        """Return the last of `tiles` at the most of them ``[1, 3, side, side]``."""
        if self.grid(image.height, image.width, self.max_patches) == (1, 1):
            return self.tiles(image, self.max_patches)
        return self._normalised(self._squeezed(to_pixels(image)))

    def _squeezed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the whole image in one tile, whatever its shape ``[1, 3, side, side]``."""
        return resized(pixels, self.side, self.side, antialias=True)[None]

    def _size(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
        """Return the image's size on the canvas: its own shape, not enlarged above a tile's side."""
        tall, wide = rows * self.side, columns * self.side
        if not self.largest:
            tall, wide = min(max(height, self.side), tall), min(max(width, self.side), wide)
        if wide / width < tall / height:
            return max(1, min(math.floor(height * (wide / width)), tall)), wide
        return tall, max(1, min(math.floor(width * (tall / height)), wide))

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise in bfloat16, as the model was trained."""
        scaled = pixels.to(torch.bfloat16) * self.rescale_factor
        mean, std = (torch.tensor(v, dtype=torch.bfloat16)[:, None, None] for v in (self.mean, self.std))
        return scaled.sub(mean).div_(std)


class Llama4Images(TiledImages):
    """The canvas first, the overview last; marks between columns, rows and in front of the overview."""

    processor: Canvas

    def prepare(self) -> None:
        vision = self.model.config.vision_config
        pooled = round(1 / vision.pixel_shuffle_ratio**2)
        self._tokens_per_tile = (vision.image_size // vision.patch_size) ** 2 // pooled
        self._marks = self.tokenizer.convert_tokens_to_ids(list(_MARKS))
        self.most_crops = self.processor.max_patches

    def overview(self, image: Image.Image) -> torch.Tensor:
        return self.processor.overview(image)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        pixels = self.all(image, max_crops)
        if len(pixels) > 1 or self.processor.grid(image.height, image.width, self.most_crops) == (1, 1):
            return pixels[:-1]
        return pixels

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.processor.tiles(image, max_crops)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        seen = self.model.vision_model(tiles.to(self.model.dtype)).last_hidden_state
        return self.model.multi_modal_projector(seen)

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": self.all(image, max_crops).to(self.model.dtype)}

    def set_to(self, height: int, width: int, max_crops: int) -> InPlace:
        shapes = {"aspect_ratios": [self.processor.grid(height, width, max_crops)]}
        return InPlace(lambda image: self.plain(image, max_crops) | shapes)

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        rows, columns = self.processor.grid(height, width, max_crops)
        start, end, image, patch, next_column, next_row = self._marks
        tile = [patch] * self._tokens_per_tile
        line = [*[*tile, next_column] * (columns - 1), *tile, next_row]
        ids = (start, *(line * rows if rows * columns > 1 else ()), image, *tile, end)
        return ImageLayout.of(ids, patch, (rows, columns), (height, width))


class Llama4(Family):
    name: ClassVar = "Llama 4"
    model_types: ClassVar = ("llama4",)
    images_type: ClassVar = Llama4Images
    tile_processor: ClassVar = Canvas
    crop_meaning: ClassVar = "`max_patches`: tiles of the canvas beside the overview tile; 1: one padded tile alone"

    def language(self, model: Any) -> Any:
        return model.language_model.model

    def head(self, model: Any) -> Any:
        return model.language_model.lm_head

    def dials(self, model: Any) -> list[Dial]:
        """Return the routers; the layers around them hold the number too and do not read it."""
        return [dial for dial in super().dials(model) if hasattr(dial.owner, "weight")]

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return _IMAGE
