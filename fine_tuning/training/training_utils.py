"""What every training run needs: its settings, its device and precision, its batches, its checkpoints."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from fine_tuning.errors import UserError
from fine_tuning.project import code_sha256, versions
from fine_tuning.settings import Settings

IGNORED_LABEL = -100
CHECKPOINT_COMPLETE = "COMPLETE"


class LoraSettings(Settings):
    """The section `train.lora`."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: Literal["all-linear", "attention"] | list[str]
    top_layers: int | None = Field(ge=1)
    rslora: bool
    dora: bool


class TrainSettings(Settings):
    """The section `train`."""

    method: Literal["lora", "qlora"]
    start_from: str | None = Field(pattern="^[0-9a-f]{8,64}$")
    launch: Literal["single", "ddp", "fsdp"]
    seed: int
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "lion_8bit", "sgd"]
    batch_tokens: int = Field(ge=16)
    packing: bool
    gradient_accumulation: int = Field(ge=1)
    lora: LoraSettings
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    threads: int | None = Field(ge=1)
    gradient_checkpointing: bool
    neftune_alpha: float | None = Field(gt=0)
    validations: int = Field(ge=1)
    early_stopping_patience: int | None = Field(ge=1)
    checkpoint_steps: int = Field(ge=1)


def is_main_process() -> bool:
    """Whether this is the process that writes files, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_process_count() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Hardware:
    """Where training runs and in which number format."""

    device: Literal["cuda", "mps", "cpu"]
    precision: Literal["float32", "bfloat16", "float16"]
    threads: int
    name: str


def detect_hardware(precision: str, threads: int | None) -> Hardware:
    """Choose device and number format; `auto` takes bfloat16 only where the hardware computes in it.

    On a CPU without bf16 units bfloat16 is emulated, 20 to 50 times slower than float32.

    Raises:
        UserError: float16 was asked for on a CPU, where training in it overflows.
    """
    import torch

    threads = threads or max(1, len(os.sched_getaffinity(0)) // local_process_count())
    if torch.cuda.is_available():
        automatic = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        device, name = "cuda", torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        automatic, device, name = "float32", "mps", "Apple GPU"
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        automatic, device = ("bfloat16" if fast else "float32"), "cpu"
        name = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    if precision == "float16" and device == "cpu":
        raise UserError("train.precision = float16 overflows on a CPU: set it to auto")
    return Hardware(device, automatic if precision == "auto" else precision, threads, name)


def lanes(settings: TrainSettings, hardware: Hardware) -> int:
    """How many parts of a batch to compute at once: two on a CPU, one elsewhere.

    One also where parts would draw random numbers from the one generator in no fixed order (dropout, NEFTune), where
    rows are no longer apart (packing), where activations are made anew (checkpointing), where weights are unpacked for
    every product (QLoRA), and where several processes share the batch already.
    """
    random = settings.lora.dropout or settings.neftune_alpha
    plain = not (random or settings.packing or settings.gradient_checkpointing or settings.method == "qlora")
    return 2 if process_count() == 1 and plain and hardware.device == "cpu" and hardware.threads > 1 else 1


# --- rows and batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One conversation as the model sees it: ids and labels of equal length, labels -100 where nothing is trained."""

    id: str
    input_ids: list[int]
    labels: list[int]


def read_rows(path: Path) -> list[Row]:
    """Read a parquet file that data preparation wrote.

    Raises:
        UserError: the file is missing.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    table = Dataset.from_parquet(str(path), keep_in_memory=True).select_columns(["id", "input_ids", "labels"])
    return [Row(row["id"], row["input_ids"], row["labels"]) for row in table]


def check_rows(rows: Sequence[Row], split: str) -> None:
    """Refuse rows that would train nothing, or train something other than their own tokens.

    Raises:
        UserError: the split is empty, ids and labels do not belong together, or no token is trained.
    """
    if not rows:
        raise UserError(f"the {split} split is empty: collect more conversations or change prepare's fractions")
    for row in rows:
        if len(row.input_ids) != len(row.labels):
            raise UserError(f"{split}: {row.id} has more ids than labels: run `dvc repro -f -s prepare && dvc repro`")
        if any(label not in (IGNORED_LABEL, token) for token, label in zip(row.input_ids, row.labels, strict=True)):
            raise UserError(f"{split}: {row.id} has a foreign label: run `dvc repro -f -s prepare && dvc repro`")
    if not count_labels(rows):
        raise UserError(f"no assistant token would be trained in the {split} split: check prepare.train_on")


def check_only_assistants_train(rows: Sequence[Row], tokenizer: Any, openers: set[str]) -> None:
    """Refuse rows in which a trained run of tokens follows anything but the opening of an assistant turn.

    Args:
        tokenizer: decodes the tokens before each trained run.
        openers: what stands right before an assistant's content in the chat template, such as
            `<|im_start|>assistant\\n`.

    Raises:
        UserError: a user's or the system's token would be trained; names the conversation.
    """
    longest = max(len(tokenizer.encode(opener, add_special_tokens=False)) for opener in openers) + 2
    for row in rows:
        for start in _trained_starts(row.labels):
            before = tokenizer.decode(row.input_ids[max(0, start - longest) : start])
            if not before.endswith(tuple(openers)):
                raise UserError(
                    f"{row.id} would train a token that is not the assistant's: `dvc repro -f -s prepare && dvc repro`"
                )


def _trained_starts(labels: Sequence[int]) -> list[int]:
    trained = [label != IGNORED_LABEL for label in labels]
    return [i for i, now in enumerate(trained) if now and (i == 0 or not trained[i - 1])]


def count_labels(rows: Sequence[Row]) -> int:
    """Number of trained tokens."""
    return sum(label != IGNORED_LABEL for row in rows for label in row.labels[1:])


def batch_by_tokens(
    rows: Sequence[Row], budget: int, multiple: int = 1, padded: Callable[[int], int] = int
) -> list[list[Row]]:
    """Group rows of like length so that no padded batch has more than `budget` tokens.

    A batch has a multiple of `multiple` rows, whatever the budget, but for the last. `padded` says how long the
    rows of a batch are whose longest has so many tokens. Sorting leaves half a per cent of padding and keeps memory
    bounded; a fixed number of rows a batch does neither.
    """
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), row.id))
    batches: list[list[Row]] = []
    for start in range(0, len(ordered), multiple):
        group = ordered[start : start + multiple]
        # Rows come in order of length, so the newest is the longest: the batch is padded to it.
        if batches and (len(batches[-1]) + len(group)) * padded(len(group[-1].input_ids)) <= budget:
            batches[-1] += group
        else:
            batches.append(group)
    return batches


def round_up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def collate(batch: Sequence[Row], pad_token_id: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Pad a batch on the right: input_ids, attention_mask and labels, each an int64 tensor of `shape`.

    Without one it is (rows, longest row). Further rows are padding only.
    """
    import torch

    lengths = [len(row.input_ids) for row in batch]
    rows, longest = shape or (len(batch), max(lengths))
    # One tensor of all: one for each row takes longer than a step on a GPU has to spare.
    spare = rows - len(batch)

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in (*values, *([[]] * spare))])

    return {
        "input_ids": padded([row.input_ids for row in batch], pad_token_id),
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([row.labels for row in batch], IGNORED_LABEL),
    }


def collate_packed(batch: Sequence[Row]) -> dict[str, Any]:
    """Lay a batch's rows end to end in one: input_ids, position_ids and labels, each an int64 tensor (1, tokens).

    Positions start anew with each row and no attention mask is passed, from which transformers makes the mask that
    keeps a row from seeing its neighbours. A row's first token is no label: its neighbour would have to predict it.
    """
    import torch

    return {
        "input_ids": torch.tensor([[token for row in batch for token in row.input_ids]]),
        "position_ids": torch.tensor([[position for row in batch for position in range(len(row.input_ids))]]),
        "labels": torch.tensor([[label for row in batch for label in (IGNORED_LABEL, *row.labels[1:])]]),
    }


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the memory that a model needs depends on."""

    parameters: int
    embedding: int  # of them, in the input and the output embedding
    layers: int
    hidden: int
    vocabulary: int


def read_shape(folder: Path) -> Shape:
    """What a folder's model takes, read from its configuration and the headers of its weights: nothing is loaded.

    Raises:
        UserError: the folder holds no model.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    parameters = 0
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as weights:
                names = weights.keys()
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not load ({type(error).__name__}): make it again with `dvc repro`") from None
    tables = 1 if config.tie_word_embeddings else 2
    return Shape(
        parameters=parameters,
        embedding=tables * config.vocab_size * config.hidden_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def memory_needed(shape: Shape, settings: TrainSettings, hardware: Hardware) -> tuple[float, float]:
    """Bytes that a process's weights take, and its activations: an estimate, meant to be right within a factor of two.

    Weights at their width (in four bits all but the embeddings, which stay whole), the activations that backpropagation
    keeps (34 values of the hidden size a token and layer: Korthikanti et al. 2022, "Reducing Activation Recomputation",
    section 4.1, without the attention matrix, which is recomputed) and a batch's logits.
    """
    width = 2 if hardware.precision == "bfloat16" else 4
    weights = shape.parameters * width
    if settings.method == "qlora":
        weights = 0.6 * (shape.parameters - shape.embedding) + 4 * shape.embedding
    elif settings.launch == "fsdp":
        weights /= process_count()
    kept = 2 if settings.gradient_checkpointing else 34
    values = kept * shape.layers * shape.hidden + shape.vocabulary
    return weights, settings.batch_tokens * values * (4 if hardware.precision == "float32" else 2)


def check_memory(shape: Shape, settings: TrainSettings, hardware: Hardware) -> None:
    """Refuse to start what cannot fit beside half a gigabyte for the program itself.

    Raises:
        UserError: the estimate exceeds the free memory; says what to change.
    """
    needed = sum(memory_needed(shape, settings, hardware)) + 0.5e9
    if hardware.device == "cpu":
        needed *= local_process_count()
    free = free_memory(hardware.device)
    if free is not None and needed > free:
        raise UserError(
            f"training needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {_smaller(settings)}"
        )


def _smaller(settings: TrainSettings) -> str:
    ways = ["lower train.batch_tokens"]
    if not settings.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing to true")
    if settings.method == "lora":
        ways.append("set train.method to qlora")
    return f"{', '.join(ways)}, or choose a smaller base.model"


def free_memory(device: str) -> int | None:
    """Bytes free for this process on `device`, or None where the system does not say."""
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    known = [free for free in (_system_memory(), group_memory()) if free is not None]
    return min(known, default=None)


def _system_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def group_memory(top: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the limits of a container or of a job of Slurm leave (cgroup v2), or None where there is no limit.

    Files that the system has cached count as used there, but give way.
    """
    try:
        inner = next(line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    left = []
    group = top / inner.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(top):
            break
        try:
            limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            left.append(int(limit) - used + int(cached.get("inactive_file", 0)))
    return min(left, default=None)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_key(
    settings: TrainSettings, rows: Sequence[Row], base_sha256: str, validation: Sequence[Row] = ()
) -> str:
    """Name of the folder that may hold this run's checkpoints: "<inputs>-<code>", two hashes.

    Inputs are settings, data, base and kind of machine: a GPU, two cores or several processes divide the rows in their
    own ways. Code is that of the training folder, with the versions of the packages that it calls. Hence a run never
    resumes from a checkpoint that it would not have written itself.
    """
    hardware = detect_hardware(settings.precision, settings.threads)
    machine = f"{hardware.device} {hardware.precision} {lanes(settings, hardware)} {process_count()}"
    digest = hashlib.sha256(settings.model_dump_json().encode() + base_sha256.encode() + machine.encode())
    for split in (rows, validation):
        digest.update(b"split")
        for row in split:
            digest.update(json.dumps([row.id, row.input_ids, row.labels]).encode())
    code = hashlib.sha256(json.dumps([code_sha256("training"), versions()]).encode())
    return f"{digest.hexdigest()[:24]}-{code.hexdigest()[:16]}"


def is_outdated(checkpoints: Path) -> bool:
    """Whether other code or other packages wrote checkpoints of the same inputs, which this run may not go on from."""
    inputs, _, code = checkpoints.name.rpartition("-")
    return bool(inputs and code) and any(checkpoints.parent.glob(f"{inputs}-*/checkpoint-*/{CHECKPOINT_COMPLETE}"))


@contextmanager
def alone_with(checkpoints: Path) -> Iterator[None]:
    """Wait until nobody else trains into the same folder, such as a run that outlived the pipeline that started it."""
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
    """The newest checkpoint that was written whole; half-written ones are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / CHECKPOINT_COMPLETE).is_file():
            complete.append(path)
        elif is_main_process():
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def mark_complete(checkpoint: Path) -> None:
    """Put a checkpoint's bytes on disk, then its mark: a crash in between leaves it unmarked."""
    for file in checkpoint.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    (checkpoint / CHECKPOINT_COMPLETE).touch()


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints, their marks first: a crash in between leaves none that looks whole."""
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
