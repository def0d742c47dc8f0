"""A memory of encoded pictures: checks ask for the same tiles many times, and encoding them is most of their time.

Shapes: n tiles, T tokens, C channels of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch

from budgetvlm.vlm.families.base import Images, TiledImages
from budgetvlm.vlm.prompt import ImageLayout


class EncodedOnce:
    """Within a ``with`` block, what was encoded before comes from memory: single tiles, or whole pictures."""

    def __init__(self, images: Images) -> None:
        self._images, self._renews = images, False
        self._name = "encode_tiles" if isinstance(images, TiledImages) else "encode"
        self._encode = getattr(images, self._name)
        self._seen: dict[Hashable, torch.Tensor] = {}

    def __enter__(self) -> EncodedOnce:
        setattr(self._images, self._name, self._tiles if self._name == "encode_tiles" else self._pictures)
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self._images, self._name)

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Encode everything anew for a ``with`` block, so that it can be timed, and remember it."""
        self._renews = True
        try:
            yield
        finally:
            self._renews = False

    def _tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return features of tiles ``[n, ...]``, ``[n, T, C]``."""
        keys = [_digest(tile) for tile in tiles]
        return torch.stack(self._remembered(keys, lambda new: self._encode(tiles[new])))

    def _pictures(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        keys = [(_digest(one), layout.grid) for one, layout in zip(pixels, layouts, strict=True)]
        return self._remembered(keys, lambda new: self._encode([pixels[i] for i in new], [layouts[i] for i in new]))

    def _remembered(
        self, keys: Sequence[Hashable], encode: Callable[[list[int]], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        new = [i for i, key in enumerate(keys) if self._renews or key not in self._seen]
        if new:
            self._seen.update(zip([keys[i] for i in new], encode(new), strict=True))
        return [self._seen[key] for key in keys]


def _digest(pixels: torch.Tensor | Mapping[str, torch.Tensor]) -> bytes:
    parts = pixels.values() if isinstance(pixels, Mapping) else [pixels]
    held = b"".join(part.float().cpu().contiguous().numpy().tobytes() for part in parts)
    return blake2b(held, digest_size=16).digest()
