"""A model as a replica serves it: opened with its controller, asked for answers and previews, and its guard kept."""

from __future__ import annotations

import logging
import math
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from budgetvlm import decide
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.price_curve import load_price_curve
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.controller.versions import standing, version_path
from budgetvlm.decide import Seen, Trial
from budgetvlm.errors import BudgetVLMError
from budgetvlm.runtime import AdaptiveVLM, bundled_controller
from budgetvlm.serving.jobs import question_of
from budgetvlm.serving.kept_requests import identity, told_of
from budgetvlm.serving.learnt_state import LearntState
from budgetvlm.serving.preview import preview
from budgetvlm.serving.shadows import SHADOW
from budgetvlm.serving.toll import Worth

SMALL = (256, 192)  # pixels of an image
LARGE_PRICE = 100.0  # at which a request takes the fastest setting
NO_VERSIONS: Mapping[str, int | None] = MappingProxyType({"serving": None, "candidate": None})
_log = logging.getLogger(__name__)


class _Interrupted(Exception):
    """Somebody came who goes before what is under way."""


class Client(Protocol):
    """The one who waits for a job; ``told``: an event of it already."""

    told: bool

    def say(self, kind: str, **data: Any) -> None:
        """Tell an event."""

    def left(self) -> bool:
        """Whether nobody waits any more."""


class ServedModel:
    """See the module. Threads may share it.

    Attributes:
        model: with its controller and its guard.
        state: where what the guard learns is kept.
        facts: what the server has to know: "fastest_ms", the least that a small request takes, "worth", of time,
            "model", what clients may know of it, and "versions" of the controller.

    Args:
        options: those of `ServeOptions` that a replica is told.

    Raises:
        BudgetVLMError: the model or its controller cannot be opened.
    """

    _explore = 0.0
    _trial: Trial | None = None
    _identity: Mapping[str, str] = MappingProxyType({})  # of the controller, where requests are kept
    _versions: Mapping[str, int | None] = NO_VERSIONS

    def __init__(self, options: Mapping[str, Any]) -> None:
        controller = Path(options["checkpoint"] or bundled_controller(options["model_path"]))
        directory = controller if controller.is_dir() else controller.parent
        self._versions = _known_versions(directory)
        self._curve, self._keeping = load_price_curve(controller), threading.Lock()
        self.state = LearntState(controller, options["state_dir"] and Path(options["state_dir"]))
        self.model = AdaptiveVLM.from_pretrained(
            options["model_path"], controller, guard=self.state.restored(), device=options["device"],
            num_threads=options["num_threads"], allow_other_model=options["allow_other_model"],
            mean_budget_ms=options["mean_budget_ms"],
        )  # fmt: skip
        if options["full_only"]:
            self.model.known[:-1] = False
            self.model.guard.rule = self.model.guard.rule._replace(revises=False, cuts=False, hurries=False)
        self._explore = options["explore"]
        if options["keeps"]:
            self._identity = identity(self.model.controller)
            self._trial = _on_trial(directory, self._versions["candidate"], options["trial"])
        decide.wait_for_compiled()
        self.facts = self.described()

    def save(self) -> None:
        """Keep what the guard has learnt, if that is new."""
        with self._keeping:
            self.state.save(self.model)

    def described(self) -> dict[str, Any]:
        """What `facts` are now."""
        model, bounds = self.model, self.model.bounds(Image.new("RGB", SMALL), "what")
        reference_ms = float(model.controller.latency_reference_ms) * bounds.slowdown
        price = model.spending.price if model.spending else float(model.controller.default_price)
        worth = Worth.of(self._curve, reference_ms, price, model.own_ms)
        known = {"knob_space": model.vlm.knob_space.to_dict(), "fingerprint": model.fingerprint}
        least_ms = float(bounds.bounds_ms.min())
        return {"fastest_ms": least_ms, "worth": asdict(worth), "model": known, "versions": dict(self._versions)}

    def work(self, header: Mapping[str, Any], images: Sequence[Image.Image], client: Client) -> None:
        """Work on a job until its client was told the last event; ``header``: see `Job.header`."""
        try:
            self._work(header, images, client)
        except BudgetVLMError as error:
            client.say("error", message=str(error), type=type(error).__name__)
        except (EOFError, ConnectionError):
            raise
        except Exception:  # what is wrong with one request ends no replica, and clients see no trace
            traceback.print_exc()
            client.say("error", message="the model failed on this request", type="InternalError")
        with self._keeping:
            self.state.answered(self.model)

    def _work(self, header: Mapping[str, Any], images: Sequence[Image.Image], client: Client) -> None:
        if header["kind"] == "preview":
            question = question_of(header["messages"])
            client.say("preview", preview=preview(self.model, images[0], question, header["price"]))
        elif header["kind"] == "rehearsal":
            image = Image.new("RGB", SMALL)
            self.model.generate(image, "what", price=LARGE_PRICE, max_new_tokens=2)
            client.say("rehearsal", **self.described())
        elif header["kind"] == SHADOW:
            self._shadow(header, images, client)
        else:
            client.say("answer", **self._answer(header, images, client), **self.facts)
            self.facts = self.described()  # for the next one, so that this one does not wait for it

    def _shadow(self, header: Mapping[str, Any], images: Sequence[Image.Image], client: Client) -> None:
        """Answer as long as nobody else comes; that is looked for before each part of the model runs."""
        own_thread = threading.get_ident()

        def look(part: Any, given: Any) -> None:
            if threading.get_ident() == own_thread and client.left():
                raise _Interrupted

        watched = register_module_forward_pre_hook(look)
        try:
            client.say("answer", **self._answer(header, images, client))
        except _Interrupted:
            client.say("error", message="somebody came", type="ClientLeft")
        finally:
            watched.remove()

    def _answer(self, header: Mapping[str, Any], images: Sequence[Image.Image], client: Client) -> dict[str, Any]:
        """The answer, and what its decision saw where requests are kept."""
        choices: list[Seen] = []

        def on_text(piece: str) -> bool:
            if piece and header["streams"]:
                client.say("text", text=piece)
            return not client.left()

        setattr(on_text, "left", client.left)  # noqa: B010 (a function has no such attribute of its own)
        answer = self.model.generate(
            messages=_with_images(header["messages"], images),
            budget_ms=header["budget_ms"] or math.inf, price=header["price"], arrived_s=header["arrived_s"],
            max_new_tokens=header["max_new_tokens"], stop=header["stop"],
            when_infeasible=header["when_infeasible"], cut=header["cut"], setting=header["setting"],
            on_text=on_text, explore=self._explore, trial=self._trial,
            on_choice=choices.append if self._identity else None,
        )  # fmt: skip
        if not choices:
            return {"answer": answer.to_dict()}
        seen, features = told_of(choices[0])
        return {"answer": answer.to_dict(), "seen": {**seen, **self._identity}, "features": features}


def _known_versions(directory: Path) -> Mapping[str, int | None]:
    """As `standing`; a description that is damaged is no reason not to serve."""
    try:
        return standing(directory)
    except BudgetVLMError as error:
        _log.warning("the controller's versions cannot be read, and none is on trial: %s", error)
        return NO_VERSIONS


def _on_trial(directory: Path, number: int | None, share: float) -> Trial | None:
    """The candidate of this number, if there is one; one that cannot be opened is no reason not to serve."""
    if number is None or not share:
        return None
    try:
        return Trial(ValueNetwork(load_controller(version_path(directory, number))), share)
    except BudgetVLMError as error:
        _log.warning("version %d is not on trial: %s", number, error)
        return None


def _with_images(messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Put images in the place of their numbers."""

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [{**part, "image": images[part["image"]]} if part["type"] == "image" else part for part in content]

    return [{**message, "content": filled(message["content"])} for message in messages]
