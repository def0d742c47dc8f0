"""Dense labels: what lies under each 8-pixel position of each tile, as far as it can be read at that tiling.

Five labels a position, 0 meaning nothing: character (1..20), its place in the code (1..3), the plate's colour (1..7),
the shape (1..5), the shape's colour (1..7). Arrays are int8 ``[tiles, 8, 8, 5]``, tiles in the processor's order.
"""

from __future__ import annotations

import numpy as np
import torch

from budgetvlm.tasks import signs

from .build import TILE

CHARS = "0123456789" + signs.LETTERS
SIZES = (len(CHARS), 3, len(signs.COLOURS), len(signs.SHAPES), len(signs.COLOURS))
GRIDS = {1: (1, 1), 4: (2, 2), 12: (4, 3)}
CELL = 8
READABLE = 5.2  # a character narrower than this many tile pixels cannot be told from its neighbours
UNREADABLE = -1
_COLOUR = {name: i + 1 for i, name in enumerate(signs.COLOURS)}


def num_tiles(max_crops: int) -> int:
    """Tiles of a picture, the overview included."""
    columns, rows = GRIDS[max_crops]
    return columns * rows + (max_crops > 1)


def tile_labels(scene: signs.Scene, max_crops: int) -> np.ndarray:
    """Labels of all tiles of a scene, the overview last; unreadable characters are `UNREADABLE`."""
    columns, rows = GRIDS[max_crops]
    canvas = _canvas_labels(scene, columns, rows)
    tiles = canvas.reshape(rows, CELL, columns, CELL, 5).swapaxes(1, 2).reshape(-1, CELL, CELL, 5)
    if max_crops == 1:
        return tiles
    return np.concatenate([tiles, _canvas_labels(scene, 1, 1)[None]])


def _canvas_labels(scene: signs.Scene, columns: int, rows: int) -> np.ndarray:
    width, height = columns * CELL, rows * CELL
    sx, sy = width / signs.WIDTH, height / signs.HEIGHT
    labels = np.zeros((height, width, 5), np.int8)
    for shape in scene.shapes:
        y, x = _cells(shape.box, sx, sy, 0.3, labels)
        labels[y, x, 3] = signs.SHAPES.index(shape.name) + 1
        labels[y, x, 4] = _COLOUR[shape.colour]
    best = np.zeros((height, width))
    for sign in scene.signs:
        y, x = _cells(sign.box, sx, sy, 0.3, labels)
        labels[y, x, 2] = _COLOUR[sign.colour]
        for place, (char, box) in enumerate(zip(sign.code, sign.char_boxes, strict=True)):
            readable = (box[2] - box[0]) * sx * TILE / CELL >= READABLE
            cover = _cover(box, sx, sy, labels)
            wins = (cover > best) & (cover > 0.2)
            best[wins] = cover[wins]
            labels[wins, 0] = CHARS.index(char) + 1 if readable else UNREADABLE
            labels[wins, 1] = place + 1 if readable else UNREADABLE
    return labels


def _cover(box: tuple[float, ...], sx: float, sy: float, labels: np.ndarray) -> np.ndarray:
    """Share of each position that a box covers, or of the box that lies in it, whichever is larger, ``[H, W]``."""
    x0, y0, x1, y1 = box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy
    xs, ys = np.arange(labels.shape[1]), np.arange(labels.shape[0])
    dx = np.clip(np.minimum(x1, xs + 1) - np.maximum(x0, xs), 0, None)
    dy = np.clip(np.minimum(y1, ys + 1) - np.maximum(y0, ys), 0, None)
    area = dy[:, None] * dx[None]
    return np.maximum(area, area / ((x1 - x0) * (y1 - y0)))


def _cells(box: tuple[float, ...], sx: float, sy: float, least: float, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    cover = _cover(box, sx, sy, labels)
    return np.nonzero(cover >= min(least, cover.max()))


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """Labels ``[..., 8, 8, 5]`` -> visual tokens' contents ``[..., 16, 4 * 42]``; unreadable characters vanish.

    The four positions of a token are ordered as InternVL's pixel shuffle orders them: by row, then by column.
    """
    labels = labels.clamp(min=0).long()
    parts = [torch.nn.functional.one_hot(labels[..., i], n + 1)[..., 1:] for i, n in enumerate(SIZES)]
    cells = torch.cat(parts, dim=-1).float()
    lead, width = cells.shape[:-3], cells.shape[-1]
    cells = cells.reshape(*lead, 4, 2, 4, 2, width).transpose(-4, -3)
    return cells.reshape(*lead, 16, 4 * width)
