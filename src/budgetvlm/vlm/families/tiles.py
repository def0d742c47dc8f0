"""What the families that cut an image into tiles of one size have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

TILES_AT_ONCE = 256  # bounds the memory of the vision tower in a batch


def encode_tiles(
    features: Callable[[torch.Tensor], torch.Tensor], pixels: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """Features ``[n_i, T, C]`` of several images' tiles ``[n_i, 3, H, W]``, encoded together."""
    chunks = torch.cat(list(pixels)).split(TILES_AT_ONCE)
    per_tile = torch.cat([features(chunk.to(device)) for chunk in chunks])
    return list(per_tile.split([len(tiles) for tiles in pixels]))
