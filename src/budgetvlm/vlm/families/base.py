"""What every family of models has to say, with the answers that fit most.

A family is one small file: a `Family` says where the knobs live in the model, an `Images` or `TiledImages` says how
a picture becomes visual tokens at a `max_crops`, a `DecoderInputs` says what the decoder is told beside embeddings. The
adapter does the rest. Where a family says nothing else, `top_k` is the attribute of every router of the language model,
where it has any, and `num_active_blocks` says which blocks the language model's list holds.
Shapes: n tiles or patches, T tokens, V visual tokens, C channels of the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm._io import to_rgb
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.vlm.attention import SKIPPABLE_KINDS, cache_maker, counting_blocks, kinds_by_block, unknown_kinds
from budgetvlm.vlm.chat_template import chat_writer
from budgetvlm.vlm.families.without_torchvision import TileProcessor
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import SOME_SIZE, DecoderInputs, EmbeddedPrompt, Writer

SIZE_CACHE_LIMIT = 4096  # sizes of images whose layout is remembered
COUNTS_PER_TOKEN = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")
COUNTS_OF_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TILES_AT_ONCE = 256  # bounds the memory of the vision tower in a batch


@dataclass(frozen=True)
class Dial:
    """One place that holds a number of experts per token: ``owner.name``, at most ``most``."""

    owner: Any
    name: str
    most: int

    def get(self) -> int:
        return int(getattr(self.owner, self.name))


class Images(ABC):
    """How one family turns an image into visual tokens; subclass `TiledImages` where tiles are encoded one by one.

    Attributes:
        most_crops: the largest `max_crops`, which is what the model does untouched.
        overview_first: the overview's tokens stand before the others, not behind them.
        pixel_names: what the image processor makes for the model's own forward.
        layout_of_size: `layout`, remembered.
        knobs: what knobs.json holds.
    """

    most_crops: int
    overview_first: ClassVar[bool] = False
    pixel_names: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __init__(self, model: Any, processor: Any, tokenizer: Any, knobs: Mapping[str, Any]) -> None:
        self.model, self.processor, self.tokenizer, self.knobs = model, processor, tokenizer, knobs
        self.layout_of_size = lru_cache(SIZE_CACHE_LIMIT)(self.layout)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Read what is needed of the model, its processor and its tokenizer, once."""

    @property
    def placeholder(self) -> int:
        """The token id that stands for one visual token."""
        return int(self.model.config.image_token_id)

    @abstractmethod
    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        """Return how an image of this size stands in the prompt, without encoding it."""

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any] | None:
        """Return what the model's own image processor is told at a `max_crops`; None: it cannot do this at all."""
        return {}

    def scaled(self, height: int, width: int, max_crops: int) -> tuple[int, int] | None:
        """Return the height and width whose image untouched is as this one at a `max_crops`; None: there is none."""
        return None

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        """Return the model's own forward's arguments for an image, made by its own processor; to check against."""
        options = self.options(image.height, image.width, max_crops) or {}
        done = run_processor(self.processor, image, **options)
        return {name: done[name] for name in self.pixel_names if name in done}

    def set_to(self, height: int, width: int, max_crops: int) -> Any:
        """Return the image processor as the model's own processor needs it at a `max_crops`."""
        own = getattr(self.processor, "image_processor", self.processor)
        return type(own).from_dict({**own.to_dict(), **(self.options(height, width, max_crops) or {})})

    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """Return all pixels in the model's order, ``[n, ...]``."""
        return self.plain(image, max_crops)["pixel_values"]

    def overview(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels of the overview, ``[n, ...]``: the whole image at the smallest size."""
        return self.all(image, 1)

    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """Return the pixels that are still to be encoded when the overview has been, ``[n, ...]``; n may be 0.

        Here all, or none where the image is shown at the overview's size.
        """
        same = self.layout_of(image, max_crops).grid == self.layout_of(image, 1).grid
        return torch.empty(0) if same else self.all(image, max_crops)

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> Sequence[torch.Tensor]:
        """Return the features of each image's pixels; here one by one, because sizes differ."""
        device = self.model.device
        return [self.encode_one(one.to(device), layout) for one, layout in zip(pixels, layouts, strict=True)]

    def encode_one(self, pixels: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """Return the features of one image's pixels, which are on the model's device."""
        raise NotImplementedError

    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        """Return visual tokens ``[V, C]`` from features of `all`, or of `beside` (None if empty) and the overview's."""
        parts = [features.flatten(0, -2)] if features is not None else []
        if overview is not None and sum(map(len, parts)) < layout.num_visual:
            parts.insert(0 if self.overview_first else 1, overview)
        return torch.cat(parts)

    def edges(self) -> tuple[int, int]:
        """Return the first and the last token id of an image in the prompt."""
        ids = self.layout_of_size(*SOME_SIZE, 1).ids
        return ids[0], ids[-1]

    def layout_of(self, image: Image.Image, max_crops: int) -> ImageLayout:
        """Return how an image stands in the prompt, without encoding it."""
        return self.layout_of_size(image.height, image.width, max_crops)

    def visual_tokens(self, image: Image.Image, max_crops: int, overview: torch.Tensor | None = None) -> torch.Tensor:
        """Return visual tokens of one image ``[V, C]``; those of its overview may be known."""
        pixels = self.all(image, max_crops) if overview is None else self.beside(image, max_crops)
        return self.encoded(pixels, overview, self.layout_of(image, max_crops))

    def encoded(self, pixels: torch.Tensor, overview: torch.Tensor | None, layout: ImageLayout) -> torch.Tensor:
        """Return visual tokens ``[V, C]`` of the pixels just cut and of an overview encoded before."""
        features = self.encode([pixels], [layout])[0] if len(pixels) else None
        return self.join(features, overview, layout)

    def crop_values(self) -> list[int]:
        """Return values of `max_crops` where none are given: powers of two, or of four where there are many."""
        base = 2 if self.most_crops <= 16 else 4
        powers = [base**i for i in range(4) if base**i < self.most_crops]
        return [*powers, self.most_crops]


class TiledImages(Images):
    """An image is cut into tiles of one size, which are encoded independently of each other."""

    def encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features of tiles ``[n, ...]`` on the model's device, of any images, ``[n, T, C]``."""
        return self.model.model.get_image_features(tiles.to(self.model.dtype)).pooler_output

    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> Sequence[torch.Tensor]:
        """Encode tiles in chunks, whatever image they are of."""
        chunks = torch.cat(list(pixels)).split(TILES_AT_ONCE)
        per_tile = torch.cat([self.encode_tiles(chunk.to(self.model.device)) for chunk in chunks])
        return per_tile.split([len(tiles) for tiles in pixels])


class Family:
    """Where the knobs of one family live. Attributes and methods below are what most families need.

    Attributes:
        name: what people call it.
        model_types: `model_type` of the configurations that it covers.
        by_place: the decoder looks things up by a block's place in its list (kinds of attention, deepstack features),
            so that a skipped block leaves a stand-in instead of a gap.
        adds_features: visual features are added to the embeddings of their placeholders instead of replacing them.
        one_image: prompts hold one image at most.
        remote_code: the model is Python code of its own, which is run only where it is trusted.
        crop_meaning: what `max_crops` becomes, in words.
        images_type: the way from an image to visual tokens.
        type_ids: what the model's own forward calls the argument that marks visual tokens; None: it has none.
        inputs_type: what the decoder is told beside embeddings, made from prompts and the model.
        tile_processor: the image processor, where Transformers has one for torchvision alone.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    by_place: ClassVar[bool] = False
    adds_features: ClassVar[bool] = False
    one_image: ClassVar[bool] = False
    remote_code: ClassVar[bool] = False
    crop_meaning: ClassVar[str]
    images_type: ClassVar[Callable[..., Images]]
    type_ids: ClassVar[str | None] = None
    inputs_type: ClassVar[type[DecoderInputs]] = DecoderInputs
    tile_processor: ClassVar[type[TileProcessor] | None] = None

    def language(self, model: Any) -> Any:
        """Return the decoder, which turns embeddings into hidden states and holds the token embeddings."""
        return model.model.language_model

    def head(self, model: Any) -> Any:
        """Return what turns hidden states into logits."""
        return model.lm_head

    def blocks(self, model: Any) -> tuple[nn.Module, str]:
        """Return the module that holds the list of blocks, and the list's name."""
        return self.language(model), "layers"

    def num_blocks(self, model: Any) -> int:
        """Return the number of the decoder's blocks."""
        holder, list_name = self.blocks(model)
        return len(getattr(holder, list_name))

    def dials(self, model: Any) -> list[Dial]:
        """Return every place that holds the number of experts per token; none in a dense model."""
        return find_dials(self.language(model))

    def fixed_blocks(self, model: Any) -> tuple[int, ...]:
        """Return the blocks that run at every depth beside the first and the last."""
        return counting_blocks(self.language(model))

    def cache_maker(self, model: Any) -> Callable[[], Any]:
        """Return what makes an empty cache for the decoder."""
        return cache_maker(self.language(model))

    def writer(self, model: Any, tokenizer: Any) -> Writer:
        """Return what writes the text around image and question, see `chat_writer`."""
        return chat_writer(tokenizer, self.placeholder(model, tokenizer))

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        """Return what stands for the image in the chat template."""
        return str(tokenizer.convert_ids_to_tokens(model.config.image_token_id))

    def deepstack_levels(self, model: Any) -> int:
        """Return how many blocks are given visual features of their own."""
        return 0

    def config(self, directory: Path) -> Any:
        """Return the configuration of the model that is loaded."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(directory, local_files_only=True)

    def build(self, directory: Path) -> Any:
        """Return the model with random weights, on the device of the context."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_config(self.config(directory))

    def load(self, directory: Path, **options: Any) -> Any:
        """Return the model, as `from_pretrained` does."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(directory, config=self.config(directory), **options)

    def load_processor(self, directory: Path) -> Any:
        """Return the image processor, the one that needs Pillow alone."""
        if self.tile_processor:
            return self.tile_processor.read(directory)
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)

    def skipped_output(self, hidden_states: torch.Tensor) -> Any:
        """Return what a block returns that does nothing."""
        return hidden_states

    def goes_by_place(self, model: Any) -> bool:
        """Tell whether a skipped block leaves a stand-in: see `by_place`; it also does where kinds of attention mix."""
        return self.by_place or len(set(kinds_by_block(self.language(model)))) > 1

    def check_blocks(self, model: Any) -> None:
        """Check that blocks can be skipped. Raises ConfigError: of a kind of attention no correct cache is known."""
        foreign = unknown_kinds(self.language(model))
        if foreign:
            raise ConfigError(
                f"blocks of this language model cannot be skipped: it has {', '.join(foreign)}, and only "
                f"{', '.join(sorted(SKIPPABLE_KINDS))} are known to keep a correct cache. Give num_active_blocks one "
                "value, the number of its blocks, in knobs.json"
            )

    def untouched_logits(self, model: Any, prompt: EmbeddedPrompt, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the logits of the model's own forward behind a prompt ``[V]``; to check against."""
        ids = torch.tensor([prompt.token_ids], device=model.device)
        return model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        """Return what the model's own forward wants beside ids and pixels; to check against."""
        return {self.type_ids: prompt.visual_mask().long()[None]} if self.type_ids else {}


def capped(head: Callable[[torch.Tensor], torch.Tensor], cap: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a head whose logits are bounded: cap * tanh(logits / cap); None: as they are."""
    return head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap


def find_dials(language: nn.Module) -> list[Dial]:
    """Find every module with a number of experts per token and a number of experts, in the order of the blocks."""
    found = []
    for module in language.modules():
        held = {name: value for name, value in vars(module).items() if type(value) is int}
        count = next((name for name in COUNTS_PER_TOKEN if name in held), None)
        most = next((held[name] for name in COUNTS_OF_EXPERTS if name in held), None)
        if count and most:
            found.append(Dial(module, count, most))
    return found


def repeated(ids: Sequence[int], placeholder: int, count: int) -> tuple[int, ...]:
    """Return ids in which the placeholder stands ``count`` times wherever it stood once."""
    return tuple(i for one in ids for i in [one] * (count if one == placeholder else 1))


def pool(tokens: torch.Tensor, deepstack_levels: int = 0) -> np.ndarray:
    """Return the controller's view of tokens ``[T, C * (1 + levels)]``: mean and maximum, float32 ``[2 * C]``.

    Deepstack levels do not count.
    """
    plain = tokens.is_cpu and tokens.dtype is torch.float32
    rows = tokens.numpy() if plain else tokens.float().cpu().numpy()
    if deepstack_levels:
        rows = rows[:, : rows.shape[1] // (1 + deepstack_levels)]
    # ufuncs, because between two runs of a model each call through NumPy's Python code takes ten times as long
    return np.concatenate([np.add.reduce(rows) / np.float32(len(rows)), np.maximum.reduce(rows)])


def run_processor(processor: Any, image: Image.Image, **options: Any) -> Any:
    """Call an image processor. Raises InputError: the processor refuses the image."""
    rgb = to_rgb(image)
    with refusals_as_input_errors(*rgb.size):
        return processor(rgb, return_tensors="pt", **options)


@contextmanager
def refusals_as_input_errors(width: int, height: int) -> Iterator[None]:
    """Turn what a processor raises where it cannot take an image of this size into an InputError."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the model's image processor refuses an image of {width} x {height}: {error}") from None
