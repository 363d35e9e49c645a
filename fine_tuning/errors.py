"""Errors that a user can cause, told in one line."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or a state that the user can mend.

    The message is one line: the cause, then the command or edit that mends it. It never quotes a conversation.
    """


def run(main: Callable[[], int | None]) -> None:
    """Run `main` as a program: a UserError becomes one line on stderr and exit status 1, Ctrl-C becomes 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
