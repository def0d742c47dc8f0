"""Idefics2: the whole image behind its four quarters, or alone. Idefics3 and SmolVLM: tiles, and the overview last.

The processor of Idefics3 makes the overview from the enlarged image, so that its pixels would depend a little on the
grid. Here it is always made as at the full setting: it is encoded once, and the full setting is the untouched model's.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from budgetvlm._io import to_rgb
from budgetvlm.vlm.chat_template import behind_images
from budgetvlm.vlm.families.base import Family, Images, TiledImages, repeated
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import Writer

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


class Idefics3Images(TiledImages):
    """Details first, the overview last; text stands between them in the prompt."""

    pixel_names = ("pixel_values", "pixel_attention_mask")

    def prepare(self) -> None:
        self._side = int(self.processor.max_image_size["longest_edge"])
        self._longest = int(self.processor.size["longest_edge"])
        self._tokens_per_tile = int(self.model.model.image_seq_len)
        self._whole = math.ceil(self._longest / self._side) if self.processor.do_image_splitting else 1
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


class Idefics2Images(Images):
    """Pictures at their own shape with their mask of real pixels as a fourth channel, ``[n, 4, H, W]``."""

    most_crops = 4
    pixel_names = ("pixel_values", "pixel_attention_mask")

    def prepare(self) -> None:
        self._tokens_per_picture = int(self.model.config.perceiver_config.resampler_n_latents)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops)[:-1]

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        done = self.plain(image, max_crops)
        return torch.cat([done["pixel_values"][0], done["pixel_attention_mask"][0, :, None].float()], dim=1)

    def encode_one(self, pixels: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        values, mask = pixels[None, :, :3], pixels[None, :, 3] > 0
        features = self.model.model.get_image_features(values, pixel_attention_mask=mask).pooler_output[0]
        return features.unflatten(0, (len(pixels), -1))

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"do_image_splitting": max_crops > 1}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        mark = int(self.tokenizer.convert_tokens_to_ids(_FAKE))
        picture = (mark, *(self.placeholder,) * self._tokens_per_picture)
        ids = (*picture * (5 if max_crops > 1 else 1), mark)
        return ImageLayout.of(ids, self.placeholder, (0, 0), (height, width))


class Idefics2(Family):
    name: ClassVar = "Idefics2"
    model_types: ClassVar = ("idefics2",)
    images_type: ClassVar = Idefics2Images
    crop_meaning: ClassVar = "4: `do_image_splitting`, the image's quarters beside it; 1: the image alone"

    def language(self, model: Any) -> Any:
        return model.model.text_model

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        """Return what writes the chat template; a blank parts a word from an image in front of it."""
        return behind_images(
            super().writer(model, tokenizer),
            lambda text: text if text[:1].isspace() or text.startswith("<") else f" {text}",
        )
