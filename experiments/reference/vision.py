"""The vision tower's own lessons: dense labels on tiles of scenes and on walls of text."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from budgetvlm.tasks import signs

from .build import TILE, build_image_processor
from .labels import SIZES, tile_labels

_PROCESSOR = build_image_processor()


def pixels(image: Image.Image, max_crops: int) -> np.ndarray:
    """Tiles as the model will see them, uint8-exact floats ``[tiles, 3, 64, 64]``, the overview last."""
    out = _PROCESSOR(image, max_patches=max_crops, return_tensors="np")
    return np.asarray(out["pixel_values"], dtype=np.float32)


class DenseHeads(nn.Module):
    """Five linear classifiers on the tower's 8 x 8 positions; thrown away after the lesson."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, n + 1) for n in SIZES])

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """``[B, 64, C]`` -> one ``[B, 64, n + 1]`` a label."""
        return [head(hidden) for head in self.heads]


def dense_loss(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over positions; unreadable characters are left out, empty positions count a fifth.

    Args:
        labels: int ``[B, 8, 8, 5]``.
    """
    total = torch.zeros(())
    for i, logit in enumerate(logits):
        target = labels[..., i].flatten(1).long()
        weight = torch.where(target > 0, 1.0, 0.2) * (target >= 0)
        loss = F.cross_entropy(logit.flatten(0, 1), target.clamp(min=0).flatten(), reduction="none")
        total = total + (loss * weight.flatten()).sum() / weight.sum()
    return total


def dense_accuracy(logits: list[torch.Tensor], labels: torch.Tensor) -> list[float]:
    """Share of non-empty positions that are right, for each label."""
    out = []
    for i, logit in enumerate(logits):
        target = labels[..., i].flatten(1).long()
        there = target > 0
        out.append(float((logit.argmax(-1) == target)[there].float().mean()) if there.any() else float("nan"))
    return out


def crowded_scene(rng: np.random.Generator) -> signs.Scene:
    """A scene with as many signs as fit: more to read for the price of one picture."""
    difficulty = signs.DIFFICULTIES[rng.choice(3, p=(0.35, 0.25, 0.4))]
    low, count = signs.FONT_SIZES[difficulty][0], {"large": 6, "medium": 14, "small": 30}[difficulty]
    taken: list[tuple[float, float, float, float]] = []
    placed = []
    for _ in range(count):
        letter, number = signs.LETTERS[rng.integers(10)], int(rng.integers(100))
        colour = list(signs.COLOURS)[rng.integers(len(signs.COLOURS))]
        sign = signs._place_sign(rng, colour, f"{letter}{number:02d}", difficulty, taken)
        if sign is not None:
            placed.append(sign)
            taken.append(sign.box)
    shapes = signs._place_shapes(rng, taken) if rng.random() < 0.5 else ()
    return signs.Scene(difficulty, tuple(placed), shapes, int(rng.integers(2**40) + low))


# Shares of the scenes in this lesson; small print takes the most practice.
LESSON_SHARES = (0.5, 0.22, 0.28)
READABLE_AT = {"large": (1, 4, 12), "medium": (4, 12), "small": (12,)}


def _scene(seed: int) -> signs.Scene:
    """A scene of the task, its difficulty by `LESSON_SHARES`."""
    return signs.make_scene(seed, signs.DIFFICULTIES[np.random.default_rng(seed).choice(3, p=LESSON_SHARES)])


def lesson(rng: np.random.Generator, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of tiles with something to read: pixels ``[B, 3, 64, 64]`` and labels ``[B, 8, 8, 5]``."""
    pictures, labels, count = [], [], 0
    while count < tiles:
        scene = crowded_scene(rng) if rng.random() < 0.7 else _scene(int(rng.integers(2**50)))
        options = READABLE_AT[scene.difficulty]
        crops = int(rng.choice(options)) if rng.random() < 0.9 else int(rng.choice((1, 4, 12)))
        y = tile_labels(scene, crops)
        x = pixels(signs.draw(scene), crops)
        busy = np.flatnonzero((y > 0).any(axis=(1, 2, 3)))
        keep = rng.permutation(busy)[:6]
        if len(keep) == 0:
            continue
        pictures.append(x[keep])
        labels.append(y[keep])
        count += len(keep)
    x, y = np.concatenate(pictures)[:tiles], np.concatenate(labels)[:tiles]
    assert x.shape[1:] == (3, TILE, TILE)
    return torch.from_numpy(x), torch.from_numpy(y)
