"""A request under way and its answer: what is chosen, what came of it and what it cost. Times in ms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from budgetvlm import decide
from budgetvlm._io import time_text
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.decide import Cut, Decision, Seen, Terms
from budgetvlm.guard.bounds import BOUND, READ, STEP, Bounds, Outcome, Request, Spent
from budgetvlm.guard.fixed import Guard
from budgetvlm.guard.rule import Infeasible
from budgetvlm.knobs import Setting
from budgetvlm.vlm import VLM, Conversation, Deadline, Generation, Overview, Quicker

AMPLE_MS = 1e9  # a budget that holds any setting


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
        extrapolated: the budget or the price lies beyond what the controller was trained on; it was told the nearest.
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
    extrapolated: bool = False

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
        "_among", "_began_s", "_drawn", "_features", "_known", "_model", "_start_s", "_terms", "budget_ms", "choice",
        "decisions", "own_ms", "probabilities",
    )  # fmt: skip

    def __init__(self, model: Chooser, terms: Terms) -> None:
        self._began_s = time.perf_counter()
        self._start_s = self._began_s if terms.arrived_s is None else terms.arrived_s
        self._model, self._terms, self.budget_ms = model, terms, float(min(terms.budget_ms, AMPLE_MS))
        self.decisions: list[Decision] = []
        self.probabilities: np.ndarray | None = None
        self._drawn = -1
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
        asked, guard = (request, feature, self.budget_ms, spent, self._known), model.guard.among(self._among)
        decision = decide.choose(guard, model.network, *asked, self._terms.price)
        self._features = feature, request.feature
        trial = self._terms.trial
        rival = decide.choose(guard, trial.network, *asked, self._price) if trial and decision.feasible else None
        decision = self._explore(decision, rival)
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
        if self._terms.on_choice and self.decisions:
            self._terms.on_choice(self._seen())
        choice, made, took, budget_ms = self.choice, generation, generation.stages_ms, float(self._terms.budget_ms)
        stages_ms = {
            "preprocess": took["preprocess"], "vision": took["vision"], "controller": self.own_ms,
            "prefill": took["prefill"], "decode": took["decode"],
        }  # fmt: skip
        return Answer(
            made.text, choice.setting, latency_ms, stages_ms, choice.predicted_ms, budget_ms, latency_ms <= budget_ms,
            choice.feasible, made.finish_reason, made.num_vision_tokens, made.num_language_tokens,
            made.num_output_tokens, len(made.hurried), bool(self.decisions) and self._extrapolated(),
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

    def _extrapolated(self) -> bool:
        """Whether the budget or the price lies beyond what the controller was trained on."""
        network, bounds = self._model.network, self.decisions[0].bounds
        left_ms = self.budget_ms - bounds.spent.waited_ms - self.own_ms
        least_ms, most_ms = network.known_ms
        price = network.default_price if self._terms.price is None else self._terms.price
        known = least_ms <= left_ms / bounds.forecast.slowdown <= most_ms
        return not known or price > network.known_terms.prices[1]

    def _seen(self) -> Seen:
        """What the first decision saw, once the answer is there."""
        model, decision, terms = self._model, self.decisions[0], self._terms
        left_ms = self.budget_ms - decision.bounds.spent.waited_ms
        told_ms = decide.seen_budget_ms(left_ms, model.guard.own_ms, decision.bounds.slowdown)
        chosen = self._drawn if self._drawn >= 0 else decision.settled(self.budget_ms, terms.when_infeasible)
        allowed = decision.bounds.allowed(self.budget_ms)
        for_sure = np.arange(len(allowed)) == chosen
        probabilities = for_sure.astype(float) if self.probabilities is None else self.probabilities
        return Seen(*self._features, told_ms, self._price, allowed, chosen, probabilities, self.choice.index)

    @property
    def _price(self) -> float:
        """That of the request, or the controller's own."""
        return self._model.network.default_price if self._terms.price is None else self._terms.price

    def _explore(self, decision: Decision, rival: Decision | None = None) -> Decision:
        """Draw who decides a share of the requests; a setting that is drawn is revised only if it has to be."""
        terms = self._terms
        if not decision.feasible or not (terms.explore or rival):
            return decision
        share = terms.trial.share if terms.trial else 0.0
        by, index, self.probabilities = decide.explored(decision, self.budget_ms, terms.explore, rival, share)
        self._drawn = index if index != by.best else -1
        return by

    def _take(self, decision: Decision, feasible: bool, infeasible: Infeasible = "fastest") -> None:
        index = decision.best if decision.best >= 0 else decision.settled(self.budget_ms, infeasible)
        if self._drawn >= 0 and decision.bounds.allowed(self.budget_ms)[self._drawn]:
            index = self._drawn
        self.decisions.append(decision)
        self.choice = Choice(self._model.settings[index], index, feasible, decision.bounds)

    def _deadline(self) -> Deadline | None:
        guard, at_s = self._model.guard, self._start_s + self.budget_ms / 1e3
        if self.choice.bounds is None:
            return Deadline(at_s, 0.0) if guard.rule.cuts else None
        cut = cuts(self._terms.cut, self.choice.feasible, guard.may_be_late)
        setting_of = self._model.settings.__getitem__
        return deadline_of(guard, setting_of, self.choice.bounds, self.choice.index, at_s, cut=cut)
