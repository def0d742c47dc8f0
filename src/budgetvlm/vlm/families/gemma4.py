"""Gemma 4 and 3n. Gemma 4 sees an image at its own shape, bounded by a number of visual tokens that comes in steps.

A skipped block leaves a stand-in, because kinds of attention, and a part of each token's embedding, go by place. Late
blocks of some sizes read keys and values of earlier ones, which therefore always run. There is no overview: the
controller reads the image at one crop. Of `max_soft_tokens`, 70 a crop, there are just 70, 140, 280, 560 and 1120.

Gemma 3n sees images of one size; its language model is built as that of the small sizes of Gemma 4. The mark behind an
image has its embedding in the table of the vision tower, so that it counts as a visual token here. The vision tower is
one of timm's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Dial, Family, Images, capped, refusals_as_input_errors
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.families.gemma3 import BREAK, with_break
from budgetvlm.vlm.families.one_size import OneSizeImages
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import DecoderInputs, Writer

TOKENS_PER_CROP = 70


class Gemma4Images(Images):
    """Patches with their column and row (-1: padding) as the last two channels, ``[n, P + 2]``."""

    pixel_names = ("pixel_values", "image_position_ids")

    def prepare(self) -> None:
        self.most_crops = int(self.processor.max_soft_tokens) // TOKENS_PER_CROP

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return torch.empty(0) if max_crops == 1 else self.all(image, max_crops)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        done = self.plain(image, max_crops)
        return torch.cat([done["pixel_values"][0], done["image_position_ids"][0].float()], dim=-1)

    def encode_one(self, pixels: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        patches, places = pixels[None].split([pixels.shape[-1] - 2, 2], dim=-1)
        return self.model.model.get_image_features(patches.to(self.model.dtype), places.long()).pooler_output[0]

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        return {"max_soft_tokens": max_crops * TOKENS_PER_CROP}

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        patch, pool = int(self.processor.patch_size), int(self.processor.pooling_kernel_size)
        with refusals_as_input_errors(width, height):
            most = max_crops * TOKENS_PER_CROP * pool**2
            size = get_aspect_ratio_preserving_size(height, width, patch, most, pool)
        rows, columns = (side // patch // pool for side in size)
        config = self.model.config
        ids = (config.boi_token_id, *[self.placeholder] * (rows * columns), config.eoi_token_id)
        return ImageLayout.of(ids, self.placeholder, (rows, columns), (height, width))


class Gemma4Inputs(BothWaysInputs):
    """Masks as Gemma 3's where the model was made with them; a part of each token's embedding for every block."""

    create_masks = "transformers.models.gemma4.modeling_gemma4:create_masks_for_vision_model"

    def prefill(self) -> dict[str, Any]:
        both_ways = getattr(self.model.config.get_text_config(), "use_bidirectional_attention", None) == "vision"
        told = super().prefill() if both_ways else DecoderInputs.prefill(self)
        return {**told, **self._by_block(self.token_ids())}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        return {**super().step(token), **self._by_block(token[:, None])}

    def token_ids(self) -> torch.Tensor:
        """Return ids ``[B, T]``, those of padding in the place of visual tokens."""
        visual = self.pad([prompt.visual_mask() for prompt in self.prompts])
        padding = int(self.model.config.get_text_config().pad_token_id or 0)
        return torch.where(visual | (self.mask == 0), padding, super().token_ids())

    def _by_block(self, ids: torch.Tensor) -> dict[str, Any]:
        language = self.model.model.language_model
        of_blocks = language.config.hidden_size_per_layer_input
        return {"per_layer_inputs": language.get_per_layer_inputs(ids)} if of_blocks else {}


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
        has_experts = getattr(config, "enable_moe_block", False)
        return [Dial(config, "top_k_experts", int(config.num_experts))] if has_experts else []

    def fixed_blocks(self, model: Any) -> tuple[int, ...]:
        layers = self.language(model).layers
        return tuple(i for i, layer in enumerate(layers) if layer.self_attn.store_full_length_kv)


class Gemma3nImages(OneSizeImages):
    """The image's features and that of the mark behind them."""

    def prepare(self) -> None:
        self.num_tokens = int(self.model.config.vision_soft_tokens_per_image)

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


class Gemma3nInputs(Gemma4Inputs):
    """Visual tokens have their own part of an embedding."""

    def token_ids(self) -> torch.Tensor:
        return DecoderInputs.token_ids(self)


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
