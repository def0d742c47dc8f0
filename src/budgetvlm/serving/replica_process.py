"""The process that holds a model: it answers one job at a time, and says each piece of text as it comes.

    python -m budgetvlm.serving.replica_process FD

FD is its end of a socket pair. It ends when the server is gone.
"""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from budgetvlm.errors import BudgetVLMError, warnings_as_notes
from budgetvlm.serving import wire
from budgetvlm.serving.toll import Worth

SMALL = (256, 192)  # pixels of an image
LARGE_PRICE = 100.0  # at which a request takes the fastest setting


class ReplicaProcess:
    """Serves the jobs that come over a socket, with the model that the first message names."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._closing = connection, False

    def run(self) -> None:
        """Open the model and answer until the server closes the connection."""
        options, _ = wire.receive(self._connection)
        try:
            self._open(options)
        except BudgetVLMError as error:
            self._say("failed", None, message=str(error))
            return
        self._facts = self._described()
        self._say("ready", None, **self._facts)
        try:
            self._serve_all()
        finally:
            self._state.save(self.model)

    def _serve_all(self) -> None:
        while not self._closing:
            if not select.select([self._connection], [], [], self._state.due_s())[0]:
                self._state.save(self.model)
                continue
            header, blocks = wire.receive(self._connection)
            if header["kind"] == "close":
                return
            if header["kind"] != "stop":  # one that is too late: its job is done
                self._serve(header, blocks)
                self._state.answered(self.model)

    def _open(self, options: dict[str, Any]) -> None:
        from budgetvlm import decide
        from budgetvlm.controller.price_curve import load_price_curve
        from budgetvlm.runtime import AdaptiveVLM, bundled_controller
        from budgetvlm.serving.learnt_state import LearntState

        controller = Path(options["checkpoint"] or bundled_controller(options["model_path"]))
        self._curve = load_price_curve(controller)
        self._state = LearntState(controller, options["state_dir"] and Path(options["state_dir"]))
        self.model = AdaptiveVLM.from_pretrained(
            options["model_path"], controller, guard=self._state.restored(), device=options["device"],
            num_threads=options["num_threads"], allow_other_model=options["allow_other_model"],
            mean_budget_ms=options["mean_budget_ms"],
        )  # fmt: skip
        if options["full_only"]:
            self.model.known[:-1] = False
            self.model.guard.rule = self.model.guard.rule._replace(revises=False, cuts=False, hurries=False)
        decide.wait_for_compiled()

    def _described(self) -> dict[str, Any]:
        """What the server has to know: what a small request takes at least, what time is worth, which model it is."""
        model, bounds = self.model, self.model.bounds(Image.new("RGB", SMALL), "what")
        reference_ms = float(model.controller.latency_reference_ms) * bounds.slowdown
        price = model.spending.price if model.spending else float(model.controller.default_price)
        worth = Worth.of(self._curve, reference_ms, price, model.own_ms)
        known = {"knob_space": model.vlm.knob_space.to_dict(), "fingerprint": model.fingerprint}
        return {"fastest_ms": float(bounds.bounds_ms.min()), "worth": asdict(worth), "model": known}

    def _serve(self, header: dict[str, Any], blocks: list[bytes]) -> None:
        job = header["id"]
        try:
            if header["kind"] == "preview":
                self._say("preview", job, preview=self._preview(header, blocks))
            elif header["kind"] == "rehearsal":
                image, budget_ms = Image.new("RGB", SMALL), math.inf
                self.model.generate(image, "what", budget_ms=budget_ms, price=LARGE_PRICE, max_new_tokens=2)
                self._say("rehearsal", job, **self._described())
            else:
                self._say("answer", job, answer=self._answer(header, blocks), **self._facts)
                self._facts = self._described()  # for the next one, so that this one does not wait for it
        except BudgetVLMError as error:
            self._say("error", job, message=str(error), type=type(error).__name__)
        except (EOFError, BrokenPipeError, ConnectionError):
            raise
        except Exception:  # what is wrong with one request ends no replica, and clients see no trace
            traceback.print_exc()
            self._say("error", job, message="the model failed on this request", type="InternalError")

    def _answer(self, header: dict[str, Any], blocks: list[bytes]) -> dict[str, Any]:
        job = header["id"]

        def on_text(piece: str) -> bool:
            if piece and header["streams"]:
                self._say("text", job, text=piece)
            return not self._stopped(job)

        answer = self.model.generate(
            messages=_with_images(header["messages"], _images(header, blocks)),
            budget_ms=header["budget_ms"] or math.inf, price=header["price"], arrived_s=header["arrived_s"],
            max_new_tokens=header["max_new_tokens"], stop=header["stop"],
            when_infeasible=header["when_infeasible"], cut=header["cut"], setting=header["setting"],
            on_text=on_text,
        )  # fmt: skip
        return answer.to_dict()

    def _preview(self, header: dict[str, Any], blocks: list[bytes]) -> dict[str, Any]:
        from budgetvlm.serving.preview import preview

        last = header["messages"][-1]["content"]
        question = last if isinstance(last, str) else next((one["text"] for one in last if one["type"] == "text"), "")
        return preview(self.model, _images(header, blocks)[0], question, header["price"])

    def _stopped(self, job: str) -> bool:
        """Whether the server says that nobody waits for this job any more."""
        while select.select([self._connection], [], [], 0)[0]:
            header, _ = wire.receive(self._connection)
            self._closing |= header["kind"] == "close"
            if self._closing or (header["kind"] == "stop" and header["id"] == job):
                return True
        return self._closing

    def _say(self, kind: str, job: str | None, **data: Any) -> None:
        wire.send(self._connection, {"kind": kind, "id": job, **data})


def _images(header: dict[str, Any], blocks: list[bytes]) -> list[Image.Image]:
    """The images of a job from their pixels."""
    return [
        Image.frombuffer("RGB", tuple(size), pixels, "raw", "RGB", 0, 1)
        for size, pixels in zip(header["sizes"], blocks, strict=True)
    ]


def _with_images(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """Put images in the place of their numbers."""

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [{**part, "image": images[part["image"]]} if part["type"] == "image" else part for part in content]

    return [{**message, "content": filled(message["content"])} for message in messages]


def main(descriptor: int) -> None:
    """Serve over an inherited socket; signals to the terminal's whole group are the server's to handle."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with warnings_as_notes(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):  # the server is gone
        ReplicaProcess(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
