"""Gemma 3: the whole image, and crops of it where it is oblong ("pan and scan").

    max_crops          1: the image alone; more: `pan_and_scan_max_num_crops`
    num_active_blocks  which decoder layers run; a skipped one leaves a stand-in, because kinds of attention go by place

Visual tokens of one crop see each other in both directions, at reading only. The image itself is always encoded first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, TiledImages, run_processor
from budgetvlm.vlm.prompt import DecoderInputs, EmbeddedPrompt, ImageLayout

# the values of the model's authors, for processors that name none
PAN_AND_SCAN = {
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class Gemma3Images(TiledImages):
    """The image first, then its crops; words stand between them in the prompt."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(model, processor)
        self.tokenizer = tokenizer
        self._options = {name: getattr(processor, name, None) or value for name, value in PAN_AND_SCAN.items()}
        self._tokens_per_crop = int(model.config.mm_tokens_per_image)
        self._placeholder = int(model.config.image_token_id)
        self.most_crops = int(self._options["pan_and_scan_max_num_crops"])

    def overview(self, image: Image.Image) -> torch.Tensor:
        return self.plain(image, 1)["pixel_values"]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.all(image, max_crops)[1:] if self._crops(image.height, image.width, max_crops) else torch.empty(0)

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.plain(image, max_crops)["pixel_values"]

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.model.model.get_image_features(tiles.to(self.model.dtype)).pooler_output

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        parts = [overview] if overview is not None else []
        return torch.cat([*parts, *([features.flatten(0, 1)] if features is not None else [])])

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        scan = {**self._options, "pan_and_scan_max_num_crops": max_crops} if max_crops > 1 else {}
        return {
            "pixel_values": run_processor(self.processor, image, do_pan_and_scan=max_crops > 1, **scan)["pixel_values"]
        }

    def _crops(self, height: int, width: int, max_crops: int) -> int:
        """Return the number of crops beside the image."""
        if max_crops == 1:
            return 0
        blank = torch.empty(3, 1, 1).expand(3, height, width).numpy()  # only its shape is looked at
        return len(self.processor.pan_and_scan(blank, **self._options | {"pan_and_scan_max_num_crops": max_crops}))

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        crops = self._crops(height, width, max_crops)
        ids = self._ids(crops)
        return ImageLayout(ids, tuple(i == self._placeholder for i in ids), (1, crops), (height, width))

    def _ids(self, crops: int) -> tuple[int, ...]:
        """Return what the processor writes for an image: one mark, or words around the image and its crops."""
        t = self.tokenizer
        start, end = (
            t.convert_ids_to_tokens(getattr(self.model.config, f"{side}_token_index")) for side in ("boi", "eoi")
        )
        one = f"\n\n{start}{t.convert_ids_to_tokens(self._placeholder)}{end}\n\n"
        words = f"Here is the original image {one} and here are some crops to help you see better "
        short = t.encode(words + " ".join([one] * crops) if crops else one, add_special_tokens=False)
        return tuple(i for s in short for i in [s] * (self._tokens_per_crop if s == self._placeholder else 1))


class VisionBlocksInputs(DecoderInputs):
    """Visual tokens that stand together see each other in both directions when the prompt is read."""

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any) -> None:
        super().__init__(prompts)
        self._config = model.config.get_text_config()

    def prefill(self) -> dict[str, Any]:
        masks = self._create_masks()(
            config=self._config,
            inputs_embeds=self.embeddings(),
            attention_mask=self.mask if self.padded else None,
            past_key_values=None,
            position_ids=self.positions if self.padded else None,
            block_sequence_ids=visual_blocks(self.pad([prompt.visual_mask() for prompt in self.prompts])),
        )
        return {**super().prefill(), "attention_mask": masks}

    def _create_masks(self) -> Callable[..., dict[str, torch.Tensor]]:
        """Return the model's own function: windows and runs of visual tokens combine differently in each generation."""
        from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

        return create_masks_for_vision_model


def visual_blocks(visual: torch.Tensor) -> torch.Tensor:
    """Return the number of the run of visual tokens that each token belongs to, -1 for text, ``[B, T]``."""
    begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    return torch.where(visual, begins.long().cumsum(1) - 1, -1)


class Gemma3(Family):
    name: ClassVar = "Gemma 3"
    model_types: ClassVar = ("gemma3",)
    by_place: ClassVar = True
    inputs_type: ClassVar = VisionBlocksInputs
    crop_meaning: ClassVar = "`pan_and_scan_max_num_crops` beside the whole image; 1: none"

    def images(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> Gemma3Images:
        return Gemma3Images(model, processor, tokenizer)

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return str(tokenizer.convert_ids_to_tokens(model.config.boi_token_index))

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        return {"token_type_ids": prompt.visual_mask().long()[None]}
