"""The server in front of engines without HTTP, for programs that ask from Python."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.answer import Answer
from budgetvlm.decide import AnswerOptions, Terms, check_request
from budgetvlm.errors import ConfigError, EngineError, InfeasibleError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.completions import error_of
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.jobs import Job
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.vlm import Conversation, OnText
from budgetvlm.vlm.conversation import Messages, about, read_messages
from budgetvlm.vlm.prompt import IMAGE

T = TypeVar("T")
HEARING_S = 1.0  # that those who still ask have to hear that all is closed
ERRORS: dict[str, type[Exception]] = {
    "invalid_request": InputError,
    **dict.fromkeys(("too_small", "too_late", "expired"), InfeasibleError),
}  # fmt: skip


class Router:
    """Answers requests within their budgets by engines, as `budgetvlm serve --engine` does. Threads share it.

    Requests wait in one queue for a place at an engine; each is answered at the setting that its budget allows, by an
    engine that serves it and is up, and by another one where that fails.

    Args:
        engines: a fleet's file (engines.yaml), or the address of an engine.
        controller: its directory, trained on profiles of these engines.
        options: others of `budgetvlm serve`, such as max_queue or mean_budget_ms.

    Raises:
        BudgetVLMError: the engines or the controller cannot be used.
    """

    def __init__(self, engines: str | Path, controller: str | Path | None = None, **options: Any) -> None:
        given = ServeOptions(engine=str(engines), checkpoint=Path(controller) if controller else None, **options)
        if not given.has_engines:
            raise ConfigError(
                f"engines={str(engines)!r} is no engines.yaml and no address; for a model, use AdaptiveVLM"
            )
        self._jobs, self._loop = Dispatcher(given), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self._thread.start()
        try:
            self._run(self._jobs.start())
        except BaseException:
            self.close()
            raise

    def generate(
        self, image: str | Path | Image.Image | None = None, question: str | None = None, *,
        messages: Messages | None = None, **terms: Unpack[AnswerOptions],
    ) -> Answer:  # fmt: skip
        """Answer a question about an image, or chat messages; arguments as of `AdaptiveVLM.generate`.

        Raises:
            InputError: what is asked cannot be answered; InfeasibleError: not in time, and it is to be refused then.
            EngineError: no engine answered, or this is closed.
        """
        if self._loop.is_closed():
            raise EngineError("this router is closed; make another one")
        kept = Terms(**terms).arrived()
        if messages is None:
            check_request(question, kept)
            conversation = about(open_image(cast(Any, image)), str(question))
        else:
            conversation = read_messages(messages)
            check_request(conversation.question, kept)
        return self._run(self._answer(_job(conversation, kept), kept.on_text))

    async def _answer(self, job: Job, on_text: OnText | None) -> Answer:
        try:
            ticket = self._jobs.submit(job)
        except APIError as error:
            raise _raised(error) from None
        async for event in ticket.events():
            if event.kind == "text" and on_text:
                if await asyncio.to_thread(on_text, event.data["text"]) is False:
                    await ticket.leave()
            elif event.kind == "answer":
                return _read(event.data["answer"])
            elif event.is_last:
                raise _raised(error_of(event))
        raise AssertionError("a job ended without a last event")

    def close(self) -> None:
        """Finish what is under way, and let go of the engines."""
        if not self._loop.is_closed():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        """Close what answers, and let those who still ask hear of it."""
        await self._jobs.close()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=HEARING_S)
        await self._loop.shutdown_default_executor()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _job(conversation: Conversation, terms: Terms) -> Job:
    """Make the job of a request."""
    numbers = itertools.count()
    messages = [
        {**turn, "content": [{**part, "image": next(numbers)} if part == IMAGE else part for part in turn["content"]]}
        for turn in conversation.turns
    ]
    return Job(
        f"request-{uuid.uuid4().hex}", messages, list(conversation.images), terms.arrived_s or time.perf_counter(),
        budget_ms=terms.budget_ms, price=terms.price, max_new_tokens=terms.max_new_tokens, stop=terms.stop_strings,
        when_infeasible=terms.when_infeasible, cut=terms.cut, setting=dict(terms.setting) if terms.setting else None,
        streams=terms.on_text is not None,
    )  # fmt: skip


def _read(answer: dict[str, Any]) -> Answer:
    """Make an answer of its document."""
    known = {name: value for name, value in answer.items() if name in Answer._fields}
    setting, budget_ms = Setting(tuple(answer["setting"].items())), answer["budget_ms"]
    return Answer(**{**known, "setting": setting, "budget_ms": math.inf if budget_ms is None else budget_ms})


def _raised(error: APIError) -> Exception:
    return ERRORS.get(error.code, EngineError)(error.message)
