"""A Transformers vision-language model behind the `VLM` protocol, with its knobs.

What a family does in its own way lies in its small file in `families`; here is what is the same for all: apply and
release a setting, encode the overview once and reuse it, answer one question with every stage timed, answer a batch.
Shapes: n tiles, V visual tokens, T tokens, C channels of the language model, D levels of deepstack features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm.errors import ConfigError, InputError, KnobSpaceError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm import blocks
from budgetvlm.vlm.decoding import LONG_AGO_S, Decoder, Pace
from budgetvlm.vlm.families.base import SIZES_KEPT, Family, Guide, Images, Layout, Paced, Passed, Row
from budgetvlm.vlm.inference import inference
from budgetvlm.vlm.pooling import WordMeans, pool
from budgetvlm.vlm.prompt import Prompt
from budgetvlm.vlm.protocol import Deadline, Generation, Overview, Revise
from budgetvlm.vlm.stopwatch import Stopwatch, waiting_for

KNOBS = ("max_crops", "top_k", "num_active_blocks")


class Adapter:
    """A frozen Transformers model. See `budgetvlm.vlm.protocol.VLM` for the methods of the protocol.

    Args:
        name: what results and checkpoints call the model.
        family: where its knobs live.
        model: a model of that family.
        images: the family's way from an image to visual tokens.
        prompt: the text around image and question.
        knob_space: allowed values of (some of) `KNOBS`.
        block_order: all blocks, most important first.
        end_ids: token ids that end an answer.

    Raises:
        ConfigError: the knobs do not fit the model.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        model: Any,
        images: Images,
        prompt: Prompt,
        knob_space: KnobSpace,
        block_order: Sequence[int],
        end_ids: Sequence[int],
    ) -> None:
        self.name, self.family, self.model, self.knob_space = name, family, model, knob_space
        self.model.eval().requires_grad_(False)
        self.images, self.prompt = images, prompt
        self.dials = family.dials(model)
        self._holder, self._list_name = family.blocks(model)
        self._levels = family.deepstack_levels(model)
        self.num_total_blocks = len(self.layers)
        self._order = blocks.check_order(block_order, self.num_total_blocks, family.fixed_blocks(model))
        self._active: dict[int, tuple[int, ...]] = {}
        self._check_knobs()
        self._layers = {n: self._layer_list(self.active_blocks(n)) for n in self._depths()}
        self._paced_layers = {n: self._paced_list(n) for n in {*self._depths(), self.num_total_blocks}}
        self._pace: Pace | None = None
        self._wait: Callable[[], None] | None = None  # for the device, before a clock is read
        self._setting_crops = [self._max_crops(setting) for setting in knob_space.settings]
        self._crops = set(self._setting_crops)
        self._visual_tokens: dict[tuple[int, int], np.ndarray] = {}
        self.decoder = Decoder(family.language(model), family.head(model), end_ids, family.new_cache)
        self._first_parameter = next(model.parameters())
        self._word_means = WordMeans(self.decoder.model.get_input_embeddings())
        self._lock = threading.RLock()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks that run now."""
        return self._holder._modules[self._list_name]  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._first_parameter.device  # what `model.device` looks for each time anew

    @property
    def most_crops(self) -> int:
        """The largest `max_crops`: that of the knob space, or the processor's own."""
        if "max_crops" in self.knob_space.names:
            return int(self.knob_space.values("max_crops")[-1])
        return self.images.most_crops

    @property
    def block_order(self) -> tuple[int, ...]:
        """All blocks, most important first."""
        return self._order

    def places(self) -> tuple[str, str]:
        """In words: where the list of blocks lives, and the places of top_k ("" where there is none)."""
        names = {id(module): name for name, module in self.model.named_modules()}
        blocks_at = f"{names.get(id(self._holder), type(self._holder).__name__)}.{self._list_name}"
        if not self.dials:
            return blocks_at, ""
        first = self.dials[0]
        owner = names.get(id(first.owner), type(first.owner).__name__)
        more = f" and {len(self.dials) - 1} more" if len(self.dials) > 1 else ""
        return blocks_at, f"{owner}.{first.name}{more}; {first.get()} of {first.most} experts"

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        """Indices of the blocks that run at this depth, ascending."""
        active = self._active.get(num_active_blocks)
        if active is None:
            self._active[num_active_blocks] = active = blocks.active_blocks(self._order, num_active_blocks)
        return active

    @contextmanager
    def apply(self, setting: Setting) -> Iterator[None]:
        """Apply a setting for a ``with`` block; other threads wait until it ends.

        Attributes are written past `nn.Module.__setattr__`, whose checks would cost more than the change itself; the
        list of layers is ready-made for each depth. `max_crops` is no state of the model: calls pass it on.

        Raises:
            KnobSpaceError: the setting is outside `knob_space`.
        """
        self.knob_space.index(setting)
        depth, top_k = setting.get("num_active_blocks"), setting.get("top_k")
        with self._changed(self._layers[int(depth)] if depth else None, int(top_k) if top_k else None):
            yield

    @contextmanager
    def only_blocks(self, active: Sequence[int]) -> Iterator[None]:
        """Run just these blocks (ascending) for a ``with`` block, whatever the knob space says; to measure blocks.

        Blocks that others cannot do without run as well.
        """
        with self._changed(self._layer_list(sorted({*active, *self.family.fixed_blocks(self.model)})), None):
            yield

    @contextmanager
    def _changed(self, layers: nn.ModuleList | None, top_k: int | None) -> Iterator[None]:
        """Other layers and another top_k, None for what stays; as before at the end, also after an exception."""
        with self._lock:
            lists = self._holder._modules
            before = lists[self._list_name], [dial.get() for dial in self.dials]
            try:
                if layers is not None:
                    lists[self._list_name] = layers
                if top_k is not None:
                    self._set_top_k([top_k] * len(self.dials))
                yield
            finally:
                lists[self._list_name] = before[0]
                self._set_top_k(before[1])

    def encode_overview(self, image: Image.Image) -> Overview:
        """Preprocess and encode the overview crop once."""
        return self.encode_overviews([image])[0]

    @inference
    def encode_overviews(self, images: Sequence[Image.Image]) -> list[Overview]:
        """`encode_overview` for several images in one pass; each is told its share of the time."""
        watch = Stopwatch(waiting_for(self._first_parameter))
        pixels = [self.images.overview(image) for image in images]
        layouts = [self.images.overview_layout(image) for image in images]
        preprocess_ms = watch.lap() / len(images)
        tokens = [features.flatten(0, -2) for features in self._encode(pixels, layouts)]
        features = [pool(self._first_level(row)) for row in tokens]
        vision_ms = watch.lap() / len(images)
        return [Overview(t, f, preprocess_ms, vision_ms) for t, f in zip(tokens, features, strict=True)]

    def question_feature(self, question: str) -> np.ndarray:
        """Mean of the embeddings of the question's tokens, float32 ``[Dl]``; what every prompt has is left out."""
        return self._word_means(self.prompt.question_array(question))

    def prompt_size(self, image: Image.Image, question: str) -> tuple[np.ndarray, int]:
        """Visual tokens at each setting ``[K]`` and the prompt's other tokens, without running the model."""
        vision = self._visual_tokens.get(image.size)
        if vision is None:
            vision = self._count_visual_tokens(image)
        return vision, len(self.prompt.question_array(question)) + self.prompt.num_fixed

    def _count_visual_tokens(self, image: Image.Image) -> np.ndarray:
        """At each setting ``[K]``; remembered for images of this size."""
        if len(self._visual_tokens) >= SIZES_KEPT:
            self._visual_tokens.clear()
        tokens = {crops: len(self.images.layout(image, crops).ids) for crops in self._crops}
        vision = np.array([tokens[crops] for crops in self._setting_crops], dtype=np.float64)
        vision.setflags(write=False)
        self._visual_tokens[image.size] = vision
        return vision

    @inference
    def encode_tiles(self, images: Sequence[Image.Image], max_crops: int | None = None) -> list[torch.Tensor]:
        """Visual tokens of each image ``[V_i, C]`` at one `max_crops` (None: the most), for `generate_batch`."""
        crops = self.most_crops if max_crops is None else max_crops
        pixels = [self.images.all(image, crops) for image in images]
        layouts = [self.images.layout(image, crops) for image in images]
        joined = zip(self._encode(pixels, layouts), layouts, strict=True)
        return [self.images.join(features, None, layout) for features, layout in joined]

    @inference
    def generate(
        self,
        image: Image.Image,
        question: str,
        setting: Setting,
        *,
        max_new_tokens: int = 16,
        overview: Overview | None = None,
        deadline: Deadline | None = None,
        revise: Revise | None = None,
    ) -> Generation:
        """Answer one question at batch 1, greedily, with every stage timed and the device synchronised."""
        _check_length(max_new_tokens)
        max_crops = self._setting_crops[self.knob_space.index(setting)]
        watch = Stopwatch(waiting_for(self._first_parameter))
        question_ids = self.prompt.question_ids(question)
        pixels = self._pixels_beside(image, max_crops, overview)
        layout = self.images.layout(image, max_crops)
        stages = {"preprocess": watch.lap() + (overview.preprocess_ms if overview else 0.0)}
        visual = self._join(pixels, overview, layout)
        stages["vision"] = watch.lap() + (overview.vision_ms if overview else 0.0)
        if revise is not None:
            setting, deadline = revise(sum(stages.values()))
            self._check_same_image(setting, max_crops)
        with self.apply(setting):
            watch.lap()
            guide = self.guide([self.row(visual, question_ids, layout)])
            pace = Pace.of(self, setting, deadline) if deadline else None
            with self._reading(setting, pace) if pace and deadline and deadline.read_ms else nullcontext():
                cache, first = self.decoder.prefill(guide.rows[0].embeddings[None], **guide.prefill())
            stages["prefill"] = watch.lap()
            ids = self.decoder.decode(cache, first, max_new_tokens, pace, guide, self.apply)
            stages["decode"] = watch.lap()
        return self._generation(ids, len(layout.ids), len(question_ids), stages, max_new_tokens, pace)

    @contextmanager
    def _reading(self, setting: Setting, pace: Pace) -> Iterator[None]:
        """Ask before each block how it reads the prompt, for a ``with`` block within that of `apply`."""
        lists = self._holder._modules
        before = lists[self._list_name]
        depth = int(setting.get("num_active_blocks", self.num_total_blocks))
        lists[self._list_name], self._pace = self._paced_layers[depth], pace
        self._wait = waiting_for(self._first_parameter)
        try:
            yield
            pace.has_read()
        finally:
            lists[self._list_name], self._pace = before, None

    def _reads(self, block: int) -> bool:
        """Whether this block is to read the prompt; the experts per token are set if that is in more of a hurry."""
        pace = self._pace
        assert pace is not None
        if self._wait:
            self._wait()
        now_s = pace.clock()
        if now_s <= pace.in_time_s.get(block, LONG_AGO_S):
            return True
        before = pace.rung
        runs = pace.reads(now_s, block)
        if pace.rung != before and pace.setting and (top_k := pace.setting.get("top_k")):
            self._set_top_k([int(top_k)] * len(self.dials))
        return runs

    @inference
    def generate_batch(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        setting: Setting,
        *,
        max_new_tokens: int = 16,
        visual: Sequence[torch.Tensor] | None = None,
    ) -> list[Generation]:
        """Answer a batch greedily; the same answers as `generate` one by one.

        Args:
            visual: tokens of `encode_tiles` at this setting's `max_crops`; only the sizes of ``images`` then matter.
        """
        _check_length(max_new_tokens)
        questions_ids = [self.prompt.question_ids(question) for question in questions]
        if not questions_ids:
            return []
        max_crops = self._max_crops(setting)
        with self.apply(setting):
            visual = self.encode_tiles(images, max_crops) if visual is None else visual
            layouts = [self.images.layout(image, max_crops) for image in images]
            rows = [self.row(*parts) for parts in zip(visual, questions_ids, layouts, strict=True)]
            answers = self.decoder.decode_batch(self.guide(rows), max_new_tokens)
        return [
            self._generation(ids, len(layout.ids), len(question), {}, max_new_tokens)
            for ids, question, layout in zip(answers, questions_ids, layouts, strict=True)
        ]

    def _check_same_image(self, setting: Setting, max_crops: int) -> None:
        """Of a revised setting. Raises KnobSpaceError."""
        if self._setting_crops[self.knob_space.index(setting)] != max_crops:
            raise KnobSpaceError(
                f"the image is encoded at max_crops={max_crops} already and cannot be answered at {setting}; revise "
                "the other knobs only"
            )

    def visual(self, image: Image.Image, max_crops: int, overview: Overview | None = None) -> torch.Tensor:
        """Visual tokens of one image ``[V, C]``, with an overview that was encoded before or without."""
        pixels = self._pixels_beside(image, max_crops, overview)
        return self._join(pixels, overview, self.images.layout(image, max_crops))

    def row(
        self, visual: torch.Tensor, question_ids: Sequence[int], layout: Layout, answer_ids: Sequence[int] = ()
    ) -> Row:
        """The whole prompt of one image and question, and what of an answer is there already."""
        before, after = self.prompt.around(question_ids)
        ids = (*before, *layout.ids, *after, *answer_ids)
        tokens, deepstack = self._first_level(visual), self._other_levels(visual)
        if layout.visual is None:
            text = self._embed([*before, *after, *answer_ids])
            parts = [text[: len(before)], tokens.to(text.dtype), text[len(before) :]]
            return Row(torch.cat(parts), ids, len(before), layout, deepstack)
        embeddings = self._embed(self._without_placeholders(ids, len(before), layout))
        row = Row(embeddings, ids, len(before), layout, deepstack)
        mask = row.visual_mask()
        tokens = tokens.to(embeddings.dtype)
        embeddings[mask] = embeddings[mask] + tokens if self.family.adds_features else tokens
        return row

    def guide(self, rows: Sequence[Row]) -> Guide:
        """What the decoder is told about these prompts."""
        return self.family.guide(rows, self.model)

    def _pixels_beside(self, image: Image.Image, max_crops: int, overview: Overview | None) -> torch.Tensor:
        if overview is None:
            return self.images.all(image, max_crops)
        return self.images.beside(image, max_crops)

    def _join(self, pixels: torch.Tensor, overview: Overview | None, layout: Layout) -> torch.Tensor:
        """Visual tokens ``[V, C]`` of the pixels just cut and of an overview encoded before."""
        features = self._encode([pixels], [layout])[0] if len(pixels) else None
        return self.images.join(features, overview.tokens if overview else None, layout)

    def _encode(self, pixels: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> list[torch.Tensor]:
        return self.images.encode(pixels, layouts)

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self.decoder.embed(torch.tensor(ids, device=self.device))

    def _without_placeholders(self, ids: Sequence[int], start: int, layout: Layout) -> list[int]:
        """Ids that the table of embeddings is sure to hold: a placeholder may lie behind its end."""
        safe = list(ids)
        if self.family.adds_features:
            return safe
        for i, is_visual in enumerate(layout.visual or (), start):
            safe[i] = 0 if is_visual else safe[i]
        return safe

    def _first_level(self, tokens: torch.Tensor) -> torch.Tensor:
        """What stands in the prompt ``[V, C]``; further levels lie behind it, ``[V, C * (1 + D)]``."""
        return tokens[:, : tokens.shape[1] // (1 + self._levels)] if self._levels else tokens

    def _other_levels(self, tokens: torch.Tensor) -> torch.Tensor | None:
        return tokens.unflatten(1, (1 + self._levels, -1))[:, 1:] if self._levels else None

    def _generation(
        self,
        ids: list[int],
        num_vision: int,
        num_question: int,
        stages: dict[str, float],
        max_new_tokens: int,
        pace: Pace | None = None,
    ) -> Generation:
        cut = "length" if len(ids) == max_new_tokens else "budget"
        return Generation(
            text=self.prompt.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            token_ids=tuple(ids),
            finish_reason="stop" if ids[-1] in self.decoder.end_ids else cut,
            num_vision_tokens=num_vision,
            num_language_tokens=num_question + self.prompt.num_fixed,
            num_output_tokens=len(ids),
            stages_ms=stages,
            hurried=tuple(pace.hurried) if pace else (),
            saved_ms=pace.saved_ms if pace else {},
        )

    def _max_crops(self, setting: Setting) -> int:
        return int(setting.get("max_crops", self.most_crops))

    def _set_top_k(self, values: Sequence[int]) -> None:
        for dial, value in zip(self.dials, values, strict=True):
            dial.set(value)

    def _depths(self) -> list[int]:
        if "num_active_blocks" not in self.knob_space.names:
            return []
        return [int(n) for n in self.knob_space.values("num_active_blocks")]

    def _layer_list(self, active: Sequence[int]) -> nn.ModuleList:
        """The list to run: without the skipped blocks, or with stand-ins where the decoder goes by place."""
        layers = self.layers
        if len(active) == len(layers):
            return layers
        if not self.family.goes_by_place(self.model):
            return nn.ModuleList(layers[i] for i in active)
        return nn.ModuleList(layer if i in active else Passed(layer) for i, layer in enumerate(layers))

    def _paced_list(self, depth: int) -> nn.ModuleList:
        """The list to run at this depth where each of its blocks is asked for first (`_reads`)."""
        numbers = {id(layer): i for i, layer in enumerate(self.layers)}

        def paced(layer: nn.Module) -> nn.Module:
            number = numbers.get(id(layer))  # a stand-in has none; `_reads` is looked up late, so that it can be timed
            return layer if number is None else Paced(layer, lambda: self._reads(number), self.family.passed)

        return nn.ModuleList(paced(layer) for layer in self._layers.get(depth, self.layers))

    def _check_knobs(self) -> None:
        problems = list(self._knob_problems())
        if problems:
            raise ConfigError(f"the knobs of {self.name} do not fit the model: " + "; ".join(problems))
        if self._depths()[:1] not in ([], [self.num_total_blocks]):
            self.family.check_blocks(self.model)

    def _knob_problems(self) -> Iterator[str]:
        space = self.knob_space
        unknown = [name for name in space.names if name not in KNOBS]
        if unknown:
            yield f"it has no knob {', '.join(unknown)}, only {', '.join(KNOBS)}"
        for name in set(space.names) & set(KNOBS):
            if any(value != int(value) for value in space.values(name)):
                yield f"{name} needs whole numbers: {list(space.values(name))}"
        depths = self._depths()
        least = blocks.least_depth(self.num_total_blocks, self.family.fixed_blocks(self.model))
        if depths and (depths[0] < least or depths[-1] > self.num_total_blocks):
            yield f"num_active_blocks={depths} is outside {least} to {self.num_total_blocks}"
        if "top_k" in space.names:
            most = min((dial.most for dial in self.dials), default=0)
            if max(space.values("top_k")) > most:
                yield f"top_k={list(space.values('top_k'))} exceeds the model's {most} experts"


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} cannot be answered with; give at least 1")
