"""Requests to a server of OpenAI's API at planned moments, whatever became of those before; run by `serving_load.py`.

    python benchmarks/serving_traffic.py PLAN.json

The plan holds "port", "path", "bodies" (JSON texts), "requests" ([[moment in s, number of the body, budget in ms], ..])
and "probe_s", how often /health is asked meanwhile. What came back is printed as JSON. It speaks HTTP by itself: a
client library would take as much time of a core as the server does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

KEPT_S = 3.0  # that an idle connection is used again
LONGEST_S = 60.0  # that an answer is waited for


class Connections:
    """Connections to one port that are kept and used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = deque()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a whole request; returns the status and the body."""
        while self._idle and time.perf_counter() > self._idle[0][2] + KEPT_S:  # the server closes them after a while
            self._idle.popleft()[1].close()
        if self._idle:
            reader, writer, _ = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer, time.perf_counter()))
        return int(head.split(b" ", 2)[1]), body


def post(path: str, body: str, headers: dict[str, Any]) -> bytes:
    """A whole request with a JSON body."""
    data = body.encode()
    lines = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


async def answered(connections: Connections, request: bytes, due_s: float) -> dict[str, Any]:
    """One request and what came of it; its time counts from when it was due."""
    try:
        async with asyncio.timeout(LONGEST_S):
            status, body = await connections.ask(request)
            document = json.loads(body)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        return {"status": 0, "code": type(error).__name__}
    row: dict[str, Any] = {"status": status, "ms": (time.perf_counter() - due_s) * 1e3}
    if status != 200:
        return row | {"code": document["error"]["code"]}
    text, said = document["choices"][0]["message"]["content"], document.get("budgetvlm", {})
    return row | {"text": text, **{name: said.get(name) for name in ("budget_met", "price", "latency_ms")}}


async def probe(port: int, every_s: float) -> list[float]:
    """Ask for the health until cancelled; returns what each took in ms."""
    connections, took = Connections(port), []
    try:
        while True:
            begin = time.perf_counter()
            await connections.ask(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
            took.append((time.perf_counter() - begin) * 1e3)
            await asyncio.sleep(every_s)
    except asyncio.CancelledError:
        return took


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Send everything at its moment."""
    connections, tasks = Connections(plan["port"]), []
    health = asyncio.create_task(probe(plan["port"], plan["probe_s"]))
    await asyncio.sleep(0.1)
    start_s = time.perf_counter()
    for at_s, number, budget_ms in plan["requests"]:
        due_s = start_s + at_s
        headers = {"X-Latency-Budget-Ms": f"{budget_ms:.3f}"} if budget_ms else {}
        request = post(plan["path"], plan["bodies"][number], headers)
        await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(answered(connections, request, due_s)))
    rows = await asyncio.gather(*tasks)
    health.cancel()
    return {"rows": rows, "health_ms": await health}


if __name__ == "__main__":
    gc.disable()  # its pauses would look like the server's
    print(json.dumps(asyncio.run(run(json.loads(Path(sys.argv[1]).read_text("utf-8"))))))
