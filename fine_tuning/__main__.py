"""The commands a person types: `python -m fine_tuning --help`."""

from fine_tuning.commands import command_line
from fine_tuning.common.errors import run


def main() -> int | None:
    arguments = command_line.parse()
    if arguments.command != "verify":  # it reports what others may read
        from fine_tuning.common.protection import protect

        protect()
    return command_line.run(arguments)


def program() -> None:
    """The console script `whetstone`."""
    run(main)


if __name__ == "__main__":
    program()
