"""`budget`: a time for training, as the number of tokens that params.yaml takes."""

import argparse

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import main_checkout, root
from fine_tuning.common.settings import read_params, write_param
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.speed import SPEED, parse_duration, read_speed


def budget(arguments: argparse.Namespace) -> None:
    root()
    settings, _ = read_params("train", TrainSettings), read_params("prepare", PrepareSettings)
    if arguments.time.lower() == "none":
        write_param("prepare", "max_train_tokens", None)
        print(
            "prepare.max_train_tokens is null: it no longer limits what `dvc repro` trains on; "
            "prepare.max_sample_tokens still limits the sample"
        )
        return
    seconds = parse_duration(arguments.time)
    speed = read_speed(main_checkout() / SPEED)
    if speed is None:
        raise UserError("nothing was trained here yet, so its speed is not known: run `dvc repro train` once")
    tokens = int(seconds * speed.tokens_per_second / settings.epochs)
    if tokens < settings.batch_tokens:
        raise UserError(
            f"{arguments.time} is too short for one batch at {speed.tokens_per_second:.0f} tokens/s: give more time"
        )
    write_param("prepare", "max_train_tokens", tokens)
    print(
        f"prepare.max_train_tokens is {tokens}: {arguments.time} at {speed.tokens_per_second:.0f} tokens/s "
        f"({speed.what}) for train.epochs {settings.epochs:g}; `dvc repro` trains on as much, your own conversations "
        "first"
    )
