"""Reading and writing of files: written aside and renamed, so that they are whole or absent; checked when read."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from budgetvlm.errors import BudgetVLMError, DataError, InputError, OutputError

ROUNDING = 1e-9  # share of a number that is rounding
DEEP_GREYS = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
OPENED_FILE = "opened_file"  # attribute of an image: the contents of the file that it was opened from
PAGED = ("TIFF", "GIF", "PNG", "WEBP")  # formats of several pages or frames; what a phone's MPO has more is a preview


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any failure it is removed.

    Raises:
        OutputError: the directory cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o644)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half-written. "
            "Free some space or choose a writable directory."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; as `atomic_path` of a whole directory, which may replace another.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        made, before = aside / path.name, aside / "before"
        try:
            made.mkdir()
            yield made
            if path.exists():
                os.replace(path, before)
            os.replace(made, path)
        finally:
            if before.exists() and not path.exists():
                os.replace(before, path)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if isinstance(error, BudgetVLMError):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half-written. "
            "Free some space or choose a writable directory."
        ) from error


def require_writable(directory: Path, flag: str) -> None:
    """Make a directory and raise OutputError where nothing can be written into it: before hours of work, not after.

    Args:
        flag: what the user gave the directory with.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory}: {error.strerror or error}; give a writable directory as {flag}"
        ) from error


def write_json(path: str | Path, document: Any) -> None:
    """Write a JSON document whole or not at all. NaN and infinity are refused (ValueError)."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=None)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def reading_text(path: Path) -> Iterator[TextIO]:
    """Yield a file opened as UTF-8, with or without a byte order mark. Raises DataError, naming another encoding."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not written in UTF-8 but in {_encoding(path)}. Save it as UTF-8, for example with "
            "iconv -f ENCODING -t UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines with their lines' numbers. Raises DataError, naming the line."""
    with reading_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({str(error)[:80]}). The file needs an object a line; it may be "
                    "truncated."
                ) from None
            if not isinstance(found, dict):
                raise DataError(f"{path}, line {number}: a line has to be an object with named fields")
            yield number, found


def _encoding(path: Path) -> str:
    """Say in which encoding a file that is not UTF-8 seems to be."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4:
        return "UTF-16"
    return "another encoding, probably Latin-1 or Windows-1252"


def header_text(header: Any, what: str) -> str:
    """Return a file's header as JSON. Raises DataError: it is not, which only the metadata of ``what`` can cause."""
    try:
        return json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the metadata of the {what} cannot be stored as JSON: {error}") from None


def check_schema(path: Path, header: Any, version: int) -> None:
    """Raise DataError unless a file's header has the schema version that this version reads."""
    found = header.get("schema_version")
    if found != version:
        raise DataError(f"{path} has schema version {found}; this version reads {version}. Make it again.")


def read_json(path: str | Path) -> Any:
    """Read a JSON document. Raises DataError: the file is missing, unreadable, not JSON, or truncated."""
    path = Path(path)
    try:
        with reading_text(path) as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); it may be truncated. Remove it and make it again."
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as every model here sees it: upright, on white, in RGB of 8 bits.

    An image that is so already is returned itself: copying a large one takes longer than a small model.

    Raises:
        InputError: it is not an image, it is empty, it has several pages, or its data cannot be decoded.
    """
    if not isinstance(image, Image.Image):
        raise InputError(
            f"an image is needed (PIL.Image.Image); given {type(image).__name__}. Open the file with PIL first."
        )
    if 0 in image.size:
        raise InputError(
            f"the image is empty: {image.width} x {image.height} pixels. Give one with at least one pixel."
        )
    try:
        if isinstance(image, ImageFile.ImageFile):
            _require_one_page(image)
            image.load()
        if image.info or type(image) is not Image.Image:  # the tag stays with copies of an opened file
            image = _upright(image)
        if image.mode in DEEP_GREYS:
            return _eight_bits(image)
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the image cannot be decoded ({error}); it may be truncated. Save it again as PNG."
        ) from error


def _require_one_page(image: ImageFile.ImageFile) -> None:
    pages = getattr(image, "n_frames", 1) if image.format in PAGED else 1
    if pages > 1 and image.tell() == 0:
        raise InputError(
            f"it holds {pages} pages or frames, and a question is about one image. Save the one that is meant as a "
            "file of its own, or give a copy of it (image.seek(n), image.copy())."
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF tag says; without one it is returned itself."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys that are deeper than a byte, on white where they are transparent.

    White is the largest number of the fewest bits (8, 12 or 16) that hold all values, as cameras and scanners fill
    them; it is 1 for fractions. Values beyond these scales are stretched from their smallest to their largest.
    """
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has values that are no numbers")
    black, most = 0.0, grey.max()
    white = next((w for w in (255.0, 4095.0, 65535.0) if most <= w), most)
    if image.mode == "F" and most <= 1:
        white = 1.0
    if grey.min() < 0 or most > 65535:
        black, white = grey.min(), max(most, grey.min() + 1)
    shades = np.rint((grey - black) / (white - black) * 255).astype(np.uint8)
    if "transparency" in image.info:
        shades[grey == image.info["transparency"]] = 255
    return Image.fromarray(shades).convert("RGB")


def open_image(image: str | Path | bytes | Image.Image) -> Image.Image:
    """Return the decoded image of a file or its contents, or an image, as `to_rgb` does.

    Raises:
        InputError: the file is missing, no image, truncated, too large to be decoded safely, or of several pages.
    """
    if isinstance(image, Image.Image):
        return _decoded(image, "the image")
    if not isinstance(image, str | Path | bytes):
        raise InputError(f"an image is needed: a file's name or a PIL image; given {type(image).__name__}")
    name = f"data of {len(image)} bytes" if isinstance(image, bytes) else shortened(str(image))
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            setattr(opened, OPENED_FILE, image if isinstance(image, bytes) else Path(image).read_bytes())
            return _decoded(opened, name)
    except FileNotFoundError:
        raise InputError(f"the image {name!r} does not exist. Check the name.") from None
    except UnidentifiedImageError:
        raise InputError(f"{name!r} is not an image that Pillow knows; give a PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name!r} is too large ({error}); make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else error  # without the whole name
        raise InputError(f"the image {name!r} cannot be read ({why}); give another or save it again") from None


def shortened(text: str, most: int = 80) -> str:
    """Return a text that fits into a message."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """Return 'a, b, c and 7 more', for error messages."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def time_unit(longest_ms: float) -> tuple[str, float]:
    """Return the unit that times are written in, and what turns ms into it: ms below a second, seconds above."""
    return ("s", 1e-3) if longest_ms >= 999.95 else ("ms", 1.0)


def time_numbers(*times_ms: float) -> tuple[list[str], str]:
    """Return times as numbers of one unit, with digits that fit the longest of them, and the unit."""
    longest = max(map(abs, times_ms))
    unit, scale = time_unit(longest)
    longest *= scale
    digits = (2 if longest < 9.995 else 1 if longest < 99.95 else 0) if unit == "s" else 1 if longest >= 1 else 3
    if unit == "ms" and all(round(time_ms, digits) == round(time_ms) for time_ms in times_ms):  # as somebody gave them
        digits = 0
    return [f"{time_ms * scale:.{digits}f}" for time_ms in times_ms], unit


def time_text(*times_ms: float, between: str = " ±") -> str:
    """Return times with their unit: "52.3 ms", "8.81 ±0.12 s"; never with an exponent."""
    numbers, unit = time_numbers(*times_ms)
    return f"{between.join(numbers)} {unit}"


def time_text_up(time_ms: float) -> str:
    """Return a time as `time_text` does, rounded up, so that who gives what was written gives no less."""
    (number,), _ = time_numbers(time_ms)
    step = 10.0 ** -len(number.partition(".")[2]) / time_unit(time_ms)[1]
    return time_text(math.ceil(time_ms / step - ROUNDING) * step)


def file_of(image: Image.Image) -> tuple[str, bytes] | None:
    """Return format and contents of the file that an image shows as it is; None: it was changed, or never was one."""
    data = getattr(image, OPENED_FILE, None)
    return (str(image.format), data) if data is not None and image.readonly else None


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        rgb = to_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if rgb is image and hasattr(image, OPENED_FILE):
        image.readonly = 1  # Pillow takes this mark away before it changes anything
    return rgb
