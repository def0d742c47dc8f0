"""Aria: one tile, or a grid of tiles from a list of resolutions; no overview beside them.

The controller reads the whole image in one tile. That tile is the model's at max_crops=1 and is paid on top elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, TiledImages
from budgetvlm.vlm.image_layout import ImageLayout


class AriaImages(TiledImages):
    """Tiles with their mask of real pixels as a fourth channel, ``[n, 4, H, W]``."""

    pixel_names = ("pixel_values", "pixel_mask")

    def prepare(self) -> None:
        config = self.model.config
        self._side = int(self.processor.max_image_size)
        patches = (self._side // int(config.vision_config.patch_size)) ** 2
        self._tokens_per_tile = int(config.projector_patch_to_query_dict[patches])
        self._resolutions = [list(map(int, size)) for size in self.processor.split_resolutions]
        self.most_crops = max(self._tiles(size) for size in self._resolutions)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops) if self._allowed(max_crops) else torch.empty(0)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        done = self.plain(image, max_crops)
        return torch.cat([done["pixel_values"], done["pixel_mask"][:, None].float()], dim=1)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        values, mask = tiles[:, :3].to(self.model.dtype), tiles[:, 3] > 0
        layer = self.model.config.vision_feature_layer
        return self.model.model.get_image_features(values, pixel_mask=mask, vision_feature_layer=layer).pooler_output

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        allowed = self._allowed(max_crops)
        split = {"split_image": True, "split_resolutions": allowed} if allowed else {"split_image": False}
        return {"max_image_size": self._side, **split}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        from transformers.image_processing_utils import select_best_resolution

        allowed = self._allowed(max_crops)
        tiles = self._tiles(select_best_resolution((height, width), allowed)) if allowed else 1
        return ImageLayout((self.placeholder,) * (tiles * self._tokens_per_tile), size=(height, width))

    def _tiles(self, size: Sequence[int]) -> int:
        return math.ceil(size[0] / self._side) * math.ceil(size[1] / self._side)

    def _allowed(self, max_crops: int) -> list[list[int]]:
        """Return resolutions to choose from; none where the image stays whole."""
        return [] if max_crops == 1 else [size for size in self._resolutions if self._tiles(size) <= max_crops]


class Aria(Family):
    name: ClassVar = "Aria"
    model_types: ClassVar = ("aria",)
    crop_meaning: ClassVar = "`split_image` with `split_resolutions` of at most that many tiles; 1: one tile, not split"
    images_type: ClassVar = AriaImages
