"""Training: this trainer, plain transformers.Trainer with peft, and TRL's SFTTrainer on the same rows.

    make repro && python -m benchmarks.training [--tokens 6000] [--batch-tokens 512] [--shape 1b | 3b | 8b] [--profile]

Each runs in a process of its own on the same conversations, base, adapter, number format and tokens a batch, TRL with
the settings that serve it best: no gradient checkpointing, rows grouped by length, and on a GPU Liger's kernels, once
with rows grouped by length and once with rows packed. Printed are tokens a second without padding, peak memory, the
ratio to the quicker TRL, and the share of the floor: the time that the matrix products of every token of every row
would take at the best speed measured for them before and after each run. (Who computes what rows have in common only
once has fewer to do.) Before that, each gives its loss for the same rows: they have to agree, or the speeds would be of
different things. On a GPU each trains on some rows before the clock starts, since kernels are compiled or chosen then;
what this trainer records (CUDA graphs) is recorded while it runs.

`--shape` takes random weights of the shape of Llama 3.2 1B or 3B or of Llama 3.1 8B instead of the base: speed and
memory do not depend on the values. `train.method` in params.yaml chooses between LoRA and QLoRA.

`--profile` instead says what a step of this trainer on one core is made of.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fine_tuning.common.settings import read_params
from fine_tuning.runtime.hardware import Hardware, detect_hardware
from fine_tuning.schema.prepared import PreparedRow, read_rows
from fine_tuning.training.settings import TrainSettings

BASE, TRAIN = Path("models/base"), Path("data/prepared/train")
ON_CPU = ("whetstone", "transformers", "trl")
ON_GPU = ("whetstone", "transformers", "trl", "trl packed")
PACKED_TOKENS = 2048  # of a packed row, which sees a mask of its length squared
CHECKED_ROWS = 3
OPERATIONS = {
    "attention": ("attention", "flash"),
    "optimiser and clipping": ("_fused_adam", "_foreach"),
    "copies": ("copy", "cat", "contiguous", "index", "gather"),
}
WARM_UP_STEPS = 5
VOCABULARY = 128_256
# Layers, width, width of the feed-forward layer, heads, heads of keys and values: the models' own config.json.
SHAPES = {"1b": (16, 2048, 8192, 32, 8), "3b": (28, 3072, 8192, 24, 8), "8b": (32, 4096, 14336, 32, 8)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch; train.batch_tokens if not given")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of the base")
    parser.add_argument("--profile", action="store_true", help="what a step is made of, on one core")
    parser.add_argument("--one", choices=ON_GPU, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape:
        global BASE
        BASE = random_base(arguments.shape)
    settings = read_params("train", TrainSettings)
    budget = arguments.batch_tokens or settings.batch_tokens
    settings = settings.model_copy(update={"batch_tokens": budget, "packing": arguments.one == "trl packed"})
    if arguments.profile:
        profile(chosen_rows(arguments.tokens), settings.model_copy(update={"threads": 1, "precision": "float32"}))
        return
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.tokens, settings)))
        return
    hardware = detect_hardware(settings.precision, settings.threads)
    results, rates = {}, [product_rate(hardware)]
    for name in ON_GPU if hardware.device == "cuda" else ON_CPU:
        command = [sys.executable, "-m", "benchmarks.training", "--one", name, "--tokens", str(arguments.tokens)]
        command += ["--batch-tokens", str(budget), *(["--shape", arguments.shape] if arguments.shape else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} did not run: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        rates.append(product_rate(hardware))
        print(f"{name}: {results[name]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    floor = max(rates) / operations_a_token(chosen_rows(arguments.tokens))
    report(results, floor, tolerance=1e-3 if hardware.precision == "float32" else 1e-2)


def report(results: dict[str, dict[str, Any]], floor: float, tolerance: float) -> None:
    """Print the table; losses that differ by more than that share are called out."""
    peer = max((result["tokens_per_second"] for name, result in results.items() if "trl" in name), default=None)
    print(f"{'trainer':14}{'tokens/s':>10}{'to TRL':>9}{'of floor':>10}{'peak MB':>9}   losses of the same rows")
    for name, result in results.items():
        speed = result["tokens_per_second"]
        ratio = f"{speed / peer:.2f}x" if peer else "-"
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
        print(f"{name:14}{speed:10.1f}{ratio:>9}{speed / floor:10.0%}{result['peak_memory_mb']:9.0f}   {losses}")
    print(f"floor: {floor:.0f} tokens/s")
    first = next(iter(results.values()))["losses"]
    for name, result in results.items():
        if any(abs(a - b) > tolerance * a for a, b in zip(first, result["losses"], strict=True)):
            print(f"the losses of {name} differ: its speed is not comparable")


def profile(rows: list[PreparedRow], settings: TrainSettings) -> None:
    """Print the shares of the time between the first step and the last."""
    import torch

    from fine_tuning.training import lora_trainer

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    at: list[float] = []

    def note(values: dict[str, float]) -> None:
        if "loss" in values and values["step"] in (1, values["steps"]):
            at.append(time.perf_counter())
            profiler.start() if len(at) == 1 else profiler.stop()

    settings = settings.model_copy(update={"epochs": 1.0, "max_steps": None, "validations": 1})
    rate = product_rate(detect_hardware("float32", 1))
    with tempfile.TemporaryDirectory() as folder:
        lora_trainer.train_adapter(BASE, "base", rows, rows[:1], settings, Path(folder, "a"), Path(folder, "c"), note)
    rate, seconds = max(rate, product_rate(detect_hardware("float32", 1))), at[1] - at[0]
    found: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        name, spent = event.key.removeprefix("aten::").rstrip("_"), event.self_cpu_time_total / 1e6
        if name in ("mm", "addmm", "bmm"):
            (*_, m, k), (*_, n) = [shape for shape in event.input_shapes if len(shape) > 1][-2:]
            adapter = min(m, k, n) <= 3 * settings.lora.rank
            if not adapter:
                floor = 2 * m * k * n * event.count / rate
                found["products with frozen weights, at the best speed"] += floor
                spent -= floor
            found["low-rank products" if adapter else "the same, slower than at the best speed"] += spent
        elif event.key.startswith("aten::"):  # not what only calls operations
            groups = (group for group, names in OPERATIONS.items() if any(part in name for part in names))
            found[next(groups, "norms, activations, rotary embedding, sums, loss")] += spent
    found["outside of operations: Python, the trainer"] = seconds - sum(found.values())
    for group, spent in sorted(found.items(), key=lambda pair: -pair[1]):
        print(f"| {group} | {spent / seconds:.0%} |")


def random_base(shape: str) -> Path:
    """A folder of random weights in bfloat16, with the tokenizer of the base; written once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(".whetstone/shapes") / shape
    if (folder / "config.json").is_file():
        return folder
    layers, width, inner, heads, pairs = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=shape != "8b", dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for file in BASE.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def chosen_rows(tokens: int) -> list[PreparedRow]:
    """The first training rows with so many tokens together; from the first again where there are not as many."""
    rows, total = [], 0
    for count, row in enumerate(itertools.cycle(read_rows(TRAIN))):
        total += len(row.input_ids)
        if total > tokens and rows:
            return rows
        rows.append(PreparedRow(f"{count}-{row.id}", row.input_ids, row.labels))
    return rows


def operations_a_token(rows: list[PreparedRow]) -> float:
    """Floating-point operations of the matrix products that a token takes.

    Forward and backward through frozen weights are 2 products each of 2 operations a weight and token; the head's are
    the same, for labels only.
    """
    import torch

    from fine_tuning.runtime.base_model import load_model

    model = load_model(BASE, torch.float32)
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    tokens = sum(len(row.input_ids) for row in rows)
    labels = sum(label != -100 for row in rows for label in row.labels)
    return 4 * body + 4 * head * labels / tokens


def product_rate(hardware: Hardware) -> float:
    """Operations a second of a product of the base's own shapes: the best of three."""
    import torch

    torch.set_num_threads(hardware.threads)
    config = json.loads((BASE / "config.json").read_text())
    dtype = getattr(torch, hardware.precision)
    tokens = 16384 if hardware.device == "cuda" else 512
    x = torch.randn(tokens, config["hidden_size"], dtype=dtype, device=hardware.device)
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


def measure(name: str, tokens: int, settings: TrainSettings) -> dict[str, Any]:
    """Train one epoch with one of the trainers: tokens a second, peak memory, losses of the checked rows."""
    settings = settings.model_copy(
        update={"epochs": 1.0, "max_steps": None, "validations": 1, "early_stopping_patience": None}
    )
    rows = chosen_rows(tokens)
    run = {"whetstone": run_whetstone, "transformers": run_transformers}.get(name, run_trl)
    with tempfile.TemporaryDirectory() as folder:
        return run(rows, settings, Path(folder))


def run_whetstone(rows: list[PreparedRow], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """This project's trainer."""
    from fine_tuning.training import lora_trainer

    losses = []
    for row in rows[:CHECKED_ROWS]:
        once = settings.model_copy(update={"max_steps": 1})
        result = lora_trainer.train_adapter(BASE, "base", [row], [row], once, folder / "x", folder / row.id)
        losses.append(result.validation_loss_before)
    if result.hardware.device == "cuda":
        few = settings.model_copy(update={"max_steps": WARM_UP_STEPS})
        lora_trainer.train_adapter(BASE, "base", rows, rows[:1], few, folder / "y", folder / "z")
    result = lora_trainer.train_adapter(BASE, "base", rows, rows[:1], settings, folder / "a", folder / "c")
    return {
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_mb": result.peak_memory_mb,
        "losses": losses,
    }


def run_transformers(rows: list[PreparedRow], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """transformers.Trainer on padded batches, peft's own layers, logits at every position."""
    from transformers import Trainer, TrainingArguments

    from fine_tuning.schema.prepared import collate

    model, hardware = adapted_base(settings)
    arguments = TrainingArguments(**common_arguments(rows, settings, hardware, folder))
    pad = model.config.get_text_config().pad_token_id or 0

    def as_dataset(chosen: list[PreparedRow]) -> list[dict[str, Any]]:
        return [{"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in chosen]

    def pad_batch(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return collate([PreparedRow(**row) for row in batch], pad)

    trainer = Trainer(model, arguments, train_dataset=as_dataset(rows), data_collator=pad_batch)
    return run_trainer(trainer, rows, [as_dataset([row]) for row in rows[:CHECKED_ROWS]], hardware)


def run_trl(rows: list[PreparedRow], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer on rows that are tokenised and labelled already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from fine_tuning.schema.chat_format import load_tokenizer

    def as_dataset(chosen: list[PreparedRow]) -> Dataset:
        return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in chosen])

    model, hardware = adapted_base(settings)
    longest = min(settings.batch_tokens, PACKED_TOKENS)
    common = common_arguments(rows, settings, hardware, folder)
    if settings.packing:
        common |= {"train_sampling_strategy": "random", "per_device_train_batch_size": settings.batch_tokens // longest}
    arguments = SFTConfig(
        **common,
        packing=settings.packing,
        max_length=longest if settings.packing else None,
        eval_packing=False,
        use_liger_kernel=hardware.device == "cuda",
    )
    trainer = SFTTrainer(model, arguments, train_dataset=as_dataset(rows), processing_class=load_tokenizer(BASE))
    return run_trainer(trainer, rows, [as_dataset([row]) for row in rows[:CHECKED_ROWS]], hardware)


def adapted_base(settings: TrainSettings) -> tuple[Any, Hardware]:
    """The base with a new adapter, and the hardware it runs on."""
    import torch
    from transformers import set_seed

    from fine_tuning.training.lora_trainer import attach_adapter, load_base

    hardware = detect_hardware(settings.precision, settings.threads)
    torch.set_num_threads(hardware.threads)
    set_seed(settings.seed)
    return attach_adapter(load_base(BASE, settings, hardware), settings), hardware


def common_arguments(
    rows: list[PreparedRow], settings: TrainSettings, hardware: Hardware, folder: Path
) -> dict[str, Any]:
    """Arguments that give both peers the conditions of this trainer."""
    mean_length = sum(len(row.input_ids) for row in rows) / len(rows)
    return {
        "output_dir": str(folder),
        "seed": settings.seed,
        "num_train_epochs": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "per_device_train_batch_size": max(1, round(settings.batch_tokens / mean_length)),
        "per_device_eval_batch_size": 1,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.precision == "bfloat16",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1000,
    }


def run_trainer(trainer: Any, rows: list[PreparedRow], checked: list[Any], hardware: Hardware) -> dict[str, Any]:
    """Losses of the checked rows, then one epoch against the clock."""
    from fine_tuning.training.lora_trainer import peak_memory_mb

    losses = [trainer.evaluate(dataset)["eval_loss"] for dataset in checked]
    if hardware.device == "cuda":
        trainer.args.max_steps = WARM_UP_STEPS
        trainer.train()
        trainer.args.max_steps = -1
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
