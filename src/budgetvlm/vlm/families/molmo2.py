"""Molmo2: the overview tile, and overlapping tiles of the enlarged image (Transformers' own class).

Visual features are added to the embeddings of their placeholders. All tokens of an image see each other in both
directions, at reading only. At max_crops=1 the one tile is the overview again, which is encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch.nn.functional import pad

from budgetvlm.vlm.families.base import Family, Images
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.families.without_torchvision import InPlace, TileProcessor, resized, to_pixels
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import EmbeddedPrompt, Writer
from budgetvlm.vlm.protocol import Turn

_IMAGE = "<|image|>"
_MARKS = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>")


@dataclass(frozen=True)
class Crops(TileProcessor):
    """Molmo2's image processor.

    Attributes:
        margins: patches by which tiles overlap, in front and behind.
        patch_size: side of a patch, in pixels.
        pooling: rows and columns of patches that become one token.
        columns, low_columns: whether a mark ends each row of tokens, in the tiles and in the overview (None: alike).
        low_start: whether the overview begins with a mark of its own.
    """

    side: int = 378
    max_crops: int = 8
    margins: tuple[int, int] = (4, 4)
    patch_size: int = 14
    pooling: tuple[int, int] = (2, 2)
    columns: bool = True
    low_columns: bool | None = None
    low_start: bool = True
    title: ClassVar = "Molmo2's image processor"
    keys: ClassVar = {
        "margins": "overlap_margins",
        "pooling": "pooling_size",
        "columns": "image_use_col_tokens",
        "low_columns": "use_single_crop_col_tokens",
        "low_start": "use_single_crop_start_token",
    }

    @property
    def patches(self) -> int:
        """On a side of a tile."""
        return self.side // self.patch_size

    @property
    def window(self) -> int:
        """Patches by which tiles are apart."""
        return self.patches - sum(self.margins)

    def grid(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return rows and columns of tiles that enlarge the image least, or else shrink it least."""
        step, margin = self.window * self.patch_size, sum(self.margins) * self.patch_size
        sides = range(1, max_crops + 1)
        shapes = [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_crops]
        shapes.sort(key=lambda shape: (math.prod(shape), shape[0]))
        size = torch.tensor([height - margin, width - margin], dtype=torch.float32)  # below 0 for small images
        scales = (torch.tensor(shapes, dtype=torch.float32) * step / size).amin(dim=1)
        enlarging = torch.where(scales < 1, torch.inf, scales)
        best = scales.argmax() if bool((scales < 1).all()) else enlarging.argmin()
        return shapes[int(best)]

    def overview(self, image: Image.Image) -> torch.Tensor:
        """Squeeze the whole image into one tile, as patches ``[1, patches, channels]``."""
        return self._patches(self._scaled(image, self.side, self.side)[None])

    def tiles(self, image: Image.Image, grid: tuple[int, int]) -> torch.Tensor:
        """Cut overlapping tiles row by row, as patches ``[n, patches, channels]``."""
        step = self.window * self.patch_size
        height, width = ((n - 1) * step + self.side for n in grid)
        canvas = self._scaled(image, height, width)
        cut = canvas.unfold(1, self.side, step).unfold(2, self.side, step)
        return self._patches(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))

    def pooling_with_overview(self, grid: tuple[int, int]) -> list[torch.Tensor]:
        """Return the pooling of the overview and of the tiles that are counted on behind it."""
        tiles = self.pooling_of(grid)
        return [self.low_pooling(), torch.where(tiles < 0, -1, tiles + self.patches**2)]

    def low_pooling(self) -> torch.Tensor:
        """Return the patches that each token of the overview is made of, -1: none ``[rows, columns, patches]``."""
        return self._pooled(torch.arange(self.patches**2).view(self.patches, self.patches))

    def pooling_of(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return the patches that each token of the tiles is made of, counted over all tiles; see `low_pooling`.

        Of patches that two tiles share, the margin's inner half is the one's and the outer half the other's.
        """
        numbers = torch.arange(math.prod(grid) * self.patches**2).view(*grid, self.patches, self.patches)
        whole = numbers.transpose(1, 2).reshape(grid[0] * self.patches, grid[1] * self.patches)
        rows, columns = (self._kept(tiles) for tiles in grid)
        return self._pooled(whole[rows][:, columns])

    def _kept(self, tiles: int) -> torch.Tensor:
        """Return the patches of a line of tiles that are kept: at each seam without both margins."""
        before, behind = self.margins
        places = torch.arange(tiles * self.patches)
        tile, place = places // self.patches, places % self.patches
        return places[((tile == 0) | (place >= before)) & ((tile == tiles - 1) | (place < self.patches - behind))]

    def _pooled(self, numbers: torch.Tensor) -> torch.Tensor:
        """Cut a grid of patches into windows; what is missing is split between both sides, the larger half behind."""
        tall, wide = self.pooling
        lacks = [-size % step for size, step in zip(numbers.shape, self.pooling, strict=True)]
        padding = [lacks[1] // 2, (lacks[1] + 1) // 2, lacks[0] // 2, (lacks[0] + 1) // 2]
        cells = pad(numbers, padding, value=-1).unfold(0, tall, tall).unfold(1, wide, wide)
        return cells.flatten(2)

    def _scaled(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        """Resize without smoothing, round the colours, then normalise ``[3, height, width]``."""
        pixels = resized(to_pixels(image).float(), height, width, antialias=False).round().clamp(0, 255)
        mean, std = (torch.tensor(v)[:, None, None] * (1 / self.rescale_factor) for v in (self.mean, self.std))
        return pixels.sub(mean).div_(std)

    def _patches(self, tiles: torch.Tensor) -> torch.Tensor:
        """Cut ``[n, 3, side, side]`` into ``[n, patches, channels]``, colours last."""
        p = self.patch_size
        return tiles.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class Molmo2Images(Images):
    """The overview first, then the tiles. Pooled tokens reach over the tiles' edges, not over the overview's."""

    processor: Crops

    def prepare(self) -> None:
        self._marks = self.tokenizer.convert_tokens_to_ids(list(_MARKS))
        self.most_crops = self.processor.max_crops

    def overview(self, image: Image.Image) -> torch.Tensor:
        return self.processor.overview(image)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        grid = self.processor.grid(image.height, image.width, max_crops)
        return torch.empty(0) if grid == (1, 1) else self.processor.tiles(image, grid)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return torch.cat([self.overview(image), self.beside(image, max_crops)])

    def encode_one(self, pixels: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """Return features ``[T, C]`` of the overview, of the tiles, or of both, told apart by how many come."""
        p, grid, num_tiles = self.processor, layout.grid, math.prod(layout.grid)
        if num_tiles == 1 or len(pixels) < num_tiles:
            parts = [p.low_pooling()]
        else:
            parts = p.pooling_with_overview(grid) if len(pixels) > num_tiles else [p.pooling_of(grid)]
        sizes = [size for part in parts for size in part.shape[:2]]
        done = self.model.model.get_image_features(
            pixels.to(self.model.dtype),
            torch.cat([part.flatten(0, 1) for part in parts]).to(pixels.device),
            torch.tensor([[*sizes, 0, 0][:4]], device=pixels.device),
        )
        return done.pooler_output[0]

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        parts = [part for part in (overview, features) if part is not None]
        return torch.cat(parts * 2 if layout.grid == (1, 1) else parts)

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        """Do as the processor: the overview and all tiles, also where they are the same."""
        p, grid = self.processor, self.processor.grid(image.height, image.width, max_crops)
        low, high = p.pooling_with_overview(grid)
        return {
            "pixel_values": torch.cat([p.overview(image), p.tiles(image, grid)]).to(self.model.dtype),
            "image_token_pooling": torch.cat([low.flatten(0, 1), high.flatten(0, 1)]),
            "image_grids": torch.tensor([[*low.shape[:2], *high.shape[:2]]]),
        }

    def set_to(self, height: int, width: int, max_crops: int) -> InPlace:
        return InPlace(lambda image: self.plain(image, max_crops))

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        p, grid = self.processor, self.processor.grid(height, width, max_crops)
        patch, column, start, low_start, end = self._marks

        def lines(first: int, pooling: torch.Tensor, columns: bool) -> list[int]:
            line = [patch] * pooling.shape[1] + [column] * columns
            return [first, *line * pooling.shape[0], end]

        low_columns = p.columns if p.low_columns is None else p.low_columns
        low = lines(low_start if p.low_start else start, p.low_pooling(), low_columns)
        ids = (*low, *lines(start, p.pooling_of(grid), p.columns))
        return ImageLayout.of(ids, patch, grid, (height, width))


class Molmo2Inputs(BothWaysInputs):
    """All tokens of the image, marks included, see each other."""

    create_masks = "transformers.masking_utils:create_causal_mask"

    def _runs(self) -> torch.Tensor:
        return self.pad([prompt.image_mask().long() for prompt in self.prompts]) - 1


class Molmo2(Family):
    name: ClassVar = "Molmo2"
    model_types: ClassVar = ("molmo2",)
    by_place: ClassVar = True
    adds_features: ClassVar = True
    inputs_type: ClassVar = Molmo2Inputs
    images_type: ClassVar = Molmo2Images
    tile_processor: ClassVar = Crops
    crop_meaning: ClassVar = "`max_crops` of the image processor: tiles beside the overview tile, one at least"

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return str(getattr(tokenizer, "image_token", None) or _IMAGE)

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        """Return what writes the chat template behind the token that begins a text, which the processor puts there."""
        write, first = super().writer(model, tokenizer), tokenizer.bos_token or tokenizer.eos_token

        def behind_first(turns: Sequence[Turn]) -> list[str]:
            before, *others = write(turns)
            return [before if before.startswith(first) else f"{first}{before}", *others]

        return behind_first

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        return {"mm_token_type_ids": prompt.image_mask().long()[None]}
