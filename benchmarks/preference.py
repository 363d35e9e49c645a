"""Preferences: this trainer's DPO and KTO beside TRL's DPOTrainer and KTOTrainer on the same pairs.

    make repro && python -m benchmarks.preference [--pairs 64] [--objective dpo | kto]

The pairs are made of training conversations: the chosen reply is theirs, the rejected one that of another. Each trainer
runs in a process of its own for one epoch in float32, TRL on tokens that are made already, with reference
log-likelihoods computed beforehand and rows grouped by length where it allows that. Printed are pairs a second (for KTO
replies a second), references included, peak memory, the ratio to TRL, and the loss of the first pairs alone after a
step on them: these have to agree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training import BASE, adapted_base, chosen_rows, common_arguments
from fine_tuning.common.settings import read_params
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.preferences import JudgedReply, Pair, rows_of
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.settings import TrainSettings

TRAINERS = ("whetstone", "trl")
BATCH = 8  # pairs of a batch of TRL's
CHECKED = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--objective", choices=("dpo", "kto"), default="dpo")
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.objective, arguments.pairs)))
        return
    results = {}
    for name in TRAINERS:
        more = ["--one", name, "--pairs", str(arguments.pairs), "--objective", arguments.objective]
        command = [sys.executable, "-m", "benchmarks.preference", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} did not run: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
    unit = "pairs/s" if arguments.objective == "dpo" else "replies/s"
    peer = results.get("trl", {}).get("per_second")
    print(f"{'trainer':12}{unit:>10}{'to TRL':>9}{'peak MB':>9}   losses")
    for name, result in results.items():
        ratio = f"{result['per_second'] / peer:.2f}x" if peer else "-"
        losses = " ".join(f"{loss:.5f}" for loss in result["losses"])
        print(f"{name:12}{result['per_second']:10.2f}{ratio:>9}{result['peak_memory_mb']:9.0f}   {losses}")
    found = [result["losses"] for result in results.values()]
    if len(found) == 2 and any(abs(a - b) > 1e-4 for a, b in zip(*found, strict=True)):
        print("the losses differ: the speeds are not comparable")


def measure(name: str, objective: str, count: int) -> dict[str, Any]:
    """Units a second, peak memory, and the losses of two steps on the first items."""
    read = read_params("train", TrainSettings)
    preference = read.preference.model_copy(update={"sft_weight": 0.0, "loss": "sigmoid", "label_smoothing": 0.0})
    changes = {"epochs": 1.0, "max_steps": None, "validations": 1, "precision": "float32", "preference": preference}
    settings = read.model_copy(update=changes)
    items = make_pairs(count) if objective == "dpo" else make_thumbs(count)
    run = run_whetstone if name == "whetstone" else run_trl
    with tempfile.TemporaryDirectory() as folder:
        longest = max(len(row.input_ids) for row in rows_of(items[:CHECKED]))
        one_batch = {"max_steps": 2, "batch_tokens": 2 * CHECKED * longest, "schedule": "constant"}
        once = settings.model_copy(update=one_batch)
        first = run(objective, items[:CHECKED], once, Path(folder) / "first")
        result = run(objective, items, settings, Path(folder) / "all")
    return result | {"losses": first["losses"][:2]}


def make_pairs(count: int) -> list[Pair]:
    """Pairs with the prompt and reply of a training row, and the reply of the next row as the rejected one."""
    rows = [row for row in chosen_rows(1000 * count) if reply_of(row)[0]][:count]
    pairs = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        prompt, said = split(row)
        rejected = split(other)[1]
        pairs.append(Pair(row.id, joined(f"{row.id}/c", prompt, said), joined(f"{row.id}/r", prompt, rejected)))
    return pairs


def make_thumbs(count: int) -> list[JudgedReply]:
    """Both sides of pairs in turn: the chosen one liked, the rejected one disliked."""
    thumbs = []
    for number, pair in enumerate(make_pairs(count)):
        row = pair.rejected if number % 2 else pair.chosen
        thumbs.append(JudgedReply(pair.id, row, row, not number % 2))
    mixed = []
    for at, thumb in enumerate(thumbs):
        # TRL takes the reply before it in a batch, the first one that of the last.
        start = at - at % BATCH
        batch = thumbs[start : start + BATCH]
        prompt, said = split(thumb.reply)[0], split(batch[(at - start - 1) % len(batch)].reply)[1]
        mixed.append(JudgedReply(thumb.id, thumb.reply, joined(f"{thumb.id}/m", prompt, said), thumb.liked))
    return mixed


def reply_of(row: PreparedRow) -> tuple[int, int]:
    """Where the last trained run of a row begins and ends."""
    end = max((at + 1 for at, label in enumerate(row.labels) if label != NOT_TRAINED), default=0)
    start = end
    while start and row.labels[start - 1] != NOT_TRAINED:
        start -= 1
    return start, end


def split(row: PreparedRow) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the reply)"""
    start, end = reply_of(row)
    return row.input_ids[:start], row.input_ids[start:end]


def joined(name: str, prompt: list[int], said: list[int]) -> PreparedRow:
    """A row of which the reply is trained."""
    return PreparedRow(name, prompt + said, [NOT_TRAINED] * len(prompt) + said)


def run_whetstone(objective: str, items: list[Any], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """This project's trainer."""
    from fine_tuning.training import lora_trainer

    seen: list[dict[str, float]] = []
    started = time.monotonic()
    result = lora_trainer.train_adapter(
        BASE, "base", items, items[:1], settings, folder / "adapter", folder / "checkpoints", seen.append
    )
    seconds = time.monotonic() - started
    losses = [values["loss"] for values in seen if "loss" in values]
    return {"per_second": len(items) / seconds, "peak_memory_mb": result.peak_memory_mb, "losses": losses}


def run_trl(objective: str, items: list[Any], settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """TRL's trainers on tokens."""
    import trl
    from datasets import Dataset

    from fine_tuning.schema.chat_format import load_tokenizer
    from fine_tuning.training.lora_trainer import peak_memory_mb

    kind, config = (trl.DPOTrainer, trl.DPOConfig) if objective == "dpo" else (trl.KTOTrainer, trl.KTOConfig)

    class Tokenised(kind):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    rows = []
    for item in items:
        if objective == "dpo":
            (prompt, chosen), (_, rejected) = split(item.chosen), split(item.rejected)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            (prompt, said), (_, other) = split(item.reply), split(item.mismatched)
            rows.append({"prompt_ids": prompt, "completion_ids": said, "KL_completion_ids": other, "label": item.liked})
    started = time.monotonic()
    model, hardware = adapted_base(settings)
    plain = [item.chosen if objective == "dpo" else item.reply for item in items]
    common = common_arguments(plain, settings, hardware, folder) | {
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "max_steps": settings.max_steps or -1,
        "logging_steps": 1,
        "beta": settings.preference.beta,
        "max_length": None,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "warmup_steps": 0,
    }
    trainer = Tokenised(
        model, args=config(**common), train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(BASE)
    )
    trainer.train()
    seconds = time.monotonic() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"per_second": len(items) / seconds, "peak_memory_mb": peak_memory_mb(hardware), "losses": losses}


if __name__ == "__main__":
    main()
