"""A family for models that no file here is written for: what differs between models is asked of the model itself.

`max_crops` is a limit of the image processor's number of tiles, where it has one. The model's own processor makes
pixels and the image's ids. The model's own forward is run up to its decoder, whose arguments are caught: embeddings of
the image, positions, masks. Its head is the rest of the forward. Whether all this is right for a model is not known
before it was tried: see `budgetvlm.vlm.finding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from budgetvlm._io import to_rgb
from budgetvlm.errors import ConfigError
from budgetvlm.vlm.decoding import SkippedBlock
from budgetvlm.vlm.families.base import Family, Images, refusals_as_input_errors
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.own_processor import NoReference, processor_of
from budgetvlm.vlm.prompt import DecoderInputs, EmbeddedPrompt

TILE_LIMITS = ("max_patches", "max_crops", "max_tiles", "max_num_tiles", "max_slice_nums")
MANY_TILES = 512
TILE_MINIMA = ("min_patches", "min_tiles")
TILE_SWITCHES = ("crop_to_patches", "do_image_splitting", "slice_mode")
KINDS_OF_TOKENS = ("mm_token_type_ids", "token_type_ids")
OF_TEXT = {"input_ids", "attention_mask", *KINDS_OF_TOKENS}


class _Caught(Exception):
    """Ends a forward at the decoder, with what the decoder was called with."""


class _Answering(SkippedBlock):
    """Stands in a part's place and answers for it; other attributes are those of the part."""

    def __init__(self, part: nn.Module, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(part)
        vars(self)["answer"] = answer

    def forward(self, *_: Any, **arguments: Any) -> Any:
        return vars(self)["answer"](arguments)


def with_answer(model: nn.Module, part: nn.Module, answer: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a model that shares everything with another but one part, for which it has an answer.

    The other model is not touched, so that it can be used by another thread meanwhile.
    """
    path = next((name for name, module in model.named_modules() if module is part), "")
    if not path:
        raise ConfigError(f"{type(model).__name__} does not hold {type(part).__name__} as a part")
    *way, last = path.split(".")
    whole = holder = _copied(model)
    for name in way:
        holder._modules[name] = holder = _copied(holder._modules[name])
    holder._modules[last] = _Answering(part, answer)
    return whole


def _copied(module: Any) -> Any:
    """Return a module of the same parts, of which some may be replaced."""
    twin = copy(module)
    twin._modules = dict(module._modules)
    return twin


def decoder_arguments(model: Any, **inputs: Any) -> dict[str, Any]:
    """Run the model's own forward up to its decoder and return what the decoder is called with."""

    def catch(arguments: dict[str, Any]) -> None:
        raise _Caught(arguments)

    try:
        with_answer(model, model.get_decoder(), catch)(**on_device(inputs, model), use_cache=False)
    except _Caught as caught:
        return dict(caught.args[0])
    raise ConfigError(f"the forward of {type(model).__name__} does not call its decoder")


class _Hidden(tuple):
    """What the inner model returns, as far as a head reads it: hidden states first, and nothing else."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self[0] if name == "last_hidden_state" else None


@dataclass(frozen=True)
class FoundLayout(ImageLayout):
    """A layout that keeps what the processor says of an image beside its pixels; they depend on its size alone."""

    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)  # for the model's own forward
    kinds: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)  # of which kind each token is


class FoundImages(Images):
    """Pixels are what the processor gives, by name; an image's tokens are all that it puts in the image's place."""

    def prepare(self) -> None:
        own = self.processor.image_processor
        self.limit = next((name for name in TILE_LIMITS if isinstance(getattr(own, name, None), int)), None)
        self._switch = next((name for name in TILE_SWITCHES if isinstance(getattr(own, name, None), bool)), None)
        # a limit of thousands counts patches of an image at its own shape, and not tiles
        most, tokens = int(getattr(own, self.limit)) if self.limit else 1, int(self.knobs.get("tokens_per_crop", 256))
        self._unit = tokens * int(getattr(own, "merge_size", 1)) ** 2 if most >= MANY_TILES else 1
        self.most_crops = max(1, most // self._unit)
        fewest = next((int(getattr(own, name)) for name in TILE_MINIMA if hasattr(own, name)), 1)
        self._least = 1 if fewest == 1 or self._takes(1) else fewest
        self.layout_of_size.cache_clear()

    def crop_values(self) -> list[int]:
        return sorted({max(self._least, value) for value in super().crop_values()})

    def _takes(self, max_crops: int) -> bool:
        """Tell whether the model can be shown an image at this number of tiles, whatever the processor's minimum."""
        self._least = max_crops
        try:
            self.visual_tokens(Image.new("RGB", (900, 600)), max_crops)
        except Exception:  # whatever the model's own code raises says no
            return False
        return True

    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        return {name: value for name, value in self._processed(image, max_crops).items() if name not in OF_TEXT}

    def all(self, image: Image.Image, max_crops: int) -> Any:
        return self.plain(image, max_crops)

    def beside(self, image: Image.Image, max_crops: int) -> Any:
        return {} if max_crops <= self._least else self.all(image, max_crops)

    def encode(self, pixels: Sequence[Any], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        return [self._encoded(one, layout) for one, layout in zip(pixels, layouts, strict=True)]

    def _encoded(self, pixels: Mapping[str, Any], layout: ImageLayout) -> torch.Tensor:
        inputs = {"input_ids": torch.tensor([layout.ids]), **pixels, **kinds_of(layout, len(layout.ids))}
        embeddings: torch.Tensor = decoder_arguments(self.model, **inputs)["inputs_embeds"]
        return embeddings[0]

    def layout(self, height: int, width: int, max_crops: int) -> ImageLayout:
        done = self._processed(Image.new("RGB", (width, height)), max_crops)
        ids = done["input_ids"][0].tolist()
        pixels = {name for name, value in done.items() if torch.is_tensor(value) and value.is_floating_point()}
        return FoundLayout(
            tuple(ids),
            size=(height, width),
            arguments={name: value for name, value in done.items() if name not in pixels | OF_TEXT},
            kinds={name: done[name][0] for name in KINDS_OF_TOKENS if name in done},
        )

    def _processed(self, image: Image.Image, max_crops: int) -> Any:
        """Return what the processor makes of the image's mark alone."""
        told: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
        options = self.options(image.height, image.width, max_crops)
        with refusals_as_input_errors(image.width, image.height):
            return self.processor(
                images=[to_rgb(image)], text=[self.processor.image_token], images_kwargs=options, **told
            )

    def options(self, height: int, width: int, max_crops: int) -> dict[str, Any]:
        if not self.limit:
            return {}
        crops = max(max_crops, self._least)
        given: dict[str, Any] = {self.limit: crops * self._unit} if crops < self.most_crops else {}
        return {**given, **({self._switch: crops > 1} if self._switch else {})}


def kinds_of(layout: Any, length: int, start: int = 0) -> dict[str, torch.Tensor]:
    """Return the arguments that mark an image's tokens in a prompt of this length, in which it begins at ``start``."""
    marks = {name: torch.zeros(1, length, dtype=torch.long) for name in layout.kinds}
    for name, kind in layout.kinds.items():
        marks[name][0, start : start + len(kind)] = kind
    return marks


def kinds_in(prompt: EmbeddedPrompt) -> dict[str, torch.Tensor]:
    """Return `kinds_of` a prompt's image, if it has one (`Family.one_image`)."""
    return kinds_of(prompt.layouts[0], len(prompt), prompt.starts[0]) if prompt.layouts else {}


def on_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Move tensors to the model's device, pixels to its type as well."""
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    moved = {name: t.to(model.device, model.dtype if t.is_floating_point() else None) for name, t in tensors.items()}
    return {**inputs, **moved}


class FoundInputs(DecoderInputs):
    """What the model's own forward tells its decoder about each prompt, put together for a batch."""

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any) -> None:
        super().__init__(prompts, model)
        self._told = [_told(prompt, model) for prompt in prompts]
        self._by_token = getattr(model.get_decoder(), "get_per_layer_inputs", None)
        places = [told.pop("position_ids", None) for told in self._told]
        self._places = None if places[0] is None else torch.cat([self._filled(one, (-1,)) for one in places], -2)

    def prefill(self) -> dict[str, Any]:
        told = dict(super().prefill())
        if self._places is not None:
            told["position_ids"] = self._places
        for name in self._told[0]:
            values = [one[name] for one in self._told]
            if name == "attention_mask":
                told[name] = self._masks(values)
            elif torch.is_tensor(values[0]):
                told[name] = torch.cat([self._filled(value, (1,)) for value in values])
            else:
                told[name] = values[0]
        return told

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        told = dict(super().step(token))
        if self._places is not None:
            self._places = self._places[..., -1:] + 1
            told["position_ids"] = self._places
        if self._by_token is not None:
            told["per_layer_inputs"] = self._by_token(token[:, None])
        return told

    def _masks(self, values: Sequence[Any]) -> Any:
        """Put masks ``[1, 1, T, T]`` together, or those of each kind of attention; None is the mask of all before."""
        if isinstance(values[0], Mapping):
            return {kind: self._masks([one[kind] for one in values]) for kind in values[0]}
        if not self.padded:
            return None if values[0] is None else torch.cat(list(values))
        causal = torch.ones(1, 1, self.longest, self.longest, dtype=torch.bool, device=self.mask.device).tril()
        made = [causal[..., : len(p), : len(p)] if v is None else v for v, p in zip(values, self.prompts, strict=True)]
        whole = torch.cat([self._filled(one, (-1, -2)) for one in made])
        return whole | torch.eye(self.longest, dtype=torch.bool, device=whole.device)  # a row of nothing would be NaN

    def _filled(self, value: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """Put zeros in front along these axes, as many as prompts are padded with."""
        for axis in axes:
            shape = list(value.shape)
            shape[axis] = self.longest - shape[axis]
            value = torch.cat([value.new_zeros(shape), value], axis)
        return value


def _told(prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
    """Return what the decoder is told about one prompt beside its embeddings."""
    layouts: Sequence[Any] = prompt.layouts
    given = layouts[0].arguments if layouts else {}
    told = decoder_arguments(model, input_ids=torch.tensor([prompt.token_ids]), **given, **kinds_in(prompt))
    used = {"input_ids", "inputs_embeds", "past_key_values", "use_cache"}
    return {name: value for name, value in told.items() if name not in used and value is not None}


class Found(Family):
    """A model of any type that Transformers opens as one that answers questions about images."""

    by_place: ClassVar = True
    one_image: ClassVar = True
    model_types: ClassVar = ()
    inputs_type: ClassVar = FoundInputs
    images_type: ClassVar = FoundImages

    def __init__(self, model_type: str) -> None:
        self.name = f"{model_type}, whose knobs were found by trying and not written by hand"  # type: ignore[misc]
        self.crop_meaning = "a limit of the image processor's number of tiles"  # type: ignore[misc]

    def language(self, model: Any) -> Any:
        return model.get_decoder()

    def head(self, model: Any) -> Any:
        """Return the rest of the model's own forward, behind the model that it wraps."""
        rest = with_answer(model, model.base_model, lambda arguments: _Hidden((arguments["inputs_embeds"],)))
        return lambda hidden: rest(inputs_embeds=hidden.view(-1, 1, hidden.shape[-1])).logits.view(
            *hidden.shape[:-1], -1
        )

    def blocks(self, model: Any) -> tuple[nn.Module, str]:
        holder = self.language(model)
        lists = {name: len(child) for name, child in holder.named_children() if isinstance(child, nn.ModuleList)}
        if not lists:
            raise ConfigError(f"{type(holder).__name__} holds no list of blocks")
        return holder, max(lists, key=lambda name: lists[name])

    def load_processor(self, directory: Path) -> Any:
        try:
            processor = processor_of(directory, image_processor=super().load_processor(directory))
        except NoReference as error:
            raise ConfigError(f"the model in {directory} cannot be tried without its own processor: {error}") from None
        self._mark = str(processor.image_token)
        return processor

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        return self._mark

    def plain_arguments(self, prompt: EmbeddedPrompt, model: Any) -> dict[str, Any]:
        return kinds_in(prompt)
