"""Where the versions of each conversation are, so that a shard is read once and not by every command.

For each shard a file in a folder of its own keeps what the manifest says of it, and for each line eight bytes of the
hash of the conversation's id, and where the line ends. It is a cache: a file that is missing, damaged, or of another
state of the shard (size, time, inode) or of the tombstones, is made again from the shard.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_lines, replacing
from fine_tuning.common.results import make_own_folder, remove
from fine_tuning.data_collection.storage.shards import describe_shard, of_this_version, plain_id, record_in, version_in
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.schema.conversation import as_conversation, can_be_folded

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2  # of the files: another one whenever they hold something else


class Scanned(NamedTuple):
    """What a shard says when it is read once."""

    entry: dict[str, Any]  # of the manifest
    forgotten: bool  # whether a line is of a conversation that was forgotten
    ids: "array[int]"  # for each line, `_number` of its conversation's id
    ends: "array[int]"  # for each line, the byte behind its newline


def scan_shard(path: Path, forgotten: Callable[[str], bool] = lambda identity: False) -> Scanned:
    """Read a shard once; `forgotten` is asked of each conversation's id. Raises UserError if the shard is gone."""
    ids, ends, came_back, end = array("Q"), array("Q"), False, 0

    def see(line: bytes) -> None:
        nonlocal came_back, end
        name = plain_id(line)
        if name is None or forgotten(name.decode("utf-8", "replace")):
            record = record_in(line)
            name = key_of(record["id"]) if can_be_folded(record) else line.rstrip(b"\n")
            came_back |= isinstance(record, dict) and forgotten(as_conversation(record)["id"])  # as cleaning takes it
        end += len(line)
        ids.append(_number(name))
        ends.append(end)

    return Scanned(describe_shard(path, see), came_back, ids, ends)


def key_of(identity: str) -> bytes:
    """An id as SQLite and this index take it, lone surrogates too."""
    return identity.encode("utf-8", "surrogatepass")


def _number(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())


class ShardIndex:
    """The versions in shards by conversation. Two ids may have one number: what is read is compared with the id."""

    def __init__(self, shards: Mapping[Path, Scanned]) -> None:
        self.shards = dict(shards)
        self._paths = [path for path, shard in shards.items() if shard.ids]

    @classmethod
    def read(
        cls, paths: Sequence[Path], folder: Path | None = None, tombstones: Tombstones | None = None
    ) -> "ShardIndex":
        """The index of shards in their order. `folder` keeps it; what it has of other shards is removed. Raises
        UserError if a shard is gone."""
        forgotten = sha256_file(tombstones.path) if tombstones else None
        kept, shards = make_own_folder(folder) if folder else None, {}
        for path in paths:
            file, key = kept and kept / f"{path.name}.index", [FORMAT, shard_state(path), forgotten]
            found = _load(file, key) if file else None
            if found is None:
                found = scan_shard(path, tombstones.names) if tombstones else scan_shard(path)
                if file:
                    _save(file, key, found)
            shards[path] = found
        used = {f"{path.name}.index" for path in paths}
        for file in kept.iterdir() if kept else ():
            if file.name not in used and not file.name.endswith(".tmp"):  # of another process
                remove(file)
        return cls(shards)

    def located(self, names: Iterable[bytes]) -> Iterator[tuple[Path, int, int, dict]]:
        """(shard, first byte, bytes, version) of every version of conversations, in shard order, and maybe of others;
        a name is the UTF-8 of an id. Raises UserError if another version of this project wrote one."""
        if not self._paths:
            return
        import numpy as np  # here, as commands that read no shard start without it

        wanted = np.unique(np.fromiter(map(_number, names), np.uint64))
        low, high = (np.searchsorted(self._sorted, wanted, side) for side in ("left", "right"))
        counts = high - low
        if not counts.any():
            return
        places = np.repeat(high - counts.cumsum(), counts) + np.arange(counts.sum())
        for line in np.sort(self._order[places]).tolist():
            shard = int(np.searchsorted(self._first_lines, line, "right")) - 1
            path, number = self._paths[shard], line - int(self._first_lines[shard])
            ends = self.shards[path].ends
            begin = ends[number - 1] if number else 0
            with open(path, "rb") as file:
                file.seek(begin)
                version = version_in(file.read(ends[number] - begin))
            if version is not None:
                yield path, begin, ends[number] - begin, of_this_version(path, version)

    def newest(self, identities: Collection[str]) -> dict[str, dict]:
        """The newest version of each of the given conversations that exists."""
        located = self.located(map(key_of, identities))
        return {version["id"]: version for *_, version in located if version["id"] in identities}

    def all_newest(self) -> Iterator[dict]:
        """The newest version of every conversation."""
        import numpy as np

        _, last = np.unique(self._ids[::-1], return_index=True)
        wanted = np.zeros(len(self._ids), np.bool_)
        wanted[len(self._ids) - 1 - last] = True
        lines = (line for path in self._paths for _, line in read_lines(path))
        yield from (version for line in compress(lines, wanted) if (version := version_in(line)) is not None)

    def count(self) -> int:
        """How many conversations there are."""
        import numpy as np

        ranked = np.sort(self._ids)  # a tenth of the time of np.unique
        return int(np.count_nonzero(ranked[1:] != ranked[:-1])) + min(len(ranked), 1)

    @cached_property
    def _ids(self) -> "np.ndarray":
        """(lines,) uint64: the numbers of all lines."""
        import numpy as np

        ids = [np.frombuffer(self.shards[path].ids, np.uint64) for path in self._paths]
        return np.concatenate([np.empty(0, np.uint64), *ids])

    @cached_property
    def _order(self) -> "np.ndarray":
        """(lines,) int: the lines in the order of their numbers, those of one number in shard order."""
        return self._ids.argsort(kind="stable")

    @cached_property
    def _sorted(self) -> "np.ndarray":
        return self._ids[self._order]

    @cached_property
    def _first_lines(self) -> "np.ndarray":
        """(shards,) int: how many lines there are before each shard."""
        import numpy as np

        return np.cumsum([0, *(len(self.shards[path].ids) for path in self._paths)])[:-1]


def shard_state(path: Path) -> list[int] | None:
    """What changes when somebody writes into a shard or puts another in its place; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _load(file: Path, key: list) -> Scanned | None:
    """What was saved under this key; None if it was not, or is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        digest, _, data = file.read_bytes().partition(b"\n")
        if hashlib.blake2b(data).hexdigest().encode() == digest:
            head, _, numbers = data.partition(b"\n")
            saved = json.loads(head)
            if saved["key"] == key:
                both = array("Q", numbers)
                return Scanned(saved["entry"], saved["forgotten"], both[: len(both) // 2], both[len(both) // 2 :])
    return None


def _save(file: Path, key: list, found: Scanned) -> None:
    head = json.dumps({"key": key, "entry": found.entry, "forgotten": found.forgotten}).encode()
    data = head + b"\n" + found.ids.tobytes() + found.ends.tobytes()
    if file.is_dir():
        remove(file)
    with replacing(file) as target:
        target.write(hashlib.blake2b(data).hexdigest().encode() + b"\n" + data)
