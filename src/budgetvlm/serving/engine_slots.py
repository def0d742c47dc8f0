"""A replica in threads of the server's own process, for a model that engines hold: it answers several jobs at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from PIL import Image

from budgetvlm.engines.engine_model import EngineVLM
from budgetvlm.engines.router import EngineRouter
from budgetvlm.errors import BudgetVLMError, ConfigError, EngineError, InputError
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.replicas import GONE, LEFT, Health, Replica, ReplicaError
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.served_model import Client, ServedModel

AGAIN_S = 0.05  # between two tries of a request
PATIENCE_S = 10.0  # in which a request without a budget is tried
SAVE_S = 1.0  # between two looks at whether what was learnt is to be saved
_log = logging.getLogger(__name__)


class _Work:
    """A job under way in a thread; what the thread says comes out in the loop."""

    told = False

    def __init__(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), False
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def say(self, kind: str, **data: Any) -> None:
        """Tell an event; called by the thread."""
        self.told = True
        self._loop.call_soon_threadsafe(self.events.put_nowait, Event(kind, data))

    def left(self) -> bool:
        """Whether nobody waits any more; called by the thread."""
        return self._stopped

    def stop(self, *, told: Event | None = None) -> None:
        """Let the thread end soon; ``told``: without waiting for what it says."""
        self._stopped = True
        if told:
            self.events.put_nowait(told)


class ServedEngines(ServedModel):
    """A served model that engines hold: what one fails to answer another does, or another setting, if there is time.

    Attributes:
        router: picks the engines.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._attach()

    def _attach(self) -> None:
        model = self.model
        self.router: EngineRouter = cast(EngineVLM, model.vlm).router
        self.router.patience_s = 0.0
        self._known = model.known, model.known_of_text
        self.follow()

    def follow(self) -> None:
        """Choose among the settings of engines that are up, as long as there are any."""
        up = np.array([self.router.is_up(setting) for setting in self.model.settings])
        known, of_text = (each & up if (each & up).any() else each for each in self._known)
        self.model.known, self.model.known_of_text = known, of_text

    def _answer(self, header: Mapping[str, Any], images: Sequence[Image.Image], client: Client) -> dict[str, Any]:
        began_s = time.perf_counter()
        end_s = header["arrived_s"] + header["budget_ms"] / 1e3 if header["budget_ms"] else began_s + PATIENCE_S
        logged: set[type[Exception]] = set()  # a try every 50 ms would fill the log while no engine is up
        while True:
            try:
                return super()._answer(header, images, client)
            except (EngineError, ConfigError) as error:
                if type(error) not in logged:
                    _log.warning("a request failed at an engine: %s", error)
                logged.add(type(error))
                if client.told or client.left() or time.perf_counter() + AGAIN_S > end_s:
                    raise EngineError("the engines failed on this request; ask again") from None
            except InputError as error:
                raise InputError(self._without_addresses(str(error))) from None
            time.sleep(AGAIN_S)
            self.follow()

    def _without_addresses(self, text: str) -> str:
        """Clients need not know where engines are."""
        for endpoint in self.router.endpoints:
            text = text.replace(f"the engine at {endpoint.client.spec.url}", "the engine")
        return text


class EngineSlots(Replica):
    """See the module. Its slots are the requests that all engines together take at once."""

    def __init__(self, options: ServeOptions) -> None:
        super().__init__(options)
        self._under_way: dict[str, tuple[_Work, asyncio.Future[None]]] = {}
        self._changed, self._ended = asyncio.Event(), False

    async def start(self) -> None:
        """Open the model's sketch, its controller and the connections to its engines. Raises ReplicaError."""
        try:
            self._served = await asyncio.to_thread(self._open)
        except BudgetVLMError as error:
            raise ReplicaError(str(error)) from None
        self.facts, self._router = self._served.facts, self._served.router
        self.slots = self._router.slots
        self._threads = ThreadPoolExecutor(self.slots, "engine-slot")
        loop = asyncio.get_running_loop()
        self._router.watch(lambda: self._follow(loop))
        self._saving = asyncio.create_task(self._save())

    def _open(self) -> ServedEngines:
        return ServedEngines(self._options.for_replicas())

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take note of an engine that is down or back; called by the thread that found out."""
        self._served.follow()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._changed.set)

    @property
    def alive(self) -> bool:
        """Whether it was not closed; engines may come back."""
        return not self._ended

    @property
    def capacity(self) -> int:
        """Requests that the engines which answer take at once."""
        return self._router.capacity if self.alive else 0

    def health(self) -> list[Health]:
        """How each engine is."""
        return [Health(one.name, one.healthy, one.in_flight, one.failures) for one in self._router.endpoints]

    async def _events(self, job: Job) -> AsyncIterator[Event]:
        if job.left:
            yield LEFT
            return
        work, loop = _Work(), asyncio.get_running_loop()
        done = loop.run_in_executor(self._threads, self._served.work, job.header(), job.images, work)
        self._under_way[job.id] = work, done
        done.add_done_callback(lambda _: self._under_way.pop(job.id))
        event = await work.events.get()
        while not event.is_last:
            yield event
            event = await work.events.get()
        yield event

    async def stop_job(self, job: Job) -> None:
        """Tell the job's thread that nobody waits for it any more."""
        if job.id in self._under_way:
            self._under_way[job.id][0].stop()

    async def changed(self) -> bool:
        """Wait until other engines answer than before; False: it was closed."""
        await self._changed.wait()
        self._changed.clear()
        return self.alive

    async def close(self, grace_s: float | None = None) -> None:
        """End it once its jobs are done, or after a while, and keep what was learnt."""
        if jobs := [done for _, done in self._under_way.values()]:
            await asyncio.wait(jobs, timeout=grace_s)
        self._ended = True
        self._changed.set()
        for work, _ in self._under_way.values():
            work.stop(told=GONE)
        self._saving.cancel()
        await asyncio.to_thread(self._router.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._served.save)

    async def _save(self) -> None:
        """Keep what was learnt also when nobody asks any more."""
        while True:
            await asyncio.sleep(SAVE_S)
            if self._served.state.due_s() == 0:
                await asyncio.to_thread(self._served.save)
