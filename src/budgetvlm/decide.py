"""The one decision: a request's terms, the guard's bounds, the controller's values, and the best setting allowed.

`specified_choice` and `specified_revision` say what it is, in NumPy; calibration, replays and evaluation use them. A
request takes the same decision by the compiled loops of `budgetvlm.guard.kernels` once these are there
(`start_compiling`): between two runs of the model they take a fifth of the time. Shapes: K settings. Times in ms.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import numpy as np

from budgetvlm._compiled import InBackground, is_kept
from budgetvlm._io import time_text
from budgetvlm.controller.price_curve import AtPrice, PriceCurve
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.errors import BudgetVLMWarning, InputError
from budgetvlm.guard import kernels
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Bounds, Request, Spent
from budgetvlm.guard.fixed import Guard
from budgetvlm.guard.machine_code import load_kernels
from budgetvlm.guard.rule import Infeasible
from budgetvlm.guard.specification import best_allowed
from budgetvlm.guard.spending import Spending, require_mean_budget
from budgetvlm.knobs import Value

Cut = Literal["always", "needed"]
_NUMBERS = int, float
_KNOWN = ("when_infeasible", get_args(Infeasible)), ("cut", get_args(Cut))
SMALLEST_BUDGET_MS = 1e-3  # that a controller is told of
CLEARLY_WORSE = 0.1  # in accuracy, its price included: nobody is to get an answer of a setting valued that much lower


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
    on_text: Callable[[str], bool | None] | None
    explore: float
    trial: Trial | None
    on_choice: Callable[[Seen], None] | None


class Trial(NamedTuple):
    """A controller that is to prove itself, and the share of requests whose setting is its choice."""

    network: ValueNetwork
    share: float


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
        explore: share of requests whose setting is drawn, see `explored`.
        trial: another controller, for a share of the requests.
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
    on_text: Callable[[str], bool | None] | None = None
    explore: float = 0.0
    trial: Trial | None = None
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
        elif self.trial and not 0 <= self.trial.share <= 1 - self.explore:
            problems.append(f"trial={self.trial.share!r} and explore={self.explore} are no shares of all requests")
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


class Decision(NamedTuple):
    """What was decided, and by what.

    Attributes:
        bounds: the guard's. values: the controller's, of every setting ``[K]``.
        best: number of the best setting that the bounds allow; -1 if they allow none.
    """

    bounds: Bounds
    values: np.ndarray
    best: int

    @property
    def feasible(self) -> bool:
        """Whether the bounds allow any setting."""
        return self.best >= 0

    def settled(self, budget_ms: float, when_infeasible: Infeasible = "fastest") -> int:
        """The number of the setting that is taken: the best one, or what is to be done where none is allowed."""
        index = self.best
        if index < 0 and when_infeasible == "best_effort":
            index = int(best_allowed(self.values, self.bounds.predicted_ms, budget_ms))
        return index if index >= 0 else self.bounds.fastest


def explored(
    decision: Decision, budget_ms: float, share: float, rival: Decision | None = None, trial: float = 0.0
) -> tuple[Decision, int, np.ndarray]:
    """Of a feasible request: whose decision it is, the setting's number, and how probable each one was ``[K]``.

    A share is drawn evenly from the settings that the bounds allow and whose values are not clearly worse than the
    best. Another share is the rival's to decide, whatever its choice is valued here: what it knows better is the point.
    """
    best, values = decision.best, decision.values
    open_to = decision.bounds.allowed(budget_ms) & (values >= values[best] - CLEARLY_WORSE)
    probabilities = share * open_to / open_to.sum()
    probabilities[best] += 1 - share - trial
    if rival:
        probabilities[rival.best] += trial
    drawn = random.random()
    if drawn < share:
        return decision, random.choice(np.flatnonzero(open_to).tolist()), probabilities
    by = rival if rival and drawn < share + trial else decision
    return by, by.best, probabilities


def choose(
    guard: Guard, network: ValueNetwork, request: Request, image: np.ndarray, budget_ms: float, spent: Spent,
    known: np.ndarray, price: float | None = None,
) -> Decision:  # fmt: skip
    """Choose a setting for a request.

    Args:
        image: the overview's feature ``[Di]``, float32.
        spent: on the request so far, waiting included.
        known: settings that may be chosen, bool ``[K]``.
        price: see `ValueNetwork.values`.
    """
    loops = _LOOPS.made
    if loops is None or not isinstance(guard, AdaptiveGuard):
        return specified_choice(guard, network, request, image, budget_ms, spent, known, price)
    features = network.inputs(image, request.feature) if network.projects else (image, request.feature)
    weights = network.default_tuple if price is None else tuple(network.weights(float(price)))
    asked = tuple(request), guard.image_groups(request), known, budget_ms, tuple(spent)
    times, fastest, forecast, values, index = loops.choose(guard.state_tuple, *asked, weights, *features)
    return Decision(Bounds(times, fastest, forecast, spent), values, index)


def choose_again(
    guard: Guard, chosen: Decision, index: int, budget_ms: float, spent: Spent, known: np.ndarray
) -> Decision:
    """Choose anew among the settings with the image of setting ``index``, which is encoded.

    Args:
        chosen: the decision that setting was chosen by; the controller's values stay what they were.
        spent: with the whole image's encoding.
    """
    loops = _LOOPS.made
    if loops is None or not isinstance(guard, AdaptiveGuard):
        return specified_revision(guard, chosen, index, budget_ms, spent, known)
    forecast = chosen.bounds.forecast
    request = tuple(forecast), index, known, tuple(spent), chosen.values, budget_ms
    times, fastest, best = loops.choose_again(guard.state_tuple, *request)
    return Decision(Bounds(times, fastest, forecast, spent, "image"), chosen.values, best)


def specified_choice(
    guard: Guard, network: ValueNetwork, request: Request, image: np.ndarray, budget_ms: float, spent: Spent,
    known: np.ndarray, price: float | None = None,
) -> Decision:  # fmt: skip
    """What `choose` is, in NumPy."""
    bounds = guard.bounds_at_choice(request, budget_ms, spent, known)
    seen_ms = seen_budget_ms(budget_ms - spent.waited_ms, guard.own_ms, bounds.slowdown)
    values = network.values(image, request.feature, seen_ms, price)
    return Decision(bounds, values, int(best_allowed(values, bounds.bounds_ms, budget_ms)))


def specified_revision(
    guard: Guard, chosen: Decision, index: int, budget_ms: float, spent: Spent, known: np.ndarray
) -> Decision:
    """What `choose_again` is, in NumPy."""
    bounds = guard.bounds_at_revision(chosen.bounds, index, spent, known)
    return Decision(bounds, chosen.values, int(best_allowed(chosen.values, bounds.bounds_ms, budget_ms)))


def seen_budget_ms(left_ms: float, own_ms: float, slowdown: float) -> float:
    """What a controller is told of a budget: as it would be on the machine that was profiled, for the model alone.

    Args:
        left_ms: of the budget. own_ms: what comes beside the model's stages.
        slowdown: see `budgetvlm.guard.bounds.Forecast`.
    """
    return max((left_ms - own_ms) / slowdown, SMALLEST_BUDGET_MS)


def begin_spending(
    mean_budget_ms: float, default_price: float, curve: PriceCurve | None, own_ms: float, slowdown: float
) -> tuple[Spending, AtPrice | None]:
    """Begin to hold a mean budget, at the price that meets it by a controller's curve; without one, at the default.

    ``own_ms`` and ``slowdown``: see `seen_budget_ms`. Warns where the budget is more than any price takes. Raises
    ConfigError: a budget that is none, or that no price meets.
    """
    if curve is None:
        return Spending(mean_budget_ms, default_price), None
    require_mean_budget(mean_budget_ms, curve.least_ms * min(slowdown, 1.0))  # one that is slow now may soon not be
    most_ms = curve.most_ms * slowdown + own_ms
    if mean_budget_ms > most_ms:
        warnings.warn(
            f"a mean budget of {time_text(mean_budget_ms)} is more than this controller makes use of "
            f"({time_text(most_ms)} on average where time costs nothing), so every request gets the best setting",
            BudgetVLMWarning,
            stacklevel=3,
        )
    begun = curve.solve(seen_budget_ms(mean_budget_ms, own_ms, slowdown))
    return Spending(mean_budget_ms, begun.price, settled=True), begun


# --- Compiled loops ---------------------------------------------------------------------------------------------------


def start_compiling(guard: Guard) -> None:
    """Begin to compile the loops, or to load them, beside what else is done; until then the specification decides."""
    if isinstance(guard, AdaptiveGuard):
        _LOOPS.start(load_kernels)


def wait_for_compiled(seconds: float | None = None) -> bool:
    """Wait until the compiled loops are there, and say whether they are.

    Args:
        seconds: to wait while they are loaded, and not at all if they have to be compiled; None: as long as it takes.

    Raises:
        OutputError: they could not be compiled, and that was waited for.
    """
    if seconds is not None and not is_kept(kernels):
        return False
    return _LOOPS.wait(seconds) is not None


_LOOPS = InBackground()
