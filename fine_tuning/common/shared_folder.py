"""Work for machines that share no disk: files travel through a folder that fsspec opens, such as s3://bucket/prefix.

A piece of work and its result are pickled. In the pickle an absolute path stands for the file itself: whoever packs it
uploads the file under the hash of its content, whoever unpacks it downloads what is missing, at once where fsspec asks
the store asynchronously (S3, Google, Azure). A worker keeps files below a scratch folder of its own; the client finds
them at the path that they would have had on a shared disk, with the same time and mode. Each run has a folder of its
own in the shared one. It holds conversations, and goes with the run.
"""

import io
import os
import pickle
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fine_tuning.common.errors import UserError, no_space
from fine_tuning.common.project import MadeBy, other_here, sha256_file
from fine_tuning.common.results import making_folder, state_of

START_IT = "start it again in a checkout with the same code, in this environment"
_BASES: dict[str, Path] = {}  # folder of a run → where files lie here
_ENDED: set[str] = set()  # folders of runs that are over: what is still worked on leaves nothing
_State = tuple[list[int] | None, str]  # of a file: its size and time, and its hash
_SENT: dict[tuple[str, Path], _State] = {}  # by folder and path, on both sides


class _Stored(NamedTuple):
    """A file in the shared folder."""

    name: str
    sha256: str
    time: int  # ns
    mode: int


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, folder: str | None, results: bool, missing: dict[Path, _State]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._folder, self._results = folder, results
        self._missing = missing  # in the folder

    def reducer_override(self, value: Any) -> Any:
        if self._folder is None or not isinstance(value, Path):
            return NotImplemented
        if not value.is_relative_to(base := _BASES[self._folder]):
            return NotImplemented
        place = value.relative_to(base)
        if value.is_file():
            return _file, (place.parent, self._stored(self._folder, value))
        # Only of a result are its files wanted.
        files = [self._stored(self._folder, path) for path in sorted(value.glob("*"))] if self._results else []
        return _files, (place, files)

    def _stored(self, folder: str, path: Path) -> _Stored:
        found = path.stat()
        known, digest = self._missing.get(path) or _SENT.get((folder, path), (None, ""))
        if known != (state := state_of(path)):
            digest = sha256_file(path)
            self._missing[path] = state, digest
        return _Stored(path.name, digest, found.st_mtime_ns, found.st_mode & 0o777)


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: bytes, folder: str, missing: dict[Path, _Stored], made: ExitStack) -> None:
        super().__init__(io.BytesIO(packed))
        self.folder, self.missing, self.made = folder, missing, made

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return partial(found, self) if found is _file or found is _files else found


def pack(folder: str | None, values: Iterable[Any], results: bool = False) -> list[bytes]:
    """Pickle values and upload the files that they name; of `results`, those in folders that they name too. Without a
    folder paths stay paths, on a disk that all share."""
    missing: dict[Path, _State] = {}
    packed = []
    for value in values:
        packer = _Packer(one := io.BytesIO(), folder, results, missing)
        packer.dump(value)
        packed.append(one.getvalue())
    if folder and missing:
        with _access(folder) as (files, root):
            files.put(list(map(str, missing)), [f"{root}/{digest}" for _, digest in missing.values()])
        _SENT.update({(folder, path): state for path, state in missing.items()})
    return packed


def unpack(folder: str | None, packed: Iterable[bytes]) -> list[Any]:
    """The values, and the files that they name."""
    missing: dict[Path, _Stored] = {}
    with ExitStack() as made:  # what places files once they are here
        values = [_Unpacker(one, folder or "", missing, made).load() for one in packed]
        if folder and missing:
            with _access(folder) as (files, root):
                files.get([f"{root}/{stored.sha256}" for stored in missing.values()], list(map(str, missing)))
        for path, stored in missing.items():
            path.chmod(stored.mode)
            os.utime(path, ns=(stored.time, stored.time))
    return values


def other_worker(address: str, because: str) -> UserError:
    """What is said of a worker whose results would be other bytes."""
    return UserError(f"the Dask worker {address} {because}: {START_IT}")


class Call:
    """A call that is made where it is unpickled. To Dask its pickle is bytes: it looks into no list for its own
    objects, a scheduler needs no code of ours, and a worker without it raises an error instead of hanging."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def tasks(
    folder: str | None, function: Callable[[Any], Any], arguments: Iterable[object], made_by: MadeBy
) -> list[bytes]:
    """Pickles that do the work where they are unpickled, with a packed result."""
    packed = pack(folder, ((function, argument) for argument in arguments))
    return [pickle.dumps(Call(work_on, one, folder, made_by)) for one in packed]


def work_on(packed: bytes, folder: str | None, made_by: MadeBy) -> bytes:
    """On a worker: unpack (function, argument) and pack the result."""
    from distributed import get_worker

    if other := other_here(made_by):
        raise other_worker(get_worker().address, f"has {other}")
    if folder in _ENDED:
        raise RuntimeError("the run has ended")
    scratch = folder and _BASES.setdefault(folder, Path(get_worker().local_directory) / folder.rpartition("/")[2])
    try:
        ((function, argument),) = unpack(folder, [packed])
        return pack(folder, [function(argument)], results=True)[0]
    finally:
        if scratch and folder in _ENDED:  # meanwhile
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def folder_of_a_run(address: str, client: Any) -> Iterator[str]:
    """The address of a new folder in the shared one; it and the workers' files are removed at the end."""
    folder = f"{address.rstrip('/')}/{uuid.uuid4().hex}"
    _BASES[folder] = Path("/")
    with _access(folder) as (files, path):
        files.makedirs(path, exist_ok=True)
    try:
        yield folder
    finally:
        try:
            client.run(_leave, folder, on_error="ignore")
        finally:  # also where the scheduler is gone
            with _access(folder) as (files, path), suppress(FileNotFoundError):
                files.rm(path, recursive=True)


def _leave(folder: str) -> None:
    _ENDED.add(folder)
    if scratch := _BASES.pop(folder, None):
        shutil.rmtree(scratch, ignore_errors=True)


def _file(unpacker: _Unpacker, place: Path, stored: _Stored) -> Path:
    path = _BASES[unpacker.folder] / place / stored.name
    if path.is_file() and path.stat().st_mtime_ns == stored.time:
        _SENT[unpacker.folder, path] = state_of(path), stored.sha256
    else:
        unpacker.missing[unpacker.made.enter_context(_placing(unpacker.folder, path, stored))] = stored
    return path


@contextmanager
def _placing(folder: str, path: Path, stored: _Stored) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _SENT[folder, path] = state_of(path), stored.sha256


def _files(unpacker: _Unpacker, place: Path, stored: list[_Stored]) -> Path:
    path = _BASES[unpacker.folder] / place
    if not stored:
        path.mkdir(parents=True, exist_ok=True)
    elif not path.is_dir():
        made = unpacker.made.enter_context(making_folder(path))
        unpacker.missing |= {made / one.name: one for one in stored}
    return path


@contextmanager
def _access(folder: str) -> Iterator[tuple[Any, str]]:
    """The file system of a folder, and the folder's path there."""
    from fsspec.core import url_to_fs

    try:
        yield url_to_fs(folder)
    except Exception as error:  # of whatever library speaks to the store
        if no_space(error):
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{socket.gethostname()} has no access to {folder.rpartition('/')[0]} ({reason}): give this machine and "
            "every worker the credentials, then run the same again"
        ) from None
