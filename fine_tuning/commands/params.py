"""`params`: check params.yaml as a whole, as `make repro` does before it starts DVC."""

import argparse
from pathlib import Path


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Add `params`."""
    command = subparsers.add_parser(
        "params",
        help="check every parameter in params.yaml",
        description="DVC removes the outputs of a stage before it runs it, so that a stage that refuses a parameter "
        "costs them. `make repro` checks all sections first.",
    )
    command.set_defaults(func=params)


def params(arguments: argparse.Namespace) -> None:
    """Check all sections.

    Raises:
        UserError: a parameter is wrong; names it.
    """
    from fine_tuning.integration.parameters import check_all_params

    check_all_params(Path("params.yaml"))
