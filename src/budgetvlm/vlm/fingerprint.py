"""A digest by which a model is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path

FINGERPRINTED = (".json", ".safetensors", ".model", ".txt", ".jinja")
PIECES, PIECE = 64, 1 << 19  # of a file: how many, and their bytes


def model_fingerprint(model_directory: Path) -> str:
    """Return a short digest of what features depend on: configuration, processor, tokenizer, weights.

    Of a file above 32 MB the size and `PIECES` spread evenly over it count, so that large weights cost no time and a
    fine-tune that leaves some layers alone is still another model.
    """
    digest = hashlib.sha256()
    for path in sorted(model_directory.iterdir()):
        if path.suffix in FINGERPRINTED and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for number in range(PIECES):
                    start = number * PIECE if size <= PIECES * PIECE else number * (size - PIECE) // (PIECES - 1)
                    file.seek(start)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]
