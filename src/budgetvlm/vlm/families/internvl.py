"""InternVL: Transformers' `InternVLForConditionalGeneration` around any language model, dense or with experts.

max_crops          tiles beside the overview; an argument of the image processor, given at each call
top_k              the attribute of every router of a mixture-of-experts language model
num_active_blocks  which decoder layers the language model's list holds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm.vlm.families.base import Family, Images, Layout, run_processor
from budgetvlm.vlm.families.tiles import encode_tiles
from budgetvlm.vlm.images import Tiles


class InternVLImages(Tiles, Images):
    """Details first, the overview last; every tile gives the same number of tokens."""

    def __init__(self, model: Any, processor: Any) -> None:
        Images.__init__(self, model, processor)
        Tiles.__init__(self, processor)
        self.most_crops = int(processor.max_patches)
        self._tokens_per_tile = int(model.config.image_seq_length)
        self._placeholder = int(model.config.image_token_id)

    def _layout(self, height: int, width: int, max_crops: int) -> Layout:
        tiles = self.count(height, width, max_crops)
        return Layout((self._placeholder,) * (tiles * self._tokens_per_tile), size=(height, width))

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        return self.details(image, max_crops)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> list[torch.Tensor]:
        def features(tiles: torch.Tensor) -> torch.Tensor:
            return self.model.get_image_features(pixel_values=tiles).pooler_output

        return encode_tiles(features, pixels, self.model.device)

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: Layout) -> torch.Tensor:
        parts = [features.flatten(0, 1)] if features is not None else []
        return torch.cat([*parts, *([overview] if overview is not None else [])])

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {"pixel_values": run_processor(self.processor, image, max_patches=max_crops)["pixel_values"]}


class InternVL(Family):
    name: ClassVar = "InternVL"
    model_types: ClassVar = ("internvl",)
    crop_meaning: ClassVar = "`max_patches`: tiles beside the overview tile"

    def images(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> Images:
        return InternVLImages(model, processor)

    def load(self, directory: Path, **options: Any) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration.from_pretrained(directory, config=read_config(directory), **options)

    def load_processor(self, directory: Path) -> Any:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        return GotOcr2ImageProcessorPil.from_pretrained(directory, local_files_only=True)


def read_config(directory: Path) -> Any:
    """The model's configuration.

    `InternVLConfig` takes any saved vision configuration for InternVL's own tower; here its `model_type` is heeded,
    so that other towers (the bundled model has a FocalNet) come back as they were saved.
    """
    from transformers import AutoConfig, InternVLConfig

    fields, _ = InternVLConfig.get_config_dict(directory, local_files_only=True)
    vision = dict(fields.pop("vision_config"))
    return InternVLConfig(vision_config=AutoConfig.for_model(vision.pop("model_type"), **vision), **fields)
