"""A request and its answer: what may be asked, what is chosen, what came of it and what it cost. Times in ms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, cast, get_args

import numpy as np
from PIL import Image

from budgetvlm import decide
from budgetvlm._io import time_text
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.decide import Decision
from budgetvlm.errors import InputError
from budgetvlm.guard.bounds import BOUND, READ, STEP, Bounds, Outcome, Request, Spent
from budgetvlm.guard.fixed import Guard
from budgetvlm.guard.rule import Infeasible
from budgetvlm.knobs import Setting, Value
from budgetvlm.vlm import VLM, Conversation, Deadline, Generation, OnText, Overview, Quicker

Cut = Literal["always", "needed"]
AMPLE_MS = 1e9  # a budget that holds any setting
_NUMBERS = int, float
_KNOWN = ("when_infeasible", get_args(Infeasible)), ("cut", get_args(Cut))


class AnswerOptions(TypedDict, total=False):
    """The fields of `Terms` as keyword arguments."""

    budget_ms: float
    price: float | None
    max_new_tokens: int
    stop: str | Sequence[str]
    when_infeasible: Infeasible
    cut: Cut
    setting: Mapping[str, Value] | None
    arrived_s: float | None
    on_text: OnText | None


class Terms(NamedTuple):
    """On which terms a request is answered.

    Attributes:
        budget_ms: a ceiling for the whole request; `math.inf`: none.
        price: accuracy given for one latency of the full setting; None: the one that keeps the mean budget, or the
            controller's own default; 0: use what the budget allows.
        max_new_tokens: of the answer.
        stop: a string that ends the answer and is no part of it, or several.
        when_infeasible: what to do where no setting is sure to keep the budget. "fastest": take the one that is
            expected to be. "best_effort": choose among those that keep it on average, if there are any. "reject":
            raise before the model runs. Whatever is done, the answer says so.
        cut: which answers stop before a token that the budget would not hold. "always": all of them. "needed": only
            while the late ones have used up what alpha allows; the others are finished late.
        setting: values of some knobs, the others at their largest: the answer is made there, whatever the controller
            would choose, and may be late. Nothing is revised, hurried or learnt.
        arrived_s: when the request arrived, on the clock of `time.perf_counter`; its waiting then counts.
        on_text: called after each token with the whole characters that it adds, maybe none; False ends the answer
            there. The model waits for it, and its time is the answer's.
    """

    budget_ms: float = math.inf
    price: float | None = None
    max_new_tokens: int = 16
    stop: str | Sequence[str] = ()
    when_infeasible: Infeasible = "fastest"
    cut: Cut = "always"
    setting: Mapping[str, Value] | None = None
    arrived_s: float | None = None
    on_text: OnText | None = None

    def problems(self) -> list[str]:
        """What of this cannot be, in words."""
        problems, setting = [], cast(Any, self.setting)
        if self.budget_ms != math.inf and (not _is_number(self.budget_ms) or self.budget_ms <= 0):
            problems.append(
                f"budget_ms={self.budget_ms!r} is not a positive number of milliseconds; for example 40, or math.inf"
            )
        if self.price is not None and (not _is_number(self.price) or self.price < 0):
            problems.append(f"price={self.price!r} is not a number of 0 or more; 0 means: use what the budget allows")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens!r} cannot be answered with; give at least 1")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            problems.append(f"stop={self.stop!r} holds what is no text or empty; give strings that end the answer")
        if setting is not None and not isinstance(setting, Mapping):
            problems.append(f"setting={setting!r} is no mapping of knobs to values")
        for (name, known), value in zip(_KNOWN, (self.when_infeasible, self.cut), strict=True):
            if value not in known:
                problems.append(f"{name}={value!r} is unknown; choose from {', '.join(known)}")
        return problems

    def arrived(self) -> Terms:
        """The same, arrived now if nothing else is said."""
        return self if self.arrived_s is not None else self._replace(arrived_s=time.perf_counter())

    @property
    def deadline_s(self) -> float:
        """When the budget is over, on the clock of ``arrived_s``, which has to be known."""
        return (self.arrived_s or 0.0) + self.budget_ms / 1e3

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        one = isinstance(self.stop, str) or not isinstance(self.stop, Sequence)
        return (self.stop,) if one else tuple(self.stop)  # type: ignore[return-value]


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
        finish_reason: "stop" (the answer ended, or came to a stop string), "length" (it was cut at max_new_tokens),
            "budget" (it was cut where the budget would not have held another token) or "stopped" (by its caller).
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
    bounds: Bounds | None  # None: it was the caller's choice

    @property
    def predicted_ms(self) -> float | None:
        """The bound on its latency, None where there is none."""
        bound: float = self.bounds.times.item(BOUND, self.index) if self.bounds else math.inf
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


def check_request(question: str | None, terms: Terms) -> None:
    """What can be told of a request without a model.

    Raises:
        InputError: an empty question, terms that are not usable; all problems at once.
    """
    problems = []
    if not isinstance(question, str) or not question.strip():
        problems.append(f"the question is empty ({question!r}); ask something about the image")
    problems += terms.problems()
    if problems:
        raise InputError("; ".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and math.isfinite(value)


class Chooser(Protocol):
    """What chooses the setting of a request; see `budgetvlm.runtime.AdaptiveVLM`."""

    vlm: VLM
    guard: Guard
    network: ValueNetwork
    known: np.ndarray
    known_of_text: np.ndarray
    settings: list[Setting]

    def request(self, image: Image.Image | None, question: str | Conversation) -> Request: ...
    def image_feature(self, overviews: Sequence[Overview]) -> np.ndarray: ...


class InFlight:
    """One request under way: how its setting is chosen, revised once the image is encoded, and what came of it."""

    __slots__ = (
        "_among", "_began_s", "_known", "_model", "_start_s", "_terms", "budget_ms", "choice", "decisions", "own_ms"
    )  # fmt: skip

    def __init__(self, model: Chooser, terms: Terms) -> None:
        self._began_s = time.perf_counter()
        self._start_s = self._began_s if terms.arrived_s is None else terms.arrived_s
        self._model, self._terms, self.budget_ms = model, terms, float(min(terms.budget_ms, AMPLE_MS))
        self.decisions: list[Decision] = []
        self.own_ms, self._among = 0.0, 1 + getattr(model.vlm, "in_flight", 0)  # requests, this one among them

    @property
    def waited_ms(self) -> float:
        """How long it waited before it began."""
        return (self._began_s - self._start_s) * 1e3

    def choose(self, image: Image.Image | None, question: str | Conversation, overviews: Sequence[Overview]) -> None:
        """Choose a setting once the overviews are encoded."""
        model, began = self._model, time.perf_counter()
        prepared_ms = sum([overview.preprocess_ms for overview in overviews])
        overview_ms = prepared_ms + sum([overview.vision_ms for overview in overviews])
        self.own_ms = (began - self._began_s) * 1e3 - overview_ms
        if overview_ms == prepared_ms:  # nothing was encoded, and features alone do not tell how fast the model is
            prepared_ms = overview_ms = 0.0
        request = model.request(image, question)
        feature = overviews[0].feature if len(overviews) == 1 else model.image_feature(overviews)
        self._known = model.known if request.images else model.known_of_text
        now_ms = (time.perf_counter() - self._start_s) * 1e3
        spent = Spent(now_ms, overview_ms, prepared_ms, self.waited_ms)
        asked = request, feature, self.budget_ms, spent, self._known, self._terms.price
        decision = decide.choose(model.guard.among(self._among), model.network, *asked)
        self._take(decision, decision.best >= 0, self._terms.when_infeasible)
        self.own_ms += (time.perf_counter() - began) * 1e3

    def take(self, setting: Setting) -> None:
        """Take the setting that the caller chose, of whose time nothing is known."""
        self.choice = Choice(setting, -1, self._terms.budget_ms == math.inf, None)

    def generate_options(self) -> dict[str, Any]:
        """What `VLM.generate` is told: on which terms, and a deadline, or to ask once the image is encoded.

        It does not ask where nothing was promised: what is done then was the caller's to say.
        """
        terms = self._terms
        told = {"max_new_tokens": terms.max_new_tokens, "stop": terms.stop_strings, "on_text": terms.on_text}
        if self._model.guard.rule.revises and self.choice.feasible and self.choice.bounds:
            return {**told, "revise": self.revise}
        return {**told, "deadline": self._deadline()}

    def revise(self, image_ms: float) -> tuple[Setting, Deadline | None]:
        """Choose anew among the settings with the encoded image."""
        began, model = time.perf_counter(), self._model
        spent = Spent((began - self._start_s) * 1e3, image_ms)
        asked = self.decisions[0], self.choice.index, self.budget_ms, spent, self._known
        decision = decide.choose_again(model.guard, *asked)
        self._take(decision, feasible=True)
        deadline = self._deadline()
        self.own_ms += (time.perf_counter() - began) * 1e3
        return self.choice.setting, deadline

    def finished(self, generation: Generation) -> Answer:
        """The answer, when its last token is there; the controller's time is a stage beside the model's."""
        latency_ms = (time.perf_counter() - self._start_s) * 1e3
        choice, made, took, budget_ms = self.choice, generation, generation.stages_ms, float(self._terms.budget_ms)
        stages_ms = {
            "preprocess": took["preprocess"], "vision": took["vision"], "controller": self.own_ms,
            "prefill": took["prefill"], "decode": took["decode"],
        }  # fmt: skip
        return Answer(
            made.text, choice.setting, latency_ms, stages_ms, choice.predicted_ms, budget_ms, latency_ms <= budget_ms,
            choice.feasible, made.finish_reason, made.num_vision_tokens, made.num_language_tokens,
            made.num_output_tokens, len(made.hurried),
        )  # fmt: skip

    def lesson(self, answer: Answer, generation: Generation) -> tuple[int, list[Bounds], Outcome]:
        """What `Guard.update` is told."""
        outcome = Outcome(
            answer.stages_ms, answer.num_output_tokens, answer.latency_ms, late=not answer.budget_met,
            cut=answer.finish_reason == "budget", promised=self.choice.feasible, saved_ms=generation.saved_ms,
            limited=self._terms.budget_ms < math.inf, whole=generation.whole, among=self._among,
            stopped=answer.finish_reason == "stopped",
        )  # fmt: skip
        return self.choice.index, [decision.bounds for decision in self.decisions], outcome

    def _take(self, decision: Decision, feasible: bool, infeasible: Infeasible = "fastest") -> None:
        index = decision.best if decision.best >= 0 else decision.settled(self.budget_ms, infeasible)
        self.decisions.append(decision)
        self.choice = Choice(self._model.settings[index], index, feasible, decision.bounds)

    def _deadline(self) -> Deadline | None:
        guard, at_s = self._model.guard, self._start_s + self.budget_ms / 1e3
        if self.choice.bounds is None:
            return Deadline(at_s, 0.0) if guard.rule.cuts else None
        cut = cuts(self._terms.cut, self.choice.feasible, guard.may_be_late)
        setting_of = self._model.settings.__getitem__
        return deadline_of(guard, setting_of, self.choice.bounds, self.choice.index, at_s, cut=cut)
