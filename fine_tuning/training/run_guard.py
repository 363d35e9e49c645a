"""What watches a run: progress, limits, Ctrl-C, early stopping, losses that are no number, whole checkpoints."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from fine_tuning.errors import UserError
from fine_tuning.records import replacing
from fine_tuning.training.training_utils import TrainSettings, is_main_process, mark_complete

Progress = Callable[[dict[str, float]], None]


class RunGuard(TrainerCallback):
    """Reports progress, stops on time, on patience, on Ctrl-C or on a loss that is no number, marks whole checkpoints.

    What it knows of earlier measurements it reads from the trainer's state, which checkpoints keep: a resumed run
    decides as an uninterrupted one would.
    """

    def __init__(self, settings: TrainSettings, progress: Progress | None) -> None:
        self.settings = settings
        self.progress = progress
        self.started = time.monotonic()
        self.interrupted = False

    @contextlib.contextmanager
    def stopping_on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C end the training after the step under way, with a checkpoint; a second one ends it at once."""

        def note(number: int, frame: Any) -> None:
            print("train: stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
            self.interrupted = True
            signal.signal(signal.SIGINT, previous)

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
        """Pass a step's numbers on."""
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the training loss became {logs['loss']} at step {state.global_step}: lower train.learning_rate; "
                "the checkpoints before it are kept"
            )
        if self.progress:
            self.progress({**logs, "step": state.global_step, "steps": state.max_steps})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop when the minutes are over, and on Ctrl-C with a checkpoint."""
        limit = self.settings.max_minutes
        if limit and time.monotonic() - self.started > 60 * limit:
            control.should_training_stop = True
        if self.interrupted:
            control.should_training_stop = control.should_save = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> Any:
        """Keep the best adapter, and stop when `early_stopping_patience` measurements brought no gain."""
        patience = self.settings.early_stopping_patience
        if not patience:
            return control
        measured = validation_history(state)
        best = best_step(state)
        if best == state.global_step and is_main_process():
            weights = get_peft_model_state_dict(model, save_embedding_layers=False)
            with replacing(self.best_file(Path(args.output_dir), state)) as file:
                file.write(safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}))
        since = sum(step > best for step in measured)
        if since >= patience:
            control.should_training_stop = True
        return control

    def best_file(self, folder: Path, state: Any) -> Path:
        """Where the weights of the best measurement so far are kept."""
        return folder / f"best-{best_step(state)}.safetensors"

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written as whole."""
        if is_main_process():
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def validation_history(state: Any) -> dict[int, float]:
    """Validation loss by step, as the trainer's state has it."""
    return {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}


def best_step(state: Any) -> int:
    """The step with the lowest validation loss, the earliest of equals."""
    history = validation_history(state)
    return min(history, key=lambda step: (history[step], step))
