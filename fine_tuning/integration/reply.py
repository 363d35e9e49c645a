"""A reply that a model writes in the background, so that a page can show it, stop it, or be closed meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from fine_tuning.common.errors import UserError

State = Literal["writing", "complete", "stopped", "failed"]


class Reply:
    """One reply: the text so far, how it ended, how fast it came.

    The stream is read by a thread of its own. `stop` returns at once, even when the server hangs: what arrived is
    kept, what still arrives is dropped, and the stream is closed (which tells the server to stop) as soon as it yields.

    Args:
        stream: makes the iterator of text pieces; called in the thread.
        on_end: called once with the reply, in whichever thread ends it, before `state` says so: the place to log it.
            `outcome` tells how it ended.
    """

    def __init__(self, stream: Callable[[], Iterator[str]], on_end: Callable[["Reply"], None] | None = None) -> None:
        self.text = ""
        self.state: State = "writing"
        self.outcome: State | None = None
        self.error: str | None = None
        self.failure: Exception | None = None
        self.pieces = 0
        self.started = time.monotonic()
        self.first_piece: float | None = None
        self.ended: float | None = None
        self._on_end = on_end
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True, name="reply")
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self.state == "writing"

    @property
    def seconds(self) -> float:
        """Seconds since the question was sent, up to the end of the reply."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Pieces a second since the first one; the engines send one piece a token. None before the second piece."""
        if self.first_piece is None or self.pieces < 2:
            return None
        return (self.pieces - 1) / max((self.ended or time.monotonic()) - self.first_piece, 1e-9)

    def stop(self) -> None:
        self._end("stopped")

    def _read(self, stream: Callable[[], Iterator[str]]) -> None:
        pieces: Iterator[str] | None = None
        try:
            pieces = stream()
            for piece in pieces:
                with self._lock:
                    if self.outcome is not None:
                        return
                    if self.first_piece is None:
                        self.first_piece = time.monotonic()
                    self.text += piece
                    self.pieces += 1
            self._end("complete")
        except UserError as error:
            self.failure = error
            self._end("failed", str(error))
        except Exception as error:
            self.failure = error
            self._end("failed", f"the reply failed ({type(error).__name__}): try again, or choose another model")
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def _end(self, outcome: State, error: str | None = None) -> None:
        with self._lock:
            if self.outcome is not None:
                return
            self.outcome = outcome
            self.error = error
            self.ended = time.monotonic()
        try:
            if self._on_end is not None:
                self._on_end(self)
        finally:
            self.state = outcome
