"""Runs the server: its address, what signals do, and what is finished before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from budgetvlm._io import require_writable
from budgetvlm.errors import ConfigError
from budgetvlm.serving.app import make_app
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.gate import Gate
from budgetvlm.serving.replicas import ReplicaError
from budgetvlm.serving.serve_options import ServeOptions

STOPPING = (signal.SIGTERM, signal.SIGINT)


class _Server(uvicorn.Server):
    """One that leaves signals to us: its own way to handle them drops requests and ends by the signal."""

    playground, kept = False, ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        address = url(*self.servers[0].sockets[0].getsockname()[:2])
        page = f"playground at {address}/playground/\n" if self.playground else ""
        print(f"{self.kept}{page}serving at {address}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def url(host: str, port: int) -> str:
    """Write an address; one of IPv6 has its colons in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(options: ServeOptions) -> None:
    """Serve until a signal ends it. Raises ConfigError, OutputError, ReplicaError: it cannot start."""
    if options.state_dir:
        require_writable(Path(options.state_dir), "--state_dir")
    with _listening(options) as listener, contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_serve(options, listener))


def _listening(options: ServeOptions) -> socket.socket:
    """Take the address before a model is opened. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # asyncio sends at once what is written to a socket that says it is TCP; others may hold an answer back for 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"host={options.host!r}, port={options.port} cannot be listened on: {error}. Give another --host or --port"
        ) from None
    return listener


async def _serve(options: ServeOptions, listener: socket.socket) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in STOPPING:
        loop.add_signal_handler(number, task.cancel)  # nothing was accepted yet
    jobs = Dispatcher(options)
    app = make_app(options, jobs)
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=1)
    server = _Server(config)
    _reload_at_hangup(loop, jobs)  # already now, because a signal that nobody handles ends the process
    server.playground = options.playground
    if options.log_requests:
        shares = [f"{name} {getattr(options, name):.1%}" for name in ("explore", "shadow", "trial")]
        server.kept = f"requests are kept in {options.log_requests}; {', '.join(shares)} of them\n"
    try:
        await jobs.start()
        _handle_signals(loop, server, jobs, app.state.gate, options.grace_s)
        await server.serve(sockets=[listener])
    finally:
        await jobs.close()


def _handle_signals(
    loop: asyncio.AbstractEventLoop, server: _Server, jobs: Dispatcher, gate: Gate, grace_s: float
) -> None:
    """SIGTERM and SIGINT finish what was accepted, a second one ends at once."""
    running: set[asyncio.Task[None]] = set()

    async def drain() -> None:
        await gate.drain(grace_s)
        server.should_exit = True

    def stop() -> None:
        if gate.draining:
            server.should_exit = server.force_exit = True
        else:
            running.add(loop.create_task(drain()))

    for number in STOPPING:
        loop.add_signal_handler(number, stop)


def _reload_at_hangup(loop: asyncio.AbstractEventLoop, jobs: Dispatcher) -> None:
    """SIGHUP reads the controller anew."""
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        with contextlib.suppress(ReplicaError):  # it is in the log
            await jobs.reload()

    loop.add_signal_handler(signal.SIGHUP, lambda: running.add(loop.create_task(reload())))
