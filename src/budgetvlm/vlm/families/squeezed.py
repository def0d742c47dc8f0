"""Cohere2 Vision and PerceptionLM: the whole image squeezed into a grid of tiles, and an overview beside them.

Both have image processors for torchvision alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family
from budgetvlm.vlm.families.internvl import GridImages
from budgetvlm.vlm.families.without_torchvision import (
    BICUBIC,
    BILINEAR,
    InPlace,
    TileProcessor,
    cells,
    least_change,
    resized,
    to_pixels,
)


@dataclass(frozen=True)
class CohereTiles(TileProcessor):
    """Cohere2 Vision's image processor: `most` tiles beside the overview, or fewer."""

    side: int = 512
    most: int = 12
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = BICUBIC
    title: ClassVar = "Cohere2 Vision's image processor"
    resamples: ClassVar = (BILINEAR, BICUBIC)
    keys: ClassVar[dict[str, str]] = {"most": "max_patches"}


@dataclass(frozen=True)
class PerceptionTiles(CohereTiles):
    """PerceptionLM's image processor; a type of input other than "thumb+tile" is the overview alone."""

    side: int = 448
    most: int = 36
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    patch_size: int = 14
    vision_input_type: str = "thumb+tile"
    title: ClassVar = "PerceptionLM's image processor"
    keys: ClassVar = {"side": "tile_size", "most": "max_num_tiles"}


class CohereImages(GridImages):
    """A mark in front of all tiles, one behind each, one at the end."""

    processor: CohereTiles

    def prepare(self) -> None:
        self.most_crops = self.processor.most
        vision = self.model.config.vision_config
        self.tokens_per_tile = (vision.image_size // vision.patch_size // self.model.config.downsample_factor) ** 2

    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        return least_change(self.processor.side, height, width, max_crops)

    def cut(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        p = self.processor
        whole = resized(to_pixels(image), rows * p.side, columns * p.side, antialias=True, resample=p.resample)
        mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
        return cells(whole, p.side).float().mul_(p.rescale_factor).sub_(mean).div_(std)

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        t = self.tokenizer
        begin, behind, end = t.convert_tokens_to_ids([t.boi_token, t.img_line_break_token, t.eoi_token])
        return (begin, *(*(self.placeholder,) * self.tokens_per_tile, behind) * (rows * columns + 1), end)

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": self.all(image, max_crops)}

    def set_to(self, height: int, width: int, max_crops: int) -> InPlace:
        def make(image: Image.Image) -> dict[str, Any]:
            return {**self.plain(image, max_crops), "num_patches": [len(self.all(image, max_crops))]}

        return InPlace(make, patch_size=math.isqrt(self.tokens_per_tile))


class PerceptionImages(CohereImages):
    """The overview first; it stands alone at max_crops=1 only. There are no marks."""

    overview_first = True
    processor: PerceptionTiles

    def prepare(self) -> None:
        p, pooled = self.processor, self.model.config.projector_pooling_ratio
        self.most_crops = p.most if p.vision_input_type == "thumb+tile" else 1
        self.tokens_per_tile = (p.side // p.patch_size // pooled) ** 2

    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return the canvas in which the image's shorter side is longest; one of its shape where it fits into none."""
        side = self.processor.side
        by_shape: dict[float, list[tuple[int, int]]] = {}
        for count in range(max_crops, 0, -1):
            for columns in range(1, count + 1):
                if count % columns == 0:
                    by_shape.setdefault(columns / (count // columns), []).append((count // columns, columns))
        canvases = [canvas for group in by_shape.values() for canvas in group]
        fitting = [(r, c) for r, c in canvases if r * side >= height and c * side >= width]
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
        side = self.processor.side
        scale, shape = min(columns * side / width, rows * side / height), width / height
        if shape > 1:
            return math.floor(scale * width / shape)
        return math.floor(scale * height * shape) if shape < 1 else scale * height

    def tiles(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        return (0, 0) if max_crops == 1 else self.grid(height, width, max_crops)

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        return GridImages.ids(self, rows, columns)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return super().encode_tiles(tiles[None])

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": self.all(image, max_crops)[None]}


class Cohere2Vision(Family):
    name: ClassVar = "Cohere2 Vision"
    model_types: ClassVar = ("cohere2_vision",)
    crop_meaning: ClassVar = "`max_patches`: tiles beside the overview tile"
    images_type: ClassVar = CohereImages
    tile_processor: ClassVar = CohereTiles


class PerceptionLM(Family):
    name: ClassVar = "PerceptionLM"
    model_types: ClassVar = ("perception_lm",)
    crop_meaning: ClassVar = "`max_num_tiles`: tiles beside the overview tile; 1: the overview tile alone"
    images_type: ClassVar = PerceptionImages
    tile_processor: ClassVar = PerceptionTiles
