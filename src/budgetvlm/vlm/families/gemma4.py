"""Gemma 4: an image at its own shape, bounded by a number of visual tokens that comes in steps.

    max_crops          `max_soft_tokens`: 70 a crop, and 70, 140, 280, 560, 1120 are all there is
    top_k              `top_k_experts` of the language model's configuration, which routers read at each call
    num_active_blocks  which decoder layers run; a skipped one leaves a stand-in, because kinds of attention, and a part
                       of each token's embedding, go by place

Late blocks of some sizes read keys and values of earlier ones, which therefore always run. There is no overview: the
controller reads the image at one crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.errors import InputError
from budgetvlm.vlm.families.base import Dial, Family, Images, capped
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.prompt import DecoderInputs, EmbeddedPrompt, ImageLayout

TOKENS_PER_CROP = 70
STEPS = (1, 2, 4, 8, 16)  # the numbers of crops whose tokens the image processor takes


class Gemma4Images(Images):
    """Patches with their column and row (-1: padding) as the last two channels, ``[n, P + 2]``."""

    pixel_names = ("pixel_values", "image_position_ids")

    def __init__(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        self.most_crops = int(processor.max_soft_tokens) // TOKENS_PER_CROP

    def crop_values(self) -> list[int]:
        return [crops for crops in STEPS if crops <= self.most_crops]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return torch.empty(0) if max_crops == 1 else self.all(image, max_crops)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        done = self.plain(image, max_crops)
        return torch.cat([done["pixel_values"][0], done["image_position_ids"][0].float()], dim=-1)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        """Encode one image at a time: how far patches are padded depends on `max_crops` alone."""
        model = self.model
        parts = (one[None].to(model.device).split([one.shape[-1] - 2, 2], dim=-1) for one in pixels)
        return [
            model.model.get_image_features(patches.to(model.dtype), places.long()).pooler_output[0]
            for patches, places in parts
        ]

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"max_soft_tokens": max_crops * TOKENS_PER_CROP}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        patch, pool = int(self.processor.patch_size), int(self.processor.pooling_kernel_size)
        try:
            most = max_crops * TOKENS_PER_CROP * pool**2
            size = get_aspect_ratio_preserving_size(height, width, patch, most, pool)
        except ValueError as error:
            raise InputError(f"an image of {width} x {height} pixels does not fit the model: {error}") from None
        rows, columns = (side // patch // pool for side in size)
        config = self.model.config
        ids = (config.boi_token_id, *[self.placeholder] * (rows * columns), config.eoi_token_id)
        return ImageLayout.of(ids, self.placeholder, (rows, columns), (height, width))


class Gemma4Inputs(BothWaysInputs):
    """Masks as Gemma 3's where the model was made with them; a part of each token's embedding for every block."""

    create_masks = "transformers.models.gemma4.modeling_gemma4:create_masks_for_vision_model"

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any) -> None:
        super().__init__(prompts, model)
        self._language = model.model.language_model
        self._by_block = bool(self._config.hidden_size_per_layer_input)

    def prefill(self) -> dict[str, Any]:
        both_ways = self._config.use_bidirectional_attention == "vision"
        told = super().prefill() if both_ways else DecoderInputs.prefill(self)
        if not self._by_block:
            return told
        ids = self.pad([torch.tensor(prompt.token_ids, device=self.mask.device) for prompt in self.prompts])
        visual = self.pad([prompt.visual_mask() for prompt in self.prompts])
        padding = int(self._config.pad_token_id or 0)
        ids = torch.where(visual | (self.mask == 0), padding, ids)
        return {**told, "per_layer_inputs": self._language.get_per_layer_inputs(ids)}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        told = super().step(token)
        if self._by_block:
            told["per_layer_inputs"] = self._language.get_per_layer_inputs(token[:, None])
        return told


class Gemma4(Family):
    name: ClassVar = "Gemma 4"
    model_types: ClassVar = ("gemma4",)
    by_place: ClassVar = True
    inputs_type: ClassVar[type[DecoderInputs]] = Gemma4Inputs
    images_type: ClassVar[type[Images]] = Gemma4Images
    type_ids: ClassVar[str | None] = "mm_token_type_ids"
    crop_meaning: ClassVar = f"`max_soft_tokens`: {TOKENS_PER_CROP} visual tokens a crop, in steps of two"

    def head(self, model: Any) -> Any:
        return capped(model.lm_head, self.language(model).config.final_logit_softcapping)

    def dials(self, model: Any) -> list[Dial]:
        config = self.language(model).config
        return [Dial(config, "top_k_experts", int(config.num_experts))] if config.enable_moe_block else []

    def fixed_blocks(self, model: Any) -> tuple[int, ...]:
        layers = self.language(model).layers
        return tuple(i for i, layer in enumerate(layers) if layer.self_attn.store_full_length_kv)
