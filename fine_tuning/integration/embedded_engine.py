"""llama.cpp inside the app: one engine a model, shared by everybody who chats, ended with the app.

with shared_engines.use(gguf, context=2048, threads=1, slots=2, timeout=120) as engine:
    ...
"""

import atexit
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fine_tuning.common.records import stamp
from fine_tuning.runtime.llama_engine import LlamaEngine

# A file that was replaced (a promotion, a new `dvc repro`) is another model.
Key = tuple[tuple[Path, tuple[int, int, int] | None], ...]


@dataclass
class _Shared:
    engine: LlamaEngine
    users: int = 0


class SharedEngines:
    """Running engines by model file and adapters.

    Args:
        limit: engines kept running. One more is started where all are answering, and the idle one that was used
            longest ago is ended, which frees its memory: the engine is a process of its own.
    """

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self._engines: OrderedDict[Key, _Shared] = OrderedDict()
        self._lock = threading.Lock()
        atexit.register(self.close)

    @contextmanager
    def use(
        self, gguf: Path, *, context: int, threads: int, slots: int, timeout: float, adapters: Sequence[Path] = ()
    ) -> Iterator[LlamaEngine]:
        """The running engine of `gguf`, started where there is none. It is not ended while somebody is in the block.
        Raises UserError if the file is missing or cannot be loaded."""
        with self._lock:
            shared = self._running(LlamaEngine(gguf, context, threads, slots, timeout, adapters))
            shared.users += 1
        try:
            yield shared.engine
        finally:
            with self._lock:
                shared.users -= 1
                self._end_idle()

    def close(self) -> None:
        with self._lock:
            for shared in self._engines.values():
                shared.engine.close()
            self._engines.clear()

    def _running(self, engine: LlamaEngine) -> _Shared:
        key = tuple((path.resolve(), stamp(path)) for path in (engine.gguf, *engine.adapters))
        shared = self._engines.get(key)
        if shared is not None and not shared.engine.alive:
            self._engines.pop(key).engine.close()
            shared = None
        if shared is None:
            shared = _Shared(engine.start())
            self._engines[key] = shared
        self._engines.move_to_end(key)
        self._end_idle()
        return shared

    def _end_idle(self) -> None:
        newest = next(reversed(self._engines), None)
        for key in list(self._engines):
            if len(self._engines) <= self.limit:
                return
            if self._engines[key].users == 0 and key != newest:
                self._engines.pop(key).engine.close()


shared_engines = SharedEngines()
