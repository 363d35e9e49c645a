"""Checkpoints: from which one a run may resume, and when one is complete."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fine_tuning.common.project import code_sha256, versions
from fine_tuning.common.records import sync
from fine_tuning.runtime.hardware import detect_hardware, is_main_process, process_count
from fine_tuning.schema.preferences import Item, JudgedReply, rows_of
from fine_tuning.training.settings import TrainSettings

CHECKPOINT_COMPLETE = "COMPLETE"


def checkpoint_key(
    settings: TrainSettings, items: Sequence[Item], base_sha256: str, validation: Sequence[Item] = ()
) -> str:
    """Name of the folder that may hold this run's checkpoints: "<inputs>-<code>", two hashes.

    Inputs are settings, data, base and kind of machine: a GPU, two cores or several processes divide the rows in their
    own ways. Code is that of the training folder, with the versions of the packages that it calls. A run never resumes
    from a checkpoint that it would not have written itself.
    """
    from fine_tuning.training.acceleration.micro_batches import count_micro_batches  # imports PyTorch

    hardware = detect_hardware(settings.precision, settings.threads)
    machine = f"{hardware.device} {hardware.precision} {count_micro_batches(settings, hardware)} {process_count()}"
    digest = hashlib.sha256(settings.model_dump_json().encode() + base_sha256.encode() + machine.encode())
    for split in (items, validation):
        digest.update(b"split")
        for item in split:
            if isinstance(item, JudgedReply):
                digest.update(str(item.liked).encode())
            for row in rows_of([item]):
                digest.update(json.dumps([row.id, row.input_ids, row.labels]).encode())
    code = hashlib.sha256(json.dumps([code_sha256("train"), versions()]).encode())
    return f"{digest.hexdigest()[:24]}-{code.hexdigest()[:16]}"


def is_outdated(checkpoints: Path) -> bool:
    """Whether other code or packages wrote checkpoints of the same inputs, from which this run must not resume."""
    inputs, _, code = checkpoints.name.rpartition("-")
    return bool(inputs and code) and any(checkpoints.parent.glob(f"{inputs}-*/checkpoint-*/{CHECKPOINT_COMPLETE}"))


@contextmanager
def alone_with(checkpoints: Path) -> Iterator[None]:
    """Wait until no other process trains into the same folder, such as a run that outlived its pipeline."""
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{checkpoints}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("train: the same training is under way in another process: waiting until it ends", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / CHECKPOINT_COMPLETE).is_file():
            complete.append(path)
        elif is_main_process():
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint to disk, then mark it: a crash in between leaves it unmarked."""
    for file in checkpoint.iterdir():
        sync(file)
    (checkpoint / CHECKPOINT_COMPLETE).touch()


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints, their marks first: a crash leaves none that looks complete."""
    for mark in folder.glob(f"checkpoint-*/{CHECKPOINT_COMPLETE}"):
        mark.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def sort_adapter_config(folder: Path) -> None:
    """Rewrite adapter_config.json with sorted keys and sorted lists: peft writes its sets in hash-seed order."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
