"""Results on disk under a hash of all that they depend on, so that nothing is computed twice."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fine_tuning.common.project import code_sha256, sha256_file, versions
from fine_tuning.common.records import copy_file, read_object, write_json

ENTRY = "entry.json"  # of a folder of results: the value, size and time of each file, what it was made of
HASHES = "hashes"  # in the folder of a memo: of files that were read
OWN = "sha256"  # in each JSON file: of the rest of it
ABANDONED = 3600  # seconds without a write, after which a temporary folder is one of a run that was killed


class Memo:
    """A folder of results of one stage. What is damaged, or a file in the place of a folder, counts as absent."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder = make_own_folder(folder)
        self._made_by = [code_sha256(stage), versions()]
        self._used: set[str] = set()
        self._known: dict[str, Any] = {}  # values of folders that were found sound, until they are given

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}}  # a worker is given nothing

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The JSON value stored under `key`, or that of `compute()`, stored.

        `key` names the inputs and settings; the stage's code and the versions of what it calls are added here.
        """
        path = self.folder / f"{self._name(key)}.json"
        if (known := _read(path)) is None:
            known = _write(path, {"value": compute()})
        return known["value"]

    def __contains__(self, key: Sequence[Any]) -> bool:
        if (value := _sound(self.folder / (name := self._name(key)))) is not None:
            self._known[name] = value
        return value is not None

    def files(
        self,
        key: Sequence[Any],
        make: Callable[[Path, Path | None], Any],
        last: Sequence[Any] = (),
        of: Collection[str] | None = None,
    ) -> tuple[Path, Any]:
        """(folder, JSON value) of the files that `make(folder, earlier)` wrote, and of what it returned.

        The files are read-only and may be linked elsewhere: one that was changed there in place is made again.
        `earlier` is the folder that was given before for the key `last`, None where there is none. `of` names all whose
        text the files may hold, for `keep_made_of`: None if that is not known.
        """
        folder, pointer = self.folder / self._name(key), self.folder / f"{self._name(['last', *last])}.json"
        self._used.add(folder.name)
        known = self._known.pop(folder.name) if folder.name in self._known else _sound(folder)
        if known is not None:
            try:
                os.utime(folder)
            except FileNotFoundError:  # another run has removed it since it was found sound
                known = None
            except OSError:  # it may only be read
                pass
        if known is not None:
            return folder, known
        remove(folder)
        earlier = self._pointed(pointer)
        with making_folder(folder) as temporary:
            value = make(temporary, earlier if last else None)
            for path in temporary.iterdir():
                path.chmod(0o444)
            states = {path.name: state_of(path) for path in temporary.iterdir()}
            _write(temporary / ENTRY, {"value": value, "files": states, "of": None if of is None else sorted(of)})
        if last:
            _write(pointer, {"folder": folder.name})
        return folder, value

    def hashes(self, paths: Sequence[Path]) -> list[str]:
        """SHA-256 of files, in hexadecimal; one with the name, size, time and inode that it had last is not read."""
        before, found = (_read(self.folder / HASHES) or {"files": {}})["files"], {}
        for path in paths:
            state = [*(state_of(path) or ()), path.stat().st_ino]
            *known, digest = before.get(path.name, [None])
            found[path.name] = [*state, digest if known == state else sha256_file(path)]
        if found != before:
            _write(self.folder / HASHES, {"files": found})
        return [digest for *_, digest in found.values()]

    def remove_unused(self, spare: int | None = None) -> None:
        """Remove folders that `files` did not give, but for the newest, as many as it gave or `spare`: they hold
        conversations. What killed runs left goes an hour later.
        """
        folders = [path for path in self.folder.glob("*") if path.is_dir()]
        others = [path for path in folders if path.name not in self._used and not path.name.startswith(".")]
        remove_oldest(others, len(self._used) if spare is None else spare)
        for folder in folders:
            if folder.name.startswith(".") and time.time() - _last_write(folder) > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
        for pointer in self.folder.glob("*.json"):
            known = _read(pointer) or {}
            if not (self.folder / known.get("folder", "none")).is_dir():
                remove(pointer)

    def _pointed(self, pointer: Path) -> Path | None:
        """The folder of results that a pointer names; None if there is none, or it was changed."""
        known = _read(pointer)
        return folder if known and _sound(folder := self.folder / known["folder"]) is not None else None

    def _name(self, key: Sequence[Any]) -> str:
        return hashlib.sha256(json.dumps([self._made_by, *key], sort_keys=True).encode()).hexdigest()


def keep_made_of(folder: Path, sources: Set[str]) -> list[Path]:
    """Remove all that is in the folder of a memo but folders of results that were made of `sources` alone, and what
    points to them; returns these folders."""
    stay = []
    for path in folder.iterdir() if folder.is_dir() else ():
        of = (_sound_entry(path) or {}).get("of")
        if of is not None and all(one in sources for one in of):
            stay.append(path)
    names = {path.name for path in stay}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in names and (_read(path) or {}).get("folder") not in names:
            remove(path)
    return stay


def _sound(folder: Path) -> Any:
    """The value of a folder of results in which no file was changed; None for any other folder."""
    return (_sound_entry(folder) or {}).get("value")


def _sound_entry(folder: Path) -> dict[str, Any] | None:
    known = _read(folder / ENTRY)
    sound = known and known["files"] == {name: state_of(f"{folder}/{name}") for name in known["files"]}
    return known if sound else None


def _read(path: Path) -> dict[str, Any] | None:
    """What `_write` wrote there; None where it is something else."""
    found = read_object(path)
    return found if found.pop(OWN, None) == _hash(found) else None


def _write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON object with a hash of it, and return it as it is read."""
    content = json.loads(json.dumps(content, allow_nan=False))
    if path.is_dir():
        remove(path)
    write_json(path, content | {OWN: _hash(content)})
    return content


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _last_write(folder: Path) -> float:
    """When something was last written there, in seconds since 1970; now where that cannot be read."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()


def state_of(path: Path | str) -> list[int] | None:
    """Bytes and time of a file, which change when somebody writes into it; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


@contextmanager
def making_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` at the end: it appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run made the same meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_own_folder(folder: Path) -> Path:
    """Make a folder that nobody else writes into, in the place of a file too."""
    for path in (*reversed(folder.parents), folder):
        if path.is_file():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove(path: Path) -> None:
    """Remove a folder or a file, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_oldest(folders: Collection[Path], keep: int) -> None:
    """Remove all but the `keep` newest."""
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system does not link. Never write into it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)
