"""models/base and the prepared train and validation rows in; models/adapter, metrics and the loss curve out."""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from fine_tuning.data_preparation.tokenizer import load_tokenizer, render
from fine_tuning.errors import UserError, count_of, run
from fine_tuning.project import artifact_root, git_commit, main_checkout, sha256_file, tracking_uri, versions
from fine_tuning.records import read_json, write_csv, write_json
from fine_tuning.settings import read_params
from fine_tuning.training.base_model import read_base_card
from fine_tuning.training.lora_trainer import Progress, TrainingResult, train_adapter
from fine_tuning.training.model_card import model_card
from fine_tuning.training.speed import SPEED, expected, read_speed, record_speed
from fine_tuning.training.tracking import Run, find_adapter, flatten, open_store, tracked_run
from fine_tuning.training.training_utils import (
    TrainSettings,
    alone_with,
    check_only_assistants_train,
    checkpoint_key,
    is_main_process,
    read_rows,
    remove_checkpoints,
)

BASE = Path("models/base")
TRAIN = Path("data/prepared/train.parquet")
VALIDATION = Path("data/prepared/validation.parquet")
PREPARED = Path("metrics/prepare.json")  # only told: what is trained depends on the rows alone
CAPS = ("max_train_tokens", "max_sample_tokens")
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/train.json")
LOSS_CURVE = Path("metrics/plots/train_loss.csv")
VALIDATION_CURVE = Path("metrics/plots/validation_loss.csv")
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm")
SCRATCH = main_checkout() / ".whetstone"


def main() -> None:
    settings = read_params("train", TrainSettings)
    client, experiment = open_store(tracking_uri(), artifact_root(), SCRATCH / "mlflow.lock")
    start = find_adapter(client, experiment, settings.start_from, SCRATCH / "start") if settings.start_from else None
    if settings.launch != "single" and "RANK" not in os.environ:
        launch(settings.launch)
    rows, validation = read_rows(TRAIN), read_rows(VALIDATION)
    check_only_assistants_train([*rows, *validation], load_tokenizer(BASE), {reply_opener()})
    base = read_base_card(BASE)
    checkpoints = SCRATCH / "checkpoints" / checkpoint_key(settings, rows, base["sha256"], validation)

    def train(progress: Progress | None) -> TrainingResult:
        name = base["model"]
        return train_adapter(BASE, name, rows, validation, settings, ADAPTER, checkpoints, progress, start)

    if not is_main_process():
        in_the_background(train)
        return
    parameters = flatten(settings.model_dump())
    commit, dirty = git_commit(Path.cwd())
    tags = {"git_commit": commit or "none", "git_dirty": str(dirty), "base_model": base["model"]}
    tags |= {f"version_{name}": version for name, version in versions().items()}
    with alone_with(checkpoints):
        with (
            tracked_run(client, experiment, "pipeline", {}, tags) as pipeline,
            tracked_run(client, experiment, "train", parameters, tags, parent=pipeline, system_metrics=True) as tracked,
        ):
            tokens = sum(len(row.input_ids) for row in rows)
            for line in announce(settings, len({row.id for row in rows}), tokens):
                print(f"train: {line}", flush=True)
            with progress_bar(tracked) as progress:
                result = train(progress)
            metrics = quality(result)
            write_json(METRICS, metrics)
            write_curves(result)
            hashes = {"train": sha256_file(TRAIN), "validation": sha256_file(VALIDATION)}
            (ADAPTER / "README.md").write_text(model_card(base, parameters, metrics, hashes))
            for run in (pipeline, tracked):
                run.tag(adapter_sha256=sha256_file(ADAPTER / "adapter_model.safetensors"))
                run.tag(**{name: str(value) for name, value in asdict(result.hardware).items()})
            tracked.log_metrics({**metrics, **speed(result)})
            pipeline.log_artifacts(ADAPTER, "adapter")
        remove_checkpoints(checkpoints)
    record_speed(main_checkout() / SPEED, result.tokens_per_second, f"{base['model']}, {settings.method}")
    print(summary(settings, result))


def announce(settings: TrainSettings, conversations: int, tokens: int) -> Iterator[str]:
    """What is about to be trained on, for how long, and what limits it. It only tells: no output depends on it."""
    yield (
        f"{settings.method} on {count_of(conversations, 'conversation')}, {tokens} tokens, "
        f"train.epochs {settings.epochs:g}: {expected(tokens, settings, read_speed(main_checkout() / SPEED))}"
    )
    left_out = read_json(PREPARED).get("left_out", {}) if PREPARED.is_file() else {}
    caps = [f"prepare.{name} ({count_of(n, 'conversation')} left out)" for name in CAPS if (n := left_out.get(name))]
    if settings.max_steps is not None:
        caps.append(f"train.max_steps ({settings.max_steps})")
    yield f"limited by {' and '.join(caps)}" if caps else "no parameter limits it"


def launch(name: str) -> None:
    """Start this stage anew in the processes that the configuration asks for, and end when they have ended.

    On a CPU they talk through gloo. Ctrl-C reaches each of them through the launcher.

    Raises:
        UserError: the machine has fewer GPUs than processes are asked for.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch import cuda
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    config = f"configs/accelerate/{name}.yaml"
    asked = yaml.safe_load(Path(config).read_text())
    here = asked["num_processes"] // asked["num_machines"]
    if cuda.is_available() and cuda.device_count() < here:
        raise UserError(f"{config} asks for {here} processes here and there are {cuda.device_count()} GPUs: set fewer")
    # What goes wrong is told by the process that it went wrong in.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", config, "-m", "stages.train"]))
    except ChildFailedError:
        sys.exit(1)
    except SignalException:
        raise KeyboardInterrupt from None
    sys.exit(0)


def in_the_background(train: Any) -> None:
    """Train as one of the processes that write nothing."""
    try:
        train(None)
    except UserError:
        # The main process meets the same and says so; the launcher then ends this one before it repeats it.
        time.sleep(10)
        raise


def summary(settings: TrainSettings, result: TrainingResult) -> str:
    """What a run took and brought, in one line, and in another that it made things worse."""
    weights = f"{result.base_weights.held_mb:.0f} MB"
    if settings.method == "qlora":
        weights += f" in four bits instead of {result.base_weights.lora_mb:.0f} MB"
    memory = f"{result.peak_memory_mb:.0f} MB at most"
    said = (
        f"train: {result.steps} steps on {result.hardware.name} in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s), validation loss {result.validation_loss_before:.3f} -> "
        f"{result.validation_loss:.3f}; the base's weights took {weights}, the whole run "
        + (memory if settings.launch == "single" else f"{memory} in this process, of several")
    )
    if result.validation_loss > result.validation_loss_before:
        said += "\ntrain: the validation loss rose: lower train.learning_rate, or train.epochs"
    return said


def reply_opener() -> str:
    """What the chat template writes right before a reply."""
    tokenizer, user = load_tokenizer(BASE), [{"role": "user", "content": "?"}]
    asked = render(tokenizer, user, None, add_generation_prompt=True).text
    return asked.removeprefix(render(tokenizer, user, None).text)


@contextmanager
def progress_bar(tracked: Run) -> Iterator[Progress]:
    """A bar on a terminal, ten lines elsewhere, with tokens/s and the time left; and every step in MLflow."""
    bar = tqdm(unit="step", desc="train", disable=None)
    pace = Pace()

    def show(values: dict[str, float]) -> None:
        step, steps = int(values["step"]), int(values["steps"])
        tracked.log_step({name: values[name] for name in CURVES if name in values}, step)
        if "loss" not in values:
            return
        pace.note(step, values["num_input_tokens_seen"])
        if bar.total is None:
            bar.total, bar.initial, bar.n = steps, step - 1, step - 1
        bar.set_postfix_str(f"loss {values['loss']:.3f}{pace.speed()}")
        bar.update(step - bar.n)
        if bar.disable and step % max(1, steps // 10) == 0:
            said = f"loss {values['loss']:.3f}{pace.speed()}{pace.left(steps)}"
            print(f"train: step {step} of {steps}, {said}", flush=True)

    try:
        yield show
    finally:
        bar.close()


class Pace:
    """How quickly the steps of this session come, those before an interruption left out."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.step, self.tokens = 0, 0.0

    def note(self, step: int, tokens: float) -> None:
        """A step has ended; `tokens` were seen since the run began."""
        self.step, self.tokens = step, tokens
        if self.first is None:
            # What came before the first step, loading the base above all, is no training.
            self.started, self.first = time.monotonic(), (step, tokens)

    def speed(self) -> str:
        """Tokens a second, padding left out, from the second step on."""
        return f", {(self.tokens - self.first[1]) / self._seconds():.0f} tokens/s" if self._known() else ""

    def left(self, steps: int) -> str:
        """The time until the last of `steps` at this pace, from the second step on."""
        if not self._known():
            return ""
        seconds = self._seconds() / (self.step - self.first[0]) * (steps - self.step)
        return f", {tqdm.format_interval(seconds)} left"

    def _known(self) -> bool:
        return self.first is not None and self.step > self.first[0]

    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started)


def quality(result: TrainingResult) -> dict[str, float]:
    """What depends on data and parameters alone: it is the same in every clone."""
    return {
        "validation_loss_before": result.validation_loss_before,
        "validation_loss": result.validation_loss,
        # Larger ones are no floats any more.
        "validation_perplexity": math.exp(min(result.validation_loss, 700.0)),
        "train_loss": result.train_loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "trainable_parameters": result.trainable_parameters,
    }


def speed(result: TrainingResult) -> dict[str, float]:
    """What depends on the machine: it goes to MLflow only."""
    return {
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_mb": result.peak_memory_mb,
        "base_weights_mb": result.base_weights.held_mb,
        "base_weights_lora_mb": result.base_weights.lora_mb,
    }


def write_curves(result: TrainingResult) -> None:
    """Loss, learning rate and gradient norm by step, and validation loss by step, for `dvc plots`."""
    steps = [entry for entry in result.history if "loss" in entry]
    columns = ["step", "loss", "learning_rate", "grad_norm"]
    write_csv(LOSS_CURVE, columns, ([entry[name] for name in columns] for entry in steps))
    measured = [[entry["step"], entry["eval_loss"]] for entry in result.history if "eval_loss" in entry]
    write_csv(VALIDATION_CURVE, ["step", "validation_loss"], [[0, result.validation_loss_before], *measured])


if __name__ == "__main__":
    run(main)
