"""One engine of a fleet: what it answers, how it is steered, and what it is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from budgetvlm.engines.dialects import Dialect
from budgetvlm.engines.engine_client import EngineClient, Reply
from budgetvlm.engines.payload import Size, Writer, data_url, messages_of
from budgetvlm.engines.sketch import Sketch
from budgetvlm.engines.standing import Standing
from budgetvlm.errors import EngineChangedError, InputError
from budgetvlm.knobs import Setting, Value
from budgetvlm.vlm import Conversation


class Ask(NamedTuple):
    """What an engine is asked at a setting; ``write`` puts its images into the request."""

    images: Sequence[Image.Image]
    question: str | Conversation
    setting: Setting
    max_new_tokens: int
    stop: Sequence[str] = ()
    write: Writer = data_url


class Endpoint(Standing):
    """One engine and what is known of it.

    Attributes:
        model: the name that it serves. identity: by which its model is known again.
        steer: how it is told how to show an image: "kwargs" (also our own server's setting), "pixels" or "none".
        values: of each knob, those that it answers.
        more_text: by how many tokens its text around a question is longer than the sketch's.
        name: its host and port.
    """

    def __init__(self, client: EngineClient, dialect: Dialect, sketch: Sketch, model: str, steer: str) -> None:
        super().__init__(client.spec.concurrency)
        self.client, self.dialect, self.sketch = client, dialect, sketch
        self.model, self.steer, self.identity = model, steer, model
        self.values: dict[str, tuple[Value, ...]] = {}
        self.more_text = 0
        self.name = urlsplit(client.spec.url).netloc

    def takes(self, knob: str) -> bool:
        """Tell whether it takes a knob with each request."""
        steered = self.steer != "none" if knob == "max_crops" else True
        return knob in self.dialect.knobs and knob not in self.client.spec.knobs and steered

    def serves(self, setting: Mapping[str, Value]) -> bool:
        """Tell whether it answers a setting."""
        return all(value in self.values[name] for name, value in setting.items())

    def smallest(self, chosen: Mapping[str, Value]) -> Setting:
        """Return a setting that it answers, with these values and every other knob at its smallest."""
        cheapest = {name: values[0] for name, values in self.values.items()}
        return Setting(tuple((cheapest | dict(chosen)).items()))

    def max_crops(self, setting: Mapping[str, Value]) -> Value:
        """Return the `max_crops` at which it shows images at a setting."""
        own = self.sketch.own_value("max_crops")
        return setting.get("max_crops", self.client.spec.knobs.get("max_crops", own or 1))

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return the body of a chat completion."""
        crops, setting = self.max_crops(ask.setting), ask.setting
        urls = [ask.write(image, self._size(image, crops), self.dialect.lossless) for image in ask.images]
        told = {name: value for name, value in setting.items() if self.takes(name)}
        return {
            "model": self.model, "messages": messages_of(ask.question, urls), "max_tokens": ask.max_new_tokens,
            "temperature": 0, "seed": 0, **({"stop": list(ask.stop)} if ask.stop else {}),
            **self.dialect.fields(told, self._options(ask.images, crops) if self._by_options else {}),
        }  # fmt: skip

    def prompt_size(self, ask: Ask) -> tuple[int, int]:
        """Return the tokens of images and of text that a prompt has here. Raises InputError: nothing is asked."""
        crops = self.max_crops(ask.setting)
        vision = sum(self.sketch.num_image_tokens(image.size, crops) for image in ask.images)
        return vision, self.sketch.num_text_tokens(ask.question)

    def check(self, ask: Ask, reply: Reply, what: str) -> None:
        """Raise EngineChangedError where the engine counts other tokens in a prompt; ``what``: the prompt, in words.

        Nothing is told by a question that names special tokens, which engines may read as such.
        """
        counted = (reply.usage or {}).get("prompt_tokens")
        right = sum(self.prompt_size(ask)) + self.more_text
        if counted not in (None, right) and not self.sketch.names_special_tokens(ask.question):
            raise EngineChangedError(
                f"the engine at {self.client.spec.url} reads {what} as a prompt of {counted} tokens, where its model "
                f"({self.sketch.vlm.name}) has {right}: it was started with other flags than before, or serves another "
                "model. Look at it with `budgetvlm check-model --engine`; what was measured of it may not hold"
            )

    @property
    def _by_options(self) -> bool:
        return self.dialect.takes_options and self.takes("max_crops") and self.steer == "kwargs"

    def _size(self, image: Image.Image, crops: Value) -> Size | None:
        """Return the size at which an image is sent, where it is made smaller to steer; None: its own."""
        size = self.sketch.scaled_size(image, crops) if self.steer == "pixels" and self.takes("max_crops") else None
        return size if size and size[0] * size[1] < image.width * image.height else None

    def _options(self, images: Sequence[Image.Image], crops: Value) -> dict[str, Any]:
        """Return what the image processor is told. Raises InputError: it would have to differ between images."""
        told = [self.sketch.options(image, crops) or {} for image in images]
        if any(one != told[0] for one in told):
            raise InputError(
                f"{len(images)} images of different shapes cannot be shown at max_crops={crops} through an engine, "
                "which takes one set of options for all of them; ask about images of one shape, or about one"
            )
        return told[0] if told else {}
