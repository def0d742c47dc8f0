"""Families whose images have one size and are seen whole: LLaVA 1.5, PaliGemma. They have no max_crops.

What the controller reads is what the model reads, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from budgetvlm.vlm.families.base import Family, Images, TiledImages, capped
from budgetvlm.vlm.families.both_ways import BothWaysInputs
from budgetvlm.vlm.families.pixtral import PixtralImages
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import EmbeddedPrompt, Writer, template_writer


class OneSizeImages(TiledImages):
    """One tile ``[1, 3, H, W]``, which is the overview."""

    most_crops = 1

    def prepare(self) -> None:
        without_class = getattr(self.model.config, "vision_feature_select_strategy", "full") == "default"
        self.num_tokens = int(self.model.model.vision_tower.embeddings.num_positions) - without_class

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        features = super().encode_tiles(tiles)
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

    create_masks = "transformers.masking_utils:create_masks_for_generate"

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
