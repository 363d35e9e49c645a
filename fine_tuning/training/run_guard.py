"""Callbacks of a run: progress, Ctrl-C, early stopping, non-finite losses, complete checkpoints."""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing
from fine_tuning.runtime.hardware import is_main_process, process_count
from fine_tuning.training.checkpoints import mark_complete
from fine_tuning.training.processes import agree, reshard
from fine_tuning.training.settings import TrainSettings

Progress = Callable[[dict[str, float]], None]
GO_ON, STOP_AND_SAVE = 0, 1


class RunGuard(TrainerCallback):
    """Reports progress, stops early, on Ctrl-C or on a non-finite loss, and marks complete checkpoints.

    What it knows of earlier measurements it reads from the trainer's state, which checkpoints keep: a resumed run
    decides as an uninterrupted one would. Several processes decide together: each would wait for the others.
    """

    def __init__(self, settings: TrainSettings, progress: Progress | None) -> None:
        self.settings = settings
        self.progress = progress
        self.interrupted = False

    @contextlib.contextmanager
    def stopping_on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C end the training after the current step, with a checkpoint; a second one ends it at once.

        Where several processes train, their launcher passes Ctrl-C on to each, and ends them after half a minute.
        """

        def note(number: int, frame: Any) -> None:
            self.interrupted = True
            again = ""
            if process_count() == 1:
                again = "; Ctrl-C again stops at once"
                signal.signal(signal.SIGINT, previous)
            if is_main_process():
                print(f"train: stopping after this step{again}", file=sys.stderr, flush=True)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.interrupted:
            raise KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        check_loss("training", logs.get("loss", 0.0), state.global_step)
        check_loss("validation", logs.get("eval_loss", 0.0), state.global_step)
        if self.progress:
            self.progress({**logs, "step": state.global_step, "steps": state.max_steps})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if agree(STOP_AND_SAVE if self.interrupted else GO_ON) == STOP_AND_SAVE:
            self.interrupted = control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> Any:
        """Keep the best adapter, and stop when `early_stopping_patience` measurements brought no gain."""
        if not self.settings.early_stopping_patience:
            return control
        if best_step(state) == state.global_step and is_main_process():
            weights = get_peft_model_state_dict(model, save_embedding_layers=False)
            with replacing(Path(args.output_dir) / _best_name(state.global_step)) as file:
                file.write(safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}))
        reshard(model)
        # Every process waits here until the file is written.
        control.should_training_stop |= bool(agree(int(out_of_patience(self.settings, state))))
        return control

    def best_file(self, folder: Path, state: Any) -> Path | None:
        """Where the weights of the best measurement so far are; None where the last weights are the ones to keep."""
        step = best_step(state) if self.settings.early_stopping_patience else None
        return None if step is None else folder / _best_name(step)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written, by all processes, as complete. Raises UserError if its weights are
        no numbers; it stays unmarked, and those before it are kept."""
        for parameter in model.parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                check_loss("next training", math.nan, state.global_step)
        reshard(model)
        agree(GO_ON)  # each has written its part
        if is_main_process():
            folder = Path(args.output_dir)
            mark_complete(folder / f"checkpoint-{state.global_step}")
            _drop_old_bests(folder, state)


def check_loss(name: str, loss: float, step: int) -> None:
    """Raises UserError unless a loss is finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"the {name} loss became {loss} at step {step}: lower train.learning_rate; the checkpoints before it are "
            "kept"
        )


def is_over(settings: TrainSettings, state: Any) -> bool:
    """Whether the run of a checkpoint's state had ended."""
    return state.global_step >= state.max_steps or out_of_patience(settings, state)


def out_of_patience(settings: TrainSettings, state: Any) -> bool:
    """Whether the last `early_stopping_patience` measurements brought no gain."""
    patience, history = settings.early_stopping_patience, validation_history(state)
    return patience is not None and sum(step > best_step(state) for step in history) >= patience


def validation_history(state: Any) -> dict[int, float]:
    """Validation loss by step, as the trainer's state has it."""
    return {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}


def best_step(state: Any, last: float = math.inf) -> int | None:
    """The step up to `last` with the lowest validation loss, the earliest of equals; None if nothing was measured."""
    history = {step: loss for step, loss in validation_history(state).items() if step <= last}
    return min(history, key=lambda step: (history[step], step), default=None)


def _best_name(step: int) -> str:
    return f"best-{step}.safetensors"


def _drop_old_bests(folder: Path, state: Any) -> None:
    """Remove best weights that no run resumed from a kept checkpoint could return to."""
    oldest = min(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    needed = best_step(state, oldest) or 0
    for path in folder.glob("best-*.safetensors"):
        if int(path.stem.split("-")[1]) < needed:
            path.unlink()
