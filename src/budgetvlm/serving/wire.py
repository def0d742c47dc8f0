"""Messages between the server and its replicas: a header in JSON and some bytes behind it, such as pixels.

A message is the header's length and the header, which says in "lengths" how long each block of bytes behind it is.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("!I")
Message = tuple[dict[str, Any], list[bytes]]


def packed(header: dict[str, Any], blocks: Sequence[bytes] = ()) -> list[bytes]:
    """Return the parts of a message in order."""
    text = json.dumps({**header, "lengths": [len(block) for block in blocks]}).encode()
    return [_LENGTH.pack(len(text)) + text, *blocks]


async def read(reader: asyncio.StreamReader) -> Message:
    """Read one message. Raises EOFError: the other side is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    header = json.loads(await reader.readexactly(length))
    return header, [await reader.readexactly(size) for size in header.pop("lengths")]


def send(connection: socket.socket, header: dict[str, Any], blocks: Sequence[bytes] = ()) -> None:
    """Write one message. Raises OSError: the other side is gone."""
    connection.sendall(b"".join(packed(header, blocks)))


def receive(connection: socket.socket) -> Message:
    """Wait for one message. Raises EOFError: the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    header = json.loads(_exactly(connection, length))
    return header, [_exactly(connection, size) for size in header.pop("lengths")]


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = connection.recv_into(view[done:])
        if not got:
            raise EOFError("the other side is gone")
        done += got
    return bytes(data)
