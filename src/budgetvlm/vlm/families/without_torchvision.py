"""Image processors that Transformers has for torchvision alone: their settings and torchvision's resizing.

torchvision's resizing of tensors is `torch.nn.functional.interpolate`. Pixels are the same to the bit (tested).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from budgetvlm._io import read_json, to_rgb
from budgetvlm.errors import ConfigError, DataError

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, as `resample` in preprocessor_config.json


@dataclass(frozen=True)
class TileProcessor:
    """An image processor that cuts tiles: the same pixels as Transformers' own, which needs torchvision.

    Attributes:
        side: of a tile, in pixels.
        title: what messages call it.
        resamples: the ways of resizing that it knows.
        keys: field -> its name in the model's files, where that is another.
    """

    side: int = 336
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    title: ClassVar[str]
    resamples: ClassVar[tuple[int, ...]] = (BILINEAR,)
    keys: ClassVar[dict[str, str]]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the settings in a model's directory. Raises ConfigError: they ask for what is not done here."""
        settings = _read_settings(directory, cls.title, cls.resamples)
        settings["side"] = (settings.get("size") or {}).get("height")
        keys = {field.name: field.name for field in fields(cls)} | {"mean": "image_mean", "std": "image_std"} | cls.keys
        given = {name: settings[key] for name, key in keys.items() if settings.get(key) is not None}
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return cls(**frozen)


def _read_settings(directory: Path, name: str, resamples: tuple[int, ...]) -> dict[str, Any]:
    """Read settings from preprocessor_config.json, or processor_config.json in newer models. Raises ConfigError."""
    old, new = directory / "preprocessor_config.json", directory / "processor_config.json"
    try:
        settings = read_json(old) if old.is_file() else read_json(new)["image_processor"]
    except (DataError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} has no settings of {name} in {old.name} or {new.name} ({error})") from None
    sides = settings.get("size") or {}
    if settings.get("resample", resamples[0]) not in resamples or sides.get("height") != sides.get("width"):
        raise ConfigError(
            f"{name} of {directory} has resample={settings.get('resample')}, size={sides}; only "
            f"{' and '.join(map(str, resamples))} (2: bilinear, 3: bicubic) and square tiles are known"
        )
    return {**(read_json(new) if new.is_file() else {}), **settings}


class InPlace:
    """What a model's own processor takes for its image processor, with the settings that it asks for."""

    def __init__(self, make: Callable[[Image.Image], dict[str, Any]], **settings: Any) -> None:
        self._make = make
        vars(self).update(settings)

    def fetch_images(self, images: Any) -> Any:
        """Return the images, which are there already."""
        return images

    def __call__(self, images: Any, **options: Any) -> dict[str, Any]:
        made = [self._make(image) for one in images for image in (one if isinstance(one, list) else [one])]
        values = {name: [done[name] for done in made] for name in made[0]}
        return {k: torch.cat(v) if torch.is_tensor(v[0]) else [*chain.from_iterable(v)] for k, v in values.items()}


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return colours ``[3, H, W]``, uint8."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def resized(
    pixels: torch.Tensor, height: int, width: int, *, antialias: bool, resample: int = BILINEAR
) -> torch.Tensor:
    """Resize colours to ``[3, height, width]``, of the type that was given."""
    mode = "bicubic" if resample == BICUBIC else "bilinear"
    return interpolate(pixels[None], (height, width), mode=mode, align_corners=False, antialias=antialias)[0]


def cells(whole: torch.Tensor, side: int) -> torch.Tensor:
    """Cut colours ``[3, H, W]`` into tiles row by row, ``[n, 3, side, side]``."""
    return whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def least_change(side: int, height: int, width: int, most: int, *, largest: bool = False) -> tuple[int, int]:
    """Return rows and columns of tiles into which an image fits enlarged least, or else shrunk least; then the fewest.

    With ``largest`` it is the grid that enlarges most instead.
    """
    scales = {
        (rows, columns): min(rows * side / height, columns * side / width)
        for rows in range(1, most + 1)
        for columns in range(1, most // rows + 1)
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = max(scales.values()) if largest or not enlarging else min(enlarging)
    return min((shape for shape, scale in scales.items() if scale == best), key=math.prod)
