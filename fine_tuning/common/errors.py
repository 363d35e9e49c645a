"""Errors that a user can cause, reported in one line, and counts in words."""

import errno
import os
import select
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As SQLite and the libraries in Rust say it, which raise errors of their own.
_NO_SPACE_WORDS = ("No space left", "disk is full", "disk I/O error", "File too large", "os error 28", "os error 27")
# As PyTorch says it, of a GPU, of its products and of a CPU.
_NO_MEMORY_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")

_NO_MEMORY = "error: the memory of this machine is full: end what else uses it (`free -h`), then run the same again"
_NO_MEMORY_FOR_A_MODEL = (
    "error: the memory of this machine or of its GPU is full: end what else uses it (`free -h`, `nvidia-smi`) or lower "
    "batch_tokens of train or evaluate in params.yaml, then run the same again"
)


class UserError(Exception):
    """A mistake or a state that the user can correct. The message is one line: the cause, then the command or edit that
    corrects it. It never quotes a conversation."""


def count_of(number: int, noun: str) -> str:
    """`1 shard`, `2,028 shards`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def run(main: Callable[[], int | None]) -> None:
    """Run `main` as a program: a UserError is one line on stderr and exit status 1, and so is a full disk or memory, or
    a file system that may not be written to.

    Ctrl-C is exit status 130. Where the reader of its output went away, as `head` does, it ends quietly with 141, as if
    SIGPIPE had ended it.
    """
    try:
        try:
            _run(main)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and _reader_is_gone()
        if not gone and not no_space(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        if not gone:
            print(_full(error), file=sys.stderr)
        sys.exit(141 if gone else 1)


def _reader_is_gone() -> bool:
    """Whether it is standard output that broke, and not a connection somewhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _run(main: Callable[[], int | None]) -> None:
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (line := line_of(error)) is None:
            raise
        print(line, file=sys.stderr)
        sys.exit(1)


def line_of(error: BaseException | None) -> str | None:
    """The line that `run` prints of an error that a user or the machine made, None of any other."""
    if isinstance(error, UserError):
        return f"error: {' '.join(str(error).split())}"
    if isinstance(error, RecursionError):
        return "error: a file is nested too deeply: restore it with `git checkout` or `dvc checkout`"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("fine_tuning"):
        return (
            f"error: the Python package {error.name} is not installed for {sys.executable}: activate the environment "
            "(`source .venv/bin/activate`), or make it first (`make install`)"
        )
    if no_space(error):
        return _full(error)
    if no_memory(error):
        return _NO_MEMORY_FOR_A_MODEL if "torch" in sys.modules else _NO_MEMORY
    for one in _chain(error):
        denied = one.filename if isinstance(one, OSError) and one.errno in _DENIED else None
        if denied or "readonly database" in str(one):
            what = denied or "the database"
            return f"error: {what} may not be read or written: run this as its owner, on a disk that is not read-only"
        file = one.filename if isinstance(one, OSError) else None
        if isinstance(one, FileExistsError) and file and os.path.islink(file) and not os.path.exists(file):
            return f"error: {file} is a link to {os.readlink(file)}, which is not there: mount it, or `rm {file}`"
        if isinstance(one, OSError) and one.errno in _NO_LOCKS and not file:
            return (
                "error: the file system of this checkout, or of a folder that it links to, cannot lock files: mount it "
                "with locks, or work on another disk"
            )
    return None


def _full(error: BaseException | None) -> str:
    """The line for a full disk, with the folder that it is known by: that of the file that could not be written, else
    the one with the least room of those that commands write to."""
    # Of a copy, the second is the file that is written.
    full = (one for one in _chain(error) if isinstance(one, OSError) and one.errno in _NO_SPACE)
    named = next((file for one in full if isinstance(file := one.filename2 or one.filename, str)), None)
    if named:
        where = next(place for place in Path(named).absolute().parents if place.is_dir())
    else:
        from fine_tuning.common.dvc_files import cache_folder

        places = [Path.cwd(), Path(tempfile.gettempdir())]
        with suppress(UserError):  # not a DVC repository
            places.append(cache_folder(Path.cwd()))
        where = min(filter(Path.is_dir, places), key=lambda place: shutil.disk_usage(place).free)
    shown = f"`df -h {shlex.quote(str(where))}`"
    return f"error: the disk is full: free some space ({shown} shows it), then run the same again"


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that a disk or a quota is full."""
    return any(
        (isinstance(one, OSError) and one.errno in _NO_SPACE) or any(words in str(one) for words in _NO_SPACE_WORDS)
        for one in _chain(error)
    )


def no_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that memory, a GPU's too, is full."""
    return any(
        isinstance(one, MemoryError) or any(words in str(one) for words in _NO_MEMORY_WORDS) for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
