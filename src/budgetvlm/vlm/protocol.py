"""What the rest of the project needs of a vision-language model, and nothing more.

A `VLM` answers a question about an image at a chosen `Setting`. It is frozen: a setting is applied for the
length of a ``with`` block and released at its end, also after an exception.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KnobSpace, Setting

STAGES = ("preprocess", "vision", "prefill", "decode")
_NEVER_S = 1e12  # on any clock


Turn = dict[str, Any]
"""As chat templates read it: "role" and "content", a list of {"type": "image"} and {"type": "text", "text": ...}."""


@dataclass(frozen=True)
class Conversation:
    """Chat messages without what is wrong with them; `budgetvlm.vlm.conversation.read_messages` makes it.

    Attributes:
        turns: with images left out, whose places stay.
        images: in their order.
        question: the text of the last message, which is the user's.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    question: str


class Overview(NamedTuple):
    """The overview crop (thumbnail), encoded once: the controller reads it, the model reuses it.

    Attributes:
        tokens: projected visual tokens of the overview crop, ``[T, C]``.
        feature: pooled vision feature for the controller, float32 ``[Di]``.
        preprocess_ms, vision_ms: what it cost.
    """

    tokens: torch.Tensor
    feature: np.ndarray
    preprocess_ms: float
    vision_ms: float


class Quicker(NamedTuple):
    """A setting at which an answer goes on where it would be late.

    It shows the model the same image and uses no block that the answer's own setting skips.

    Attributes:
        step_ms, read_ms: as `Deadline` has them of the answer's own setting.
    """

    setting: Setting
    step_ms: float
    read_ms: float = 0.0


class Deadline(NamedTuple):
    """When an answer has to be there.

    Attributes:
        at_s: on the clock of `time.perf_counter`.
        step_ms: what one more token is expected to take; where a step took longer, that counts.
        tokens: of the whole answer; it is hurried where these would not be in time.
        hurried: each quicker than the one before; maybe none.
        cut: whether the answer stops before a token that would be late even in a hurry.
        read_ms: what reading the prompt is expected to take; 0: it is not hurried, only the tokens after it are.
        clock: that of ``at_s``, in seconds. It is read before each block of a reading that may be hurried, once the
            prompt is read and after each further token, and never else.
    """

    at_s: float
    step_ms: float
    tokens: int = 1
    hurried: tuple[Quicker, ...] = ()
    cut: bool = True
    read_ms: float = 0.0
    clock: Callable[[], float] = time.perf_counter

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The quicker ones."""
        return tuple(quicker.setting for quicker in self.hurried)

    @classmethod
    def at_once(cls, setting: Setting) -> Deadline:
        """Make a deadline that cuts nothing, and hurries every token after the first at this setting."""
        return cls(_NEVER_S, math.inf, hurried=(Quicker(setting, 0.0),), cut=False)

    @classmethod
    def never(cls, clock: Callable[[], float]) -> Deadline:
        """Make a deadline that changes nothing, to learn when each block has read and each token was made."""
        return cls(_NEVER_S, 1.0, cut=False, read_ms=1.0, clock=clock)

    @classmethod
    def over(cls, setting: Setting) -> Deadline:
        """Make a deadline that cuts nothing, and hurries the whole answer, its first block included."""
        return cls(0.0, 1.0, hurried=(Quicker(setting, 0.5, 0.5),), cut=False, read_ms=1.0)


class RecordingClock:
    """A clock in seconds that remembers its readings."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = now_s
        self.readings: list[float] = []

    def read(self) -> float:
        self.readings.append(self._now_s())
        return self.readings[-1]


OnText = Callable[[str], bool | None]
"""Called after each token with the whole characters that it adds, maybe none; False ends the answer there.

It may have an attribute ``left``, which a model that waits for others asks from another thread now and then: whether
nobody waits for the answer any more.
"""

Revise = Callable[[float], tuple[Setting, Deadline | None]]
"""From the time in ms that preprocessing and encoding the image took (an overview's included) to the setting that the
answer is made at, which shows the model the same image, and its deadline."""


@dataclass(frozen=True)
class Generation:
    """One answer and what it cost.

    Attributes:
        text: the decoded answer without special tokens, up to a stop string.
        token_ids: generated ids, the end token or the tokens of a stop string included if there are any.
        finish_reason: "stop" (end token or stop string), "length" (max_new_tokens reached), "budget" (the deadline did
            not hold another token) or "stopped" (``on_text`` said so).
        stages_ms: time of each of `STAGES` in ms; empty from `VLM.generate_batch`. A reused overview's own time is
            counted in "preprocess" and "vision", because the request pays for it once.
        num_vision_tokens, num_language_tokens, num_output_tokens: counts; the prompt's image markers are language.
        hurried: the settings of the tokens, the last ones of the answer, that were made at another than the answer's;
            of all tokens where already the prompt's reading was hurried.
        saved_ms: what hurrying saved, by stage, as the deadline expected it.
        whole: neither a stop string nor ``on_text`` ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_vision_tokens: int
    num_language_tokens: int
    num_output_tokens: int
    stages_ms: dict[str, float] = field(default_factory=dict)
    hurried: tuple[Setting, ...] = ()
    saved_ms: dict[str, float] = field(default_factory=dict)
    whole: bool = True

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())


@runtime_checkable
class VLM(Protocol):
    """A frozen vision-language model with knobs.

    Attributes:
        can_revise: it runs in this process, one request at a time, and a request under way can be turned to another
            setting; one that is served elsewhere answers as it was asked, several requests side by side.
    """

    name: str
    knob_space: KnobSpace
    num_total_blocks: int
    can_revise: bool

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        """Return indices of the blocks that run at this depth, ascending; first and last are always among them."""

    def apply(self, setting: Setting) -> AbstractContextManager[None]:
        """Apply a setting; restored on exit, also after an exception. Threads take turns. Raises KnobSpaceError."""

    def encode_overview(self, image: Image.Image) -> Overview:
        """Preprocess and encode the overview crop once."""

    def question_feature(self, question: str | Conversation) -> np.ndarray:
        """Return mean of the question's token embeddings, float32 ``[Dl]``; of a conversation, the last question's."""

    def prompt_size(self, image: Image.Image | None, question: str | Conversation) -> tuple[np.ndarray, int]:
        """Return visual tokens at each setting ``[K]`` and the prompt's other tokens, without running the model.

        Raises InputError: an empty question, a conversation that the model cannot have.
        """

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
        """Answer one question at batch 1, greedily, with every stage timed and the device synchronised.

        Args:
            image: None beside a conversation, which brings its images; all are shown at the setting's `max_crops`.
            overview: of the image; of a conversation, those of its images.
            stop: strings that end the answer and are no part of it.
            on_text: what it takes is part of "decode".
            revise: asked once the image is encoded at ``setting``; answering goes on with the setting and the deadline
                that it returns. Its own time is in no stage.

        Raises:
            InputError: an empty question or an image that cannot be used.
            KnobSpaceError: a setting outside `knob_space`, a revised one with another image.
        """

    def generate_batch(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        setting: Setting,
        *,
        max_new_tokens: int = 16,
    ) -> list[Generation]:
        """Answer a batch greedily; the same answers as `generate` one by one."""


def require_side_by_side(vlm: VLM, concurrency: int) -> None:
    """Raise ConfigError where a model cannot have as many requests in flight."""
    if concurrency < 1:
        raise ConfigError(f"concurrency={concurrency} has to be 1 at least")
    if concurrency > 1 and vlm.can_revise:
        raise ConfigError(
            f"concurrency={concurrency}: {vlm.name} runs in this process and answers one request at a time; several "
            "are in flight at an engine alone (--model_path engines.yaml). Leave it at 1."
        )


@contextmanager
def fresh_images(vlm: VLM) -> Iterator[None]:
    """See to it that no engine knows an image from before, for a ``with`` block, so that no cache is measured."""
    before = getattr(vlm, "fresh_images", None)
    if before is not None:
        vlm.fresh_images = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is not None:
            vlm.fresh_images = before  # type: ignore[attr-defined]
