"""Errors that a user can cause, told in one line."""

import errno
import sys
from collections.abc import Callable

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As SQLite and the libraries in Rust say it, which raise errors of their own.
_NO_SPACE_WORDS = ("No space left", "disk is full", "disk I/O error", "File too large", "os error 28", "os error 27")


class UserError(Exception):
    """A mistake or a state that the user can mend.

    The message is one line: the cause, then the command or edit that mends it. It never quotes a conversation.
    """


def run(main: Callable[[], int | None]) -> None:
    """Run `main` as a program: a UserError or a full disk is one line on stderr and exit status 1, Ctrl-C is 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not no_space(error):
            raise
        print("error: the disk is full: free some space (`df -h .` shows it), then run the same again", file=sys.stderr)
        sys.exit(1)


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(words in str(error) for words in _NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
