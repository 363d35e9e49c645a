"""Every command that a person can type, as commands.toml lists them.

The module of a command is imported when the command was chosen: `--help` imports none of them.
"""

import argparse
import re
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

TYPES = {"path": Path, "int": int, "float": float}
HOST = {"action": "append", "help": "an Ollama to act on instead of deploy.host; may be repeated"}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, of this process's if none is given; exit status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tuning", description="Fine-tune a local chatbot on its own conversations."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = tomllib.loads(Path(__file__).with_name("commands.toml").read_text(encoding="utf-8"))
    for name, command in commands.items():
        made = subparsers.add_parser(name, help=command["help"], description=command.get("description"))
        made.set_defaults(run=command["run"])
        made._negative_number_matcher = re.compile(r"-\d")  # `budget -5m` is a wrong time and not an option
        if "one_of" in command:
            _add(made.add_mutually_exclusive_group(required=True), command["one_of"])
        hosts = {"--host": HOST} if command.get("hosts") else {}
        _add(made, command.get("arguments", {}) | hosts)
    return parser.parse_args(words)


def _add(to: Any, arguments: dict[str, Any]) -> None:
    for name, given in arguments.items():
        options = {"action": "store_true", "help": given} if isinstance(given, str) else dict(given)
        if kind := options.pop("type", None):
            options["type"] = TYPES[kind]
        to.add_argument(name, **options)


def run(arguments: argparse.Namespace) -> int | None:
    module, _, function = arguments.run.partition(":")
    return getattr(import_module(f"fine_tuning.commands.{module}"), function)(arguments)
