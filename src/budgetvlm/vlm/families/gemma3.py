"""Gemma 3: the whole image, and crops of it where it is oblong ("pan and scan").

Visual tokens of one crop see each other in both directions, at reading only. The image itself is always encoded first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.chat_template import behind_images
from budgetvlm.vlm.families.base import Family, TiledImages, repeated
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import Writer

BREAK = "\n\n"  # in front of an image and behind it

# the values of the model's authors, for processors that name none
PAN_AND_SCAN = {
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class Gemma3Images(TiledImages):
    """The image first, then its crops; words stand between them in the prompt."""

    overview_first = True

    def prepare(self) -> None:
        self._options = {name: getattr(self.processor, name, None) or value for name, value in PAN_AND_SCAN.items()}
        self._tokens_per_crop = int(self.model.config.mm_tokens_per_image)
        self.most_crops = int(self._options["pan_and_scan_max_num_crops"])

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops)[1:] if self._crops(image.height, image.width, max_crops) else torch.empty(0)

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        scan = {**self._options, "pan_and_scan_max_num_crops": max_crops} if max_crops > 1 else {}
        return {"do_pan_and_scan": max_crops > 1, **scan}

    def _crops(self, height: int, width: int, max_crops: int) -> int:
        """Return the number of crops beside the image."""
        if max_crops == 1:
            return 0
        blank = torch.empty(3, 1, 1).expand(3, height, width).numpy()  # only its shape is looked at
        return len(self.processor.pan_and_scan(blank, **self._options | {"pan_and_scan_max_num_crops": max_crops}))

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        """Return what the processor writes for an image: one mark, or words around the image and its crops."""
        crops, t = self._crops(height, width, max_crops), self.tokenizer
        start, end = (
            t.convert_ids_to_tokens(getattr(self.model.config, f"{side}_token_index")) for side in ("boi", "eoi")
        )
        one = f"{start}{t.convert_ids_to_tokens(self.placeholder)}{end}"
        words = f"{one}{BREAK} and here are some crops to help you see better {BREAK}" if crops else one
        short = t.encode(words + f"{BREAK} {BREAK}".join([one] * crops), add_special_tokens=False)
        ids = repeated(short, self.placeholder, self._tokens_per_crop)
        layout = ImageLayout.of(ids, self.placeholder, (1, crops), (height, width))
        return replace(layout, lead=f"Here is the original image {BREAK}" if crops else BREAK)


def with_break(write: Writer) -> Writer:
    """Return what writes the same, with the break that the processor writes behind an image."""
    return behind_images(write, lambda text: BREAK + text)


class Gemma3Inputs(BothWaysInputs):
    create_masks = "transformers.models.gemma3.modeling_gemma3:create_masks_for_vision_model"


class Gemma3(Family):
    name: ClassVar = "Gemma 3"
    model_types: ClassVar = ("gemma3",)
    by_place: ClassVar = True
    inputs_type: ClassVar = Gemma3Inputs
    images_type: ClassVar = Gemma3Images
    type_ids: ClassVar = "token_type_ids"
    crop_meaning: ClassVar = "`pan_and_scan_max_num_crops` beside the whole image; 1: none"

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        return with_break(super().writer(model, tokenizer))

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return str(tokenizer.convert_ids_to_tokens(model.config.boi_token_index))
