"""From an image and a question to what the model and the controller read.

The controller reads a handful of vectors, for which starting tensor operations takes longer than the sums; plain arrays
in main memory are pooled by NumPy. What comes out is an array: nothing that reads it needs PyTorch.
Shapes: n tiles, T tokens, V visual tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm.vlm.families.base import AnyImages, TiledImages
from budgetvlm.vlm.prompt import ImageLayout
from budgetvlm.vlm.protocol import Overview

SIZE_CACHE_LIMIT = 4096  # sizes of images whose layout is remembered
TILES_AT_ONCE = 256  # bounds the memory of the vision tower in a batch


class ImageEncoder:
    """Encodes images, with an overview that was encoded before or without.

    Attributes:
        layout_of_size: height, width, `max_crops` -> how such an image stands in the prompt; remembered.

    Args:
        images: the family's way from an image to visual tokens.
    """

    def __init__(self, images: AnyImages) -> None:
        self._images = images
        self.layout_of_size = lru_cache(SIZE_CACHE_LIMIT)(images.layout)

    def layout(self, image: Image.Image, max_crops: int) -> ImageLayout:
        """Return how the image stands in the prompt, without encoding it."""
        return self.layout_of_size(image.height, image.width, max_crops)

    def visual_tokens(self, image: Image.Image, max_crops: int, overview: Overview | None = None) -> torch.Tensor:
        """Return visual tokens of one image ``[V, C]``."""
        return self.join(self.pixels(image, max_crops, overview), overview, self.layout(image, max_crops))

    def pixels(self, image: Image.Image, max_crops: int, overview: Overview | None) -> torch.Tensor:
        """Return the pixels that are still to be encoded, ``[n, ...]``."""
        return self._images.all(image, max_crops) if overview is None else self._images.beside(image, max_crops)

    def join(self, pixels: torch.Tensor, overview: Overview | None, layout: ImageLayout) -> torch.Tensor:
        """Return visual tokens ``[V, C]`` of the pixels just cut and of an overview encoded before."""
        features = self.encode([pixels], [layout])[0] if len(pixels) else None
        return self._images.join(features, overview.tokens if overview else None, layout)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> Sequence[torch.Tensor]:
        """Return the features of each image's pixels, encoded together; tiles in chunks, whatever image they are of."""
        images = self._images
        if not isinstance(images, TiledImages):
            return images.encode(pixels, layouts)
        device = images.model.device
        chunks = torch.cat(list(pixels)).split(TILES_AT_ONCE)
        per_tile = torch.cat([images.encode_tiles(chunk.to(device)) for chunk in chunks])
        return per_tile.split([len(tiles) for tiles in pixels])


def pool(tokens: torch.Tensor, deepstack_levels: int = 0) -> np.ndarray:
    """Return the controller's view of visual tokens: mean and maximum over them, float32 ``[2 * C]``.

    Args:
        tokens: ``[T, C]``, or ``[T, C * (1 + levels)]`` with deepstack levels, which do not count.
    """
    if deepstack_levels:
        tokens = tokens[:, : tokens.shape[1] // (1 + deepstack_levels)]
    plain = tokens.dtype is torch.float32 and tokens.is_cpu
    rows: np.ndarray = (tokens if plain else tokens.float().cpu()).numpy()
    width = rows.shape[1]
    out = np.empty(2 * width, dtype=np.float32)
    np.add.reduce(rows, out=out[:width])
    out[:width] /= len(rows)
    np.maximum.reduce(rows, out=out[width:])
    return out


class WordMeans:
    """Averages word embeddings.

    Args:
        table: a module that embeds ids.
    """

    def __init__(self, table: nn.Module) -> None:
        self._table = table
        weight = table.weight.detach() if type(table) is nn.Embedding else torch.empty(0, device="meta")
        self._rows = weight.numpy() if weight.is_cpu and weight.dtype is torch.float32 else None  # without PyTorch

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return the mean of the embeddings of these tokens, int64 ``[T]``, float32 ``[C]``."""
        if self._rows is not None:
            out: np.ndarray = np.add.reduce(self._rows[ids]) / np.float32(len(ids))
            return out
        device = next(self._table.parameters()).device
        with torch.inference_mode():
            mean: np.ndarray = self._table(torch.tensor(ids, device=device)).float().mean(0).cpu().numpy()
        return mean
