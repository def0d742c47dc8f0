"""One engine over HTTP: what it serves, chat completions as streams, how much it has to do."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from budgetvlm import _extras
from budgetvlm._io import shortened
from budgetvlm.engines.dialects import TRUST_FLAG, Dialect
from budgetvlm.engines.fleet_file import ReplicaSpec
from budgetvlm.engines.limit import Limit, cut
from budgetvlm.errors import ConfigError, EngineDownError, EngineError, EngineFailedError, InputError
from budgetvlm.vlm import OnText

_extras.require("httpx2", "engines", "engine over HTTP")
import httpx2 as httpx  # noqa: E402 (what is missing is named first)

CHECKING_S, CONNECTING_S, SILENT_S = 2.0, 5.0, 300.0  # without a deadline, how long an engine may say nothing
LEAST_S = 1e-3  # of a timeout
KEPT_S = 4.0  # that an idle connection is kept: uvicorn, under most engines, closes it after 5
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@dataclass
class Reply:
    """What an engine said.

    Attributes:
        text: all of it, or what there was when it was ended.
        finish_reason: the engine's own, or "budget" and "stopped" as `budgetvlm.vlm.Generation` has them.
        usage: its counts of tokens; None: it told none.
        first_s: when the first of its text was there, on the clock of `time.perf_counter`; NaN: none was.
        stop_reason: the stop string that ended it; None: none did, as vLLM says.
        more: fields of the last event that are not OpenAI's.
    """

    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] | None = None
    first_s: float = math.nan
    stop_reason: Any = "not told"
    more: dict[str, Any] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any]) -> str:
        """Take one event of the stream, or the one document without; returns the text that it adds."""
        self.usage = dict(event.get("usage") or ()) or self.usage
        self.more |= {name: event[name] for name in ("metrics", "budgetvlm") if event.get(name)}
        choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        piece = str((choice.get("delta") or choice.get("message") or {}).get("content") or "")
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.stop_reason = choice.get("stop_reason", self.stop_reason)
        if math.isnan(self.first_s) and (piece or self.finish_reason):
            self.first_s = time.perf_counter()
        self.text += piece
        return piece


class EngineClient:
    """Speaks to one engine. Threads may share it; connections are kept and used again."""

    def __init__(self, spec: ReplicaSpec) -> None:
        key, local = spec.api_key(), urlsplit(spec.url).hostname in LOOPBACK
        self.spec, self._streams = spec, set[socket.socket]()
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_keepalive_connections=spec.concurrency, keepalive_expiry=KEPT_S),
            verify=spec.url.startswith("https"),  # reading all certificates takes a tenth of a second
            trust_env=not local,  # a proxy of the environment is for other machines
        )

    def close(self) -> None:
        """Break off what is under way and close its connections."""
        self.break_off()
        self._http.close()

    def break_off(self) -> None:
        """End all answers that are under way, as if the engine had."""
        for connection in tuple(self._streams):
            cut(connection)

    def check(self, health: str) -> bool:
        """Ask whether it is well; False: it says nothing for a while. Raises EngineDownError: it is not.

        Args:
            health: see `Dialect`.
        """
        root = self.spec.url.rpartition("/")[0] if health.startswith("/") else f"{self.spec.url}/"
        with self._failures():
            try:
                response = self._http.get(root + health, timeout=CHECKING_S)
            except httpx.TimeoutException:
                return False
            if response.status_code >= 500:
                raise self._refusal(response.status_code, response.text, {})
        return True

    def models(self) -> list[dict[str, Any]]:
        """Return what it serves. Raises EngineError: no engine is there, or it says nothing of the kind."""
        with self._failures():
            response = self._http.get(f"{self.spec.url}/models", timeout=CONNECTING_S)
            self._require_ok(response, {})
            found = response.json()
        models = found.get("data") if isinstance(found, dict) else None
        if not isinstance(models, list) or not all(isinstance(one, dict) and "id" in one for one in models):
            raise EngineError(f"{self.spec.url}/models lists no models ({found!r:.80}); is this an engine's address?")
        return models

    def load(self, dialect: Dialect) -> tuple[float, ...]:
        """Return how many requests it says that run and that wait; empty where it says nothing."""
        found: dict[str, float] = {}
        if dialect.load_metrics:
            with self._failures():
                text = self._http.get(f"{self.spec.url.rpartition('/')[0]}/metrics", timeout=CONNECTING_S).text
            for line in text.splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if name in dialect.load_metrics:
                    value, *_ = line.removeprefix(name).rpartition("}")[2].split()  # a timestamp may follow
                    found[name] = found.get(name, 0.0) + float(value)
        return tuple(found.values())

    def chat(
        self, body: Mapping[str, Any], *, end_s: float = math.inf, on_text: OnText | None = None,
        left: Callable[[], bool] | None = None, stream: bool = True,
    ) -> Reply:  # fmt: skip
        """Have a chat completed.

        Args:
            end_s: when to break it off, on the clock of `time.perf_counter`; the engine then stops working on it.
            on_text: called with each piece of text; False breaks it off.
            left: asked now and then by another thread whether nobody waits any more, which breaks it off, too.
            stream: as text comes; False: at once, which costs both sides less.

        Raises:
            InputError: the engine refuses the request as its author's fault.
            ConfigError: it refuses the model's name, the key, or options of the image processor.
            EngineDownError: it cannot be reached, failed, or broke off.
        """
        limit = Limit(end_s, left)
        reply, how = Reply(), {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        left_s = SILENT_S if math.isinf(end_s) else max(end_s - time.perf_counter(), LEAST_S)
        request = self._http.build_request(
            "POST", f"{self.spec.url}/chat/completions", content=json.dumps({**body, **how}).encode(),
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(left_s, connect=min(left_s, CONNECTING_S)),
        )  # fmt: skip
        try:
            with closing(self._pieces(request, limit, body, reply, stream)) as pieces:
                for piece in pieces:
                    if time.perf_counter() >= end_s and not reply.finish_reason:
                        reply.finish_reason = "budget"
                        break
                    if piece and on_text is not None and on_text(piece) is False:
                        reply.finish_reason = "stopped"
                        break
        except EngineDownError:
            if not (ended := limit.reached()):
                raise
            reply.finish_reason = reply.finish_reason or ended
        if not reply.finish_reason:
            raise EngineDownError(f"the engine at {self.spec.url} broke off in the middle of an answer")
        return reply

    def _pieces(
        self, request: Any, limit: Limit, body: Mapping[str, Any], reply: Reply, stream: bool
    ) -> Generator[str, None, None]:
        """Send a request and yield the text that each event adds; what goes wrong with whom it is given is not ours."""
        with self._failures(), self._sent(request, limit) as (response, said):
            self._require_ok(response, body)
            for event in events(said) if stream else [json.loads(b"".join(said))]:
                self._require_no_error(event, body)
                yield reply.take(event)

    @contextmanager
    def _sent(self, request: Any, limit: Limit) -> Iterator[Any]:
        """Send a request; its connection is cut at its limit, whatever is being waited for.

        Yields the response and the pieces of its body. The end of these is read once nothing cuts the connection any
        more, because it is another request's from then on.
        """
        response = self._http.send(request, stream=True)
        connection = response.extensions["network_stream"].get_extra_info("socket")
        self._streams.add(connection)
        try:
            pieces = response.iter_bytes()
            with limit.cutting(connection):
                yield response, pieces
            self._streams.discard(connection)
            if not limit.has_cut:
                next(pieces, None)
        finally:
            self._streams.discard(connection)
            response.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what goes wrong between here and the engine into EngineDownError."""
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError, ValueError, OSError, AttributeError, TypeError) as error:
            if isinstance(error, EngineError | InputError | ConfigError):
                raise
            what = "there is no engine at" if isinstance(error, httpx.ConnectError) else "cannot speak to the engine at"
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            said = f"it says what no engine says ({said})" if isinstance(error, AttributeError | TypeError) else said
            raise EngineDownError(f"{what} {self.spec.url}: {said}. Is it running, and is that its address?") from None
        except RuntimeError:
            if not self._http.is_closed:
                raise
            raise EngineDownError(f"the connections to the engine at {self.spec.url} were closed meanwhile") from None

    def _require_ok(self, response: Any, body: Mapping[str, Any]) -> None:
        """Raise what an answer with another status than 200 means."""
        if response.status_code == 200:
            return
        with suppress(httpx.HTTPError):
            response.read()
        said = response.text if response.is_closed else ""
        with suppress(ValueError, AttributeError, TypeError):
            document = json.loads(said)
            said = document["error"]["message"] if "error" in document else document["message"]
        raise self._refusal(response.status_code, str(said), body)

    def _require_no_error(self, event: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        if error := event.get("error"):
            error = error if isinstance(error, dict) else {"message": str(error)}
            code = error.get("code")
            raise self._refusal(code if isinstance(code, int) else 500, str(error.get("message")), body)

    def _refusal(self, status: int, said: str, body: Mapping[str, Any]) -> Exception:
        where, said = f"the engine at {self.spec.url}", shortened(" ".join(said.split()), 300)
        if ("mm_processor_kwargs" in body and "mm_processor_kwargs" in said) or TRUST_FLAG in said:
            return ConfigError(
                f"{where} takes no options of the image processor with a request ({said}). Start vLLM with "
                f"{TRUST_FLAG}, or steer by pixels or not at all (steer: in the fleet's file)"
            )
        if status in (401, 403):
            return ConfigError(f"{where} wants another key ({status}: {said}); name its variable: api_key_env")
        if status == 404 and "model" not in body:
            return ConfigError(
                f"{self.spec.url}/models does not exist, so no engine with OpenAI's API is there; give its address up "
                "to the version, such as http://127.0.0.1:8000/v1"
            )
        if status == 404:
            return ConfigError(f"{where} does not know the model {body.get('model')!r} ({said}); give its name: model")
        if status < 500 and status not in (408, 429):
            return InputError(f"{where} refuses the request ({status}: {said})")
        return EngineFailedError(f"{where} failed ({status}: {said})")


def events(pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the documents of a stream of server-sent events. Lines end at newlines alone: text may hold U+2028."""
    held = b""
    for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                yield json.loads(data)
