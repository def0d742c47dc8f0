"""An image as numbers without a model: its size, brightness, edges and a small grey copy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from budgetvlm._io import open_image

SIDE, THUMBNAIL = 128, 8  # of the grey copy on which edges are counted, and of the one that is kept
EDGE = 0.1  # step between neighbours, of the range from black to white, that is an edge
NUM_MEASURES = 9
NUM_STATISTICS = NUM_MEASURES + THUMBNAIL**2


def image_statistics(image: str | Path | bytes | Image.Image) -> np.ndarray:
    """Return log width, height and pixels, log aspect, brightness, contrast, edges, and the copy's shades.

    Returns:
        float32 ``[NUM_STATISTICS]``, the measures before the shades.

    Raises:
        InputError: no image, or one that cannot be read.
    """
    picture = open_image(image)
    width, height = picture.size
    grey = np.asarray(_small_grey(picture), np.float32) / 255
    steps = [np.abs(np.diff(grey, axis=axis)) for axis in (0, 1)]
    edges = [np.mean(one > EDGE) for one in steps]
    block = SIDE // THUMBNAIL
    shades = grey.reshape(THUMBNAIL, block, THUMBNAIL, block).mean(axis=(1, 3))
    sizes = (math.log(width), math.log(height), math.log(width * height), math.log(width / height))
    measures = (*sizes, grey.mean(), grey.std(), *edges, np.mean([one.mean() for one in steps]))
    return np.array([*measures, *shades.ravel()], np.float32)


def _small_grey(picture: Image.Image) -> Image.Image:
    """Return a grey copy of ``SIDE`` pixels each way; a large image is first made smaller by a whole number."""
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0).convert("L")
