"""Images of a request: from a data URL or an allowed host to pixels, each limit checked before the work it limits."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re
import time
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from PIL import Image, ImageFile

from budgetvlm._io import OPENED_FILE, open_image, shortened
from budgetvlm.errors import InputError
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.serve_options import ServeOptions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")  # Pillow's others run programs, or nobody needs
PIECE = 1 << 16
ENCODED_PIECE = 1 << 18  # decoded in about 2 ms
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_log = logging.getLogger(__name__)


class ImageReader:
    """Reads the images of one request.

    Attributes:
        images: those that were read, in order, decoded and in RGB.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._heads: list[ImageFile.ImageFile] = []
        self._pixels = 0

    def add(self, url: str) -> int:
        """Take one more image, of which only the head is read; returns its number. Raises APIError."""
        number, limits = len(self._heads), self._options
        if number == limits.max_images:
            raise _refused(f"more than {limits.max_images} images", "too_many_images", 400)
        head = _opened(_data(url, limits))
        if max(head.size) > limits.max_side:
            raise _refused(f"a side is longer than {limits.max_side:,} pixels: {_size(head)}", "image_too_large", 413)
        self._pixels += head.width * head.height
        if self._pixels > limits.max_pixels:
            raise _refused(
                f"the images have more than {limits.max_pixels:,} pixels, this one {_size(head)}; send smaller ones",
                "image_too_large", 413,
            )  # fmt: skip
        self._heads.append(head)
        return number

    def decoded(self) -> list[Image.Image]:
        """Decode what was taken. Raises APIError."""
        return [_decoded(head) for head in self._heads]


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def _refused(why: str, code: str, status: int) -> APIError:
    return APIError(status, f"an image cannot be taken: {why}", code=code, param="messages")


def _data(url: str, options: ServeOptions) -> bytes:
    """The bytes of an image's file. Raises APIError."""
    found = _DATA_URL.match(url)
    if not found:
        return fetched(url, options)
    try:
        return _unpacked(url, found.end())
    except (binascii.Error, ValueError):
        raise _refused("what follows base64, in the data URL is not base64", "invalid_image_url", 400) from None


def _unpacked(url: str, start: int) -> bytes:
    """Decode base64 in pieces, because other threads wait as long as one takes. Raises binascii.Error."""
    pieces = [
        base64.b64decode(url[at : at + ENCODED_PIECE], validate=True) for at in range(start, len(url), ENCODED_PIECE)
    ]
    if any(len(piece) < ENCODED_PIECE * 3 // 4 for piece in pieces[:-1]):
        raise binascii.Error("padding before the end")
    return b"".join(pieces)


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Read an image's head. Raises APIError."""
    try:
        head = Image.open(io.BytesIO(data), formats=FORMATS)
        setattr(head, OPENED_FILE, data)  # an engine is sent it as it is
        return head
    except Image.DecompressionBombError:
        raise _refused("it is far too large", "image_too_large", 413) from None
    except Exception as error:  # whatever Pillow raises on hostile bytes, it is the image's fault
        _log.info("the head of an image: %r", error)
        raise _refused("it is no PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF image", "invalid_image", 400) from None


def _decoded(head: ImageFile.ImageFile) -> Image.Image:
    try:
        return open_image(head)
    except InputError as error:
        raise _refused(str(error), "invalid_image", 400) from None
    except Exception as error:  # likewise
        _log.info("decoding an image: %r", error)
        raise _refused("it cannot be decoded; it may be damaged", "invalid_image", 400) from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Follow nobody to another host."""


def fetched(url: str, options: ServeOptions) -> bytes:
    """Fetch an image from an allowed host, within its time and the limit of a body. Raises APIError."""
    _require_allowed(url, options)
    opener, end_s = urllib.request.build_opener(_NoRedirect), time.perf_counter() + options.fetch_timeout_s
    data = bytearray()
    try:
        with opener.open(url, timeout=options.fetch_timeout_s) as response:
            while piece := response.read1(PIECE):
                data += piece
                if len(data) > options.max_body:
                    raise _refused(f"its file is larger than {options.max_body:,} bytes", "image_too_large", 413)
                if time.perf_counter() > end_s:
                    raise TimeoutError
    except urllib.request.HTTPError as error:
        raise _refused(f"its host answered with status {error.code}", "image_not_found", 400) from None
    except (OSError, HTTPException, ValueError):
        raise _refused("its host did not send it in time", "image_not_found", 400) from None
    return bytes(data)


def _require_allowed(url: str, options: ServeOptions) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme in ("http", "https") and parts.netloc.lower() in options.allow_hosts:
        return
    if parts.scheme in ("http", "https"):
        why = f"this server fetches nothing from {shortened(parts.netloc)!r}; send the image as a data URL"
    else:
        why = f"{shortened(url, 40)!r} is no data URL such as data:image/png;base64,..."
    raise _refused(why, "invalid_image_url", 400)
