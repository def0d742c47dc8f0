"""Families whose images have one size and are seen whole: LLaVA 1.5, PaliGemma. They have no max_crops.

    top_k              routers of the language model, where it has any
    num_active_blocks  which decoder layers the language model's list holds

What the controller reads is what the model reads, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, Images, TiledImages, capped
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.families.pixtral import PixtralImages
from budgetvlm.vlm.prompt import EmbeddedPrompt, ImageLayout, Writer, template_writer


class OneSizeImages(TiledImages):
    """One tile ``[1, 3, H, W]``, which is the overview."""

    most_crops = 1

    def __init__(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, processor, tokenizer, options)
        self.num_tokens = self.count(model)

    def count(self, model: Any) -> int:
        """Return the number of an image's tokens."""
        without_class = getattr(model.config, "vision_feature_select_strategy", "full") == "default"
        return int(model.model.vision_tower.embeddings.num_positions) - without_class

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return torch.empty(0)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        features = self.model.model.get_image_features(tiles.to(self.model.dtype)).pooler_output
        return features if torch.is_tensor(features) else torch.stack(list(features))

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        return ImageLayout((self.placeholder,) * self.num_tokens, size=(height, width))


class PlainLlava(Family):
    """Images of one size, or at their own shape where the vision tower is Pixtral's."""

    name: ClassVar = "LLaVA 1.5, Pixtral"
    model_types: ClassVar = ("llava",)
    crop_meaning: ClassVar = "`longest_edge` where the vision tower is Pixtral's; else its images have one size"

    @staticmethod
    def images_type(model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> Images:
        of_pixtral = model.config.vision_config.model_type == "pixtral"
        return (PixtralImages if of_pixtral else OneSizeImages)(model, processor, tokenizer, options)


class PaliGemmaInputs(BothWaysInputs):
    """The whole prompt sees itself in both directions, an answer does not; positions begin at 1."""

    create_masks = "budgetvlm.vlm.families.one_size:paligemma_masks"

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any) -> None:
        super().__init__(prompts, model)
        self.positions = self.mask.cumsum(1).clamp(min=1)

    def prefill(self) -> dict[str, Any]:
        return {**super().prefill(), "position_ids": self.positions}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        if self.padded:
            return super().step(token)
        self.positions = self.positions[:, -1:] + 1
        return {"position_ids": self.positions}

    def _runs(self) -> torch.Tensor:
        whole = [torch.ones(len(prompt), dtype=torch.long, device=self.mask.device) for prompt in self.prompts]
        for run, prompt in zip(whole, self.prompts, strict=True):
            run[len(prompt) - prompt.num_answered :] = 0
        return self.pad(whole) - 1


def paligemma_masks(config: Any, **told: Any) -> Any:
    """Return the mask of full attention, and that of windows where the language model has any (PaliGemma 2)."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    full = create_causal_mask(config=config, **told)
    if getattr(config, "sliding_window", None) is None:
        return full
    return {
        "full_attention": full,
        "sliding_attention": create_sliding_window_causal_mask(config=config, **told),
    }


class PaliGemma(Family):
    """The processor writes the text's first token behind the image, and a line's end behind the question."""

    name: ClassVar = "PaliGemma 1 and 2"
    model_types: ClassVar = ("paligemma",)
    crop_meaning: ClassVar = "its images have one size"
    images_type: ClassVar = OneSizeImages
    inputs_type: ClassVar = PaliGemmaInputs

    def head(self, model: Any) -> Any:
        return capped(model.lm_head, getattr(model.config.get_text_config(), "final_logit_softcapping", None))

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        tokenizer.add_bos_token = False
        return template_writer(f"{{image}}{tokenizer.bos_token or ''}{{question}}\n")

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        return {"token_type_ids": torch.zeros(1, len(prompt), dtype=torch.long)}
