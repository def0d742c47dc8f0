"""What an engine is sent: chat messages with their images inside, as their files are, or lossless."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from budgetvlm._io import file_of, to_rgb
from budgetvlm.vlm import Conversation
from budgetvlm.vlm.prompt import IMAGE, one_question

REDRAWN = 8  # pixels of an image whose lowest bits are drawn anew
SENT_AS_THEY_ARE = {"JPEG", "PNG", "WEBP"}  # formats that every engine reads


Size = tuple[int, int]
Writer = Callable[[Image.Image, Size | None, str], str]
"""From an image, the width and height at which it is to be sent (None: its own) and a format without loss to an address
that holds it."""


def data_url(image: Image.Image, size: Size | None = None, lossless: str = "PNG") -> str:
    """Write an image into an address: its file as it is, where there is one, or else in a format without loss."""
    kind, data = (file_of(image) if size is None else None) or ("", b"")
    if kind not in SENT_AS_THEY_ARE:
        file = io.BytesIO()
        # other levels of compression take several times as long for files a tenth smaller
        _scaled(image, size).save(file, lossless, **({"compress_level": 1} if lossless == "PNG" else {}))
        kind, data = lossless, file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def fresh_data_url(image: Image.Image, size: Size | None = None, lossless: str = "PNG") -> str:
    """Do as `data_url` for an image that no cache of an engine knows."""
    return data_url(redrawn(_scaled(image, size)), None, lossless)


def redrawn(image: Image.Image) -> Image.Image:
    """Copy an image with the lowest bits of some pixels drawn anew, so that no cache of an engine knows it."""
    copy = to_rgb(image).copy()
    for _ in range(REDRAWN):
        at = random.randrange(copy.width), random.randrange(copy.height)
        bits = random.getrandbits(3)
        pixel: Any = copy.getpixel(at)
        copy.putpixel(at, tuple(shade ^ (bits >> i & 1) for i, shade in enumerate(pixel)))
    return copy


def _scaled(image: Image.Image, size: Size | None) -> Image.Image:
    """Scale an image as the processors of families do that are steered by its size."""
    rgb = to_rgb(image)
    return rgb if size is None else rgb.resize(size, Image.Resampling.BICUBIC)


def messages_of(question: str | Conversation, urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return chat messages as engines read them, with the addresses of their images in order."""
    turns = question.turns if isinstance(question, Conversation) else one_question(question)
    left = iter(urls)

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(left)}} if one == IMAGE else one

    return [{"role": turn["role"], "content": [part(one) for one in turn["content"]]} for turn in turns]
