"""An image squeezed into a grid of tiles, and into one tile beside them: the overview, the same at every setting."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from PIL import Image

from budgetvlm.vlm.families.base import TiledImages
from budgetvlm.vlm.prompt import ImageLayout


class GridImages(TiledImages):
    """Tiles row by row, the overview before or behind them; every tile gives the same number of tokens."""

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
