"""What is known of a served model without its weights: tokens of a request, knobs, what its image processor is told."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KnobSpace, Value
from budgetvlm.vlm import Conversation
from budgetvlm.vlm.knob_limits import check_knobs
from budgetvlm.vlm.loading import load
from budgetvlm.vlm.prompt import one_question

ANY_SIZE = (480, 640)  # height and width of an image of several crops


class Sketch:
    """A model from its configuration, tokenizer and image processor alone. Threads may share it.

    Attributes:
        vlm: the model without weights.
        model_type: of its configuration.
    """

    def __init__(self, model_path: str, *, trust_remote_code: bool = False) -> None:
        self.vlm = load(model_path, device="meta", trust_remote_code=trust_remote_code)
        self.images, self.prompt = self.vlm.images, self.vlm.prompt
        self.model_type = str(self.vlm.model.config.model_type)
        self._lock = threading.Lock()  # fast tokenizers are not to be used by two threads at once

    def own_value(self, knob: str) -> Value | None:
        """Return the value of a knob that the model has untouched; None: it has no such knob."""
        if knob == "max_crops":
            return self.images.most_crops
        if knob == "num_active_blocks":
            return self.vlm.num_total_blocks
        return min((dial.get() for dial in self.vlm.dials), default=None) if knob == "top_k" else None

    def values(self, knob: str) -> tuple[Value, ...]:
        """Return the values of a knob that the model can take, its own one if there is no choice."""
        if knob in self.vlm.knob_space.names:
            return self.vlm.knob_space.values(knob)
        own = self.own_value(knob)
        return () if own is None else (own,)

    def require(self, knobs: Mapping[str, Sequence[Value]], where: str) -> None:
        """Raise ConfigError where the model cannot take these values."""
        check_knobs(KnobSpace({name: sorted(values) for name, values in knobs.items()}), self.vlm.family,
                    self.vlm.model, where)  # fmt: skip
        most = max(knobs.get("max_crops", (0,)))
        if most > self.images.most_crops:
            raise ConfigError(
                f"{where}: max_crops={most} is more than the {self.images.most_crops} of the model's image processor"
            )

    def num_image_tokens(self, size: tuple[int, int], max_crops: Value) -> int:
        """Return the prompt's tokens of an image of this width and height."""
        return self.prompt.num_image_tokens(self._layout(size, max_crops))

    def shown(self, size: tuple[int, int], max_crops: Value) -> tuple[int, tuple[int, int]]:
        """Return what is the same for all values of `max_crops` that show an image of this size alike."""
        layout = self._layout(size, max_crops)
        return len(layout.ids), layout.grid

    def _layout(self, size: tuple[int, int], max_crops: Value) -> Any:
        width, height = size
        return self.images.layout_of_size(height, width, int(min(max_crops, self.images.most_crops)))

    def num_text_tokens(self, question: str | Conversation) -> int:
        """Return the prompt's tokens beside those of its images. Raises InputError: nothing is asked."""
        with self._lock:
            if not isinstance(question, Conversation):
                self.prompt.question_ids(question)  # refuses an empty question
            return self.prompt.num_text_tokens(question)

    def names_special_tokens(self, question: str | Conversation) -> bool:
        """Tell whether the text holds the name of a special token, such as an image's place."""
        turns = question.turns if isinstance(question, Conversation) else one_question(question)
        texts = (part.get("text", "") for turn in turns for part in turn["content"])
        return any(self.prompt.special.search(text) for text in texts)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of an answer."""
        with self._lock:
            return tuple(self.prompt.tokenizer.encode(text, add_special_tokens=False))

    def options(self, image: Image.Image, max_crops: Value) -> dict[str, Any] | None:
        """Return what the family's image processor is told, without what it does anyway; None: it cannot be told."""
        told = self.images.options(image.height, image.width, int(max_crops))
        if told is None:
            return None
        own = self.images.processor
        return {name: value for name, value in told.items() if not _is_default(getattr(own, name, None), value)}

    @property
    def scales(self) -> bool:
        """Whether the size of an image decides on its tokens, so that scaling it steers the model."""
        return self.images.scaled(*ANY_SIZE, 1) is not None

    def scaled_size(self, image: Image.Image, max_crops: Value) -> tuple[int, int] | None:
        """Return the width and height at which the image gives the tokens of a value; None: no size does."""
        found = self.images.scaled(image.height, image.width, int(max_crops))
        return found and (found[1], found[0])


def _is_default(own: Any, value: Any) -> bool:
    """Tell whether a processor has this value already; of a dictionary, all that it holds."""
    if not isinstance(value, dict):
        return bool(own == value)
    return own is not None and all(_item(own, name) == one for name, one in value.items())


def _item(own: Any, name: str) -> Any:
    return own.get(name) if isinstance(own, dict) else getattr(own, name, None)
