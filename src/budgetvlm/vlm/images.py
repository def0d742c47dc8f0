"""From an image to tiles, by Transformers' own tiling for InternVL (`GotOcr2ImageProcessorPil`).

A request may need only the overview, only the other tiles, or all; the processor's own call always makes all of them.
`Tiles` takes its grids and sizes, resizes with Pillow as it does, and gives the same pixels (tested); the processor
copies the whole image several times meanwhile, which takes twice as long as all the rest. Shapes: n tiles,
`[n, 3, H, W]` float32.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from budgetvlm.errors import InputError


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; itself if it is that already, because a copy of a large one takes longer than a small model.

    Raises:
        InputError: it is not an image, it is empty, or its data cannot be decoded.
    """
    if not isinstance(image, Image.Image):
        raise InputError(
            f"an image is needed (PIL.Image.Image); given {type(image).__name__}. Open the file with PIL first."
        )
    if 0 in image.size:
        raise InputError(
            f"the image is empty: {image.width} x {image.height} pixels. Give one with at least one pixel."
        )
    try:
        if type(image) is not Image.Image:  # an opened file is read when it is first needed
            image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"the image cannot be decoded ({error}); it may be truncated. Save it again as PNG."
        ) from error


def open_image(image: str | Path | bytes | Image.Image) -> Image.Image:
    """The decoded image in RGB, upright, of a file or its contents; an image that is one already is only decoded.

    Raises:
        InputError: the file is missing, no image, truncated, or too large to be decoded safely.
    """
    if isinstance(image, Image.Image):
        return _decoded(image, "the image")
    if not isinstance(image, str | Path | bytes):
        raise InputError(f"an image is needed: a file's name or a PIL image; given {type(image).__name__}")
    name = f"data of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _decoded(ImageOps.exif_transpose(opened), name)
    except FileNotFoundError:
        raise InputError(f"the image {name!r} does not exist. Check the name.") from None
    except UnidentifiedImageError:
        raise InputError(f"{name!r} is not an image that Pillow knows; give a PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name!r} is too large ({error}); make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the image {name!r} cannot be read ({error}); give another or save it again") from None


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        return to_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


class Tiles:
    """Cuts images into tiles.

    Args:
        processor: a `GotOcr2ImageProcessorPil`; its size, resampling and normalisation are used.
    """

    def __init__(self, processor: Any) -> None:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        self.processor, self._best_grid = processor, get_optimal_tiled_canvas
        self._size = processor.size.height, processor.size.width  # of a tile
        self._mean = torch.tensor(processor.image_mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(processor.image_std, dtype=torch.float32)[:, None, None]

    def overview(self, image: Image.Image) -> torch.Tensor:
        """The whole image in one tile (the thumbnail), ``[1, 3, H, W]``."""
        return self._normalise(self._resized(image, 1, 1))

    def details(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """The tiles beside the overview, row by row, at most ``max_crops``; none where the overview says it all."""
        columns, rows = 1, 1
        if max_crops > 1:
            size = image.height, image.width
            columns, rows = self._best_grid(size, self._size, self.processor.min_patches, max_crops)
        if columns * rows == 1:
            return torch.empty(0, 3, *self._size)
        return self._normalise(self._resized(image, rows, columns))

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """The tiles in the model's order: details, then the overview."""
        return torch.cat([self.details(image, max_crops), self.overview(image)])

    def count(self, height: int, width: int, max_crops: int) -> int:
        """Number of tiles that `all` cuts from an image of this size, without cutting."""
        options = {"crop_to_patches": True, "max_patches": max_crops}
        return int(self.processor.get_number_of_image_patches(height, width, options))

    def _resized(self, image: Image.Image, rows: int, columns: int) -> np.ndarray:
        """The whole image in so many tiles, row by row, uint8."""
        height, width = self._size
        resized = to_rgb(image).resize((columns * width, rows * height), self.processor.resample)
        tiles = np.asarray(resized).reshape(rows, height, columns, width, 3)
        return np.ascontiguousarray(tiles.transpose(0, 2, 4, 1, 3)).reshape(-1, 3, height, width)

    def _normalise(self, tiles: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(tiles).float()
        return pixels.mul_(self.processor.rescale_factor).sub_(self._mean).div_(self._std)
