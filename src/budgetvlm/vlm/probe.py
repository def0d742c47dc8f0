"""What a model is checked with: images, questions and settings, and the logits that they give.

Differences of logits are measured in standard deviations of the logits. Shapes: V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.prompt import EmbeddedPrompt, ImageLayout
from budgetvlm.vlm.protocol import Deadline, Generation

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Broken(Exception):
    """A check that does not hold; the message says what was seen."""


class Probe:
    """A model, one or more questions about images, and the settings to try.

    Args:
        settings: which to try; None: all.
    """

    def __init__(
        self,
        vlm: Adapter,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        settings: Sequence[Setting] | None = None,
    ) -> None:
        self.vlm, self.images, self.questions = vlm, list(images), list(questions)
        self.settings = list(vlm.knob_space.settings if settings is None else settings)
        self._seen: dict[tuple[int, int], torch.Tensor] = {}
        self.tolerance = TOLERANCE.get(vlm.model.dtype, TOLERANCE[torch.float32])

    @property
    def space(self) -> KnobSpace:
        return self.vlm.knob_space

    @cached_property
    def question_ids(self) -> list[Any]:
        return [self.vlm.prompt.question_ids(question) for question in self.questions]

    def crops(self, setting: Setting) -> int:
        return int(setting.get("max_crops", self.vlm.most_crops))

    def layout(self, max_crops: int, i: int = 0) -> ImageLayout:
        return self.vlm.images.layout_of(self.images[i], max_crops)

    def prompt(self, max_crops: int, i: int = 0, answer_ids: Sequence[int] = ()) -> EmbeddedPrompt:
        """Return the prompt of one image and question, encoded without a reused overview, with part of an answer."""
        visual = self.visual(max_crops, i)
        return self.vlm.embed_prompt(visual, self.question_ids[i], self.layout(max_crops, i), answer_ids)

    def visual(self, max_crops: int, i: int = 0) -> torch.Tensor:
        """Return visual tokens of one image ``[T, C]``; encoded once."""
        if (max_crops, i) not in self._seen:
            self._seen[max_crops, i] = self.vlm.images.visual_tokens(self.images[i], max_crops)
        return self._seen[max_crops, i]

    def logits(self, prompt: EmbeddedPrompt) -> torch.Tensor:
        """Return the logits behind the prompt ``[V]``, without a cache."""
        return self.vlm.decoder.logits(prompt.embeddings[None], **self.vlm.decoder_inputs([prompt]).prefill())[0]

    def logits_at(self, setting: Setting) -> torch.Tensor:
        with self.vlm.apply(setting):
            return self.logits(self.prompt(self.crops(setting)))

    def untouched(self, max_crops: int) -> torch.Tensor:
        """Return the logits of the model's own forward, with pixels of its own processor ``[V]``."""
        prompt = self.prompt(max_crops)
        family, model = self.vlm.family, self.vlm.model
        inputs = self.vlm.images.plain(self.images[0], max_crops) | family.plain_arguments(prompt, model)
        moved = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return family.untouched_logits(model, prompt, moved)

    def answer(self, setting: Setting, max_new_tokens: int, deadline: Deadline | None = None) -> Generation:
        """Answer the first question."""
        return self.vlm.generate(
            self.images[0], self.questions[0], setting, max_new_tokens=max_new_tokens, deadline=deadline
        )

    def same(self, got: torch.Tensor, wanted: torch.Tensor, where: str) -> float:
        """Return how far apart two logits are, in standard deviations.

        Raises:
            Broken: further than the tolerance.
        """
        apart = float((got.float() - wanted.float()).abs().max() / wanted.float().std())
        if not apart <= self.tolerance:
            raise Broken(f"{where}: logits differ by {apart:.2g} standard deviations")
        return apart


def one_knob_at_a_time(space: KnobSpace) -> list[Setting]:
    """Return the settings that differ from the full one in one knob, the full and the cheapest one."""
    near = {setting_with(space, **{name: value}) for name in space.names for value in space.values(name)}
    return [s for s in space.settings if s in near | {space.cheapest, space.full}]


def setting_with(space: KnobSpace, **values: float) -> Setting:
    """Return the full setting with other values."""
    return space.setting(**{**space.full, **values})


def own_values(vlm: Adapter) -> dict[str, int]:
    """Return the knob values of the untouched model."""
    experts = min((dial.get() for dial in vlm.dials), default=0)
    return {"max_crops": vlm.images.most_crops, "top_k": experts, "num_active_blocks": vlm.num_total_blocks}


def state_of(vlm: Adapter) -> tuple[Any, ...]:
    """Return what a setting changes, to be compared before and after."""
    return list(map(id, vlm.layers)), [dial.get() for dial in vlm.dials]


class TopKRecorder(TorchFunctionMode):
    """Records how many experts each router chooses per token: what `topk` over that many experts returns."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.chosen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else (kwargs or {})["input"]
            if scores.shape[-1] == self.num_experts:
                self.chosen.append(int(result[0].shape[-1]))
        return result
