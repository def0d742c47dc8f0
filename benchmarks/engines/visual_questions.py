"""A folder of images with questions, several to an image as in VQA sets, for runs against engines.

The images have sizes as photographs and screenshots have them. What counts as the right answer is the caller's: with
those of the full setting, the accuracy of a setting is the share of questions at which it agrees with the full one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (640, 480), (480, 640), (800, 600), (512, 512), (448, 224), (224, 448), (333, 500), (1024, 768), (250, 120)
ABOUT = "code total date name price shop street title colour number".split()
WHERE = ("in red", "at the top", "on the left", "of the largest box")

Answer = Callable[[Path, str], str]


def size_of(number: int) -> tuple[int, int]:
    """Return width and height of an image."""
    return SIZES[number % len(SIZES)]


def picture(number: int) -> Image.Image:
    """Return an image of coarse random colours."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size_of(number), Image.Resampling.BICUBIC)


def jpeg(number: int) -> bytes:
    """Return an image as the contents of a file."""
    file = io.BytesIO()
    picture(number).save(file, "JPEG", quality=90)
    return file.getvalue()


def questions(number: int, per_image: int) -> Iterator[str]:
    """Yield different questions about an image."""
    for i in range(per_image):
        about = ABOUT[(number + i) % len(ABOUT)]
        yield f"what is the {about} {WHERE[(number * per_image + i) % len(WHERE)]}"


def write_folder(
    directory: Path, numbers: Sequence[int], *, per_image: int = 3, answer: Answer = lambda *_: "a"
) -> Path:
    """Write the images of these numbers and `metadata.jsonl`; ``answer`` is asked for each question's answer."""
    directory.mkdir(parents=True)
    with (directory / "metadata.jsonl").open("w") as lines:
        for number in numbers:
            path = directory / f"{number:05d}.jpg"
            path.write_bytes(jpeg(number))
            for question in questions(number, per_image):
                row = {"file_name": path.name, "question": question, "answers": [answer(path, question)]}
                lines.write(json.dumps(row) + "\n")
    return directory
