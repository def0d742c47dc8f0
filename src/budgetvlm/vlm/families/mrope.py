"""Families that see an image in patches at its own shape, with positions in three dimensions (M-RoPE).

One crop is what gives `TOKENS_PER_CROP` visual tokens ("tokens_per_crop" in knobs.json sets another number). These
families have no overview crop. The controller reads the image at one crop; where the chosen setting shows it at the
same size, that is reused, and elsewhere it is paid on top: about 1 / max_crops of the image's encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image

from budgetvlm._io import to_rgb
from budgetvlm.errors import InputError
from budgetvlm.vlm.families.base import Family, Images, refusals_as_input_errors, run_processor
from budgetvlm.vlm.families.without_torchvision import InPlace
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import DecoderInputs, EmbeddedPrompt

TOKENS_PER_CROP = 256
MOST_OBLONG = 200  # the processors refuse images of a larger aspect ratio


class PatchImages(Images):
    """Pixels are patches ``[n, P]``; the vision tower is told their grid."""

    frames: Mapping[str, int] = MappingProxyType({})  # what the processor's rule for sizes wants to know of time
    pixel_names = ("pixel_values", "image_grid_thw")

    def prepare(self) -> None:
        processor = self.processor
        self._patch, self._merge = int(processor.patch_size), int(processor.merge_size)
        self._factor = self._patch * self._merge
        self._least, self._most = int(processor.size.shortest_edge), int(processor.size.longest_edge)
        self._crop_pixels = int(self.knobs.get("tokens_per_crop", TOKENS_PER_CROP)) * self._factor**2
        self.most_crops = max(1, self._most // self._crop_pixels)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        grids = torch.tensor([[1, *layout.grid] for layout in layouts], device=self.model.device)
        patches = torch.cat(list(pixels)).to(self.model.device, self.model.dtype)
        done = self.model.model.get_image_features(patches, grids)
        levels = getattr(done, "deepstack_features", None) or []
        by_level = [done.pooler_output, *levels]
        return [torch.cat(parts, dim=-1) for parts in zip(*by_level, strict=True)]

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        least, most = self._limits(max_crops)
        return {"size": {"shortest_edge": least, "longest_edge": most}}

    def scaled(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        return self._resized(height, width, max_crops)

    def _limits(self, max_crops: int) -> tuple[int, int]:
        """Return the fewest and most pixels; at the most crops those of the untouched processor."""
        most = self._most if max_crops >= self.most_crops else max_crops * self._crop_pixels
        return min(self._least, most), most

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        rows, columns = (side // self._patch for side in self._resized(height, width, max_crops))
        count = rows * columns // self._merge**2
        return ImageLayout((self.placeholder,) * count, grid=(rows, columns), size=(height, width))

    def _resized(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        """Return height and width after the processor: multiples of a merged patch, within the limits."""
        least, most = self._limits(max_crops)
        if max(height, width) > MOST_OBLONG * min(height, width):
            raise InputError(
                f"an image of {width} x {height} pixels is too oblong; give one of at most {MOST_OBLONG} to 1"
            )
        # each family has a rule of its own in the file of its image processor
        smart_resize = resolve_name(f"{type(self.processor).__module__}:smart_resize")
        told = {"factor": self._factor, "min_pixels": least, "max_pixels": most, **self.frames}
        with refusals_as_input_errors(width, height):
            size: tuple[int, int] = smart_resize(height=height, width=width, **told)
        return size


class Glm4vImages(PatchImages):
    """GLM enlarges images smaller than one merged patch first, and counts a still image's two frames in its limits.

    GLM-GA's processor can round to more than one merged patch; the one that needs Pillow alone forgets it.
    """

    def prepare(self) -> None:
        super().prepare()
        frames = int(self.processor.temporal_patch_size)
        self.frames = {"num_frames": frames, "temporal_factor": frames}
        self._crop_pixels *= frames
        self.most_crops = max(1, self._most // self._crop_pixels)
        self._expand = int(getattr(self.processor, "patch_expand_factor", 1))
        self._factor *= self._expand

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        if self._expand == 1:
            return super().plain(image, max_crops)
        height, width = self._resized(image.height, image.width, max_crops)
        resized = to_rgb(image).resize((width, height), self.processor.resample)
        done = run_processor(self.processor, resized, do_resize=False)
        return {name: done[name] for name in self.pixel_names}

    def set_to(self, height: int, width: int, max_crops: int) -> Any:
        if self._expand == 1:
            return super().set_to(height, width, max_crops)
        return InPlace(lambda image: self.plain(image, max_crops), merge_size=self._merge)


class MRopeInputs(DecoderInputs):
    """Positions of text are the same in all three dimensions; an image spans rows and columns at one time.

    Behind the image the text goes on after its longer side (Qwen2-VL, Wang et al., 2024, arXiv:2409.12191, 2.1).
    """

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any) -> None:
        super().__init__(prompts, model)
        merge = int(model.config.vision_config.spatial_merge_size)
        self._where = self.pad([self._positions(prompt, merge).T for prompt in prompts]).permute(2, 0, 1)
        self._next = self._where.amax(dim=(0, 2))[None, :, None].expand(3, -1, -1)

    def prefill(self) -> dict[str, Any]:
        levels = [prompt.deepstack for prompt in self.prompts if prompt.deepstack is not None]
        told = {**super().prefill(), "position_ids": self._where}
        if levels:
            told["visual_pos_masks"] = self.pad([prompt.visual_mask() for prompt in self.prompts])
            told["deepstack_visual_embeds"] = list(torch.cat(levels).unbind(1))
        return told

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        self._next = self._next + 1
        return {**super().step(token), "position_ids": self._next}

    def _positions(self, prompt: EmbeddedPrompt, merge: int) -> torch.Tensor:
        """Return time, row and column of each token, ``[3, T]``."""
        device, end, following = prompt.embeddings.device, 0, 0
        parts: list[torch.Tensor] = []
        text = torch.arange(len(prompt), device=device).expand(3, -1)
        for start, layout in zip(prompt.starts, prompt.layouts, strict=True):
            height, width = (side // merge for side in layout.grid)
            sides = (torch.arange(side, device=device) for side in (height, width))
            y, x = torch.meshgrid(*sides, indexing="ij")
            first = following + start - end
            image = first + torch.stack([torch.zeros_like(y), y, x]).flatten(1)
            parts += text[:, following:first], image
            end, following = start + height * width, first + max(height, width)
        return torch.cat([*parts, text[:, : len(prompt) - end] + following], dim=1)


class QwenVL(Family):
    """Some give features of several depths of the vision tower, which are added behind the first blocks (deepstack).

    They are added also where such a block is skipped: its stand-in keeps its place.
    """

    name: ClassVar = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, Cosmos3"
    model_types: ClassVar[tuple[str, ...]] = (
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "cosmos3_omni",
    )  # fmt: skip
    inputs_type: ClassVar[type[DecoderInputs]] = MRopeInputs
    crop_meaning: ClassVar = f"`longest_edge` (max_pixels): {TOKENS_PER_CROP} visual tokens a crop"
    images_type: ClassVar[type[PatchImages]] = PatchImages
    type_ids: ClassVar[str | None] = "mm_token_type_ids"

    def deepstack_levels(self, model: Any) -> int:
        return len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))

    def goes_by_place(self, model: Any) -> bool:
        return self.deepstack_levels(model) > 0 or super().goes_by_place(model)


class QwenOmni(QwenVL):
    """The thinker of an Omni model, which reads images and writes text; what speaks is not loaded."""

    name: ClassVar = "Qwen2.5-Omni, Qwen3-Omni"
    model_types: ClassVar = (
        "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
    )  # fmt: skip
    type_ids: ClassVar = None

    def config(self, directory: Path) -> Any:
        """Return the thinker's; public checkpoints hold it in a model of another type."""
        whole = super().config(directory)
        return getattr(whole, "thinker_config", whole)

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        """Return a mask, without which the thinker numbers its tokens in one dimension."""
        return {"attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}


class Exaone(QwenVL):
    """Positions in one dimension; kinds of attention mix."""

    name: ClassVar = "EXAONE 4.5"
    model_types: ClassVar = ("exaone4_5",)
    inputs_type: ClassVar = DecoderInputs
    type_ids: ClassVar = None


class Glm4v(QwenVL):
    name: ClassVar = "GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR, GLM-GA"
    model_types: ClassVar = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga")
    images_type: ClassVar = Glm4vImages


class ErnieInputs(MRopeInputs):
    """ERNIE sends visual tokens, and the marks around them, to experts of their own."""

    def prefill(self) -> dict[str, Any]:
        kinds = self.pad([_marked(prompt, self.model.config) for prompt in self.prompts])
        return {**super().prefill(), "moe_mm_token_type_ids": kinds}


def _marked(prompt: EmbeddedPrompt, config: Any) -> torch.Tensor:
    """Return 1 at visual tokens and the marks around them, ``[T]``; an answer is text whatever it says."""
    names = ("image_token_id", "image_start_token_id", "image_end_token_id")
    marks = {int(getattr(config, name)) for name in names}
    images = zip(prompt.starts, prompt.layouts, strict=True)
    around = {place for start, layout in images for place in range(start - 1, start + len(layout.ids) + 1)}
    kinds = [int(place in around and i in marks) for place, i in enumerate(prompt.token_ids)]
    return torch.tensor(kinds, device=prompt.embeddings.device)


class ErnieVL(QwenVL):
    name: ClassVar = "ERNIE-4.5-VL"
    model_types: ClassVar = ("ernie4_5_vl_moe",)
    inputs_type: ClassVar = ErnieInputs

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        return {
            **super().plain_arguments(prompt, model),
            "moe_mm_token_type_ids": _marked(prompt, model.config)[None],
        }
