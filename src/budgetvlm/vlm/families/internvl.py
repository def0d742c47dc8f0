"""InternVL: Transformers' `InternVLForConditionalGeneration` around any language model, dense or with experts.

A request may need only the overview, only the other tiles, or all; the processor's own call always makes all of them,
and copies the whole image several times meanwhile. So tiles are cut here: with the processor's grids, sizes and
numbers, resized with Pillow as it does, to the same pixels (tested).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from budgetvlm._io import to_rgb
from budgetvlm.vlm.families.base import Family, TiledImages
from budgetvlm.vlm.image_layout import ImageLayout


class GridImages(TiledImages):
    """An image squeezed into a grid of tiles, row by row, and into one tile beside them, the same at every setting.

    Every tile gives the same number of tokens.
    """

    tokens_per_tile: int

    @abstractmethod
    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return rows and columns of tiles for an image of this size."""

    @abstractmethod
    def cut(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        """Squeeze the whole image into a grid of tiles, row by row, normalised ``[n, 3, H, W]``."""

    def overview(self, image: Image.Image) -> torch.Tensor:
        return self.cut(image, 1, 1)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        rows, columns = self.tiles(image.height, image.width, max_crops)
        return self.cut(image, rows, columns) if rows * columns else torch.empty(0)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        overview, tiles = self.overview(image), self.beside(image, max_crops)
        parts = [overview, tiles] if self.overview_first else [tiles, overview]
        return torch.cat([part for part in parts if len(part)])

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        grid = self.tiles(height, width, max_crops)
        layout = ImageLayout.of(self.ids(*grid), self.placeholder, grid, (height, width))
        return replace(layout, visual=None) if layout.num_visual == len(layout.ids) else layout

    def ids(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the token ids of a grid of tiles and the overview."""
        return (self.placeholder,) * (self.tokens_per_tile * (rows * columns + 1))

    def tiles(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return rows and columns of tiles beside the overview; (0, 0) where it stands alone."""
        grid = self.grid(height, width, max_crops)
        return (0, 0) if grid == (1, 1) else grid


class InternVLImages(GridImages):
    """Details row by row first, the overview last, ``[n, 3, H, W]``."""

    def prepare(self) -> None:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        processor = self.processor
        self._best_grid = get_optimal_tiled_canvas
        self.most_crops = int(processor.max_patches)
        self.tokens_per_tile = int(self.model.config.image_seq_length)
        self._size = processor.size.height, processor.size.width  # of a tile
        self._mean = torch.tensor(processor.image_mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(processor.image_std, dtype=torch.float32)[:, None, None]

    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        if max_crops == 1:
            return 1, 1
        columns, rows = self._best_grid((height, width), self._size, self.processor.min_patches, max_crops)
        return rows, columns

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"crop_to_patches": True, "max_patches": max_crops}

    def cut(self, image: Image.Image, rows: int, columns: int) -> torch.Tensor:
        height, width = self._size
        resized = to_rgb(image).resize((columns * width, rows * height), self.processor.resample)
        tiles = np.asarray(resized).reshape(rows, height, columns, width, 3).transpose(0, 2, 4, 1, 3)
        pixels = torch.from_numpy(np.ascontiguousarray(tiles).reshape(-1, 3, height, width)).float()
        return pixels.mul_(self.processor.rescale_factor).sub_(self._mean).div_(self._std)


class InternVL(Family):
    name: ClassVar = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    crop_meaning: ClassVar = "`max_patches`: tiles beside the overview tile"
    images_type: ClassVar = InternVLImages

    def config(self, directory: Path) -> Any:
        """Return the model's configuration.

        `InternVLConfig` takes any saved vision configuration for InternVL's own tower; here its `model_type` is heeded,
        so that other towers (the bundled model has a FocalNet) come back as they were saved.
        """
        from transformers.models.auto.configuration_auto import AutoConfig
        from transformers.models.internvl.configuration_internvl import InternVLConfig

        fields, _ = InternVLConfig.get_config_dict(directory, local_files_only=True)
        vision = dict(fields.pop("vision_config"))
        return InternVLConfig(vision_config=AutoConfig.for_model(vision.pop("model_type"), **vision), **fields)

    def load_processor(self, directory: Path) -> Any:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        return GotOcr2ImageProcessorPil.from_pretrained(directory, local_files_only=True)


class QianfanOCR(InternVL):
    """InternVL's own tiles under another mark in the chat template."""

    name: ClassVar = "Qianfan-OCR"
    model_types: ClassVar = ("qianfan_ocr",)

    def config(self, directory: Path) -> Any:
        return Family.config(self, directory)

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return "<image>"
