"""`adopt FOLDER`: an adapter that was trained elsewhere becomes what the pipeline packages, evaluates and compares."""

import argparse
import tempfile
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import root
from fine_tuning.common.settings import read_params, write_param
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.training.adopted import read_adapter, stage_adapter
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.tracking import checkout_store, tracked_run

BASE = Path("models/base")


def adopt(arguments: argparse.Namespace) -> None:
    """Check the adapter, keep it in MLflow, and let params.yaml name it."""
    root()
    settings, card = read_params("train", TrainSettings), read_base_card(BASE)
    if settings.method != "lora":
        raise UserError("train.method is qlora, and an adopted adapter is measured on the plain base: set it to lora")
    config = read_adapter(arguments.folder, BASE, card, arguments.same_base)
    origin = arguments.origin or arguments.folder.resolve().name
    client, experiment = checkout_store()
    with tempfile.TemporaryDirectory(prefix="adopt-") as scratch:
        sha256 = stage_adapter(arguments.folder, config, origin, Path(scratch, "adapter"))
        tags = {"adapter_sha256": sha256, "adopted_from": origin, "base_model": card["model"]}
        with tracked_run(client, experiment, "adopt", {}, tags) as run:
            run.log_artifacts(Path(scratch, "adapter"), "adapter")
    write_param("train", "start_from", sha256)
    write_param("train", "max_steps", 0)
    print(f"adopted {origin}: LoRA of rank {config['r']}, SHA-256 {sha256[:12]}")
    print("params.yaml names it (train.start_from) and takes it as it is (train.max_steps: 0). Next:")
    print("  dvc repro                   # packages, evaluates and compares it")
    print("every repro and round takes it until both parameters are null again:")
    print("  git checkout params.yaml    # trains here again")
    print("if it was trained on conversations of the test split, the comparison favours it: nothing here can see that")
