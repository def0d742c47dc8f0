"""What every family of models is asked, with the answers that fit most.

A family is one small file: a `Family` says where the knobs live in the model, an `Images` says how a picture becomes
visual tokens at a `max_crops`, a `Guide` says what the decoder is told beside embeddings. The adapter does the rest.
Shapes: n tiles or patches, T tokens, V visual tokens, C channels of the language model, B rows of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.vlm.images import to_rgb
from budgetvlm.vlm.prompt import chat_template

SIZES_KEPT = 4096  # sizes of images whose layout is remembered
ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Layout:
    """How one image stands in the prompt at one `max_crops`.

    Attributes:
        ids: its token ids; a visual token's place holds the family's placeholder.
        visual: which of ``ids`` are visual tokens; None: all of them.
        grid: rows and columns of its tiles or patches; (0, 0) where it is not cut.
        size: height and width of the image in pixels.
        order: for each visual token, which of the features it is; None: one after the other.
    """

    ids: tuple[int, ...]
    visual: tuple[bool, ...] | None = None
    grid: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    order: tuple[int, ...] | None = None

    @property
    def num_visual(self) -> int:
        return len(self.ids) if self.visual is None else sum(self.visual)


@dataclass(frozen=True)
class Dial:
    """One place that holds a number of experts per token: ``owner.name``, at most ``most``."""

    owner: Any
    name: str
    most: int

    def get(self) -> int:
        return int(vars(self.owner)[self.name])

    def set(self, value: int) -> None:
        """Write past `nn.Module.__setattr__`, whose checks would cost more than the change itself."""
        vars(self.owner)[self.name] = value


@dataclass(frozen=True)
class Row:
    """One prompt, ready for the decoder.

    Attributes:
        embeddings: ``[T, C]``.
        token_ids: T ids; placeholders stand for visual tokens.
        start: where the image's tokens begin.
        layout: how the image stands in the prompt.
        deepstack: features added behind the first D blocks, ``[V, D, C]``; None where the family has none.
    """

    embeddings: torch.Tensor
    token_ids: tuple[int, ...]
    start: int
    layout: Layout
    deepstack: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def visual_mask(self) -> torch.Tensor:
        """True at visual tokens, ``[T]``."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        inside = self.layout.visual or (True,) * len(self.layout.ids)
        mask[self.start : self.start + len(inside)] = torch.tensor(inside, dtype=torch.bool)
        return mask.to(self.embeddings.device)


class Guide:
    """What the decoder is told beside embeddings, for one batch: padding, and what a family adds to it.

    Rows are padded on the left. Where none is padded nothing is said, which lets the model take its quicker way.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        device = rows[0].embeddings.device
        self.longest = max(len(row) for row in rows)
        self.padded = any(len(row) < self.longest for row in rows)
        self.mask = torch.ones(len(rows), self.longest, dtype=torch.long, device=device)
        for mask, row in zip(self.mask, rows, strict=True):
            mask[: self.longest - len(row)] = 0
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0) if self.padded else self.mask

    def prefill(self) -> dict[str, Any]:
        """Arguments for the whole prompts."""
        return {"attention_mask": self.mask, "position_ids": self.positions} if self.padded else {}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        """Arguments for the next token of each row, ``[B]``."""
        if not self.padded:
            return {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return {"attention_mask": self.mask, "position_ids": self.positions}

    def pad(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor ``[T_i, ...]`` a row -> ``[B, T, ...]``, zeros on the left."""
        whole = values[0].new_zeros(len(values), self.longest, *values[0].shape[1:])
        for row, value in zip(whole, values, strict=True):
            row[self.longest - len(value) :] = value
        return whole


class Images(ABC):
    """How one family turns an image into visual tokens.

    Attributes:
        most_crops: the largest `max_crops`, which is what the model does untouched.
        overview_is_part: every setting encodes the overview anyway, so that reading it first costs nothing.
    """

    most_crops: int
    overview_is_part: bool = True

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._layouts: dict[tuple[int, int, int], Layout] = {}

    def layout(self, image: Image.Image, max_crops: int) -> Layout:
        """How the image stands in the prompt, without encoding it."""
        key = image.height, image.width, max_crops
        if key not in self._layouts:
            if len(self._layouts) >= SIZES_KEPT:
                self._layouts.clear()
            self._layouts[key] = self._layout(*key)
        return self._layouts[key]

    @abstractmethod
    def _layout(self, height: int, width: int, max_crops: int) -> Layout: ...

    @abstractmethod
    def overview(self, image: Image.Image) -> torch.Tensor:
        """Pixels of the overview, ``[n, ...]``."""

    @abstractmethod
    def beside(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """Pixels of what is still to be encoded when the overview has been, ``[n, ...]``; n may be 0."""

    @abstractmethod
    def all(self, image: Image.Image, max_crops: int) -> torch.Tensor:
        """All pixels in the model's order, ``[n, ...]``."""

    def overview_layout(self, image: Image.Image) -> Layout:
        """The layout of the overview alone."""
        return self.layout(image, 1)

    @abstractmethod
    def encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> list[torch.Tensor]:
        """Features of each image's pixels, encoded together."""

    @abstractmethod
    def join(self, features: torch.Tensor | None, overview: torch.Tensor | None, layout: Layout) -> torch.Tensor:
        """Visual tokens ``[V, C]`` from the features of `all`; or of `beside` (None if empty) and the overview's."""

    @abstractmethod
    def plain(self, image: Image.Image, max_crops: int) -> dict[str, Any]:
        """What the model's own forward is given for this image, made by its own processor; to check against."""

    def crop_values(self) -> list[int]:
        """Values of `max_crops` where none are given: powers of two and the most, of four where there are many."""
        base = 2 if self.most_crops <= 16 else 4
        powers = [base**i for i in range(4) if base**i < self.most_crops]
        return [*powers, self.most_crops]


class Family:
    """Where the knobs of one family live. Attributes and methods below are what most families need.

    Attributes:
        name: what people call it.
        model_types: `model_type` of the configurations that it covers.
        by_place: the decoder looks things up by a block's place in its list (kinds of attention, deepstack features),
            so that a skipped block leaves a stand-in instead of a gap.
        adds_features: visual features are added to the embeddings of their placeholders instead of replacing them.
        remote_code: the model is Python code of its own, which is run only where it is trusted.
        crop_meaning: what `max_crops` becomes, in words.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    by_place: ClassVar[bool] = False
    adds_features: ClassVar[bool] = False
    remote_code: ClassVar[bool] = False
    crop_meaning: ClassVar[str]

    def guide(self, rows: Sequence[Row], model: Any) -> Guide:
        """What the decoder is told about these prompts."""
        return Guide(rows)

    def language(self, model: Any) -> Any:
        """The decoder: embeddings -> hidden states; it holds the token embeddings."""
        return model.model.language_model

    def head(self, model: Any) -> Any:
        """Hidden states -> logits."""
        return model.lm_head

    def blocks(self, model: Any) -> tuple[nn.Module, str]:
        """The module that holds the list of blocks, and the list's name."""
        return self.language(model), "layers"

    def dials(self, model: Any) -> list[Dial]:
        """Every place that holds the number of experts per token; none in a dense model."""
        return find_dials(self.language(model))

    def fixed_blocks(self, model: Any) -> tuple[int, ...]:
        """Blocks that run at every depth beside the first and the last."""
        return ()

    def images(self, model: Any, processor: Any, tokenizer: Any, options: Mapping[str, Any]) -> Images:
        raise NotImplementedError

    def template(self, model: Any, tokenizer: Any) -> str:
        """The prompt, with `{image}` and `{question}`: from the tokenizer's chat template.

        Raises:
            ConfigError: there is no chat template, or it does not hold one image and one question.
        """
        return chat_template(tokenizer, self.placeholder(model, tokenizer))

    def placeholder(self, model: Any, tokenizer: Any) -> str:
        """What stands for the image in the chat template."""
        return str(tokenizer.convert_ids_to_tokens(model.config.image_token_id))

    def deepstack_levels(self, model: Any) -> int:
        """How many blocks are given visual features of their own."""
        return 0

    def load(self, directory: Path, **options: Any) -> Any:
        """The model, as `from_pretrained` returns it."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(directory, **options)

    def load_processor(self, directory: Path) -> Any:
        """The image processor, the one that needs Pillow alone."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)

    def passed(self, hidden_states: torch.Tensor) -> Any:
        """What a block returns that does nothing."""
        return hidden_states

    def new_cache(self) -> Any:
        """An empty cache of keys and values. All its layers are full ones; masks keep sliding windows."""
        from transformers import DynamicCache

        return DynamicCache()

    def goes_by_place(self, model: Any) -> bool:
        """Whether a skipped block has to leave a stand-in: see `by_place`; so has it where kinds of attention mix."""
        return self.by_place or len(attention_kinds(self.language(model))) > 1

    def check_blocks(self, model: Any) -> None:
        """Whether blocks can be skipped: an attention without keys and values needs a cache of its own kind.

        Raises:
            ConfigError: the language model has another kind of attention than full, sliding or chunked.
        """
        foreign = attention_kinds(self.language(model)) - ATTENTION_KINDS
        if foreign:
            raise ConfigError(
                f"blocks of this language model cannot be skipped: it has {', '.join(sorted(foreign))}, and only "
                f"{', '.join(sorted(ATTENTION_KINDS))} are known to keep a correct cache. Give num_active_blocks one "
                "value, the number of its blocks, in knobs.json"
            )

    def untouched_logits(self, model: Any, row: Row, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Logits of the model's own forward behind a prompt ``[V]``; to check against."""
        ids = torch.tensor([row.token_ids], device=model.device)
        return model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]

    def plain_arguments(self, row: Row, model: Any) -> dict[str, Any]:
        """What the model's own forward wants beside ids and pixels; to check against."""
        return {}


def find_dials(language: nn.Module) -> list[Dial]:
    """Every module with a number of experts per token and a number of experts, in the order of the blocks."""
    found = (m for m in language.modules() if isinstance(vars(m).get("top_k"), int))
    return [Dial(m, "top_k", int(vars(m)["num_experts"])) for m in found if "num_experts" in vars(m)]


def attention_kinds(language: Any) -> set[str]:
    """The kinds of attention that the decoder's configuration lists; none where all blocks are alike."""
    return set(getattr(language.config, "layer_types", None) or ())


class Passed(nn.Module):
    """Stands in a skipped block's place and hands the hidden states on; what it is asked else, the block answers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["block"] = block  # past `nn.Module.__setattr__`: the block stays no child of this

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states


class Paced(Passed):
    """Stands in front of a block and runs it, or hands the hidden states on as a skipped block would.

    Args:
        runs: asked each time whether the block runs.
        passed: see `Family.passed`.
    """

    def __init__(self, block: nn.Module, runs: Callable[[], bool], passed: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(block)
        vars(self).update(runs=runs, passed=passed)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mine = vars(self)
        return mine["block"](hidden_states, *args, **kwargs) if mine["runs"]() else mine["passed"](hidden_states)

    __call__ = forward  # past `nn.Module.__call__`: nobody hooks a stand-in, and a request pays for each


def block_of(layer: nn.Module) -> nn.Module:
    """The block that a stand-in stands for; any other is its own."""
    block: nn.Module = vars(layer)["block"] if isinstance(layer, Passed) else layer
    return block


def fractions(whole: int, shares: Sequence[float], least: int) -> list[int]:
    """Shares of a whole, rounded up, at least ``least``, ascending."""
    return sorted({max(least, math.ceil(share * whole)) for share in shares})


def run_processor(processor: Any, image: Image.Image, **options: Any) -> Any:
    """An image processor's own call.

    Raises:
        InputError: the processor refuses the image.
    """
    rgb = to_rgb(image)
    with refusals_in_words(*rgb.size):
        return processor(rgb, return_tensors="pt", **options)


@contextmanager
def refusals_in_words(width: int, height: int) -> Iterator[None]:
    """What a processor raises where it cannot take an image of this size, as an InputError."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the model's image processor refuses an image of {width} x {height}: {error}") from None
