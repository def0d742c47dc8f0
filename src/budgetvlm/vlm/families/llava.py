"""LLaVA-NeXT and LLaVA-OneVision: an overview tile and a grid of tiles from a list of pinpoints.

The overview is the whole image squeezed into one tile and does not depend on the grid, so that it is encoded once.
Packing (unpadding, the token that ends a row) is the model's own code, told of the grid that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, TiledImages, run_processor
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import EmbeddedPrompt


class LlavaImages(TiledImages):
    """The overview first, then the grid's tiles row by row."""

    pixel_names = ("pixel_values", "image_sizes")

    def prepare(self) -> None:
        vision = self.model.config.vision_config
        self._side = int(vision.image_size)
        self._tokens_per_tile = (self._side // int(vision.patch_size)) ** 2
        self._pinpoints = [list(map(int, point)) for point in self.processor.image_grid_pinpoints]
        self.most_crops = max(self._tiles(point) for point in self._pinpoints)

    def overview(self, image: Image.Image) -> torch.Tensor:
        done = run_processor(self.processor, image, image_grid_pinpoints=[[self._side, self._side]])
        return done["pixel_values"][0][:1]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops)[1:] if self._allowed(max_crops) else torch.empty(0)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        alone = not self._allowed(max_crops)
        return self.overview(image) if alone else self.plain(image, max_crops)["pixel_values"][0]

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return projected features of tiles ``[n, 3, H, W]``, before packing."""
        config, inner = self.model.config, self.model.model
        hidden = inner.vision_tower(tiles.to(self.model.dtype), output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        wanted = [layers] if isinstance(layers, int) else layers
        selected = torch.cat([hidden[i] for i in wanted], dim=-1)
        if config.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        return inner.multi_modal_projector(selected)

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        parts = [overview[None]] if overview is not None else []
        tiles = torch.cat([*parts, *([features] if features is not None else [])])
        return self._pack(tiles, layout.grid, layout.size, self.model.model.image_newline)

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any] | None:
        allowed = self._allowed(max_crops)
        return {"image_grid_pinpoints": allowed} if allowed else None

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        """Return also the grids to choose from, which the model's own forward reads in its configuration."""
        allowed = self._allowed(max_crops)
        if allowed:
            return {**super().plain(image, max_crops), "image_grid_pinpoints": allowed}
        size = torch.tensor([[image.height, image.width]])
        alone = [[0, 0]]  # a pinpoint that leaves the overview alone
        return {"pixel_values": self.overview(image)[None], "image_sizes": size, "image_grid_pinpoints": alone}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        from transformers.image_processing_utils import select_best_resolution

        allowed = self._allowed(max_crops)
        best = select_best_resolution((height, width), allowed) if allowed else (0, 0)
        grid = best[0] // self._side, best[1] // self._side
        # one channel of zeros is packed to count what packing leaves
        tiles = torch.zeros(1 + grid[0] * grid[1], self._tokens_per_tile, 1)
        count = len(self._pack(tiles, grid, (height, width), torch.zeros(1)))
        return ImageLayout((self.placeholder,) * count, grid=grid, size=(height, width))

    def _tiles(self, point: Sequence[int]) -> int:
        return (point[0] // self._side) * (point[1] // self._side)

    def _allowed(self, max_crops: int) -> list[list[int]]:
        """Return grids to choose from; none where the overview is to stand alone."""
        return [] if max_crops == 1 else [point for point in self._pinpoints if self._tiles(point) <= max_crops]

    def _pack(
        self, tiles: torch.Tensor, grid: tuple[int, int], size: tuple[int, int], newline: torch.Tensor
    ) -> torch.Tensor:
        """Pack features with the model's own code, under a configuration that knows just the chosen grid."""
        config = self.model.config
        pinpoints = [[grid[0] * self._side, grid[1] * self._side]]
        told = SimpleNamespace(
            config=SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=config.vision_config)
        )
        of_onevision = hasattr(config, "vision_aspect_ratio")
        name = "vision_aspect_ratio" if of_onevision else "vision_feature_select_strategy"
        packed, _ = type(self.model.model).pack_image_features(
            told, [tiles], [list(size)], image_newline=newline, **{name: getattr(config, name)}
        )
        return packed[0]


class Llava(Family):
    name: ClassVar = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")
    crop_meaning: ClassVar = "`image_grid_pinpoints` of at most that many tiles beside the overview tile"
    images_type: ClassVar = LlavaImages

    def untouched_logits(self, model: Any, prompt: EmbeddedPrompt, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the logits of a model that was configured with the grids that are allowed."""
        allowed, pixels = inputs["image_grid_pinpoints"], dict(inputs)
        own, model.config.image_grid_pinpoints = model.config.image_grid_pinpoints, allowed
        del pixels["image_grid_pinpoints"]
        try:
            return super().untouched_logits(model, prompt, pixels)
        finally:
            model.config.image_grid_pinpoints = own


class LlavaOnevision(Llava):
    """Of several images its processor shows the overviews alone, so that there would be nothing to choose."""

    name: ClassVar = "LLaVA-OneVision"
    model_types: ClassVar = ("llava_onevision",)
    one_image: ClassVar = True
