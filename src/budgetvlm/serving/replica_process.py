"""The process that holds a model: it answers one job at a time, and says each piece of text as it comes.

    python -m budgetvlm.serving.replica_process FD

FD is its end of a socket pair. It ends when the server is gone.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from PIL import Image

from budgetvlm.errors import BudgetVLMError, warnings_as_notes
from budgetvlm.serving import wire

if TYPE_CHECKING:
    from budgetvlm.serving.served_model import ServedModel


class ReplicaProcess:
    """Serves the jobs that come over a socket, with the model that the first message names."""

    told = False

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._closing = connection, False
        self._job: str | None = None

    def run(self) -> None:
        """Open the model and answer until the server closes the connection."""
        options, _ = wire.receive(self._connection)
        try:
            self._served = self._open(options)
        except BudgetVLMError as error:
            self.say("failed", message=str(error))
            return
        self.say("ready", **self._served.facts)
        try:
            self._serve_all()
        finally:
            self._served.save()

    def _open(self, options: dict[str, Any]) -> ServedModel:
        from budgetvlm.serving.served_model import ServedModel  # takes seconds, and signals are to be ignored by then

        return ServedModel(options)

    def _serve_all(self) -> None:
        while not self._closing:
            if not select.select([self._connection], [], [], self._served.state.due_s())[0]:
                self._served.save()
                continue
            header, blocks = wire.receive(self._connection)
            if header["kind"] == "close":
                return
            if header["kind"] != "stop":  # one that is too late: its job is done
                self._job = header["id"]
                self._served.work(header, _images(header, blocks), self)

    def left(self) -> bool:
        """Whether the server says that nobody waits for the job under way any more."""
        while select.select([self._connection], [], [], 0)[0]:
            header, _ = wire.receive(self._connection)
            self._closing |= header["kind"] == "close"
            if self._closing or (header["kind"] == "stop" and header["id"] == self._job):
                return True
        return self._closing

    def say(self, kind: str, **data: Any) -> None:
        """Tell the server an event of the job under way."""
        blocks = data.pop("features", ())  # bytes, which JSON does not take
        wire.send(self._connection, {"kind": kind, "id": self._job, **data}, blocks)


def _images(header: dict[str, Any], blocks: list[bytes]) -> list[Image.Image]:
    """The images of a job from their pixels."""
    return [
        Image.frombuffer("RGB", tuple(size), pixels, "raw", "RGB", 0, 1)
        for size, pixels in zip(header["sizes"], blocks, strict=True)
    ]


def main(descriptor: int) -> None:
    """Serve over an inherited socket; signals to the terminal's whole group are the server's to handle."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with warnings_as_notes(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):  # the server is gone
        ReplicaProcess(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
