"""Cohere2 Vision and PerceptionLM: the whole image squeezed into a grid of tiles, and an overview beside them.

    max_crops          `max_patches` and `max_num_tiles` of the image processors: tiles beside the overview tile
    top_k              routers of the language model, where it has any
    num_active_blocks  which decoder layers the language model's list holds

Both have image processors for torchvision alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family
from budgetvlm.vlm.families.grid import GridImages
from budgetvlm.vlm.families.without_torchvision import (
    BICUBIC,
    BILINEAR,
    InPlace,
    TileProcessor,
    least_change,
    resized,
    to_pixels,
)


@dataclass(frozen=True)
class Squeezed(TileProcessor):
    """An image processor that squeezes.

    Attributes:
        most: the most tiles beside the overview.
    """

    most: int = 12
    resample: int = BICUBIC
    resamples: ClassVar = (BILINEAR, BICUBIC)

    def cut(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        """See `GridImages.cut`."""
        height, width = rows * self.side, columns * self.side
        whole = resized(to_pixels(image), height, width, antialias=True, resample=self.resample)
        cells = whole.unflatten(1, (rows, self.side)).unflatten(3, (columns, self.side))
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return cells.permute(1, 3, 0, 2, 4).flatten(0, 1).float().mul_(self.rescale_factor).sub_(mean).div_(std)

    @abstractmethod
    def grid(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Return rows and columns of tiles."""


class SqueezedImages(GridImages):
    """Tiles of one of these processors."""

    processor: Squeezed

    def __init__(self, model: Any, processor: Squeezed, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        self.most_crops = processor.most

    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        return self.processor.grid(height, width, max_crops)

    def cut(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        return self.processor.cut(image, rows, columns)

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": self.all(image, max_crops)}

    def set_to(self, height: int, width: int, max_crops: int) -> InPlace:
        def make(image: Image.Image) -> dict[str, Any]:
            return {**self.plain(image, max_crops), "num_patches": [len(self.all(image, max_crops))]}

        return InPlace(make, patch_size=math.isqrt(self.tokens_per_tile))


@dataclass(frozen=True)
class CohereTiles(Squeezed):
    """Cohere2 Vision's image processor."""

    side: int = 512
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    title: ClassVar = "Cohere2 Vision's image processor"
    keys: ClassVar = {"most": "max_patches"}

    def grid(self, height: int, width: int, most: int) -> tuple[int, int]:
        return least_change(self.side, height, width, most)


class CohereImages(SqueezedImages):
    """A mark in front of all tiles, one behind each, one at the end."""

    def __init__(self, model: Any, processor: CohereTiles, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        vision = model.config.vision_config
        self.tokens_per_tile = (vision.image_size // vision.patch_size // model.config.downsample_factor) ** 2
        names = (tokenizer.boi_token, tokenizer.img_line_break_token, tokenizer.eoi_token)
        self._begin, self._break, self._end = tokenizer.convert_tokens_to_ids(list(names))

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        tile = (*(self.placeholder,) * self.tokens_per_tile, self._break)
        return (self._begin, *tile * (rows * columns + 1), self._end)


@dataclass(frozen=True)
class PerceptionTiles(Squeezed):
    """PerceptionLM's image processor.

    Attributes:
        patch_size: side of a patch, in pixels.
        vision_input_type: "thumb+tile", or else the overview alone.
    """

    side: int = 448
    most: int = 36
    patch_size: int = 14
    vision_input_type: str = "thumb+tile"
    title: ClassVar = "PerceptionLM's image processor"
    keys: ClassVar = {"side": "tile_size", "most": "max_num_tiles"}

    def grid(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Return the canvas in which the image's shorter side is longest; one of its shape where it fits into none."""
        by_shape: dict[float, list[tuple[int, int]]] = {}
        for count in range(most, 0, -1):
            for columns in range(1, count + 1):
                if count % columns == 0:
                    by_shape.setdefault(columns / (count // columns), []).append((count // columns, columns))
        canvases = [canvas for group in by_shape.values() for canvas in group]
        fitting = [(r, c) for r, c in canvases if r * self.side >= height and c * self.side >= width]
        if fitting:
            return max(reversed(fitting), key=lambda canvas: self._short_side(height, width, *canvas))
        wanted = width / height
        if wanted >= 1:
            closest = min((shape for shape in by_shape if shape <= wanted), key=lambda shape: abs(shape - wanted))
        else:
            closest = min((shape for shape in by_shape if shape > wanted), key=lambda s: abs(1 / s - 1 / wanted))
        return max(by_shape[closest], key=lambda canvas: canvas[1])

    def _short_side(self, height: int, width: int, rows: int, columns: int) -> float:
        """Return the shorter side, in pixels, of the image enlarged to fill a canvas at its own shape."""
        scale, shape = min(columns * self.side / width, rows * self.side / height), width / height
        if shape > 1:
            return math.floor(scale * width / shape)
        return math.floor(scale * height * shape) if shape < 1 else scale * height


class PerceptionImages(SqueezedImages):
    """The overview first; it stands alone at max_crops=1 only."""

    overview_first = True
    processor: PerceptionTiles

    def __init__(self, model: Any, processor: PerceptionTiles, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        if processor.vision_input_type != "thumb+tile":
            self.most_crops = 1
        self.tokens_per_tile = (processor.side // processor.patch_size // model.config.projector_pooling_ratio) ** 2

    def tiles(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        return (0, 0) if max_crops == 1 else self.grid(height, width, max_crops)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return super().encode_tiles(tiles[None])

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": self.all(image, max_crops)[None]}


class Cohere2Vision(Family):
    name: ClassVar = "Cohere2 Vision"
    model_types: ClassVar = ("cohere2_vision",)
    crop_meaning: ClassVar = "`max_patches`: tiles beside the overview tile"
    images_type: ClassVar = CohereImages

    def load_processor(self, directory: Path) -> Any:
        return CohereTiles.read(directory)


class PerceptionLM(Family):
    name: ClassVar = "PerceptionLM"
    model_types: ClassVar = ("perception_lm",)
    crop_meaning: ClassVar = "`max_num_tiles`: tiles beside the overview tile; 1: the overview tile alone"
    images_type: ClassVar = PerceptionImages

    def load_processor(self, directory: Path) -> Any:
        return PerceptionTiles.read(directory)
