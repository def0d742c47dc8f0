"""Gemma 3n: images of one size, seen whole; the language model is built as that of the small sizes of Gemma 4.

    num_active_blocks  which decoder layers run; a skipped one leaves a stand-in, because kinds of attention, and a part
                       of each token's embedding, go by place

The mark behind an image has its embedding in the table of the vision tower, so that it counts as a visual token here.
The vision tower is one of timm's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from budgetvlm.vlm.families.base import Dial
from budgetvlm.vlm.families.gemma3 import BREAK, with_break
from budgetvlm.vlm.families.gemma4 import Gemma4
from budgetvlm.vlm.families.one_size import OneSizeImages
from budgetvlm.vlm.prompt import DecoderInputs, ImageLayout, Writer


class Gemma3nImages(OneSizeImages):
    """The image's features and that of the mark behind them."""

    def count(self, model: Any) -> int:
        return int(model.config.vision_soft_tokens_per_image)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        features = super().encode_tiles(tiles)
        end = torch.tensor([[self.model.config.eoi_token_id]], device=features.device)
        mark = self.model.model.embed_vision(input_ids=end).expand(len(features), -1, -1)
        return torch.cat([features, mark.to(features.dtype)], dim=1)

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        config = self.model.config
        visual = (*(self.placeholder,) * self.num_tokens, int(config.eoi_token_id))
        seen = (False, *(True for _ in visual))
        return ImageLayout((int(config.boi_token_id), *visual), seen, size=(height, width), lead=BREAK)


class Gemma3nInputs(DecoderInputs):
    """A part of each token's embedding for every block."""

    def __init__(self, prompts: Any, model: Any) -> None:
        super().__init__(prompts)
        self._language = model.model.language_model

    def prefill(self) -> dict[str, Any]:
        ids = self.pad([torch.tensor(prompt.token_ids, device=self.mask.device) for prompt in self.prompts])
        return {**super().prefill(), "per_layer_inputs": self._language.get_per_layer_inputs(ids)}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        return {**super().step(token), "per_layer_inputs": self._language.get_per_layer_inputs(token[:, None])}


class Gemma3n(Gemma4):
    """Line breaks stand in front of an image and behind it, as in Gemma 3."""

    name: ClassVar = "Gemma 3n"
    model_types: ClassVar = ("gemma3n",)
    crop_meaning: ClassVar = "its images have one size"
    inputs_type: ClassVar = Gemma3nInputs
    images_type: ClassVar = Gemma3nImages
    type_ids: ClassVar = None

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        return with_break(super().writer(model, tokenizer))

    def dials(self, model: Any) -> list[Dial]:
        return []
