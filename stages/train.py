"""models/base and the prepared train and validation rows in; models/adapter, metrics and the loss curve out."""

import csv
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml
from tqdm import tqdm

from fine_tuning.data_preparation.tokenizer import load_tokenizer, render
from fine_tuning.errors import run
from fine_tuning.project import artifact_root, git_commit, main_checkout, sha256_file, tracking_uri
from fine_tuning.records import write_json
from fine_tuning.settings import read_params
from fine_tuning.training.base_model import read_base_card
from fine_tuning.training.lora_trainer import Progress, TrainingResult, train_adapter
from fine_tuning.training.model_card import model_card
from fine_tuning.training.tracking import Run, find_adapter, flatten, open_store, tracked_run, versions
from fine_tuning.training.training_utils import (
    TrainSettings,
    check_only_assistants_train,
    checkpoint_key,
    detect_hardware,
    is_main_process,
    read_rows,
    remove_checkpoints,
)

BASE = Path("models/base")
TRAIN = Path("data/prepared/train.parquet")
VALIDATION = Path("data/prepared/validation.parquet")
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/train.json")
CURVE = Path("metrics/plots/train_loss.csv")
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm")
SCRATCH = main_checkout() / ".whetstone"


def main() -> None:
    settings = read_params("train", TrainSettings)
    if settings.launch != "single" and "RANK" not in os.environ:
        launch(settings.launch)
    rows, validation = read_rows(TRAIN), read_rows(VALIDATION)
    check_only_assistants_train([*rows, *validation], load_tokenizer(BASE), {reply_opener()})
    base = read_base_card(BASE)
    checkpoints = SCRATCH / "checkpoints" / checkpoint_key(settings, rows, base["sha256"])

    def train(progress: Progress | None) -> TrainingResult:
        name = base["model"]
        return train_adapter(BASE, name, rows, validation, settings, ADAPTER, checkpoints, progress, start)

    client, experiment = open_store(tracking_uri(), artifact_root(), SCRATCH / "mlflow.lock")
    start = find_adapter(client, experiment, settings.start_from, SCRATCH / "start") if settings.start_from else None
    if not is_main_process():
        train(None)
        return
    parameters = flatten(settings.model_dump())
    commit, dirty = git_commit(Path.cwd())
    tags = {"git_commit": commit or "none", "git_dirty": str(dirty), "base_model": base["model"], **versions()}
    with (
        tracked_run(client, experiment, "pipeline", {}, tags) as pipeline,
        tracked_run(client, experiment, "train", parameters, tags, parent=pipeline, system_metrics=True) as tracked,
    ):
        tokens = sum(len(row.input_ids) for row in rows)
        print(f"train: {settings.method} on {len(rows)} conversations, {tokens} tokens", flush=True)
        with progress_bar(tracked) as progress:
            result = train(progress)
        metrics = quality(result)
        write_json(METRICS, metrics)
        write_curve(result)
        hashes = {"train": sha256_file(TRAIN), "validation": sha256_file(VALIDATION)}
        (ADAPTER / "README.md").write_text(model_card(base, parameters, metrics, hashes))
        for run in (pipeline, tracked):
            run.tag(adapter_sha256=sha256_file(ADAPTER / "adapter_model.safetensors"))
            run.tag(**{name: str(value) for name, value in asdict(result.hardware).items()})
        tracked.log_metrics({**metrics, **speed(result)})
        pipeline.log_artifacts(ADAPTER, "adapter")
    remove_checkpoints(checkpoints)
    print(
        f"train: {result.steps} steps on {result.hardware.name} in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s), validation loss {result.validation_loss_before:.3f} -> "
        f"{result.validation_loss:.3f}; the base's weights took {result.base_weights_mb:.0f} MB, the whole run "
        f"{result.peak_memory_mb:.0f} MB at most"
    )


def launch(name: str) -> None:
    """Start this stage anew in the processes that the configuration asks for; on a CPU they talk through gloo."""
    config = f"configs/accelerate/{name}.yaml"
    command = ["accelerate", "launch", "--config_file", config, "-m", "stages.train"]
    if detect_hardware("auto", None).device == "cpu":
        processes = yaml.safe_load(Path(config).read_text())["num_processes"]
        command = ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "stages.train"]
    os.execvp(command[0], command)


def reply_opener() -> str:
    """What the chat template writes right before a reply."""
    tokenizer, user = load_tokenizer(BASE), [{"role": "user", "content": "?"}]
    asked = render(tokenizer, user, None, add_generation_prompt=True).text
    return asked.removeprefix(render(tokenizer, user, None).text)


@contextmanager
def progress_bar(tracked: Run) -> Iterator[Progress]:
    """A bar on a terminal, ten lines elsewhere, and every step in MLflow."""
    bar = tqdm(unit="step", desc="train", disable=None)

    def show(values: dict[str, float]) -> None:
        step, steps = int(values["step"]), int(values["steps"])
        tracked.log_step({name: values[name] for name in CURVES if name in values}, step)
        if "loss" not in values:
            return
        bar.total = steps
        bar.set_postfix_str(f"loss {values['loss']:.3f}")
        bar.update(step - bar.n)
        if bar.disable and step % max(1, steps // 10) == 0:
            print(f"train: step {step} of {steps}, loss {values['loss']:.3f}", flush=True)

    try:
        yield show
    finally:
        bar.close()


def quality(result: TrainingResult) -> dict[str, float]:
    """What depends on data and parameters alone: it is the same in every clone."""
    return {
        "validation_loss_before": result.validation_loss_before,
        "validation_loss": result.validation_loss,
        "validation_perplexity": math.exp(result.validation_loss),
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
        "base_weights_mb": result.base_weights_mb,
    }


def write_curve(result: TrainingResult) -> None:
    """Loss, learning rate and gradient norm by step for `dvc plots`."""
    CURVE.parent.mkdir(parents=True, exist_ok=True)
    validation = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    with open(CURVE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss", "validation_loss", "learning_rate", "grad_norm"])
        for entry in result.history:
            if "loss" in entry:
                step = entry["step"]
                writer.writerow(
                    [step, entry["loss"], validation.get(step, ""), entry["learning_rate"], entry["grad_norm"]]
                )


if __name__ == "__main__":
    run(main)
