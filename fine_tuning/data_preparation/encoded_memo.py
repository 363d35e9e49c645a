"""Windows of conversations that were encoded before, so that a newcomer does not make all others be encoded again."""

import json
import marshal
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fine_tuning.common.project import code_sha256, versions


class EncodedMemo:
    """A database of results by what they depend on. A context manager: at its end those that nobody asked for go.

    Whoever finds it in use works with a temporary one; a damaged one is made anew.

    Args:
        settings: what all results depend on, besides the code and the versions of the packages.
    """

    def __init__(self, path: Path, settings: Sequence[Any]) -> None:
        self._common = blake2b(json.dumps([code_sha256("prepare"), versions(), settings]).encode(), digest_size=16)
        self._used = bytearray()  # of each row, whether it was asked for
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open(str(path))
        except sqlite3.OperationalError:  # in use
            self._open("")
        except sqlite3.DatabaseError:
            path.unlink()
            self._open(str(path))

    def _open(self, name: str) -> None:
        self._database = sqlite3.connect(name, timeout=0, isolation_level=None)
        self._database.execute("PRAGMA secure_delete=ON")  # they hold conversations
        self._database.execute("PRAGMA cache_size=-65536")  # kilobytes; keys come in any order
        self._database.execute("BEGIN EXCLUSIVE")
        self._database.execute("CREATE TABLE IF NOT EXISTS encoded (row INTEGER PRIMARY KEY, key UNIQUE, value)")

    def get(self, key: bytes, compute: Callable[[], Any]) -> Any:
        """What `compute()` gave for the same key, or gives now; both are plain values."""
        digest = self._common.copy()
        digest.update(key)
        name = digest.digest()
        found = self._database.execute("SELECT row, value FROM encoded WHERE key = ?", (name,)).fetchone()
        if found is None:
            value = compute()
            packed = zlib.compress(marshal.dumps(value), 1)
            row = self._database.execute("INSERT INTO encoded (key, value) VALUES (?, ?)", (name, packed)).lastrowid
        else:
            row, value = found[0], marshal.loads(zlib.decompress(found[1]))
        self._used.extend(bytes(max(0, row + 1 - len(self._used))))
        self._used[row] = 1
        return value

    def __enter__(self) -> "EncodedMemo":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            self._database.create_function("used", 1, lambda row: row < len(self._used) and self._used[row])
            self._database.execute("DELETE FROM encoded WHERE NOT used(row)")
        self._database.execute("COMMIT")
        self._database.close()
