"""Training: this trainer, plain transformers.Trainer with peft, and TRL's SFTTrainer on the same rows.

    make repro && python -m benchmarks.training [--tokens 6000] [--packing]

Each runs in a process of its own on the same conversations, base, adapter and number format, TRL with the settings
that serve it best here: no gradient checkpointing, the hardware's own number format, rows grouped by length. Printed
are tokens a second without padding, peak memory, the ratio to TRL, and the share of the floor: the time that the
matrix products of every token of every row would take at the best speed measured for them before and after each run.
(Who computes what rows have in common only once has fewer to do.) Before that, each gives its loss for the same rows:
they have to agree, or the speeds would be of different things.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fine_tuning.settings import read_params
from fine_tuning.training.training_utils import Row, TrainSettings, detect_hardware, read_rows

BASE, TRAIN = Path("models/base"), Path("data/prepared/train.parquet")
CONTENDERS = ("whetstone", "transformers", "trl")
ROWS_A_BATCH = 8
CHECKED_ROWS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--packing", action="store_true", help="TRL and this trainer pack rows: for GPUs")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.tokens, arguments.packing)))
        return
    results, rates = {}, [product_rate()]
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.training", "--one", name, "--tokens", str(arguments.tokens)]
        done = subprocess.run(command + ["--packing"] * arguments.packing, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} did not run: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        rates.append(product_rate())
        print(f"{name}: {results[name]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    report(results, max(rates) / operations_a_token(chosen_rows(arguments.tokens)))


def report(results: dict[str, dict[str, Any]], floor: float) -> None:
    """Print the table; losses that differ by more than a thousandth are called out."""
    peer = results.get("trl", {}).get("tokens_per_second")
    print(f"{'trainer':14}{'tokens/s':>10}{'to TRL':>9}{'of floor':>10}{'peak MB':>9}   losses of the same rows")
    for name, result in results.items():
        speed = result["tokens_per_second"]
        ratio = f"{speed / peer:.2f}x" if peer else "-"
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
        print(f"{name:14}{speed:10.1f}{ratio:>9}{speed / floor:10.0%}{result['peak_memory_mb']:9.0f}   {losses}")
    print(f"floor: {floor:.0f} tokens/s")
    first = next(iter(results.values()))["losses"]
    for name, result in results.items():
        if any(abs(a - b) > 1e-3 * a for a, b in zip(first, result["losses"], strict=True)):
            print(f"the losses of {name} differ: its speed is not comparable")


def chosen_rows(tokens: int) -> list[Row]:
    """The first training rows with so many tokens together."""
    rows, total = [], 0
    for row in read_rows(TRAIN):
        if total + len(row.input_ids) > tokens and rows:
            break
        rows.append(row)
        total += len(row.input_ids)
    return rows


def operations_a_token(rows: list[Row]) -> float:
    """Floating-point operations of the matrix products that a token takes.

    Forward and backward through frozen weights are 2 products each of 2 operations a weight and token; the head's are
    the same, for labels only.
    """
    import torch

    from fine_tuning.training.base_model import load_model

    model = load_model(BASE, torch.float32)
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    tokens = sum(len(row.input_ids) for row in rows)
    labels = sum(label != -100 for row in rows for label in row.labels)
    return 4 * body + 4 * head * labels / tokens


def product_rate() -> float:
    """Operations a second of a product of the base's own shapes: the best of three."""
    import torch

    hardware = detect_hardware("auto", None)
    torch.set_num_threads(hardware.threads)
    config = json.loads((BASE / "config.json").read_text())
    dtype = getattr(torch, hardware.precision)
    x = torch.randn(512, config["hidden_size"], dtype=dtype, device=hardware.device)
    w = torch.randn(config["intermediate_size"], config["hidden_size"], dtype=dtype, device=hardware.device)
    repeats = 200 if hardware.device == "cuda" else 60
    rates = []
    for _ in range(3):
        (x @ w.t()).sum().item()
        started = time.perf_counter()
        for _ in range(repeats):
            y = x @ w.t()
        y.sum().item()
        rates.append(repeats * 2 * x.shape[0] * w.numel() / (time.perf_counter() - started))
    return max(rates)


def measure(name: str, tokens: int, packing: bool) -> dict[str, Any]:
    """Train one epoch with one of the trainers: tokens a second, peak memory, losses of the checked rows."""
    settings = read_params("train", TrainSettings).model_copy(
        update={"epochs": 1.0, "max_steps": None, "validations": 1, "packing": packing, "early_stopping_patience": None}
    )
    rows = chosen_rows(tokens)
    with tempfile.TemporaryDirectory() as folder:
        run = run_whetstone if name == "whetstone" else run_transformers if name == "transformers" else run_trl
        return run(rows, settings, Path(folder))


def run_whetstone(rows: list[Row], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """This project's trainer."""
    from fine_tuning.training import lora_trainer

    losses = []
    for row in rows[:CHECKED_ROWS]:
        once = settings.model_copy(update={"max_steps": 1})
        result = lora_trainer.train_adapter(BASE, "base", [row], [row], once, folder / "x", folder / row.id)
        losses.append(result.validation_loss_before)
    result = lora_trainer.train_adapter(BASE, "base", rows, rows[:1], settings, folder / "a", folder / "c")
    return {
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_mb": result.peak_memory_mb,
        "losses": losses,
    }


def run_transformers(rows: list[Row], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """transformers.Trainer on padded batches, peft's own layers, logits at every position."""
    from transformers import Trainer, TrainingArguments

    from fine_tuning.training.training_utils import collate

    model, hardware = adapted_base(settings)
    arguments = TrainingArguments(**common_arguments(settings, hardware, folder))
    pad = model.config.get_text_config().pad_token_id or 0

    def as_dataset(chosen: list[Row]) -> list[dict[str, Any]]:
        return [{"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in chosen]

    def pad_batch(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return collate([Row(**row) for row in batch], pad)

    trainer = Trainer(model, arguments, train_dataset=as_dataset(rows), data_collator=pad_batch)
    return run_trainer(trainer, rows, [as_dataset([row]) for row in rows[:CHECKED_ROWS]], hardware)


def run_trl(rows: list[Row], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer on rows that are tokenised and labelled already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from fine_tuning.data_preparation.tokenizer import load_tokenizer

    def as_dataset(chosen: list[Row]) -> Dataset:
        return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in chosen])

    model, hardware = adapted_base(settings)
    arguments = SFTConfig(
        **common_arguments(settings, hardware, folder),
        packing=settings.packing,
        max_length=settings.batch_tokens if settings.packing else None,
        eval_packing=False,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=as_dataset(rows), processing_class=load_tokenizer(BASE))
    return run_trainer(trainer, rows, [as_dataset([row]) for row in rows[:CHECKED_ROWS]], hardware)


def adapted_base(settings: TrainSettings) -> tuple[Any, Any]:
    """The base with a new adapter, and the hardware it runs on."""
    import torch
    from transformers import set_seed

    from fine_tuning.training.lora_trainer import attach_adapter, load_base

    hardware = detect_hardware(settings.precision, settings.threads)
    torch.set_num_threads(hardware.threads)
    set_seed(settings.seed)
    return attach_adapter(load_base(BASE, settings, hardware), settings), hardware


def common_arguments(settings: TrainSettings, hardware: Any, folder: Path) -> dict[str, Any]:
    """Arguments that give both peers the conditions of this trainer."""
    return {
        "output_dir": str(folder),
        "seed": settings.seed,
        "num_train_epochs": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "per_device_train_batch_size": ROWS_A_BATCH,
        "per_device_eval_batch_size": 1,
        "train_sampling_strategy": "random" if settings.packing else "group_by_length",
        "remove_unused_columns": False,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.precision == "bfloat16",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1000,
    }


def run_trainer(trainer: Any, rows: list[Row], checked: list[Any], hardware: Any) -> dict[str, Any]:
    """Losses of the checked rows, then one epoch against the clock."""
    from fine_tuning.training.lora_trainer import peak_memory_mb

    losses = [trainer.evaluate(dataset)["eval_loss"] for dataset in checked]
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    tokens = sum(len(row.input_ids) for row in rows)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_memory_mb": peak_memory_mb(hardware),
        "losses": losses,
    }


if __name__ == "__main__":
    main()
