"""A model that answers within a budget: the controller chooses the knobs of each request.

A request runs in these steps: the overview crop is encoded; the guard bounds the time of every setting from the image's
size, the question and what the overview took; the controller reads the overview's pooled features, the question's
embeddings and the budget, and chooses among the settings whose bound keeps it; the model encodes the image as that
setting says and reuses the overview; from what is then left of the budget the other knobs are chosen anew; the model
answers; the guard learns from what it took.
The clock runs from the decoded image (or from when the request arrived) to the last token, all included. Times in ms.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
from PIL import Image

from budgetvlm import decide
from budgetvlm._io import open_image, time_text
from budgetvlm.answer import AMPLE_MS, Answer, Choice, InFlight
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import AtPrice, PriceCurve, load_price_curve
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.decide import AnswerOptions, Terms, check_request
from budgetvlm.engines.opening import bundled_controller, fingerprint_of, open_model
from budgetvlm.engines.request_features import Extractor, extractor_beside, with_features
from budgetvlm.errors import CheckpointError, ConfigError, InfeasibleError, InputError, KnobSpaceError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Bounds, Request, Spent
from budgetvlm.guard.fixed import FixedGuard, Guard
from budgetvlm.guard.saved import load_guard, save_guard
from budgetvlm.guard.spending import Spending
from budgetvlm.vlm import VLM, Conversation, Overview
from budgetvlm.vlm.conversation import Messages, is_plain, read_messages
from budgetvlm.vlm.protocol import STAGES
from budgetvlm.vlm.text_stream import Pieces

REHEARSALS = 5  # requests before the first real one
_BLANK = (256, 192)  # pixels of the image that the model is warmed up with
_LOADING_S = 3.0  # that a rehearsal waits for compiled loops: long enough to load them, not to compile them


class AdaptiveVLM:
    """A vision-language model with a controller. Threads may share it; a model here answers one request at a time.

    Attributes:
        guard: learns from every request; one with fixed bounds where none was given.
        settings: the controller's, as the model knows them.
        known: settings that the controller has learnt about, bool ``[K]``.
        known_of_text: of these, the ones for text alone: those of the fewest crops, which then mean nothing.
        spending: holds the mean budget; None: there is none.
        solved: the price that this began with, and what it gave on validation samples; None: not known.
        own_ms: what a request took beside the model's stages when it was rehearsed.
        fingerprint: of the model's weights; None where they were not opened by `from_pretrained`.

    Args:
        vlm: the model.
        controller: trained on profiles of this model.
        guard: bounds each request's latency and learns from it; None: the controller's own fixed bounds.
        rehearsals: requests on a blank image that are run first, so that the first real one is not the slowest, and so
            that it is known what they take beside the model (with none, that is taken for 0).
        mean_budget_ms: what requests without a price of their own may take on average, see `budgetvlm.guard.spending`.
        price_curve: says at which price that is so at first; None: it begins at the controller's default.
        compiled: decide by compiled loops as soon as these are there; they are compiled in the background, once on each
            machine. False: decide in NumPy, which takes a millisecond more, for a program that answers once.

    Raises:
        KnobSpaceError: the controller or the guard knows other settings than the model.
        CheckpointError: the controller was trained on features of another model.
        ConfigError: a mean budget that is none, or below what any price gives by the curve.
    """

    fingerprint: str | None = None

    def __init__(
        self,
        vlm: VLM,
        controller: GRPOController,
        guard: AdaptiveGuard | None = None,
        *,
        rehearsals: int = REHEARSALS,
        compiled: bool = True,
        mean_budget_ms: float | None = None,
        price_curve: PriceCurve | None = None,
    ) -> None:
        self.vlm, self.controller, self.network = vlm, controller.eval(), ValueNetwork(controller)
        vlm.knob_space.require_contains(controller.knob_space, f"the model {vlm.name}")
        bounds_ms = controller.bounds_ms.numpy()
        if guard is not None and not vlm.can_revise:
            guard = guard.replaced(rule=guard.rule.for_model(vlm.can_revise))
        self.guard: Guard = guard or FixedGuard(controller.knob_space, bounds_ms)
        controller.knob_space.require_equal(self.guard.knob_space, "the guard")
        self.known = np.isfinite(bounds_ms)
        crops = np.array([setting.get("max_crops", 1) for setting in controller.knob_space.settings])
        fewest = self.known & (crops == crops.min())
        self.known_of_text = fewest if fewest.any() else self.known
        self._usual_image = controller.image_input.mean.float().numpy()
        columns = [vlm.knob_space.index(setting) for setting in controller.knob_space.settings]
        self.settings = [vlm.knob_space.settings[column] for column in columns]  # the model knows its own ones
        self._columns = None if columns == list(range(len(vlm.knob_space))) else np.array(columns)
        self._lock = threading.Lock()  # of what the guard learns
        self.spending: Spending | None = None
        self.solved: AtPrice | None = None
        if compiled:
            decide.start_compiling(self.guard)
        self.own_ms = self._rehearse(rehearsals)
        self.guard.own_ms = self.guard.own_ms or self.own_ms
        if mean_budget_ms is not None:
            slowdown = self.bounds(Image.new("RGB", _BLANK), "what").slowdown
            begin = float(controller.default_price), price_curve, self.own_ms, slowdown
            self.spending, self.solved = decide.begin_spending(mean_budget_ms, *begin)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str = "reference",
        controller: str | Path | GRPOController | None = None,
        *,
        guard: AdaptiveGuard | None = None,
        extractor: Extractor | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        allow_other_model: bool = False,
        **options: Any,
    ) -> AdaptiveVLM:
        """Open a model and its controller.

        Args:
            model_path: "reference", a model's directory, engines.yaml or an engine's address.
            controller: a training directory, a checkpoint, a controller; None: the one that the model brings.
            guard, extractor: None: those that lie beside the controller; without an extractor the model makes features.
            allow_other_model: take a controller or a guard that was made for other weights.
            options: rehearsals, compiled, mean_budget_ms and price_curve of `AdaptiveVLM`.

        Raises:
            ConfigError, CheckpointError, KnobSpaceError: either cannot be used, or they do not fit.
        """
        if not isinstance(controller, GRPOController):
            path = bundled_controller(model_path) if controller is None else Path(controller)
            controller, guard = load_controller(path), guard or load_guard(path)
            extractor = extractor or extractor_beside(path, device)
            options = {"price_curve": load_price_curve(path), **options}
        vlm = open_model(model_path, device=device, num_threads=num_threads)
        fingerprint = fingerprint_of(model_path, vlm)
        if not allow_other_model:
            controller.trained_on.require_model(fingerprint, model_path, guard.origin if guard else {})
        model = cls(with_features(vlm, extractor), controller, guard, **options)
        model.fingerprint = fingerprint
        return model

    @overload
    def generate(
        self, image: str | Path | Image.Image | None = None, question: str | None = None, *,
        messages: Messages | None = None, stream: Literal[False] = False, **terms: Unpack[AnswerOptions],
    ) -> Answer: ...  # fmt: skip
    @overload
    def generate(
        self, image: str | Path | Image.Image | None = None, question: str | None = None, *,
        messages: Messages | None = None, stream: Literal[True], **terms: Unpack[AnswerOptions],
    ) -> Pieces[Answer]: ...  # fmt: skip
    def generate(
        self, image: str | Path | Image.Image | None = None, question: str | None = None, *,
        messages: Messages | None = None, stream: bool = False, **terms: Unpack[AnswerOptions],
    ) -> Answer | Pieces[Answer]:  # fmt: skip
        """Answer a question about an image, or chat messages, within a budget.

        Args:
            image: an image or its file; opening and decoding a file is before the clock starts.
            messages: instead of image and question, see `budgetvlm.vlm.conversation.read_messages`. All their images
                are shown with the same number of crops.
            stream: return at once an iterator over the pieces of the answer's text, which a thread writes. Its
                ``answer`` waits for the whole answer, and `close` ends the writing after the token that is under way.
            terms: see `budgetvlm.decide.Terms`.

        Raises:
            InputError: an image that cannot be read, an empty question, messages or terms that are not usable, a budget
                that nothing keeps and "reject".
            KnobSpaceError: a setting that the model does not have.
        """
        kept = Terms(**terms)
        asked = self._asked(image, question, messages, kept)
        if not stream:
            return self._answer(*asked, kept)
        if kept.on_text is not None:
            raise InputError("on_text is called with the pieces that a stream hands over; give one of both")
        kept = kept.arrived()
        return Pieces(lambda on_text: self._answer(*asked, kept._replace(on_text=on_text)))

    def stream(
        self, image: str | Path | Image.Image | None = None, question: str | None = None, *,
        messages: Messages | None = None, **terms: Unpack[AnswerOptions],
    ) -> Pieces[Answer]:  # fmt: skip
        """Do as `generate` with ``stream=True``."""
        return self.generate(image, question, messages=messages, stream=True, **terms)

    def generate_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer several requests, each with its own budget and price, one after another; the earliest deadline first.

        The model answers one at a time also here: a shared run would make each wait for the longest, and would tell the
        guard nothing of what one takes. A request's clock runs from this call, so that its waiting counts.

        Args:
            requests: arguments of `generate`, by name.

        Raises:
            InputError: one that `generate` would refuse, or that is to be rejected if late, by its number; none is
                answered then.
        """
        opened = []
        for number, request in enumerate(requests):
            given = dict(request)
            image, question, messages = (given.pop(name, None) for name in ("image", "question", "messages"))
            try:
                if unknown := sorted(given.keys() - set(Terms._fields)):
                    raise InputError(f"{', '.join(unknown)} is unknown; known: {', '.join(Terms._fields)}")
                terms = Terms(**given)
                if terms.when_infeasible == "reject":
                    raise InputError('"reject" would lose the answers to the others; choose fastest or best_effort')
                opened.append((number, self._asked(image, question, messages, terms), terms))
            except (InputError, KnobSpaceError) as error:
                raise InputError(f"request {number} of the batch cannot be answered: {error}") from None
        began = [(number, asked, terms.arrived()) for number, asked, terms in opened]
        began.sort(key=lambda one: (one[2].deadline_s, one[0]))
        answers = {number: self._answer(*asked, terms) for number, asked, terms in began}
        return [answers[number] for number in range(len(answers))]

    def _asked(
        self, image: Any, question: str | None, messages: Messages | None, terms: Terms
    ) -> tuple[Image.Image | None, str | Conversation]:
        """Open what is asked about: an image and a question, or a conversation. Raises InputError, KnobSpaceError."""
        conversation = None if messages is None else read_messages(messages)
        if conversation and (image is not None or question is not None):
            raise InputError("image and question stand in the messages; give either these or the messages")
        check_request(conversation.question if conversation else question, terms)
        if terms.setting is not None:
            self.vlm.knob_space.completed(terms.setting)
        if conversation is None:
            return open_image(image), str(question)
        if is_plain(conversation):
            return conversation.images[0], conversation.question
        self.vlm.prompt_size(None, conversation)  # refuses at once what the model cannot take
        return None, conversation

    def _answer(self, image: Image.Image | None, question: str | Conversation, terms: Terms) -> Answer:
        """Answer what was opened and checked."""
        if self.spending and terms.price is None:
            terms = terms._replace(price=self.spending.price)
        under_way = InFlight(self, terms)
        if terms.when_infeasible == "reject":
            self._reject(self.bounds(image, question, under_way.budget_ms, under_way.waited_ms), under_way)
        overviews = [self.vlm.encode_overview(one) for one in _images(image, question) if terms.setting is None]
        if terms.setting is None:
            under_way.choose(image, question, overviews)
        else:
            under_way.take(self.vlm.knob_space.completed(terms.setting))
        options = under_way.generate_options()
        generation = self.vlm.generate(image, question, under_way.choice.setting, overview=overviews, **options)
        answer = under_way.finished(generation)
        if self.spending:
            self.spending.add(answer.latency_ms)
        if terms.setting is None:
            with self._lock:
                self.guard.update(*under_way.lesson(answer, generation))
        return answer

    def save_guard(self, directory: str | Path) -> Path:
        """Write what the guard has learnt beside a controller; `from_pretrained` takes it from there. Returns the file.

        The guard of the bundled controller goes to the user's data directory (`budgetvlm.guard.saved.guard_file`).

        Raises:
            ConfigError: there is no guard that learns. OutputError: it cannot be written.
        """
        with self._lock:
            document = self.guard.to_dict()
        if not document:
            raise ConfigError("this model has no guard that could be saved; calibrate one (`budgetvlm calibrate`)")
        return save_guard(dict(document), Path(directory))

    def choose(self, image: Image.Image, question: str, budget_ms: float, price: float | None = None) -> Choice:
        """The controller's decision for a request, without answering it."""
        overview, request = self.vlm.encode_overview(image), self.request(image, question)
        spent = Spent(0.0, overview.preprocess_ms + overview.vision_ms, overview.preprocess_ms)
        asked = request, overview.feature, budget_ms, spent, self.known, price
        decision = decide.choose(self.guard, self.network, *asked)
        index = decision.settled(budget_ms)
        return Choice(self.settings[index], index, decision.best >= 0, decision.bounds)

    def bounds(
        self, image: Image.Image | None, question: str | Conversation, budget_ms: float = math.inf, waited_ms: float = 0
    ) -> Bounds:
        """What the guard says of a request before the model runs."""
        request = self.request(image, question)
        spent, known = Spent(waited_ms, waited_ms=waited_ms), self.known if request.images else self.known_of_text
        return self.guard.bounds_at_choice(request, budget_ms, spent, known)

    def request(self, image: Image.Image | None, question: str | Conversation) -> Request:
        """What is known of a request before the model runs, at the controller's settings."""
        vision, language = self.vlm.prompt_size(image, question)
        if self._columns is not None:
            vision = vision[self._columns]
            vision.flags.writeable = False
        images = float(len(_images(image, question)))
        return Request(vision, float(language), self.vlm.question_feature(question), images)

    def image_feature(self, overviews: Sequence[Overview]) -> np.ndarray:
        """What the controller is told of images, float32 ``[Di]``: their mean; of text, that of all it learnt on."""
        features = [overview.feature for overview in overviews] or [self._usual_image]
        return np.stack(features).mean(axis=0, dtype=np.float32)

    def _reject(self, bounds: Bounds, under_way: InFlight) -> None:
        """Raise InfeasibleError if no setting is sure to keep the budget."""
        if not bounds.allowed(under_way.budget_ms).any():
            raise InfeasibleError(
                f"budget_ms={under_way.budget_ms:g} cannot be kept: the fastest setting is expected to take up to "
                f"{time_text(bounds.bounds_ms.min())}, {time_text(under_way.waited_ms)} of waiting included. Give more "
                'time, or another when_infeasible ("fastest", "best_effort")'
            )

    def _rehearse(self, answers: int) -> float:
        """Check that the features fit, and warm up with some answers; what they took beside the model, in ms."""
        overview = self.vlm.encode_overview(blank := Image.new("RGB", _BLANK))
        try:
            self.network.inputs(overview.feature, self.vlm.question_feature("what"))
        except InputError as error:
            raise CheckpointError(
                f"the controller does not fit the model {self.vlm.name}: {error}. Train one on its profiles."
            ) from error
        if not answers:
            return 0.0
        for setting in (self.settings[k] for k in np.flatnonzero(self.known)[[0, -1]]):
            self.vlm.generate(blank, "what", setting, max_new_tokens=2, overview=overview)
        decide.wait_for_compiled(_LOADING_S)
        guard, self.guard = self.guard, self.guard.copy()  # the rehearsal is not to be learnt from
        try:
            made = [self.generate(blank, "what", budget_ms=AMPLE_MS, max_new_tokens=2) for _ in range(answers)]
        finally:
            self.guard = guard
        return statistics.median(one.latency_ms - sum(one.stages_ms[stage] for stage in STAGES) for one in made)


def _images(image: Image.Image | None, question: str | Conversation) -> Sequence[Image.Image]:
    """The images of a request: the one beside a question, or those of a conversation."""
    return question.images if isinstance(question, Conversation) else (image,) if image is not None else ()
