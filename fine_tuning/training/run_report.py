"""What a training run reports: an announcement, a summary, metrics and curves."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fine_tuning.common.errors import count_of
from fine_tuning.training.lora_trainer import TrainingResult
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.speed import Speed, expected

CAPS = ("max_train_tokens", "max_sample_tokens")
PREFERENCES = (*(f"{kind}_{what}" for what in ("accuracy", "margin", "kl") for kind in ("pairs", "thumbs")),
               "pairs_chosen", "pairs_rejected")  # fmt: skip
Curve = tuple[list[str], list[list[Any]]]


def announcement(
    settings: TrainSettings, conversations: int, tokens: int, left_out: Mapping[str, int], speed: Speed | None
) -> Iterator[str]:
    """What is about to be trained on, for how long, and which parameters limit it; `left_out` is {reason:
    conversations} of preparation. A run on pairs or thumbs alone has no `conversations`."""
    if settings.max_steps == 0:
        yield "the adapter of train.start_from is taken as it is (train.max_steps: 0); set both to null to train again"
        return
    what = f"{count_of(conversations, 'conversation')}, " if conversations else ""
    yield (
        f"{settings.method} on {what}{tokens} tokens, "
        f"train.epochs {settings.epochs:g}: {expected(tokens, settings, speed)}"
    )
    caps = [f"prepare.{name} ({count_of(n, 'conversation')} left out)" for name in CAPS if (n := left_out.get(name))]
    if settings.max_steps is not None:
        caps.append(f"train.max_steps ({settings.max_steps})")
    yield f"limited by {' and '.join(caps)}" if caps else "no parameter limits it"


def summary(settings: TrainSettings, result: TrainingResult) -> str:
    """One-line summary of a run; a second line warns when validation loss rose."""
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


def quality(result: TrainingResult) -> dict[str, float]:
    """What depends on data and parameters alone: it is the same in every clone."""
    losses = ("validation_loss_before", "validation_loss", "train_loss")
    names = (*losses, "steps", "tokens", "trained_tokens", "trainable_parameters")
    measured = {
        name.removeprefix("eval_"): v for name, v in result.validation.items() if "pairs" in name or "thumbs" in name
    }
    found = {name: value for name in names if (value := getattr(result, name)) is not None}
    if "eval_sft_loss" in result.validation or not measured:  # losses of pairs and thumbs alone are not nats a token
        found["validation_perplexity"] = math.exp(min(result.validation_loss, 700.0))  # exp() overflows above 709
    return found | measured


def speed(result: TrainingResult) -> dict[str, float]:
    """What depends on the machine: it goes to MLflow only."""
    weights = {"base_weights_mb": result.base_weights.held_mb, "base_weights_lora_mb": result.base_weights.lora_mb}
    return {name: getattr(result, name) for name in ("seconds", "tokens_per_second", "peak_memory_mb")} | weights


def learning_curve(result: TrainingResult) -> Curve:
    """Columns and rows: loss, learning rate and gradient norm by step."""
    columns = ["step", "loss", "learning_rate", "grad_norm"]
    return columns, [[entry[name] for name in columns] for entry in result.history if "loss" in entry]


def validation_curve(result: TrainingResult) -> Curve:
    """Columns and rows: validation loss by step, that before training at step 0."""
    measured = [[entry["step"], entry["eval_loss"]] for entry in result.history if "eval_loss" in entry]
    return ["step", "validation_loss"], [[0, result.validation_loss_before], *measured]


def preference_curve(result: TrainingResult) -> Curve:
    """Columns and rows: what was measured on validation pairs and thumbs by step; no rows where there were none."""
    measured = [entry for entry in result.history if any(f"eval_{name}" in entry for name in PREFERENCES)]
    return ["step", *PREFERENCES], [
        [entry["step"], *(entry.get(f"eval_{name}", "") for name in PREFERENCES)] for entry in measured
    ]
