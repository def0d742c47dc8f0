"""A Transformers vision-language model behind the `VLM` protocol, with its knobs.

What a family does in its own way lies in its small file (`internvl.py`); here is what is the same for all: apply and
release a setting, encode the overview once and reuse it, answer one question with every stage timed, answer a batch.
Shapes: n tiles, T visual tokens a tile, C channels of the language model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm import blocks, internvl
from budgetvlm.vlm.decoding import Decoder
from budgetvlm.vlm.images import Tiles
from budgetvlm.vlm.prompt import Prompt
from budgetvlm.vlm.protocol import Deadline, Generation, Overview
from budgetvlm.vlm.stopwatch import Stopwatch

KNOBS = ("max_crops", "top_k", "num_active_blocks")
_TILES_AT_ONCE = 256  # bounds the memory of the vision tower in a batch


class InternVLAdapter:
    """A frozen InternVL model. See `budgetvlm.vlm.protocol.VLM` for the methods of the protocol.

    Args:
        name: what results and checkpoints call the model.
        model: an `InternVLForConditionalGeneration`.
        processor: its `GotOcr2ImageProcessorPil`.
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
        model: Any,
        processor: Any,
        prompt: Prompt,
        knob_space: KnobSpace,
        block_order: Sequence[int],
        end_ids: Sequence[int],
    ) -> None:
        self.name, self.model, self.knob_space = name, model, knob_space
        self.model.eval().requires_grad_(False)
        self.tiles, self.prompt = Tiles(processor), prompt
        self._language = internvl.language_model(model)
        self._routers = internvl.routers(model)
        self.num_total_blocks = len(self._language.layers)
        self._order = blocks.check_order(block_order, self.num_total_blocks)
        self._check_knobs()
        self._layers = {n: self._layer_list(n) for n in self._depths()}
        self._setting_crops = [self._max_crops(setting) for setting in knob_space.settings]
        self._crops = set(self._setting_crops)
        self._tokens_per_tile = int(model.config.image_seq_length)
        self.decoder = Decoder(self._language, model.lm_head, end_ids)
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def most_crops(self) -> int:
        """The largest `max_crops`: that of the knob space, or the processor's own."""
        if "max_crops" in self.knob_space.names:
            return int(self.knob_space.values("max_crops")[-1])
        return int(self.tiles.processor.max_patches)

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        """Indices of the blocks that run at this depth, ascending."""
        return blocks.active_blocks(self._order, num_active_blocks)

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
        """Run just these blocks (ascending) for a ``with`` block, whatever the knob space says; to measure blocks."""
        with self._changed(nn.ModuleList(self._language.layers[i] for i in active), None):
            yield

    @contextmanager
    def _changed(self, layers: nn.ModuleList | None, top_k: int | None) -> Iterator[None]:
        """Other layers and another top_k, None for what stays; as before at the end, also after an exception."""
        with self._lock:
            language = self._language._modules
            before = language["layers"], [vars(router)["top_k"] for router in self._routers]
            try:
                if layers is not None:
                    language["layers"] = layers
                if top_k is not None:
                    self._set_top_k([top_k] * len(self._routers))
                yield
            finally:
                language["layers"] = before[0]
                self._set_top_k(before[1])

    @torch.inference_mode()
    def encode_overview(self, image: Image.Image) -> Overview:
        """Preprocess and encode the overview crop once."""
        watch = Stopwatch(self.device)
        pixels = self.tiles.overview(image)
        preprocess_ms = watch.lap()
        tokens = self._encode(pixels)
        feature = pool(tokens)
        return Overview(tokens, feature, preprocess_ms, watch.lap())

    @torch.inference_mode()
    def encode_overviews(self, images: Sequence[Image.Image]) -> list[Overview]:
        """`encode_overview` for several images in one pass; each is told its share of the time."""
        watch = Stopwatch(self.device)
        pixels = torch.cat([self.tiles.overview(image) for image in images])
        preprocess_ms = watch.lap() / len(images)
        tokens = self._encode(pixels).unflatten(0, (len(images), -1))
        features = [pool(row) for row in tokens]
        vision_ms = watch.lap() / len(images)
        return [Overview(t, f, preprocess_ms, vision_ms) for t, f in zip(tokens, features, strict=True)]

    @torch.inference_mode()
    def question_feature(self, question: str) -> torch.Tensor:
        """Mean of the embeddings of the question's tokens, float32 ``[Dl]``; what every prompt has is left out."""
        return self._embed(self.prompt.question_ids(question)).float().mean(0).cpu()

    def prompt_size(self, image: Image.Image, question: str) -> tuple[np.ndarray, int]:
        """Visual tokens at each setting ``[K]`` and the prompt's other tokens, without running the model."""
        tokens = {crops: self.tiles.count(image, crops) * self._tokens_per_tile for crops in self._crops}
        vision = np.array([tokens[crops] for crops in self._setting_crops], dtype=np.float64)
        return vision, len(self.prompt.question_ids(question)) + self.prompt.num_fixed

    @torch.inference_mode()
    def encode_tiles(self, images: Sequence[Image.Image], max_crops: int) -> list[torch.Tensor]:
        """Visual tokens of each image ``[n_i * T, C]`` at one tiling, for `generate_batch` at many settings."""
        tiles = [self.tiles.all(image, max_crops) for image in images]
        chunks = torch.cat(tiles).split(_TILES_AT_ONCE)
        per_tile = torch.cat([self._encode(chunk).unflatten(0, (len(chunk), -1)) for chunk in chunks])
        return [part.flatten(0, 1) for part in per_tile.split([len(t) for t in tiles])]

    @torch.inference_mode()
    def generate(
        self,
        image: Image.Image,
        question: str,
        setting: Setting,
        *,
        max_new_tokens: int = 16,
        overview: Overview | None = None,
        deadline: Deadline | None = None,
    ) -> Generation:
        """Answer one question at batch 1, greedily, with every stage timed and the device synchronised."""
        _check_length(max_new_tokens)
        with self.apply(setting):
            watch = Stopwatch(self.device)
            question_ids = self.prompt.question_ids(question)
            pixels = self._pixels_beside(image, self._max_crops(setting), overview)
            stages = {"preprocess": watch.lap() + (overview.preprocess_ms if overview else 0.0)}
            visual = self._join(pixels, overview)
            stages["vision"] = watch.lap() + (overview.vision_ms if overview else 0.0)
            cache, first = self.decoder.prefill(self.assemble(visual, question_ids)[None])
            stages["prefill"] = watch.lap()
            ids = self.decoder.decode(cache, first, max_new_tokens, deadline)
            stages["decode"] = watch.lap()
        return self._generation(ids, len(visual), len(question_ids), stages, max_new_tokens)

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
            visual: tokens of `encode_tiles` at this setting's `max_crops`; ``images`` are then not looked at.
        """
        _check_length(max_new_tokens)
        questions_ids = [self.prompt.question_ids(question) for question in questions]
        if not questions_ids:
            return []
        with self.apply(setting):
            visual = self.encode_tiles(images, self._max_crops(setting)) if visual is None else visual
            pairs = list(zip(visual, questions_ids, strict=True))
            answers = self.decoder.decode_batch([self.assemble(v, q) for v, q in pairs], max_new_tokens)
        return [
            self._generation(ids, len(v), len(q), {}, max_new_tokens)
            for ids, (v, q) in zip(answers, pairs, strict=True)
        ]

    def assemble(self, visual: torch.Tensor, question_ids: Sequence[int]) -> torch.Tensor:
        """Embeddings of the whole prompt ``[T, C]``."""
        start = len(self.prompt.before)
        text = self._embed([*self.prompt.before, *self.prompt.between, *question_ids, *self.prompt.after])
        return torch.cat([text[:start], visual.to(text.dtype), text[start:]])

    def _pixels_beside(self, image: Image.Image, max_crops: int, overview: Overview | None) -> torch.Tensor:
        if overview is None:
            return self.tiles.all(image, max_crops)
        return self.tiles.details(image, max_crops)

    def _join(self, pixels: torch.Tensor, overview: Overview | None) -> torch.Tensor:
        """Visual tokens ``[n * T, C]`` of the tiles just cut and, last, those of an overview encoded before."""
        parts = [self._encode(pixels)] if len(pixels) else []
        return torch.cat([*parts, *([overview.tokens] if overview else [])])

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return internvl.encode(self.model, pixels.to(self.device)).flatten(0, 1)

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self.decoder.embed(torch.tensor(ids, device=self.device))

    def _generation(
        self, ids: list[int], num_vision: int, num_question: int, stages: dict[str, float], max_new_tokens: int
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
        )

    def _max_crops(self, setting: Setting) -> int:
        return int(setting.get("max_crops", self.most_crops))

    def _set_top_k(self, values: Sequence[int]) -> None:
        for router, value in zip(self._routers, values, strict=True):
            vars(router)["top_k"] = value

    def _depths(self) -> list[int]:
        if "num_active_blocks" not in self.knob_space.names:
            return []
        return [int(n) for n in self.knob_space.values("num_active_blocks")]

    def _layer_list(self, depth: int) -> nn.ModuleList:
        if depth == self.num_total_blocks:
            return self._language.layers
        return nn.ModuleList(self._language.layers[i] for i in self.active_blocks(depth))

    def _check_knobs(self) -> None:
        problems = list(self._knob_problems())
        if problems:
            raise ConfigError(f"the knobs of {self.name} do not fit the model: " + "; ".join(problems))
        if self._depths()[:1] not in ([], [self.num_total_blocks]):
            internvl.check_blocks(self.model)

    def _knob_problems(self) -> Iterator[str]:
        space = self.knob_space
        unknown = [name for name in space.names if name not in KNOBS]
        if unknown:
            yield f"it has no knob {', '.join(unknown)}, only {', '.join(KNOBS)}"
        for name in set(space.names) & set(KNOBS):
            if any(value != int(value) for value in space.values(name)):
                yield f"{name} needs whole numbers: {list(space.values(name))}"
        depths = self._depths()
        if depths and (depths[0] < 2 or depths[-1] > self.num_total_blocks):
            yield f"num_active_blocks={depths} is outside 2 to {self.num_total_blocks}"
        if "top_k" in space.names:
            most = min((int(router.num_experts) for router in self._routers), default=0)
            if max(space.values("top_k")) > most:
                yield f"top_k={list(space.values('top_k'))} exceeds the model's {most} experts"


def pool(tokens: torch.Tensor) -> torch.Tensor:
    """The controller's view of visual tokens ``[T, C]``: mean and maximum over the tokens, float32 ``[2 * C]``."""
    tokens = tokens.float()
    return torch.cat([tokens.mean(0), tokens.amax(0)]).cpu()


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} cannot be answered with; give at least 1")
