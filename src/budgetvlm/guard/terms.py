"""On which terms a request is answered, and what can be told of it without a model. Times in ms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import numpy as np

from budgetvlm.errors import InputError
from budgetvlm.guard.rule import Infeasible
from budgetvlm.knobs import Value

Cut = Literal["always", "needed"]
OnText = Callable[[str], bool | None]
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
    explore: float
    on_choice: Callable[[Seen], None] | None


class Seen(NamedTuple):
    """What a request's decision saw and did, for who wants to learn from it.

    Attributes:
        image, language: features, float32 ``[Di]`` and ``[Dl]``.
        budget_ms, price: as the controller was told.
        allowed: settings whose bounds kept the budget, bool ``[K]``.
        chosen: the setting that was chosen first.
        probabilities: with which each setting would have been, ``[K]``; 1 for that one where none was drawn.
        answered: the one that answered.
    """

    image: np.ndarray
    language: np.ndarray
    budget_ms: float
    price: float
    allowed: np.ndarray
    chosen: int
    probabilities: np.ndarray
    answered: int


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
        explore: share of requests whose setting is drawn, see `budgetvlm.decide.explored`.
        on_choice: called when the answer is there, with what the decision saw; not where the setting was given.
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
    explore: float = 0.0
    on_choice: Callable[[Seen], None] | None = None

    def problems(self) -> list[str]:
        """What of this cannot be, in words."""
        problems, setting = [], cast(Any, self.setting)
        if self.budget_ms != math.inf and (not _is_number(self.budget_ms) or self.budget_ms <= 0):
            problems.append(
                f"budget_ms={self.budget_ms!r} is not a positive number of milliseconds; for example 40, or math.inf"
            )
        if self.price is not None and (not _is_number(self.price) or self.price < 0):
            problems.append(f"price={self.price!r} is not a number of 0 or more; 0 means: use what the budget allows")
        if not _is_number(self.explore) or not 0 <= self.explore <= 1:
            problems.append(f"explore={self.explore!r} is no share of requests; give a number from 0 to 1")
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
