"""Progress of a run: a bar on a terminal, lines elsewhere, with tokens a second and the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from fine_tuning.training.run_guard import Progress
from fine_tuning.training.tracking import Run

CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm")


@contextmanager
def progress_bar(tracked: Run) -> Iterator[Progress]:
    """A bar on a terminal, ten lines elsewhere; every step is logged to `tracked`."""
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
            line = f"loss {values['loss']:.3f}{pace.speed()}{pace.left(steps)}"
            print(f"train: step {step} of {steps}, {line}", flush=True)

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
