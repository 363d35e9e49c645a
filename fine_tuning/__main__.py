"""The commands a person types: `python -m fine_tuning --help`."""

import argparse

from fine_tuning.commands import (
    budget,
    conversations,
    experiments,
    forget,
    learning_curve,
    models,
    summary,
    supply_chain,
    tokenizers,
)
from fine_tuning.common.errors import run
from fine_tuning.common.protection import protect


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="python -m fine_tuning", description="Sharpen a chatbot on its own talk.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = (conversations, models, forget, summary, experiments, supply_chain, tokenizers, learning_curve, budget)
    for module in modules:
        module.add_commands(subparsers)
    arguments = parser.parse_args()
    if arguments.command != "verify":  # it reports what others may read
        protect()
    return arguments.func(arguments)


def program() -> None:
    """The console script `whetstone`."""
    run(main)


if __name__ == "__main__":
    program()
