"""Progress of a run: a bar on a terminal, lines elsewhere, with tokens a second and the time left."""

import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fine_tuning.common.project import main_checkout
from fine_tuning.common.stage_times import TRAINING
from fine_tuning.training.run_guard import Progress
from fine_tuning.training.tracking import Run

CURVES = ("loss", "learning_rate", "grad_norm")  # and all that is measured on the validation split


@contextmanager
def progress_bar(tracked: Run, curves: Mapping[Path, Mapping[str, str]]) -> Iterator[Progress]:
    """A bar on a terminal, ten lines elsewhere; every step is logged to `tracked`, and for the app in TRAINING.

    `curves` are CSV files that grow with the run, so that `dvc plots show` and DVC's extension draw it, and which value
    stands in which column.
    """
    for path, columns in curves.items():
        _write_row(path, list(columns), "w")
    live = main_checkout() / TRAINING
    live.parent.mkdir(exist_ok=True)
    live.write_text("step,steps,loss\n")
    bar = tqdm(unit="step", desc="train", disable=None)
    # Time, step and tokens at the end of this session's first step: before it the base was loaded.
    began: tuple[float, int, float] | None = None

    def show(values: dict[str, float]) -> None:
        nonlocal began
        step, steps = int(values["step"]), int(values["steps"])
        tracked.log_step(
            {name: value for name, value in values.items() if name in CURVES or name.startswith("eval_")}, step
        )
        for path, columns in curves.items():
            if values.keys() >= set(columns.values()):
                _write_row(path, [values[name] for name in columns.values()], "a")
        if "loss" not in values:
            return
        with open(live, "a") as curve:
            curve.write(f"{step},{steps},{values['loss']}\n")
        now = time.monotonic(), step, values["num_input_tokens_seen"]
        began = began or now
        seconds, steps_done, tokens = (end - start for start, end in zip(began, now, strict=True))
        line, left = f"loss {values['loss']:.3f}", ""
        if steps_done:
            line += f", {tokens / max(1e-9, seconds):.0f} tokens/s"
            left = f", {tqdm.format_interval(seconds / steps_done * (steps - step))} left"
        if bar.total is None:
            bar.total, bar.initial, bar.n = steps, step - 1, step - 1
        bar.set_postfix_str(line)
        bar.update(step - bar.n)
        if bar.disable and step % max(1, steps // 10) == 0:
            print(f"train: step {step} of {steps}, {line}{left}", flush=True)

    try:
        yield show
    finally:
        bar.close()


def _write_row(path: Path, row: Sequence[object], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode, newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
