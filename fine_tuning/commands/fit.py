"""`fit`: what a base model would need on this machine, before it is downloaded or trained."""

import argparse
import shutil
from pathlib import Path

from tqdm import tqdm

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import main_checkout, root
from fine_tuning.common.records import read_object
from fine_tuning.common.settings import read_params
from fine_tuning.runtime.base_model import BaseSettings
from fine_tuning.runtime.gguf_writer import NotCovered, architecture_of
from fine_tuning.runtime.hardware import detect_hardware
from fine_tuning.training.memory import PROGRAM, free_memory, memory_needed, probe
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.speed import SPEED, read_speed

PREPARED = Path("metrics/prepare.json")
# models/base and models/merged in 16 bits, a GGUF of each in 8.5, and DVC's cache of all of them.
DISK_PER_PARAMETER = 2 * (2 * 2 + 2 * 8.5 / 8)


def fit(arguments: argparse.Namespace) -> int:
    """Print parameters, memory, disk and time; 1 if it does not fit."""
    root()
    base, settings = read_params("base", BaseSettings), read_params("train", TrainSettings)
    model = arguments.model or base.model
    shape, config = probe(model, None if arguments.model else base.revision)
    hardware = detect_hardware(settings.precision, settings.threads)
    memory, disk = free_memory(hardware.device), shutil.disk_usage(".").free
    print(f"{model}: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers")
    print(
        f"here: {hardware.name}, {hardware.precision}, {memory / 1e9:.1f} GB of memory free, {disk / 1e9:.0f} of disk"
    )
    fits = {}
    for method in ("lora", "qlora"):
        needed = sum(memory_needed(shape, settings.model_copy(update={"method": method}), hardware)) + PROGRAM
        fits[method] = needed <= memory
        print(f"train.method {method}: about {needed / 1e9:.1f} GB of memory, {'fits' if fits[method] else 'too much'}")
    room = shape.parameters * DISK_PER_PARAMETER
    print(f"disk: about {room / 1e9:.1f} GB, {'fits' if room <= disk else 'too much'}")
    print(f"training: {_time(shape.parameters, settings)}")
    try:
        architecture_of(config)
    except NotCovered as refused:
        print(f"GGUF: {refused}")
    if fits[settings.method] and room <= disk:
        return 0
    raise UserError(
        f"{model} does not fit: "
        + ("free some disk" if fits[settings.method] else "set train.method to qlora" if fits["qlora"]
           else "lower train.batch_tokens, set train.gradient_checkpointing to true, or choose a smaller model")
    )  # fmt: skip


def _time(parameters: int, settings: TrainSettings) -> str:
    """How long the prepared training data would take: time a token grows as the parameters do."""
    speed = read_speed(main_checkout() / SPEED)
    if speed is None or not speed.parameters:
        return "how long it takes is not known: nothing was trained here yet; `dvc repro train` measures it"
    pace = speed.tokens_per_second * speed.parameters / parameters
    splits = read_object(PREPARED).get("splits", {})
    tokens = splits.get("train", {}).get("tokens", 0)
    of = f"{tokens} tokens, train.epochs {settings.epochs:g}" if tokens else "10000 tokens"
    seconds = tokens * settings.epochs / pace if tokens else 10_000 / pace
    return (
        f"about {tqdm.format_interval(seconds)} for {of}: {pace:.3g} tokens/s, from the {speed.tokens_per_second:.0f} "
        f"last measured here ({speed.what}) by the number of parameters"
    )
