#!/usr/bin/env bash
# An expert would say: engines ask an image processor's `get_number_of_image_patches` how many tiles, and so how many
# image tokens, a picture of this size will take, without making them; the processor's own count is the one that it
# then cuts, for any limit of size that it accepts.
#
# What happens (transformers 5.23.0, Idefics3 and SmolVLM): the limit `size["longest_edge"]` may be any number. Where
# it is a multiple of a tile, as in public checkpoints, promise and tiles agree for all pictures. Where it is not, the
# promise is short for many: the cutter enlarges the longer side to whole tiles first and the shorter side with it, the
# promise rounds the shorter side as it was before. At 3.8 tiles 330 x 434 pixels are promised as 12 + 1, cut as 16 + 1.
# The promise is never too large, so memory and placeholders reserved by it do not suffice. No error is raised here.
#
# For users of this project: the knob `max_crops` lowers `longest_edge`. The family `budgetvlm.vlm.families.idefics`
# asks the code that cuts instead of the promise, and its layouts are compared with the processor at such limits
# (tests/test_families.py).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 pillow==13.0.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" - <<'PY'
import random, sys
import transformers
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

transformers.logging.set_verbosity_error()
TILE = 16  # small, so that many pictures take little time; only the ratio to `longest_edge` matters
numbers = random.Random(0)
SIZES = [(330, 434), *((numbers.randint(20, 500), numbers.randint(20, 500)) for _ in range(150))]


def counts(cls, longest, width, height):
    processor = cls(size={"longest_edge": longest}, max_image_size={"longest_edge": TILE})
    tiles = processor([[Image.new("RGB", (width, height))]], return_tensors="np")["pixel_values"].shape[1]
    return processor.get_number_of_image_patches(height, width)[0], tiles


print("transformers", transformers.__version__)
print("expected: tiles promised are tiles cut. Seen:")
holds = True
for cls in (Idefics3ImageProcessorPil, SmolVLMImageProcessorPil):
    for tiles in (4, 3.8, 3.5, 3.2):
        found = [counts(cls, int(tiles * TILE), *size) for size in SIZES]
        found = [(max(promised, 1), cut) for promised, cut in found]
        short, long = sum(a < b for a, b in found), sum(a > b for a, b in found)
        print(f"  {cls.__name__}, longest_edge of {tiles} tiles: too few promised for {short} of {len(SIZES)} pictures,"
              f" too many for {long}; 330 x 434: {found[0][0]} promised, {found[0][1]} cut")
        holds &= long == 0 and ((short == 0) if tiles == 4 else short > 10)
print("as described" if holds else "CHANGED")
sys.exit(not holds)
PY
