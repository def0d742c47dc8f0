"""A model that answers within a budget: the controller chooses the knobs of each request.

A request runs so: the overview crop is encoded; the controller reads its pooled features, the question's embeddings
and the budget, and chooses a setting; the model answers at that setting and reuses the overview. The clock runs from
the decoded image to the last token, the controller's time included. Times in ms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.decision import Decider
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import CheckpointError, ConfigError, InputError, KnobSpaceError
from budgetvlm.knobs import Setting
from budgetvlm.vlm import STAGES, VLM, Generation, Overview, load_vlm
from budgetvlm.vlm.images import open_image

_BLANK = (256, 192)  # pixels of the image that the model is warmed up with
_DECISIONS, _ANSWERS = 9, 2  # rehearsed before the first request


@dataclass(frozen=True)
class Answer:
    """An answer within a budget, and what it cost.

    Attributes:
        answer: the text.
        setting: the knobs that were chosen.
        latency_ms: from the decoded image to the last token, all included.
        stages_ms: "preprocess", "vision", "controller", "prefill", "decode"; the controller's share is its own, the
            features that it needs beyond the model's included.
        predicted_ms: the bound on the latency that the choice relied on; None where the controller has no bounds.
        budget_ms: what was asked for.
        budget_met: whether ``latency_ms`` kept it.
        feasible: whether any setting was expected to keep it. If not, this is the best effort: the setting with the
            smallest bound.
        finish_reason: "stop" (the answer ended) or "length" (it was cut at max_new_tokens).
        num_vision_tokens, num_language_tokens, num_output_tokens: counts.
    """

    answer: str
    setting: Setting
    latency_ms: float
    stages_ms: dict[str, float]
    predicted_ms: float | None
    budget_ms: float
    budget_met: bool
    feasible: bool
    finish_reason: str
    num_vision_tokens: int
    num_language_tokens: int
    num_output_tokens: int

    @property
    def best_effort(self) -> bool:
        """The budget is below what the cheapest setting is expected to take."""
        return not self.feasible

    @property
    def controller_ms(self) -> float:
        """The controller's own time."""
        return self.stages_ms["controller"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "setting": dict(self.setting), "best_effort": self.best_effort}

    def __str__(self) -> str:
        met = "met" if self.budget_met else "missed"
        effort = ", best effort: below the cheapest setting's time" if self.best_effort else ""
        return (
            f"{self.answer!r} in {self.latency_ms:.1f} ms, budget {self.budget_ms:.1f} ms {met}{effort}; "
            f"{self.setting}; controller {self.controller_ms:.1f} ms"
        )


@dataclass(frozen=True)
class Choice:
    """What the controller chose: the setting, whether the budget allows any, the bound it relied on."""

    setting: Setting
    feasible: bool
    predicted_ms: float | None


class AdaptiveVLM:
    """A vision-language model with a controller.

    Args:
        vlm: the model.
        controller: trained on profiles of this model.
        warm_up: run a few requests on a blank image, so that the first real one is not the slowest, and so that the
            controller's own time is known: it is taken off each budget before the controller sees it.

    Raises:
        KnobSpaceError: the controller knows a setting that the model does not.
        CheckpointError: the controller was trained on features of another model.
    """

    def __init__(self, vlm: VLM, controller: GRPOController, *, warm_up: bool = True) -> None:
        self.vlm, self.controller, self.decider = vlm, controller.eval(), Decider(controller)
        _check_settings(vlm, controller)
        self.controller_ms = self._rehearse(*(_DECISIONS, _ANSWERS) if warm_up else (1, 0))

    @classmethod
    def from_pretrained(
        cls,
        model_path: str = "reference",
        controller: str | Path | GRPOController | None = None,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> AdaptiveVLM:
        """Open a model and its controller.

        Args:
            model_path: "reference" or a model's directory.
            controller: a training directory, a checkpoint, a controller; None: ``controller/`` in the model's
                directory.

        Raises:
            ConfigError, CheckpointError, KnobSpaceError: either cannot be used, or they do not fit.
        """
        if not isinstance(controller, GRPOController):
            controller = load_controller(_controller_path(model_path, controller))
        return cls(load_vlm(model_path, device=device, num_threads=num_threads), controller)

    def generate(
        self,
        image: str | Path | Image.Image,
        question: str,
        *,
        budget_ms: float,
        price: float | None = None,
        max_new_tokens: int = 16,
    ) -> Answer:
        """Answer a question about an image within a budget.

        Args:
            image: an image or its file; opening and decoding a file is before the clock starts.
            budget_ms: a ceiling for the whole request.
            price: accuracy given for one latency of the full setting; None: the controller's own default; 0: use what
                the budget allows.

        Raises:
            InputError: an image that cannot be read, an empty question, a budget or price that is not usable.
        """
        check_request(question, budget_ms, price)
        picture = open_image(image)
        start = time.perf_counter()
        overview = self.vlm.encode_overview(picture)
        choosing = time.perf_counter()
        choice = self.choose(overview, question, budget_ms, price)
        controller_ms = (time.perf_counter() - choosing) * 1e3
        generation = self.vlm.generate(
            picture, question, choice.setting, max_new_tokens=max_new_tokens, overview=overview
        )
        latency_ms = (time.perf_counter() - start) * 1e3
        return _answer(choice, generation, controller_ms, latency_ms, budget_ms)

    @torch.inference_mode()
    def choose(self, overview: Overview, question: str, budget_ms: float, price: float | None = None) -> Choice:
        """The controller's decision for one request, without answering.

        The budget that the controller sees is what remains when its own time is taken off.
        """
        left_ms = max(budget_ms - self.controller_ms, 1e-3)
        feasible = self.decider.feasible(left_ms)
        question_feature = self.vlm.question_feature(question)
        index = self.decider.choose(overview.feature.numpy(), question_feature.numpy(), left_ms, price, feasible)
        bound = float(self.controller.bounds_ms[index])
        known = 0 < bound < math.inf
        return Choice(
            setting=self.controller.knob_space.settings[index],
            feasible=bool(feasible.any()),
            predicted_ms=bound + self.controller_ms if known else None,
        )

    def _rehearse(self, decisions: int, answers: int) -> float:
        """Warm up, check that the features fit, and time the controller: the median of its decisions in ms."""
        self.controller_ms = 0.0
        blank = Image.new("RGB", _BLANK)
        took = []
        for number in range(decisions):
            overview = self.vlm.encode_overview(blank)
            start = time.perf_counter()
            try:
                self.choose(overview, "what", 1e6)
            except InputError as error:
                raise CheckpointError(
                    f"the controller does not fit the model {self.vlm.name}: {error}. Train one on its profiles."
                ) from error
            took.append((time.perf_counter() - start) * 1e3)
            if number < answers:
                for setting in (self.vlm.knob_space.cheapest, self.vlm.knob_space.full):
                    self.vlm.generate(blank, "what", setting, max_new_tokens=2, overview=overview)
        return sorted(took)[len(took) // 2]


def _controller_path(model_path: str, controller: str | Path | None) -> Path:
    """Where the controller lies. Raises ConfigError."""
    from budgetvlm.vlm.loading import model_directory

    if controller is not None:
        return Path(controller)
    bundled = model_directory(model_path) / "controller"
    if not bundled.is_dir():
        raise ConfigError(
            f"no controller was given, and the model {model_path!r} brings none. Train one: `budgetvlm quickstart`, or "
            "`budgetvlm profile`, `prepare` and `train --output_dir DIR`; then give DIR (--checkpoint DIR)"
        )
    return bundled


def _check_settings(vlm: VLM, controller: GRPOController) -> None:
    """Every setting that the controller may choose has to be one of the model's."""
    ours, theirs = vlm.knob_space, controller.knob_space
    same_knobs = ours.names == theirs.names
    if not same_knobs or any(set(theirs.values(name)) - set(ours.values(name)) for name in ours.names):
        raise KnobSpaceError(
            f"the controller chooses among {theirs}, but the model {vlm.name} has {ours}. Use the controller that was "
            "trained on this model's profiles, or train one."
        )


def check_request(question: str, budget_ms: float, price: float | None = None) -> None:
    """What can be told of a request without a model.

    Raises:
        InputError: an empty question, a budget or a price that is not usable; all problems at once.
    """
    problems = list(_request_problems(question, budget_ms, price))
    if problems:
        raise InputError("; ".join(problems))


def _request_problems(question: Any, budget_ms: Any, price: Any) -> Iterator[str]:
    if not isinstance(question, str) or not question.strip():
        yield f"the question is empty ({question!r}); ask something about the image"
    if not _is_number(budget_ms) or budget_ms <= 0:
        yield f"budget_ms={budget_ms!r} is not a positive number of milliseconds; give one, for example 40"
    if price is not None and (not _is_number(price) or price < 0):
        yield f"price={price!r} is not a number of 0 or more; 0 means: use what the budget allows"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _answer(
    choice: Choice, generation: Generation, controller_ms: float, latency_ms: float, budget_ms: float
) -> Answer:
    before, after = STAGES[:2], STAGES[2:]
    stages = {stage: generation.stages_ms[stage] for stage in before}
    stages["controller"] = controller_ms
    stages |= {stage: generation.stages_ms[stage] for stage in after}
    return Answer(
        answer=generation.text,
        setting=choice.setting,
        latency_ms=latency_ms,
        stages_ms=stages,
        predicted_ms=choice.predicted_ms,
        budget_ms=budget_ms,
        budget_met=latency_ms <= budget_ms,
        feasible=choice.feasible,
        finish_reason=generation.finish_reason,
        num_vision_tokens=generation.num_vision_tokens,
        num_language_tokens=generation.num_language_tokens,
        num_output_tokens=generation.num_output_tokens,
    )
