"""A Transformers vision-language model behind the `VLM` protocol, with its knobs.

What a family does in its own way lies in its small file in `families`; here is what is the same for all: apply and
release a setting, encode the overview once and reuse it, answer one question with every stage timed, answer a batch.
Shapes: n tiles, V visual tokens, T tokens, C channels of the language model, K settings.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm.errors import InputError, KnobSpaceError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm import blocks
from budgetvlm.vlm.decoding import Decoder, Pace, PacedReading, mean_embedder, stopwatch, waiting_for
from budgetvlm.vlm.families.base import SIZE_CACHE_LIMIT, Family, Images, pool
from budgetvlm.vlm.knob_limits import check_knobs, depths
from budgetvlm.vlm.prompt import DecoderInputs, EmbeddedPrompt, Prompt, PromptEmbedder
from budgetvlm.vlm.protocol import Conversation, Deadline, Generation, OnText, Overview, Revise
from budgetvlm.vlm.text_stream import TextStream


class _Configuration(NamedTuple):
    """What the model is at one setting: crops, blocks that run and their list, experts (None: as they are)."""

    max_crops: int
    active: tuple[int, ...]
    layers: nn.ModuleList | None
    top_k: int | None


class Adapter:
    """A frozen Transformers model. See `budgetvlm.vlm.protocol.VLM` for the methods of the protocol.

    Args:
        name: what results and checkpoints call the model.
        knob_space: allowed values of (some of) `budgetvlm.knobs.KNOBS`.
        block_order: all blocks, most important first.
        end_ids: token ids that end an answer.

    Raises ConfigError: the knobs do not fit the model.
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
        check_knobs(knob_space, family, model, name)
        self.name, self.family, self.model, self.knob_space = name, family, model, knob_space
        self.model.eval().requires_grad_(False)
        self.can_revise = True
        self.images, self.prompt = images, prompt
        # where the knobs live
        self.dials = family.dials(model)
        self._holder, self._list_name = family.blocks(model)
        self.num_total_blocks = len(self.layers)
        self.block_order = blocks.check_order(block_order, self.num_total_blocks, family.fixed_blocks(model))
        # the lists of blocks at each depth, and the configuration of each setting
        self.wait = waiting_for(next(model.parameters()))
        self._reading = PacedReading(self.wait, self._set_top_k)
        self._layers = {n: self._layer_list(self.active_blocks(n)) for n in {*depths(knob_space), len(self.layers)}}
        self._paced_layers = {
            n: blocks.paced_list(layers, self.layers, self._reading, family.skipped_output)
            for n, layers in self._layers.items()
        }
        self._configurations = {setting: self._configure(setting) for setting in knob_space.settings}
        # what prompts and answers are made with
        self.decoder = Decoder(family.language(model), family.head(model), end_ids, family.cache_maker(model))
        table = self.decoder.model.get_input_embeddings()
        self._mean_embedding = mean_embedder(table)
        self._deepstack_levels = family.deepstack_levels(model)
        self.embed_prompt = PromptEmbedder(prompt, table, self._deepstack_levels, family.adds_features)
        self._visual_tokens = lru_cache(SIZE_CACHE_LIMIT)(self._count_visual_tokens)
        self._lock = threading.RLock()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks that run now."""
        layers: nn.ModuleList = getattr(self._holder, self._list_name)
        return layers

    @property
    def most_crops(self) -> int:
        """The largest `max_crops`: that of the knob space, or the processor's own."""
        own = "max_crops" in self.knob_space.names
        return int(self.knob_space.values("max_crops")[-1]) if own else self.images.most_crops

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        """Return the indices of the blocks that run at this depth, ascending."""
        return blocks.active_blocks(self.block_order, num_active_blocks)

    @contextmanager
    def apply(self, setting: Setting) -> Iterator[None]:
        """Apply a setting for a ``with`` block; other threads wait until it ends.

        The list of layers is ready-made for each depth. `max_crops` is no state of the model: calls pass it on.

        Raises KnobSpaceError: the setting is outside `knob_space`.
        """
        configuration = self._configuration(setting)
        with self._changed(configuration.layers, configuration.top_k):
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
        """Change layers and top_k (None: not) for a ``with`` block; as before at its end, also after an exception."""
        wanted: list[tuple[Any, str, Any]] = [(self._holder, self._list_name, layers)] if layers is not None else []
        wanted += [(dial.owner, dial.name, top_k) for dial in self.dials if top_k is not None]
        with self._lock:
            before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
            try:
                for change in wanted:
                    setattr(*change)
                yield
            finally:
                for change in before:
                    setattr(*change)

    def _set_top_k(self, top_k: int) -> None:
        for dial in self.dials:
            setattr(dial.owner, dial.name, top_k)

    def pace(self, setting: Setting, deadline: Deadline) -> Pace:
        """Make the pace of an answer that is given at this setting."""
        quicker = (one.setting for one in deadline.hurried)
        return Pace(deadline, [self._configuration(one).active for one in (setting, *quicker)])

    def encode_overview(self, image: Image.Image) -> Overview:
        """Preprocess and encode the overview crop once."""
        return self.encode_overviews([image])[0]

    @torch.inference_mode()
    def encode_overviews(self, images: Sequence[Image.Image]) -> list[Overview]:
        """Do as `encode_overview` for several images in one pass; each is told its share of the time."""
        lap = stopwatch(self.wait)
        pixels = [self.images.overview(image) for image in images]
        layouts = [self.images.layout_of(image, 1) for image in images]
        preprocess_ms = lap() / len(images)
        tokens = [features.flatten(0, -2) for features in self.images.encode(pixels, layouts)]
        features = [pool(one, self._deepstack_levels) for one in tokens]
        vision_ms = lap() / len(images)
        return [Overview(t, f, preprocess_ms, vision_ms) for t, f in zip(tokens, features, strict=True)]

    def question_feature(self, question: str | Conversation) -> np.ndarray:
        """Return the mean of the embeddings of the question's tokens, float32 ``[Dl]``, without the fixed text's."""
        return self._mean_embedding(self.prompt.question_ids(question))

    def prompt_size(self, image: Image.Image | None, question: str | Conversation) -> tuple[np.ndarray, int]:
        """Return visual tokens at each setting ``[K]`` and the prompt's other tokens, without running the model."""
        images = self._images_of(image, question)
        if len(images) == 1:
            return self._visual_tokens(*images[0].size), self.prompt.num_text_tokens(question)
        none = np.zeros(len(self.knob_space))
        return sum((self._visual_tokens(*one.size) for one in images), none), self.prompt.num_text_tokens(question)

    def _images_of(self, image: Any, question: str | Conversation) -> Sequence[Image.Image]:
        """Return all images that are asked about. Raises InputError: more than the model takes."""
        if not isinstance(question, Conversation):
            return (image,)
        if len(question.images) > 1 and self.family.one_image:
            raise InputError(f"the model {self.name} takes one image, given {len(question.images)}; ask about one")
        return question.images

    @torch.inference_mode()
    def encode_tiles(self, images: Sequence[Image.Image], max_crops: int | None = None) -> list[torch.Tensor]:
        """Return visual tokens of each image ``[V_i, C]`` at one `max_crops` (None: the most), for `generate_batch`."""
        crops = self.most_crops if max_crops is None else max_crops
        pixels = [self.images.all(image, crops) for image in images]
        layouts = [self.images.layout_of(image, crops) for image in images]
        encoded = zip(self.images.encode(pixels, layouts), layouts, strict=True)
        return [self.images.join(features, None, layout) for features, layout in encoded]

    @torch.inference_mode()
    def generate(
        self,
        image: Image.Image | None,
        question: str | Conversation,
        setting: Setting,
        *,
        max_new_tokens: int = 16,
        overview: Overview | Sequence[Overview] | None = None,
        deadline: Deadline | None = None,
        revise: Revise | None = None,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> Generation:
        """Answer one question at batch 1, greedily, with every stage timed and the device synchronised."""
        _check_length(max_new_tokens)
        max_crops = self._configuration(setting).max_crops
        images = self._images_of(image, question)
        overviews = [overview] if isinstance(overview, Overview) else list(overview or ())
        lap = stopwatch(self.wait)
        # cut the images and encode them, but for the overviews
        pixels = [(self.images.beside if overviews else self.images.all)(one, max_crops) for one in images]
        layouts = [self.images.layout_of(one, max_crops) for one in images]
        texts = self.prompt.around(question, [layout.lead for layout in layouts])
        stages = {"preprocess": lap() + sum([one.preprocess_ms for one in overviews])}
        known: list[Any] = [one.tokens for one in overviews] or [None] * len(images)
        visual = [self.images.encoded(*parts) for parts in zip(pixels, known, layouts, strict=True)]
        stages["vision"] = lap() + sum([one.vision_ms for one in overviews])
        if not images:
            stages = dict.fromkeys(stages, 0.0)  # there was nothing to be timed
        # choose the other knobs anew
        if revise is not None:
            setting, deadline = revise(sum(stages.values()))
            if self._configuration(setting).max_crops != max_crops:
                raise KnobSpaceError(
                    f"the image is encoded at max_crops={max_crops} already and cannot be answered at {setting}; "
                    "revise the other knobs only"
                )
        # read the prompt and answer
        with self.apply(setting):
            lap()
            prompt = self.embed_prompt.around(visual, texts, layouts)
            inputs = self.decoder_inputs([prompt])
            pace = self.pace(setting, deadline) if deadline else None
            with self.paced(setting, pace) if pace and deadline and deadline.read_ms else nullcontext():
                cache, first = self.decoder.prefill(prompt.embeddings[None], **inputs.prefill())
            stages["prefill"] = lap()
            text = TextStream(self._text, stop, on_text) if stop or on_text else None
            ids = self.decoder.decode(cache, first, max_new_tokens, pace, inputs, self.apply, text)
            if text:
                text.finish(ids)
            stages["decode"] = lap()
        return self._generation(ids, prompt, max_new_tokens, stages, pace, text)

    @contextmanager
    def paced(self, setting: Setting, pace: Pace) -> Iterator[None]:
        """Ask a pace before each block how it reads the prompt, for a ``with`` block within that of `apply`."""
        layers_before = self.layers
        self._reading.pace = pace
        setattr(self._holder, self._list_name, self._paced_layers[len(self._configuration(setting).active)])
        try:
            yield
            pace.has_read()
        finally:
            setattr(self._holder, self._list_name, layers_before)
            self._reading.pace = None

    @torch.inference_mode()
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
        max_crops = self._configuration(setting).max_crops
        with self.apply(setting):
            visual = self.encode_tiles(images, max_crops) if visual is None else visual
            layouts = [self.images.layout_of(image, max_crops) for image in images]
            prompts = [self.embed_prompt(*parts) for parts in zip(visual, questions_ids, layouts, strict=True)]
            answers = self.decoder.decode_batch(self.decoder_inputs(prompts), max_new_tokens)
        return [self._generation(ids, prompt, max_new_tokens, {}) for ids, prompt in zip(answers, prompts, strict=True)]

    def _count_visual_tokens(self, width: int, height: int) -> np.ndarray:
        crops = (self._configuration(setting).max_crops for setting in self.knob_space.settings)
        layouts = (self.images.layout_of_size(height, width, most) for most in crops)
        visual = np.array([self.prompt.num_image_tokens(layout) for layout in layouts], dtype=np.float64)
        visual.setflags(write=False)
        return visual

    def decoder_inputs(self, prompts: Sequence[EmbeddedPrompt]) -> DecoderInputs:
        """Return what the decoder is told about these prompts beside their embeddings."""
        return self.family.inputs_type(prompts, self.model)

    def _generation(
        self,
        ids: list[int],
        prompt: EmbeddedPrompt,
        max_new_tokens: int,
        stages: dict[str, float],
        pace: Pace | None = None,
        text: TextStream | None = None,
    ) -> Generation:
        cut = "length" if len(ids) == max_new_tokens else "budget"
        num_vision = prompt.num_image_tokens
        return Generation(
            text=text.text if text else self._text(ids).strip(),
            token_ids=tuple(ids),
            finish_reason=(text and text.ended) or ("stop" if ids[-1] in self.decoder.end_ids else cut),
            num_vision_tokens=num_vision,
            num_language_tokens=len(prompt.token_ids) - num_vision,
            num_output_tokens=len(ids),
            stages_ms=stages,
            hurried=tuple(pace.hurried) if pace else (),
            saved_ms=pace.saved_ms if pace else {},
            whole=not (text and text.ended),
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.prompt.tokenizer.decode(ids, skip_special_tokens=True))

    def _layer_list(self, active: Sequence[int]) -> nn.ModuleList:
        return blocks.layer_list(self.layers, active, stand_ins=self.family.goes_by_place(self.model))

    def _configuration(self, setting: Setting) -> _Configuration:
        """Look a setting up. Raises KnobSpaceError where it is outside the knob space."""
        found = self._configurations.get(setting)
        return found or self._configurations[self.knob_space.settings[self.knob_space.index(setting)]]

    def _configure(self, setting: Setting) -> _Configuration:
        depth = int(setting.get("num_active_blocks", self.num_total_blocks))
        return _Configuration(
            int(setting.get("max_crops", self.most_crops)),
            self.active_blocks(depth),
            self._layers[depth] if "num_active_blocks" in setting else None,
            int(setting["top_k"]) if "top_k" in setting else None,
        )


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} cannot be answered with; give at least 1")
