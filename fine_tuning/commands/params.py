"""`params`: check params.yaml as a whole, as `make repro` does before it starts DVC."""

import argparse
from pathlib import Path

from fine_tuning.integration.parameters import check_all_params


def params(arguments: argparse.Namespace) -> None:
    check_all_params(Path("params.yaml"))
