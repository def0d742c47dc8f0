"""What is checked before a request is understood: whether it may come in, and its body's size and pace."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from budgetvlm._io import shortened
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.serve_options import KEY_VARIABLE, ServeOptions

OPEN_PATHS = {"/health", "/ready", "/metrics"}
OPEN_FOLDER = "/playground"  # its page; what the page asks for needs the key
ADMIN_FOLDER = "/admin/"
LINGER_S = 2.0  # how long a body that was refused is read on, so that its sender comes to read the answer
POLL_S = 0.01


class ClientGone(Exception):
    """The client left before its body was here."""


class Gate:
    """An ASGI middleware that lets requests in or refuses them.

    Attributes:
        draining: nothing new is let in. open: requests that were let in and are not answered yet. held: bytes of
            their bodies.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options, self._key = options, options.key()
        self.draining, self.open, self.held = False, 0, 0

    def before(self, app: ASGIApp) -> Gate:
        """Put it before an application."""
        self._app = app
        return self

    async def drain(self, grace_s: float) -> None:
        """Let nothing in any more, and wait until all is answered or the time is over."""
        self.draining, end_s = True, time.perf_counter() + grace_s
        while self.open and time.perf_counter() < end_s:
            await asyncio.sleep(POLL_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["arrived_s"] = time.perf_counter()
        try:
            self._check_key(scope)
            if scope["method"] != "POST":  # where GET is answered, HEAD is; the web server leaves the body out
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                await self._app({**scope, "method": method}, receive, send)
                return
            self._check_room(scope)
            with self._counted() as body:
                await self._read(body, scope, receive)
                await self._app(scope, _again(b"".join(body), receive), send)
        except APIError as error:
            await _refuse(error, scope, receive, send)
        except ClientGone:
            scope["visit"].error = "client_left"

    @contextmanager
    def _counted(self) -> Iterator[list[bytes]]:
        """Count a request, and what is put into its list, until it is answered."""
        self.open += 1
        body: list[bytes] = []
        try:
            yield body
        finally:
            self.open -= 1
            self.held -= sum(map(len, body))

    def _check_key(self, scope: Scope) -> None:
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        if path.startswith(ADMIN_FOLDER) and not self._key:
            raise APIError(403, f"this needs a key, and the server has none: start it with --api_key_file or "
                           f"${KEY_VARIABLE}, or send SIGHUP")  # fmt: skip
        if not self._key or (reads and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))):
            return
        given = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(given[2].strip().encode("latin-1"), self._key.encode())
        if given[0].lower() != "bearer" or not right:
            raise APIError(401, "a key is needed: Authorization: Bearer KEY" if not given[2] else "this key is wrong")

    def _check_room(self, scope: Scope) -> None:
        if self.draining:
            raise APIError(503, "the server is shutting down", code="shutting_down", retry_after_s=1)
        if self.open >= self._options.max_open:
            raise _overloaded()
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and kind != "application/json":
            raise APIError(415, f"the body is {kind or 'of no type'}; send Content-Type: application/json")
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise APIError(415, f"the body is encoded as {shortened(coding)!r}; send it as it is")

    async def _read(self, body: list[bytes], scope: Scope, receive: Receive) -> None:
        """Read a body piece by piece within its limits. Raises APIError, ClientGone."""
        most, length = self._options.max_body, Headers(scope=scope).get("content-length", "0")
        if int(length) > most:
            raise _too_large(most)
        size, more = 0, True
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while more:
                    piece, more = _piece(await receive())
                    size += len(piece)
                    if size > most:
                        raise _too_large(most)
                    if self.held + len(piece) > self._options.max_open_mb * 1e6:
                        raise _overloaded()
                    body.append(piece)
                    self.held += len(piece)
        except TimeoutError:
            after_s = self._options.body_timeout_s
            raise APIError(408, f"the body was not here after {after_s:g} s; send it faster or smaller") from None


def _overloaded() -> APIError:
    return APIError(503, "too much is under way; ask again later", code="overloaded", retry_after_s=1)


def _too_large(most: int) -> APIError:
    return APIError(413, f"the body is larger than {most:,} bytes; send fewer or smaller images")


def _piece(message: Message) -> tuple[bytes, bool]:
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body that was read already, then whatever else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


async def _refuse(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close the connection once the client had time to read that."""
    scope["visit"].error = error.code
    response = error.response()
    response.headers["Connection"] = "close"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"

    async def send_slowly(message: Message) -> None:
        if message["type"] != "http.response.body" or error.status == 408:
            await send(message)
            return
        await send({**message, "more_body": True})
        await _read_on(receive)
        await send({"type": "http.response.body", "body": b""})

    await response(scope, receive, send_slowly)


async def _read_on(receive: Receive) -> None:
    """Read the rest of a body and forget it."""
    try:
        async with asyncio.timeout(LINGER_S):
            while _piece(await receive())[1]:
                pass
    except (TimeoutError, ClientGone):
        return
