"""Start a stage in several processes, as an accelerate configuration asks for them."""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fine_tuning.common.errors import UserError


def launch(config: Path, module: str) -> NoReturn:
    """Start `python -m module` again in the processes that the configuration asks for, and end when they have ended.

    On a CPU they talk through gloo. Ctrl-C reaches each of them through the launcher. Raises UserError if the machine
    has fewer GPUs than processes are asked for.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch import cuda
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    wanted = yaml.safe_load(config.read_text())
    here = wanted["num_processes"] // wanted["num_machines"]
    if cuda.is_available() and cuda.device_count() < here:
        raise UserError(f"{config} asks for {here} processes here and there are {cuda.device_count()} GPUs: set fewer")
    # The process that fails prints the error.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", str(config), "-m", module]))
    except ChildFailedError:
        sys.exit(1)
    except SignalException:
        raise KeyboardInterrupt from None
    sys.exit(0)


def train_without_output(train: Callable[[], Any]) -> None:
    """Train as one of the processes that write nothing."""
    try:
        train()
    except UserError:
        # The main process raises the same error and reports it; the launcher then ends this one before it repeats it.
        time.sleep(10)
        raise
