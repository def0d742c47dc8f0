"""A model that answers within a budget: the controller chooses the knobs of each request.

A request runs so: the overview crop is encoded; the guard bounds the time of every setting from the image's size, the
question and what the overview took; the controller reads the overview's pooled features, the question's embeddings and
the budget, and chooses among the settings whose bound keeps it; the model encodes the image as that setting says and
reuses the overview; from what is then left of the budget the other knobs are chosen anew; the model answers; the guard
learns from what it took.
The clock runs from the decoded image (or from when the request arrived) to the last token, all included. Times in ms.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from budgetvlm._io import open_image, read_json, write_json
from budgetvlm.answer import Answer, Choice, Cut, Infeasible, check_request, make_answer
from budgetvlm.controller.checkpoint import GUARD, load_controller
from budgetvlm.controller.decision import Decider, best_within
from budgetvlm.controller.network import GRPOController
from budgetvlm.decide import seen_ms
from budgetvlm.errors import CheckpointError, ConfigError, DataError, InputError, KnobSpaceError
from budgetvlm.guard.adaptive import SIZES_KEPT, AdaptiveGuard
from budgetvlm.guard.bounds import READ, STEP, Bounds, Request, Spent, quick_spent
from budgetvlm.knobs import Setting
from budgetvlm.vlm import VLM, Deadline, Overview, load_vlm
from budgetvlm.vlm.inference import inference
from budgetvlm.vlm.protocol import STAGES, quick_quicker

_BLANK = (256, 192)  # pixels of the image that the model is warmed up with
_AMPLE_MS = 1e9  # a budget that holds any setting
_ANSWERS = 5  # rehearsed before the first request


class Outlook(NamedTuple):
    """What is known of a request before the model runs: its size and question feature, and what the guard says."""

    request: Request
    bounds: Bounds


class AdaptiveVLM:
    """A vision-language model with a controller.

    Args:
        vlm: the model.
        controller: trained on profiles of this model.
        guard: bounds each request's latency and learns from it; None: the controller's own fixed bounds.
        warm_up: run a few requests on a blank image, so that the first real one is not the slowest, and so that it is
            known what they take beside the model (`controller_ms`; else it is taken for 0).

    Raises:
        KnobSpaceError: the controller or the guard knows other settings than the model.
        CheckpointError: the controller was trained on features of another model.
    """

    def __init__(
        self, vlm: VLM, controller: GRPOController, guard: AdaptiveGuard | None = None, *, warm_up: bool = True
    ) -> None:
        self.vlm, self.controller, self.decider = vlm, controller.eval(), Decider(controller)
        _check_settings(vlm, controller)
        if guard is not None:
            controller.knob_space.require_equal(guard.latency.knob_space, "the guard")
        self._columns = [vlm.knob_space.index(setting) for setting in controller.knob_space.settings]
        self._settings = [vlm.knob_space.settings[column] for column in self._columns]  # the model knows its own ones
        self._all_columns = self._columns == list(range(len(vlm.knob_space)))
        self._fixed: tuple[float, Bounds] | None = None
        self._of_columns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.known = np.isfinite(controller.bounds_ms.numpy())  # settings that the controller has learnt about
        self.only_known = None if self.known.all() else self.known
        self._lock = threading.Lock()  # of what the guard learns; a decision is one compiled call, and needs none
        self.guard = None if guard is None else guard.copy()  # the rehearsal is not to be learnt from
        self.controller_ms = 0.0
        self.controller_ms = self._rehearse(_ANSWERS if warm_up else 0)
        self.guard = guard
        if guard is not None:
            guard.other_ms = guard.other_ms or self.controller_ms

    @classmethod
    def from_pretrained(
        cls,
        model_path: str = "reference",
        controller: str | Path | GRPOController | None = None,
        *,
        guard: AdaptiveGuard | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> AdaptiveVLM:
        """Open a model and its controller.

        Args:
            model_path: "reference" or a model's directory.
            controller: a training directory, a checkpoint, a controller; None: ``controller/`` in the model's
                directory.
            guard: None: the one that lies beside the controller, if there is one.

        Raises:
            ConfigError, CheckpointError, KnobSpaceError: either cannot be used, or they do not fit.
        """
        if not isinstance(controller, GRPOController):
            path = _controller_path(model_path, controller)
            controller, guard = load_controller(path), guard or load_guard(path)
        return cls(load_vlm(model_path, device=device, num_threads=num_threads), controller, guard)

    @inference
    def generate(
        self,
        image: str | Path | Image.Image,
        question: str,
        *,
        budget_ms: float,
        price: float | None = None,
        max_new_tokens: int = 16,
        when_infeasible: Infeasible = "fastest",
        cut: Cut = "always",
        arrived_s: float | None = None,
    ) -> Answer:
        """Answer a question about an image within a budget.

        Args:
            image: an image or its file; opening and decoding a file is before the clock starts.
            budget_ms: a ceiling for the whole request.
            price: accuracy given for one latency of the full setting; None: the controller's own default; 0: use what
                the budget allows.
            when_infeasible: what to do where no setting is expected to keep the budget. "fastest": take the one
                that is expected to be. "best_effort": choose among those that keep it on average, if there are any.
                "reject": raise before the model runs. Whatever is done, the answer says so.
            cut: which answers stop before a token that the budget would not hold. "always": all of them. "needed": only
                while the late ones have used up what alpha allows; the others are finished late.
            arrived_s: when the request arrived, on the clock of `time.perf_counter`; its waiting then counts.

        Raises:
            InputError: an image that cannot be read, an empty question, a budget or price that is not usable, a
                budget that nothing keeps and "reject".
        """
        check_request(question, budget_ms, price, when_infeasible, cut)
        budget_ms = float(budget_ms)  # compiled loops would be compiled anew for whole numbers
        picture = open_image(image)
        began = time.perf_counter()
        start = began if arrived_s is None else arrived_s
        waited_ms = _ms(start, began)
        if when_infeasible == "reject":
            self._reject(self._request(picture, question), budget_ms, waited_ms)
        planned = time.perf_counter()
        overview = self.vlm.encode_overview(picture)
        choosing = time.perf_counter()
        request = self._request(picture, question)  # here, where pooling has just brought Python back into the caches
        prepared_ms = overview.preprocess_ms
        spent = quick_spent((_ms(start, time.perf_counter()), prepared_ms + overview.vision_ms, prepared_ms))
        bounds, values, choice = self.decide(
            request, overview.feature, budget_ms, spent, price, waited_ms, when_infeasible
        )
        course = _Course(self, start, budget_ms, cut, values, [bounds], choice)
        chosen = time.perf_counter()
        generation = self.vlm.generate(
            picture,
            question,
            course.choice.setting,
            max_new_tokens=max_new_tokens,
            overview=overview,
            **course.orders(),
        )
        latency_ms = _ms(start, time.perf_counter())
        controller_ms = _ms(began, planned) + _ms(choosing, chosen) + course.revising_ms
        answer = make_answer(course.choice, generation, controller_ms, latency_ms, budget_ms)
        self._learn(course, answer, generation.saved_ms)
        return answer

    def save_guard(self, directory: str | Path) -> Path:
        """Write what the guard has learnt beside a controller; `from_pretrained` takes it from there. Returns the file.

        Raises:
            ConfigError: there is no guard. OutputError: it cannot be written.
        """
        if self.guard is None:
            raise ConfigError("this model has no guard that could be saved; calibrate one (`budgetvlm calibrate`)")
        with self._lock:
            document = self.guard.to_dict()
        path = Path(directory) / GUARD
        write_json(path, document)
        return path

    def choose(self, overview: Overview, question: str, budget_ms: float, price: float | None = None) -> Choice:
        """The controller's decision for an image whose overview is given, by the fixed bounds, without answering."""
        request = Request(np.zeros(len(self._columns)), 0, self.vlm.question_feature(question))
        bounds = self._fixed_bounds(0.0)
        seen_ms = self.seen_budget_ms(bounds, budget_ms)
        index, values = self.decider.best(
            overview.feature, request.feature, seen_ms, price, bounds.bounds_ms, budget_ms
        )
        return self.choice(index, values, bounds, budget_ms)

    def decide(
        self,
        request: Request,
        image: np.ndarray,
        budget_ms: float,
        spent: Spent,
        price: float | None = None,
        waited_ms: float = 0.0,
        when_infeasible: Infeasible = "fastest",
    ) -> tuple[Bounds, np.ndarray, Choice]:
        """From what is known of a request to its setting; with it the bounds and every setting's value, ``[K]``.

        Args:
            image: the overview's feature ``[Di]``, float32.
            spent: on the request so far, waiting included.
        """
        if self.guard is None:
            bounds = self._fixed_bounds(waited_ms)
            seen_ms = self.seen_budget_ms(bounds, budget_ms - waited_ms)
            index, values = self.decider.best(image, request.feature, seen_ms, price, bounds.bounds_ms, budget_ms)
        else:
            bounds, values, index = self.guard.choose(
                self.decider, request, image, budget_ms, spent, price, waited_ms, self.only_known
            )
        return bounds, values, self.choice(index, values, bounds, budget_ms, when_infeasible)

    def look(self, image: Image.Image, question: str, budget_ms: float = math.inf) -> Outlook:
        """What can be said of a request before the model runs."""
        request = self._request(image, question)
        return Outlook(request, self._bounds(request, budget_ms, Spent()))

    def _request(self, image: Image.Image, question: str) -> Request:
        vision, language = self.vlm.prompt_size(image, question)
        if not self._all_columns:
            vision = self._own_columns(vision)
        return Request(vision, language, self.vlm.question_feature(question))

    def _own_columns(self, vision: np.ndarray) -> np.ndarray:
        """The controller's settings of all of the model's; the same array for the same array."""
        found = self._of_columns.get(id(vision))
        if found is None or found[0] is not vision:
            if len(self._of_columns) >= SIZES_KEPT:
                self._of_columns.clear()
            self._of_columns[id(vision)] = found = vision, vision[self._columns]
        return found[1]

    def _bounds(self, request: Request, budget_ms: float, spent: Spent, waited_ms: float = 0.0) -> Bounds:
        if self.guard is None:
            return self._fixed_bounds(waited_ms)
        return self.guard.bounds(request, budget_ms, spent, self.only_known)

    def seen_budget_ms(self, bounds: Bounds, left_ms: float) -> float:
        """What the controller is told of a budget: as it would be on the machine that was profiled, for the model."""
        own_ms = self.guard.other_ms if self.guard is not None else self.controller_ms
        return seen_ms(left_ms, own_ms, bounds.slowdown)

    def _fixed_bounds(self, waited_ms: float) -> Bounds:
        """The controller's own bounds, and beside them its own time and the waiting."""
        own_ms = self.controller_ms + waited_ms
        if self._fixed is None or self._fixed[0] != own_ms:
            bounds = self.controller.bounds_ms.numpy().astype(np.float64)
            self._fixed = own_ms, Bounds.fixed(np.where(bounds > 0, bounds + own_ms, 0.0))
        return self._fixed[1]

    def _reject(self, request: Request, budget_ms: float, waited_ms: float) -> None:
        """Raise InputError if no setting is expected to keep the budget."""
        bounds = self._bounds(request, budget_ms, Spent(waited_ms), waited_ms)
        if not bounds.allowed(budget_ms).any():
            raise InputError(
                f"budget_ms={budget_ms:g} cannot be kept: the fastest setting is expected to take up to "
                f"{bounds.bounds_ms.min():.1f} ms, {bounds.spent.total_ms:.1f} ms of waiting included. Give more time, "
                'or another when_infeasible ("fastest", "best_effort")'
            )

    def choice(
        self,
        index: int,
        values: np.ndarray,
        bounds: Bounds,
        budget_ms: float,
        when_infeasible: Infeasible = "fastest",
        promised: bool = False,
    ) -> Choice:
        """The most valuable setting of those that the budget allows, or what is done where it allows none.

        Args:
            index: its number, as `best_within` says it.
            values: `Decider.values` of every setting, ``[K]``.
            promised: one was allowed when the setting was first chosen.
        """
        feasible = promised or index >= 0
        if not feasible and when_infeasible == "best_effort":
            index = best_within(values, bounds.predicted_ms, budget_ms)
        if index < 0:
            index = bounds.fastest
        return Choice(self._settings[index], index, feasible, bounds)

    def _learn(self, course: _Course, answer: Answer, saved_ms: dict[str, float]) -> None:
        if self.guard is None:
            return
        with self._lock:
            self.guard.update(
                course.looks,
                course.choice.index,
                answer.stages_ms,
                answer.num_output_tokens,
                answer.latency_ms,
                late=not answer.budget_met,
                cut=answer.finish_reason == "budget",
                promised=course.choice.feasible,
                saved_ms=saved_ms,
            )

    def deadline(self, bounds: Bounds, index: int, at_s: float, *, cut: bool = True) -> Deadline | None:
        """Of an answer at this setting; None: it is finished as planned whatever it takes.

        Args:
            at_s: when its budget ends. cut: whether tokens that would be late are left out.
        """
        guard = self.guard
        if guard is None or not guard.cuts:
            return None
        settings, ms = self._settings, bounds.times.item
        hurried = tuple([quick_quicker((settings[k], ms(STEP, k), ms(READ, k))) for k in guard.quicker(index)])
        return Deadline(at_s, ms(STEP, index), bounds.lengths[1], hurried, cut, ms(READ, index) if hurried else 0.0)

    def _rehearse(self, answers: int) -> float:
        """Check that the features fit, and warm up with so many answers; what they took beside the model, in ms."""
        blank, space = Image.new("RGB", _BLANK), self.vlm.knob_space
        overview = self.vlm.encode_overview(blank)
        try:
            self.choose(overview, "what", _AMPLE_MS)
        except InputError as error:
            raise CheckpointError(
                f"the controller does not fit the model {self.vlm.name}: {error}. Train one on its profiles."
            ) from error
        if not answers:
            return 0.0
        for setting in (space.cheapest, space.full):
            self.vlm.generate(blank, "what", setting, max_new_tokens=2, overview=overview)
        made = [self.generate(blank, "what", budget_ms=_AMPLE_MS, max_new_tokens=2) for _ in range(answers)]
        return statistics.median(one.latency_ms - sum(one.stages_ms[stage] for stage in STAGES) for one in made)


class _Course:
    """One request under way: what the guard says of it, which setting was chosen, and how it is revised.

    Args:
        start_s: when its clock started.
        cut: which answers have a deadline.
        values: of every setting, ``[K]``.
        looks: the guard's bounds, at each moment at which a setting is chosen.
        choice: by the first of them.
    """

    __slots__ = ("_budget_ms", "_cut", "_model", "_start_s", "_values", "choice", "looks", "revising_ms")

    def __init__(
        self,
        model: AdaptiveVLM,
        start_s: float,
        budget_ms: float,
        cut: Cut,
        values: np.ndarray,
        looks: list[Bounds],
        choice: Choice,
    ) -> None:
        self._model, self._start_s, self._budget_ms = model, start_s, budget_ms
        self._cut, self._values, self.looks, self.choice = cut, values, looks, choice
        self.revising_ms = 0.0

    def orders(self) -> dict[str, Any]:
        """What `VLM.generate` is told: a deadline, or to ask once the image is encoded.

        It does not ask where nothing was promised: what is done then was the caller's to say.
        """
        guard = self._model.guard
        may_be_revised = guard is not None and guard.revises and self.choice.feasible
        return {"revise": self.revise} if may_be_revised else {"deadline": self.deadline()}

    def revise(self, image_ms: float) -> tuple[Setting, Deadline | None]:
        """Choose anew among the settings with the encoded image."""
        began, model = time.perf_counter(), self._model
        assert model.guard is not None
        spent = quick_spent((_ms(self._start_s, began), image_ms, 0.0))
        bounds, index = model.guard.choose_again(
            self.looks[0], self.choice.index, self._values, self._budget_ms, spent, model.only_known
        )
        self.looks.append(bounds)
        self.choice = model.choice(index, self._values, bounds, self._budget_ms, promised=True)
        deadline = self.deadline()
        self.revising_ms = _ms(began, time.perf_counter())
        return self.choice.setting, deadline

    def deadline(self) -> Deadline | None:
        """Of the answer; None: it is finished as planned whatever it takes."""
        guard = self._model.guard
        if guard is None:
            return None
        at_s, cut = self._start_s + self._budget_ms / 1e3, cuts(guard, self._cut, self.choice.feasible)
        return self._model.deadline(self.looks[-1], self.choice.index, at_s, cut=cut)


def cuts(guard: AdaptiveGuard, cut: Cut, promised: bool) -> bool:
    """Whether an answer is cut before a token that would be late. Where nothing was promised none may be late."""
    return cut == "always" or not (promised and guard.may_be_late)


def _ms(start_s: float, end_s: float) -> float:
    return (end_s - start_s) * 1e3


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


def load_guard(path: Path) -> AdaptiveGuard | None:
    """The guard beside a controller (a directory or a file in it), or None. Raises CheckpointError."""
    file = (path if path.is_dir() else path.parent) / GUARD
    if not file.exists():
        return None
    try:
        return AdaptiveGuard.from_dict(read_json(file))
    except DataError as error:
        raise CheckpointError(f"{file} is not usable: {error}") from None
