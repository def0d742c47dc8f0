"""Asks one engine about images at each way to show them, and keeps what was found."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from budgetvlm.engines.endpoint import Ask, Endpoint
from budgetvlm.engines.engine_client import Reply
from budgetvlm.engines.payload import Size, Writer, data_url, fresh_data_url
from budgetvlm.engines.token_counts import PROBE_SIZES, QUESTION
from budgetvlm.errors import ConfigError, EngineError, InputError
from budgetvlm.knobs import Value
from budgetvlm.vlm import OnText

SOME_TOKENS = 8


class NotTold(Exception):
    """Why a check says nothing of this engine."""


class Heard(NamedTuple):
    """An answer and what it took, by this side's clock."""

    reply: Reply
    first_ms: float
    total_ms: float

    @property
    def counted(self) -> int | None:
        """Tokens of the prompt, as the engine says."""
        return (self.reply.usage or {}).get("prompt_tokens")

    @property
    def details(self) -> dict[str, Any]:
        """What the engine says of the kinds of these tokens."""
        return (self.reply.usage or {}).get("prompt_tokens_details") or {}


class EngineProbe:
    """Asks one engine, and keeps what was found.

    Attributes:
        own: the `max_crops` at which it shows images unless told otherwise.
        tokens: image tokens at each of `PROBE_SIZES`, of each `max_crops` that works.
        why_not: of each that is not offered.
        throughput: answers a second by the number of requests in flight.
        last: the last answer that was told to its end.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.own = endpoint.max_crops({})
        self.tokens: dict[Value, list[int]] = {}
        self.why_not: dict[Value, str] = {}
        self.throughput: dict[int, float] = {}
        self.last: Heard | None = None

    def ask(
        self, image: Image.Image, max_crops: Value, *, question: str = QUESTION, most: int = 1,
        write: Writer = data_url, on_text: OnText | None = None, knobs: Mapping[str, Value] | None = None,
    ) -> Heard:  # fmt: skip
        """Ask about an image, with all knobs that are not named at their smallest values."""
        setting = self.endpoint.smallest({"max_crops": max_crops, **(knobs or {})})
        body = self.endpoint.body(Ask([image], question, setting, most, (), write))
        sent_s = time.perf_counter()
        reply = self.endpoint.client.chat(body, on_text=on_text)
        heard = Heard(reply, (reply.first_s - sent_s) * 1e3, (time.perf_counter() - sent_s) * 1e3)
        self.last = heard if reply.usage else self.last
        return heard

    def right(self, size: Size, max_crops: Value) -> int:
        """Return the prompt's tokens that the model has."""
        setting = self.endpoint.smallest({"max_crops": max_crops})
        tokens = self.endpoint.prompt_size(Ask([Image.new("RGB", size)], QUESTION, setting, 1))
        return sum(tokens) + self.endpoint.more_text

    def wrong(self, size: Size, max_crops: Value, counted: int | None) -> str | None:
        """Say what is wrong with a count; None: nothing."""
        right, read = self.right(size, max_crops), f"an image of {size[0]} x {size[1]} is read as {counted} tokens"
        if counted == right:
            return None
        if counted == self.right(size, self.own):
            return f"ignored in silence: {read}, as without it, where its model has {right}"
        most = self.endpoint.sketch.images.most_crops
        alike = next((crops for crops in range(1, most + 1) if self.right(size, crops) == counted), None)
        return f"{f'taken for {alike}' if alike else 'not as its model does'}: {read} instead of {right}"

    def try_values(self, values: Sequence[Value]) -> None:
        """Find out which values of `max_crops` the engine heeds, one request after another."""
        self.why_not, self.tokens = {}, {}
        for value in values:
            try:
                why = self._try_value(value)
            except ConfigError as error:
                self.why_not = dict.fromkeys((one for one in values if one != self.own), str(error))
                self._keep(self.own)
                return
            if why:
                self.why_not[value] = why

    def _try_value(self, value: Value) -> str | None:
        """Say why a value cannot be offered; None: it can. Raises ConfigError: no value can."""
        for size in PROBE_SIZES:
            try:
                counted = self.ask(picture(size), value).counted
            except InputError as error:
                return f"refused: {error}"
            if why := self.wrong(size, value, counted):
                return why
        self._keep(value)
        return None

    def _keep(self, value: Value) -> None:
        self.tokens[value] = [self.endpoint.sketch.num_image_tokens(size, value) for size in PROBE_SIZES]

    def load(self) -> tuple[float, ...]:
        """Return how many requests run and wait, as the engine says. Raises NotTold: it does not."""
        try:
            load = self.endpoint.client.load(self.endpoint.dialect)
        except EngineError as error:
            raise NotTold(str(error)) from None
        if not load:
            raise NotTold("it does not say how many requests run (/metrics)")
        return load

    def answers_per_s(self, in_flight: int) -> float:
        """Measure the throughput with this number of requests in flight, of images that no cache knows."""
        image, requests = picture(PROBE_SIZES[0]), max(2 * in_flight, 4)
        with ThreadPoolExecutor(in_flight) as pool:
            began_s = time.perf_counter()
            asked = [
                pool.submit(self.ask, image, self.own, most=SOME_TOKENS, write=fresh_data_url) for _ in range(requests)
            ]
            for one in asked:
                one.result()
            return requests / (time.perf_counter() - began_s)


def picture(size: Size) -> Image.Image:
    """Draw coloured squares, the same ones at each call."""
    colours = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
