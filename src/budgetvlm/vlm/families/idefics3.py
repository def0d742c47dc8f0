"""Idefics3 and SmolVLM: a grid of tiles, each announced by its row and column, and the overview last.

    max_crops          `longest_edge` of the image processor: the largest size whose grid has at most that many tiles
    top_k              routers of the language model, where it has any
    num_active_blocks  which decoder layers the language model's list holds

The processor makes the overview from the enlarged image, so that its pixels would depend a little on the grid. Here it
is always made as at the full setting: it is encoded once, and the full setting is the untouched model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from budgetvlm._io import to_rgb
from budgetvlm.vlm.families.base import Family, TiledImages, repeated
from budgetvlm.vlm.prompt import ImageLayout

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


class Idefics3Images(TiledImages):
    """Details first, the overview last; text stands between them in the prompt."""

    pixel_names = ("pixel_values", "pixel_attention_mask")

    def __init__(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        self._side = int(processor.max_image_size["longest_edge"])
        self._longest = int(processor.size["longest_edge"])
        self._tokens_per_tile = int(model.model.image_seq_len)
        self._whole = math.ceil(self._longest / self._side) if processor.do_image_splitting else 1
        self.most_crops = self._whole**2

    def overview(self, image: Image.Image) -> torch.Tensor:
        """Take the processor's own steps to its last tile, without cutting the others."""
        from transformers.image_utils import SizeDict

        p = self.processor
        square = SizeDict(height=self._side, width=self._side)
        pixels = np.moveaxis(np.asarray(to_rgb(image)), -1, 0)
        pixels = p.resize(pixels, SizeDict(longest_edge=self._longest), resample=p.resample)
        if p.do_image_splitting:
            pixels = p.resize_for_vision_encoder(pixels, self._side, resample=p.resample)
        if pixels.shape[-2:] != (self._side, self._side) or not p.do_image_splitting:
            pixels = p.resize(pixels, square, resample=p.resample)
        pixels = p.normalize(p.rescale(pixels, p.rescale_factor), p.image_mean, p.image_std)
        return torch.from_numpy(np.ascontiguousarray(pixels))[None]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        uncut = self.layout_of(image, max_crops).grid == (0, 0)
        return torch.empty(0) if uncut else self.plain(image, max_crops)["pixel_values"][0][:-1]

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return torch.cat([self.beside(image, max_crops), self.overview(image)])

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.model.model.get_image_features(tiles[None]).pooler_output[0].unflatten(0, (len(tiles), -1))

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"size": {"longest_edge": self._edge(self._multiple(height, width, max_crops))}}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        rows, columns = self._grid(height, width, self._multiple(height, width, max_crops))
        once = self.tokenizer.convert_ids_to_tokens(self.placeholder)
        tiles = ["".join(f"{_FAKE}<row_{r}_col_{c}>{once}" for c in range(1, columns + 1)) for r in range(1, rows + 1)]
        details = "".join(f"{line}\n" for line in tiles) + ("\n" if tiles else "")
        short = self.tokenizer.encode(f"{details}{_FAKE}{_GLOBAL}{once}{_FAKE}", add_special_tokens=False)
        ids = repeated(short, self.placeholder, self._tokens_per_tile)
        return ImageLayout.of(ids, self.placeholder, (rows, columns), (height, width))

    def _multiple(self, height: int, width: int, max_crops: int) -> int:
        """Return how many tiles long the enlarged image is: as many as give at most ``max_crops`` tiles."""
        fitting = (n for n in range(self._whole, 1, -1) if math.prod(self._grid(height, width, n)) <= max_crops)
        return next(fitting, 1)

    def _edge(self, multiple: int) -> int:
        return self._longest if multiple == self._whole else multiple * self._side

    def _grid(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """Return rows and columns of the tiles that the processor's own code cuts.

        `get_number_of_image_patches` promises fewer where `longest_edge` is no multiple of a tile.
        """
        module = import_module(type(self.processor).__module__)
        size = module.get_resize_output_image_size(SimpleNamespace(shape=(3, height, width)), self._edge(multiple))
        asked = SimpleNamespace(resize=lambda image, size, **_: (size.height, size.width))
        in_tiles = type(self.processor).resize_for_vision_encoder
        rows, columns = (n // self._side for n in in_tiles(asked, SimpleNamespace(shape=(3, *size)), self._side))
        return (rows, columns) if rows * columns > 1 and self.processor.do_image_splitting else (0, 0)


class Idefics3(Family):
    name: ClassVar = "Idefics3, SmolVLM"
    model_types: ClassVar = ("idefics3", "smolvlm")
    images_type: ClassVar = Idefics3Images
    crop_meaning: ClassVar = "`longest_edge`: the largest grid of at most that many tiles beside the overview tile"

    def language(self, model: Any) -> Any:
        return model.model.text_model
