"""What image processors need that Transformers has for torchvision alone: its resizing, and where a size is written.

torchvision's resizing of tensors is `torch.nn.functional.interpolate`. Pixels are the same to the bit (tested).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from budgetvlm._io import read_json, to_rgb
from budgetvlm.errors import ConfigError, DataError

BILINEAR = 2  # Pillow's number, as `resample` in preprocessor_config.json


def read_processor(directory: Path, name: str) -> dict[str, Any]:
    """Read an image processor's settings from preprocessor_config.json, or processor_config.json in newer models.

    Raises:
        ConfigError: there is none, it cannot be read, or it asks for what is not done here.
    """
    old, new = directory / "preprocessor_config.json", directory / "processor_config.json"
    try:
        settings = read_json(old) if old.is_file() else read_json(new)["image_processor"]
    except (DataError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} has no settings of {name} in {old.name} or {new.name} ({error})") from None
    sides = settings.get("size") or {}
    if settings.get("resample", BILINEAR) != BILINEAR or sides.get("height") != sides.get("width"):
        raise ConfigError(
            f"{name} of {directory} has resample={settings.get('resample')}, size={sides}; only {BILINEAR} (bilinear) "
            "and square tiles are known"
        )
    return dict(settings)


def read_more(directory: Path) -> dict[str, Any]:
    """Return what processor_config.json says beside the image processor; {} where it is missing."""
    path = directory / "processor_config.json"
    return dict(read_json(path)) if path.is_file() else {}


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return colours ``[3, H, W]``, uint8."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def resized(pixels: torch.Tensor, height: int, width: int, *, antialias: bool) -> torch.Tensor:
    """Resize colours to ``[3, height, width]``, of the type that was given."""
    return interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False, antialias=antialias)[0]
