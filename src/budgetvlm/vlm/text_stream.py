"""The text of an answer as its tokens come: in whole characters, up to a stop string; and who reads it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Generic, Literal, TypeVar

from budgetvlm.vlm.protocol import OnText

T = TypeVar("T")
_HALF = "\ufffd"  # what a tokenizer writes for a character of which some bytes are still to come


class TextStream:
    """Takes the tokens of one answer and hands its text on; the pieces joined are the answer's text.

    Blank space around the whole text is left out. What may become a stop string, or is half a character, waits.

    Attributes:
        text: what was handed on so far.
        ended: "stop": at a stop string. "stopped": by who reads it. None: not yet.

    Args:
        decode: tokens to text, without special ones; tokens are ids, or pieces of text as an engine sends them.
        stop: strings that end the answer and are no part of it.
        on_text: see `budgetvlm.vlm.protocol.OnText`.
    """

    def __init__(
        self, decode: Callable[[Sequence[Any]], str], stop: Sequence[str] = (), on_text: OnText | None = None
    ) -> None:
        self._decode, self._stop, self._on_text = decode, stop, on_text
        self._begin = self._read = 0
        self._held = ""  # decoded, and not handed on
        self.text = ""
        self.ended: Literal["stop", "stopped"] | None = None

    def __call__(self, ids: Sequence[Any]) -> bool:
        """Take all tokens so far, of which the last one is new; whether the answer goes on."""
        new = self._new_text(ids)
        if new.endswith(_HALF):
            new = ""
        elif new:
            self._begin, self._read = self._read, len(ids)
        self._take(new)
        goes_on = self._hand_on(len(self._held) - (0 if self.ended else self._may_become_stop()))
        if not goes_on:
            self.ended = self.ended or "stopped"
        return self.ended is None

    def finish(self, ids: Sequence[Any]) -> str:
        """Hand on what waits, once all tokens are there; returns the whole text."""
        if self.ended is None:
            self._take(self._new_text(ids))
            if self._held.strip():
                self._hand_on(len(self._held))
        return self.text

    def _new_text(self, ids: Sequence[Any]) -> str:
        """Return what the tokens since the last whole character add.

        Some tokenizers drop the blank in front of a text's first word, so it is decoded behind the text before it, and
        without.
        """
        before = self._decode(ids[self._begin : self._read])
        return self._decode(ids[self._begin :])[len(before) :]

    def _take(self, new: str) -> None:
        """Add text to what is held, and end at the first stop string in it."""
        self._held += new
        places = [place for one in self._stop if (place := self._held.find(one)) >= 0]
        if places:
            self._held, self.ended = self._held[: min(places)], "stop"

    def _may_become_stop(self) -> int:
        """Return how many of the last characters that are held may be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        ends = (n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop))
        return next(ends, 0)

    def _hand_on(self, size: int) -> bool:
        """Hand on this many characters of those that are held, but blank space at the end; whether more is wanted."""
        ready = self._held[:size].rstrip()
        self._held = self._held[len(ready) :]
        piece = ready if self.text else ready.lstrip()
        self.text += piece
        return self._on_text is None or self._on_text(piece) is not False


class Pieces(Generic[T]):
    """Pieces of a text while it is written by a thread of its own, which waits for nobody who reads them.

    Args:
        write: given what to call with each piece (`OnText`), returns what is left when all is written.
    """

    def __init__(self, write: Callable[[OnText], T]) -> None:
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._closed = Event()
        self._written: Future[T] = Future()
        queue, closed, written = self._queue, self._closed, self._written  # not this object, so that it can be dropped

        def on_text(piece: str) -> bool:
            if piece:
                queue.put(piece)
            return not closed.is_set()

        def run() -> None:
            try:
                written.set_result(write(on_text))
            except BaseException as error:  # raised where the pieces are read
                written.set_exception(error)
            queue.put(None)

        Thread(target=run, daemon=True).start()

    def __iter__(self) -> Pieces[T]:
        return self

    def __next__(self) -> str:
        piece = self._queue.get()
        if piece is None:
            self._queue.put(None)
            self._written.result()
            raise StopIteration
        return piece

    @property
    def answer(self) -> T:
        """What is left when all is written; waits for it. Raises what the writer raised."""
        return self._written.result()

    def close(self) -> None:
        """End the writing after the piece that is under way."""
        self._closed.set()

    def __enter__(self) -> Pieces[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close
