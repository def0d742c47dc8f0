"""A model that answers within a budget: the controller chooses the knobs of each request.

A request runs so: the guard bounds the time of every setting from the image's size and the question; the overview crop
is encoded; the controller reads its pooled features, the question's embeddings and the budget, and chooses among the
settings whose bound keeps it; the model answers at that setting and reuses the overview; the guard learns from what it
took. The clock runs from the decoded image (or from when the request arrived) to the last token, all included. Times
in ms.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from budgetvlm._io import read_json, write_json
from budgetvlm.adaptive import AdaptiveGuard, Bounds, Request
from budgetvlm.answer import Answer, Choice, Infeasible, check_request, make_answer
from budgetvlm.controller.checkpoint import GUARD, load_controller
from budgetvlm.controller.decision import Decider
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import CheckpointError, ConfigError, DataError, InputError, KnobSpaceError
from budgetvlm.vlm import VLM, Deadline, Overview, load_vlm
from budgetvlm.vlm.images import open_image

_BLANK = (256, 192)  # pixels of the image that the model is warmed up with
_DECISIONS, _ANSWERS = 9, 2  # rehearsed before the first request


@dataclass(frozen=True, eq=False)
class Outlook:
    """What is known of a request before the model runs: its size and question feature, and what the guard says."""

    request: Request
    bounds: Bounds

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Settings expected to keep the budget, bool ``[K]``."""
        return self.bounds.allowed(budget_ms)


class AdaptiveVLM:
    """A vision-language model with a controller.

    Args:
        vlm: the model.
        controller: trained on profiles of this model.
        guard: bounds each request's latency and learns from it; None: the controller's own fixed bounds.
        warm_up: run a few requests on a blank image, so that the first real one is not the slowest, and so that the
            controller's own time is known.

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
        self.known = np.isfinite(controller.bounds_ms.numpy())  # settings that the controller has learnt about
        self._lock = threading.Lock()
        self.guard = None  # the rehearsal is not to be learnt from
        self.controller_ms = self._rehearse(*(_DECISIONS, _ANSWERS) if warm_up else (1, 0))
        self.guard = guard
        if guard is not None and not guard.other_ms:
            guard.other_ms = self.controller_ms

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

    def generate(
        self,
        image: str | Path | Image.Image,
        question: str,
        *,
        budget_ms: float,
        price: float | None = None,
        max_new_tokens: int = 16,
        when_infeasible: Infeasible = "fastest",
        arrived_s: float | None = None,
    ) -> Answer:
        """Answer a question about an image within a budget.

        Args:
            image: an image or its file; opening and decoding a file is before the clock starts.
            budget_ms: a ceiling for the whole request.
            price: accuracy given for one latency of the full setting; None: the controller's own default; 0: use what
                the budget allows.
            when_infeasible: what to do where no setting is expected to keep the budget. "fastest": take the one with
                the smallest bound. "best_effort": choose among those that keep it on average, if there are any.
                "reject": raise before the model runs. Whatever is done, the answer says so.
            arrived_s: when the request arrived, on the clock of `time.perf_counter`; its waiting then counts.

        Raises:
            InputError: an image that cannot be read, an empty question, a budget or price that is not usable, a
                budget that nothing keeps and "reject".
        """
        check_request(question, budget_ms, price, when_infeasible)
        picture = open_image(image)
        start = time.perf_counter() if arrived_s is None else arrived_s
        began = time.perf_counter()
        left_ms = budget_ms - (began - start) * 1e3
        outlook = self.look(picture, question, left_ms)
        allowed = self._allowed(outlook, left_ms, budget_ms, when_infeasible)
        planning_ms = (time.perf_counter() - began) * 1e3
        overview = self.vlm.encode_overview(picture)
        choosing = time.perf_counter()
        choice = self._choose(overview, outlook, left_ms, price, allowed)
        controller_ms = planning_ms + (time.perf_counter() - choosing) * 1e3
        deadline = Deadline(start + budget_ms / 1e3, float(outlook.bounds.step_ms[choice.index]))
        generation = self.vlm.generate(
            picture,
            question,
            choice.setting,
            max_new_tokens=max_new_tokens,
            overview=overview,
            deadline=deadline if self.guard is not None and self.guard.cuts else None,
        )
        latency_ms = (time.perf_counter() - start) * 1e3
        answer = make_answer(choice, generation, controller_ms, latency_ms, budget_ms)
        self._learn(outlook, choice, answer)
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
        request = Request(np.zeros(len(self._columns)), 0, self._question_feature(question))
        outlook = Outlook(request, self._fixed_bounds())
        return self._choose(overview, outlook, budget_ms, price, outlook.allowed(budget_ms))

    def look(self, image: Image.Image, question: str, budget_ms: float = math.inf) -> Outlook:
        """What can be said of a request before the model runs."""
        vision, language = self.vlm.prompt_size(image, question)
        request = Request(vision[self._columns], language, self._question_feature(question))
        if self.guard is None:
            return Outlook(request, self._fixed_bounds())
        with self._lock:
            bounds = self.guard.bounds(request, budget_ms)
        return Outlook(request, bounds if self.known.all() else bounds.only(self.known))

    def seen_budget_ms(self, bounds: Bounds, left_ms: float) -> float:
        """What the controller is told of a budget: as it would be on the machine that was profiled, for the model."""
        own_ms = self.guard.other_ms if self.guard is not None else self.controller_ms
        return max((left_ms - own_ms) / bounds.slowdown, 1e-3)

    def _question_feature(self, question: str) -> np.ndarray:
        feature: np.ndarray = self.vlm.question_feature(question).numpy()
        return feature

    def _fixed_bounds(self) -> Bounds:
        """The controller's own bounds and, beside them, its own time."""
        bounds = self.controller.bounds_ms.numpy().astype(np.float64)
        bounds = np.where(bounds > 0, bounds + self.controller_ms, 0.0)
        return Bounds(bounds, bounds, bounds, np.zeros_like(bounds), 1.0, ())

    def _allowed(self, outlook: Outlook, left_ms: float, budget_ms: float, when_infeasible: Infeasible) -> np.ndarray:
        """The settings to choose from, none where the fastest is to be taken. Raises InputError for "reject"."""
        allowed = outlook.allowed(left_ms)
        if allowed.any() or when_infeasible == "fastest":
            return allowed
        if when_infeasible == "reject":
            raise InputError(
                f"budget_ms={budget_ms:g} cannot be kept: the fastest setting is expected to take up to "
                f"{outlook.bounds.bounds_ms.min():.1f} ms, and {max(left_ms, 0):.1f} ms are left. Give more time, or "
                'another when_infeasible ("fastest", "best_effort")'
            )
        likely: np.ndarray = outlook.bounds.predicted_ms <= left_ms
        return likely

    def _choose(
        self, overview: Overview, outlook: Outlook, left_ms: float, price: float | None, allowed: np.ndarray
    ) -> Choice:
        bounds = outlook.bounds
        budget_ms = self.seen_budget_ms(bounds, left_ms)
        index = bounds.fastest
        if allowed.any():
            features = overview.feature.numpy(), outlook.request.feature
            index = self.decider.choose(*features, budget_ms, price, allowed)
        bound = float(bounds.bounds_ms[index])
        return Choice(
            setting=self.controller.knob_space.settings[index],
            index=index,
            feasible=bool(outlook.allowed(left_ms).any()),
            predicted_ms=bound if 0 < bound < math.inf else None,
        )

    def _learn(self, outlook: Outlook, choice: Choice, answer: Answer) -> None:
        if self.guard is None:
            return
        with self._lock:
            self.guard.update(
                outlook.request,
                outlook.bounds,
                choice.index,
                answer.stages_ms,
                answer.num_output_tokens,
                late=not answer.budget_met,
                cut=answer.finish_reason == "budget",
                promised=choice.feasible,
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


def load_guard(path: Path) -> AdaptiveGuard | None:
    """The guard beside a controller (a directory or a file in it), or None. Raises CheckpointError."""
    file = (path if path.is_dir() else path.parent) / GUARD
    if not file.exists():
        return None
    try:
        return AdaptiveGuard.from_dict(read_json(file))
    except DataError as error:
        raise CheckpointError(f"{file} is not usable: {error}") from None
