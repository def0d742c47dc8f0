"""Idefics2: the whole image, and its four quarters in front of it where it is split.

max_crops          1: the image alone; 4: `do_image_splitting`
top_k              routers of the language model, where it has any
num_active_blocks  which decoder layers the language model's list holds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, Images
from budgetvlm.vlm.prompt import ImageLayout, Writer

_FAKE = "<fake_token_around_image>"


class Idefics2Images(Images):
    """Pictures at their own shape with their mask of real pixels as a fourth channel, ``[n, 4, H, W]``."""

    most_crops = 4
    pixel_names = ("pixel_values", "pixel_attention_mask")

    def __init__(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        self._tokens_per_picture = int(model.config.perceiver_config.resampler_n_latents)

    def crop_values(self) -> list[int]:
        return [1, 4]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops)[:-1]

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        done = self.plain(image, max_crops)
        return torch.cat([done["pixel_values"][0], done["pixel_attention_mask"][0, :, None].float()], dim=1)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        """Encode one image at a time: they have different sizes."""
        return [self._encode_one(one.to(self.model.device)) for one in pixels]

    def _encode_one(self, pictures: torch.Tensor) -> torch.Tensor:
        values, mask = pictures[None, :, :3], pictures[None, :, 3] > 0
        features = self.model.model.get_image_features(values, pixel_attention_mask=mask).pooler_output[0]
        return features.unflatten(0, (len(pictures), -1))

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"do_image_splitting": max_crops > 1}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        mark = int(self.tokenizer.convert_tokens_to_ids(_FAKE))
        picture = (mark, *(self.placeholder,) * self._tokens_per_picture)
        ids = (*picture * (5 if max_crops > 1 else 1), mark)
        return ImageLayout.of(ids, self.placeholder, (0, 0), (height, width))


class Idefics2(Family):
    name: ClassVar = "Idefics2"
    model_types: ClassVar = ("idefics2",)
    images_type: ClassVar = Idefics2Images
    crop_meaning: ClassVar = "4: `do_image_splitting`, the image's quarters beside it; 1: the image alone"

    def language(self, model: Any) -> Any:
        return model.model.text_model

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        """Return what writes the chat template; a blank parts a word from an image in front of it."""
        write = super().writer(model, tokenizer)

        def apart(question: str) -> tuple[str, str]:
            before, behind = write(question)
            return before, behind if behind[:1].isspace() or behind.startswith("<") else f" {behind}"

        return apart
