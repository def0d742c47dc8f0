"""A model that engines serve, behind the `VLM` protocol.

Its stages: "preprocess" is features and the writing of the image, "vision" nothing, "prefill" all until the first of
the answer's text is here, "decode" the rest. All times are this side's. Shapes: K settings.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from budgetvlm.engines.asked_once import Remembered, all_at_once, digest_of
from budgetvlm.engines.endpoint import Ask, Endpoint
from budgetvlm.engines.engine_client import Reply
from budgetvlm.engines.engine_load import LoadOfOthers
from budgetvlm.engines.payload import Size, data_url, fresh_data_url
from budgetvlm.engines.request_features import Extractor
from budgetvlm.engines.router import EngineRouter, key_of
from budgetvlm.engines.sketch import Sketch
from budgetvlm.engines.token_counts import PROBE_SIZES
from budgetvlm.errors import InputError, KnobSpaceError
from budgetvlm.features.image_statistics import image_statistics
from budgetvlm.knobs import MODEL, KnobSpace, Setting
from budgetvlm.vlm import Conversation, Deadline, Generation, OnText, Overview, Revise
from budgetvlm.vlm.text_stream import TextStream

ANSWERS, URLS = 1 << 17, 1 << 27  # that are remembered: how many, and how many bytes of images
ENDING_S = 5e-3  # what ending an answer before its deadline takes: to wake up, to close, to tell
NO_LANGUAGE = np.zeros(1, np.float32)


class EngineVLM:
    """A model that engines serve. Threads may share it; they answer side by side.

    Attributes:
        served: the settings that an engine of the fleet answers.
        can_revise: an answer cannot be turned to another setting once it was asked for.
        features: makes what a controller reads; None: nothing does, while profiles are measured.
        fresh_images: no cache of an engine is to know an image, so that none is measured.
    """

    can_revise = False

    def __init__(self, name: str, knob_space: KnobSpace, router: EngineRouter, sketches: Mapping[Any, Sketch]) -> None:
        self.name, self.knob_space, self.router = name, knob_space, router
        self._sketches = dict(sketches)
        self._largest = self._sketches[max(self._sketches, key=lambda value: value or 0)]
        self.num_total_blocks = self._largest.vlm.num_total_blocks
        self.served = tuple(setting for setting in knob_space.settings if router.serving(setting))
        self._loads = [(one, LoadOfOthers(one)) for one in router.endpoints]
        self.features: Extractor | None = None
        self.fresh_images = False
        self._answers: Remembered[Generation] = Remembered(ANSWERS)
        self._urls: Remembered[str] = Remembered(URLS, len)

    @property
    def in_flight(self) -> int:
        """Requests that one of its engines works on now, on average: ours, and those of others that it tells of."""
        up = [one.in_flight + others.requests() for one, others in self._loads if one.healthy]
        return round(sum(up) / len(up)) if up else 0

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        """Return the indices of the blocks that run at this depth, ascending."""
        return self._largest.vlm.active_blocks(num_active_blocks)

    @contextmanager
    def apply(self, setting: Setting) -> Iterator[None]:
        """Do nothing but check a setting: each request brings its own."""
        self._require_served(setting)
        yield

    def fingerprint(self) -> str:
        """Return a short digest of what answers: names of models, knobs, tokens of some images at each setting."""
        names = sorted({(str(one.client.spec.knobs.get(MODEL)), one.identity) for one in self.router.endpoints})
        sizes = [self._image_tokens((size,)).tolist() for size in PROBE_SIZES]
        return hashlib.sha256(repr((names, self.knob_space.to_dict(), sizes)).encode()).hexdigest()[:16]

    def encode_overview(self, image: Image.Image) -> Overview:
        """Compute an image's feature; there is nothing that the model could use again."""
        began = time.perf_counter()
        feature = image_statistics(image) if self.features is None else self.features.of_image(image)
        return Overview(torch.empty(0), feature, _ms_since(began), 0.0)

    def question_feature(self, question: str | Conversation) -> np.ndarray:
        """Return a question's feature, float32 ``[Dl]``; of a conversation, the last question's."""
        if self.features is None:
            return NO_LANGUAGE
        said = question.question if isinstance(question, Conversation) else question
        return self.features.of_question(said)

    def prompt_size(self, image: Image.Image | None, question: str | Conversation) -> tuple[np.ndarray, int]:
        """Return visual tokens at each setting ``[K]`` and the prompt's other tokens, without asking an engine."""
        sizes = tuple(one.size for one in _images(image, question))
        return self._image_tokens(sizes), self._largest.num_text_tokens(question)

    def _image_tokens(self, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.array([
            sum(self._sketch(setting).num_image_tokens(size, setting.get("max_crops", math.inf)) for size in sizes)
            for setting in self.knob_space.settings
        ], dtype=np.float64)  # fmt: skip

    def _sketch(self, setting: Setting) -> Sketch:
        return self._sketches[setting[MODEL]] if MODEL in setting else self._largest

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
        """Answer one question, greedily and as a stream, with every stage timed.

        Raises:
            EngineError: no engine that answers this setting is up, or it shows images in another way than it did.
        """
        overviews = [overview] if isinstance(overview, Overview) else list(overview or ())
        earlier_ms = sum(one.preprocess_ms for one in overviews)
        if revise is not None:
            setting, deadline = revise(earlier_ms)
        write = fresh_data_url if self.fresh_images else data_url
        ask = Ask(_images(image, question), question, setting, max_new_tokens, stop, write)
        return self._answer(ask, earlier_ms, deadline, on_text)

    def generate_batch(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        setting: Setting,
        *,
        max_new_tokens: int = 16,
    ) -> list[Generation]:
        """Answer a batch greedily, with as many requests in flight as the engines take; no stage is timed.

        Equal requests are sent once, also those of earlier batches: the same image, shown alike, and question.
        """
        digests = [digest_of(image) for image in images]
        asks = [
            Ask([image], question, setting, max_new_tokens, write=partial(self._written, digest))
            for image, question, digest in zip(images, questions, digests, strict=True)
        ]
        keys = [(digest, *self._seen(ask)) for digest, ask in zip(digests, asks, strict=True)]
        places = sum(one.client.spec.concurrency for one in self.router.serving(setting))
        return all_at_once(
            keys, lambda number: self._answers.get(keys[number], lambda: self._untimed(asks[number])), places
        )

    def _written(self, digest: bytes, image: Image.Image, size: Size | None, lossless: str) -> str:
        return self._urls.get((digest, size, lossless), lambda: data_url(image, size, lossless))

    def _seen(self, ask: Ask) -> tuple[Hashable, ...]:
        """Return what an answer depends on beside the image."""
        others = {name: value for name, value in ask.setting.items() if name != "max_crops"}
        crops, sketch = ask.setting.get("max_crops"), self._sketch(ask.setting)
        shown = None if crops is None else sketch.shown(ask.images[0].size, crops)
        return ask.question, shown, tuple(others.items()), ask.max_new_tokens

    def _untimed(self, ask: Ask) -> Generation:
        return replace(self._answer(ask, stream=False), stages_ms={})

    def _answer(
        self, ask: Ask, earlier_ms: float = 0.0, deadline: Deadline | None = None, on_text: OnText | None = None,
        stream: bool = True,
    ) -> Generation:  # fmt: skip
        """Answer what is asked; ``earlier_ms``: of preprocessing before."""
        if ask.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={ask.max_new_tokens} cannot be answered with; give at least 1")
        self._require_served(ask.setting)
        began_s, pieces = time.perf_counter() - earlier_ms / 1e3, list[str]()
        end_s = deadline.at_s - ENDING_S if deadline and deadline.cut else math.inf
        key = None if self.fresh_images else key_of(ask.images)
        return self.router.ask(
            ask.setting, lambda endpoint: _generation(endpoint, ask, pieces, on_text, began_s, end_s, stream),
            key=key, end_s=end_s, again=lambda: not pieces,
        )  # fmt: skip

    def _require_served(self, setting: Setting) -> None:
        """Raise KnobSpaceError unless an engine answers this setting."""
        self.knob_space.index(setting)
        if not self.router.serving(setting):
            raise KnobSpaceError(f"no engine of {self.name} answers {setting}")


def _generation(
    endpoint: Endpoint, ask: Ask, pieces: list[str], on_text: OnText | None, began_s: float, end_s: float, stream: bool
) -> Generation:
    """Have an engine answer what was begun at a time; ``pieces`` takes what it says as it comes."""
    text = TextStream("".join, (), on_text)

    def take(piece: str) -> bool:
        pieces.append(piece)
        return text(pieces)

    body, (vision, language) = endpoint.body(ask), endpoint.prompt_size(ask)
    sent_s = time.perf_counter()
    reply = endpoint.client.chat(body, end_s=end_s, on_text=take, left=getattr(on_text, "left", None), stream=stream)
    text.finish(pieces)
    done_s = time.perf_counter()
    endpoint.check(ask, reply, f"this request at {ask.setting}")
    first_s = done_s if math.isnan(reply.first_s) else reply.first_s
    stages = {
        "preprocess": (sent_s - began_s) * 1e3, "vision": 0.0, "prefill": (first_s - sent_s) * 1e3,
        "decode": (done_s - first_s) * 1e3,
    }  # fmt: skip
    ids = endpoint.sketch.token_ids(text.text)
    made = (reply.usage or {}).get("completion_tokens")
    at_stop_string = bool(ask.stop) and reply.finish_reason == "stop" and reply.stop_reason is not None
    return Generation(
        text.text, ids, _reason(reply), vision, language, len(ids) if made is None else int(made), stages,
        whole=reply.finish_reason != "stopped" and not at_stop_string,
    )  # fmt: skip


def _images(image: Image.Image | None, question: str | Conversation) -> Sequence[Image.Image]:
    return question.images if isinstance(question, Conversation) else (image,) if image is not None else ()


def _reason(reply: Reply) -> str:
    return reply.finish_reason if reply.finish_reason in ("length", "budget", "stopped") else "stop"


def _ms_since(began_s: float) -> float:
    return (time.perf_counter() - began_s) * 1e3
