"""A request and its answer: what may be asked, what was chosen, what came of it and what it cost. Times in ms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from budgetvlm._io import time_text
from budgetvlm.errors import InputError
from budgetvlm.guard.bounds import BOUND, READ, STEP, Bounds
from budgetvlm.guard.fixed import Guard
from budgetvlm.guard.rule import Infeasible
from budgetvlm.knobs import Setting
from budgetvlm.vlm import Deadline, Generation, Quicker

Cut = Literal["always", "needed"]
_NUMBERS = int, float
_KNOWN = ("when_infeasible", get_args(Infeasible)), ("cut", get_args(Cut))


class Answer(NamedTuple):
    """An answer within a budget, and what it cost.

    Attributes:
        answer: the text.
        setting: the knobs that were chosen.
        latency_ms: from the decoded image, or the request's arrival, to the last token, all included.
        stages_ms: "preprocess", "vision", "controller", "prefill", "decode"; the controller's share is its own, the
            features that it needs beyond the model's included.
        predicted_ms: the bound on the latency that the choice relied on; None where the controller has no bounds.
        budget_ms: what was asked for; infinite: nothing.
        budget_met: whether ``latency_ms`` kept it.
        feasible: whether any setting was sure to keep it, by the bounds. If not, this is the best effort.
        finish_reason: "stop" (the answer ended), "length" (it was cut at max_new_tokens) or "budget" (it was cut where
            the budget would not have held another token).
        num_vision_tokens, num_language_tokens, num_output_tokens: counts.
        num_hurried_tokens: of the output tokens, how many (the last ones) were made with fewer experts or blocks than
            the setting says, because the answer would have been late; all of them where the prompt was read so, too.
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
    num_hurried_tokens: int = 0

    @property
    def best_effort(self) -> bool:
        """No setting was sure to keep the budget, so nothing was promised."""
        return not self.feasible

    @property
    def controller_ms(self) -> float:
        """The controller's own time."""
        return self.stages_ms["controller"]

    @property
    def verdict(self) -> str:
        """The budget and whether it was kept, in words."""
        if self.budget_ms == math.inf:
            return "none of its own"
        return f"{time_text(self.budget_ms)} {'met' if self.budget_met else 'missed'}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a budget of its own that there was not is None."""
        budget_ms = self.budget_ms if self.budget_ms < math.inf else None
        setting, best_effort = dict(self.setting), self.best_effort
        return {**self._asdict(), "setting": setting, "budget_ms": budget_ms, "best_effort": best_effort}

    def __str__(self) -> str:
        effort = " (best effort: no setting was sure to keep it)" if self.best_effort else ""
        return (
            f"{self.answer!r} in {time_text(self.latency_ms)}, budget {self.verdict}{effort}; "
            f"{self.setting}; controller {time_text(self.controller_ms)}"
        )


@dataclass(slots=True)  # frozen ones take five times as long to make
class Choice:
    """What the controller chose: the setting and its number, whether the budget allows any, the bounds it relied on."""

    setting: Setting
    index: int
    feasible: bool
    bounds: Bounds

    @property
    def predicted_ms(self) -> float | None:
        """The bound on its latency, None where the controller has no bounds."""
        bound: float = self.bounds.times.item(BOUND, self.index)
        return bound if 0 < bound < math.inf else None


def cuts(cut: Cut, promised: bool, may_be_late: bool) -> bool:
    """Whether an answer is cut before a token that would be late. Where nothing was promised none may be late.

    Args:
        promised: a setting was sure to keep the budget. may_be_late: see `AdaptiveGuard.may_be_late`.
    """
    return cut == "always" or not (promised and may_be_late)


def deadline_of(
    guard: Guard, setting: Callable[[int], Setting], bounds: Bounds, index: int, at_s: float, *, cut: bool = True
) -> Deadline | None:
    """The deadline of an answer at the setting of this number, cut at its end or not; None: nothing changes it.

    Args:
        setting: the model's, from a number.
        at_s: on the clock of `time.perf_counter`.
    """
    if not guard.rule.cuts:
        return None
    ms = bounds.times.item
    faster = guard.faster_settings(index)
    hurried = tuple([Quicker(setting(k), ms(STEP, k), ms(READ, k)) for k in faster])
    tokens = int(bounds.forecast.long_tokens)
    return Deadline(at_s, ms(STEP, index), tokens, hurried, cut, ms(READ, index) if hurried else 0.0)


def check_request(
    question: str, budget_ms: float, price: float | None = None, when_infeasible: str = "fastest", cut: str = "always"
) -> None:
    """What can be told of a request without a model.

    Raises:
        InputError: an empty question, a budget or a price that is not usable; all problems at once.
    """
    problems = []
    if not isinstance(question, str) or not question.strip():
        problems.append(f"the question is empty ({question!r}); ask something about the image")
    if budget_ms != math.inf and (not _is_number(budget_ms) or budget_ms <= 0):
        problems.append(
            f"budget_ms={budget_ms!r} is not a positive number of milliseconds; for example 40, or math.inf"
        )
    if price is not None and (not _is_number(price) or price < 0):
        problems.append(f"price={price!r} is not a number of 0 or more; 0 means: use what the budget allows")
    for (name, known), value in zip(_KNOWN, (when_infeasible, cut), strict=True):
        if value not in known:
            problems.append(f"{name}={value!r} is unknown; choose from {', '.join(known)}")
    if problems:
        raise InputError("; ".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and math.isfinite(value)


def make_answer(
    choice: Choice, generation: Generation, controller_ms: float, latency_ms: float, budget_ms: float
) -> Answer:
    """The answer to a request from what its parts say; the controller's time is a stage beside the model's."""
    made, took = generation, generation.stages_ms
    stages_ms = {
        "preprocess": took["preprocess"], "vision": took["vision"], "controller": controller_ms,
        "prefill": took["prefill"], "decode": took["decode"],
    }  # fmt: skip
    return Answer(
        made.text, choice.setting, latency_ms, stages_ms, choice.predicted_ms, budget_ms, latency_ms <= budget_ms,
        choice.feasible, made.finish_reason, made.num_vision_tokens, made.num_language_tokens, made.num_output_tokens,
        len(made.hurried),
    )  # fmt: skip
