"""Molmo and MolmoE-1B (`allenai/MolmoE-1B-0924`): Python code that comes with the model.

That code predates Transformers' caches: keys and values are a list with one pair for each block that ran. Visual
features are added to the embeddings of their placeholders. The processor shifts the masks of padding by one tile, so
that the overview is encoded under the first tile's mask; it is reused where that mask is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm._io import to_rgb
from budgetvlm.errors import ConfigError
from budgetvlm.vlm.decoding import block_of
from budgetvlm.vlm.families.base import Dial, Family, TiledImages, find_dials, refusals_as_input_errors
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import EmbeddedPrompt, Writer, template_writer

_MARKS = ("<im_patch>", "<im_col>", "<im_start>", "<im_end>")


class MolmoImages(TiledImages):
    """The overview first, then overlapping tiles; the share of each patch that is image is the last channel.

    Pixels are ``[n, patches, channels + 1]``.
    """

    def prepare(self) -> None:
        self._marks = list(map(int, self.tokenizer.convert_tokens_to_ids(list(_MARKS))))
        self.most_crops = int(self.processor.max_crops)

    def overview(self, image: Image.Image) -> torch.Tensor:
        return self.all(image, 1)[:1]

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        pixels = self.all(image, max_crops)
        return pixels[1:] if torch.equal(pixels[:1], self.overview(image)) else pixels

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        crops, _, _, mask = self._processed(np.array(to_rgb(image)), max_crops)
        return torch.cat([_tensor(crops), _tensor(mask)[..., None]], dim=-1)

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        values = tiles[..., :-1].to(self.model.dtype)
        return self.model.model.vision_backbone(values[None], tiles[None, ..., -1])[0][0]

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        assert features is not None and layout.order is not None
        tiles = layout.grid[0]
        if overview is not None and len(features) < tiles:
            features = torch.cat([overview[None], features])
        return features.flatten(0, 1)[list(layout.order)]

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        crops, _, places, mask = self._processed(np.array(to_rgb(image)), max_crops)
        return {
            "images": _tensor(crops)[None].to(self.model.dtype),
            "image_masks": _tensor(mask)[None],
            "image_input_idx": torch.as_tensor(places).long()[None],
        }

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        """The processor is asked about a black image of this size: it has no way to be asked about a size."""
        _, ids, places, _ = self._processed(np.zeros((height, width, 3), np.uint8), max_crops)
        flat = np.asarray(places).reshape(-1)
        taken = np.flatnonzero(flat >= 0)
        order = taken[np.argsort(flat[taken], kind="stable")]
        layout = ImageLayout.of(np.asarray(ids).tolist(), self._marks[0], (len(places), 1), (height, width))
        return replace(layout, order=tuple(order.tolist()))

    def _processed(self, pixels: np.ndarray, max_crops: int) -> Any:
        """Return tiles, token ids, the place of each feature among them (negative: none), share of image in each patch.

        A copy of the code in use elsewhere adds the grid of tiles.
        """
        height, width = pixels.shape[:2]
        with refusals_as_input_errors(width, height):
            return self.processor.preprocess(pixels, *self._marks, max_crops=max_crops)[:4]


def _tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values)).float()


class PairsOfBlocks:
    """A cache as such code wants it: keys and values of each block that ran, in their order.

    Which blocks run may change from one token to the next.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, Any] = {}  # by the block's `id`

    def get_seq_length(self) -> int:
        """Return the length of the first block, which always runs."""
        return int(next(iter(self._pairs.values()))[0].shape[-2]) if self._pairs else 0

    def of(self, blocks: Sequence[nn.Module], num_blocks: int) -> list[Any] | None:
        """Return the pairs of these blocks, and as many as the model insists on: those behind go unread."""
        pairs = [self._pairs[id(block_of(block))] for block in blocks] if self._pairs else []
        return [*pairs, *pairs[-1:] * (num_blocks - len(pairs))] if pairs else None

    def keep(self, blocks: Sequence[nn.Module], pairs: Sequence[Any]) -> None:
        """Take over what these blocks returned."""
        self._pairs.update({id(block_of(block)): pair for block, pair in zip(blocks, pairs, strict=False)})


class MolmoLanguage:
    """The whole model as a decoder: embeddings -> logits; masks and positions are always given."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self._num_blocks = len(model.model.transformer.blocks)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.model.transformer.wte

    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        past_key_values: PairsOfBlocks | None = None,
        use_cache: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        blocks = list(self.model.model.transformer.blocks)
        past = past_key_values.get_seq_length() if past_key_values else 0
        rows, length = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(rows, past + length, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).expand(rows, -1)
        done = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values.of(blocks, self._num_blocks) if past_key_values else None,
            use_cache=use_cache,
        )
        if past_key_values is not None:
            past_key_values.keep(blocks, done.past_key_values)
        return (done.logits,)


def _fill(model: nn.Module, directory: Path) -> list[str]:
    """Read the weights file by file; which are missing, in their order."""
    from safetensors.torch import load_file

    missing = dict.fromkeys(model.state_dict())
    for path in sorted(directory.glob("*.safetensors")):
        weights = load_file(path)
        model.load_state_dict(weights, strict=False)
        missing = dict.fromkeys(name for name in missing if name not in weights)
    return list(missing)


class Molmo(Family):
    name: ClassVar = "Molmo, MolmoE-1B"
    model_types: ClassVar = ("molmo",)
    remote_code: ClassVar = True
    adds_features: ClassVar = True
    images_type: ClassVar = MolmoImages
    crop_meaning: ClassVar = "`max_crops` of the image processor: tiles beside the overview tile, one at least"

    def language(self, model: Any) -> Any:
        return MolmoLanguage(model)

    def cache_maker(self, model: Any) -> Callable[[], Any]:
        return PairsOfBlocks

    def head(self, model: Any) -> Any:
        return nn.Identity()  # the decoder above ends in logits

    def blocks(self, model: Any) -> tuple[nn.Module, str]:
        return model.model.transformer, "blocks"

    def dials(self, model: Any) -> list[Dial]:
        return find_dials(model.model.transformer)

    def skipped_output(self, hidden_states: torch.Tensor) -> Any:
        """Return the hidden states with a pair that is never read: such code insists on one."""
        return hidden_states, (hidden_states, hidden_states)

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        return template_writer(f"{tokenizer.bos_token or tokenizer.eos_token}{{image}} User: {{question}} Assistant:")

    def config(self, directory: Path) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(directory, trust_remote_code=True, local_files_only=True)

    def build(self, directory: Path, dtype: Any = "auto") -> Any:
        """Return the model with random weights. Raises ConfigError: its code does not run here."""
        import transformers
        from transformers import AutoModelForCausalLM

        try:
            config = self.config(directory)
            wanted = config.dtype if dtype == "auto" else dtype
            return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=wanted or torch.float32)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the code that comes with the model in {directory} does not run with Transformers "
                f"{transformers.__version__}: {error}"
            ) from error

    def load(self, directory: Path, **options: Any) -> Any:
        """Build the model and then fill in its weights: that code knows no `from_pretrained`. Raises ConfigError."""
        from transformers import GenerationConfig

        model = self.build(directory, options["dtype"])
        saved = (directory / "generation_config.json").is_file()
        model.generation_config = GenerationConfig.from_pretrained(directory) if saved else GenerationConfig()
        return model, {"missing_keys": _fill(model, directory), "mismatched_keys": []}

    def load_processor(self, directory: Path) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(directory, trust_remote_code=True, local_files_only=True)

    def untouched_logits(self, model: Any, prompt: EmbeddedPrompt, inputs: Mapping[str, Any]) -> torch.Tensor:
        places = inputs["image_input_idx"]
        moved = {**inputs, "image_input_idx": torch.where(places < 0, places, places + prompt.starts[0])}
        return super().untouched_logits(model, prompt, moved)
