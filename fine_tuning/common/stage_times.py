"""How long the pipeline's stages take here: a stage says when it starts how far the run is, and keeps its time."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fine_tuning.common.errors import line_of, run
from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import read_object, updating, write_json

TIMES = Path(".whetstone/stage_seconds.json")
TRAINING = Path(".whetstone/training.csv")  # step, steps and loss of the training that runs, or ran last
FAILED = Path(".whetstone/stage_failed.json")  # {"stage", "error"} of the stage that failed last
# Seconds of the sample's run on two AVX2 cores. They stand for a stage until it has run here once.
SAMPLE = {
    "base": 30.0, "intake": 1.0, "clean": 1.0, "export": 1.0, "prepare": 4.0, "train": 140.0, "package": 34.0,
    "evaluate": 180.0, "compare": 5.0,
}  # fmt: skip


def run_stage(main: Callable[[], int | None]) -> None:
    """Run a stage's `main` as a program (`errors.run`), with a line that says how far the pipeline is."""
    run(lambda: _timed(Path(sys.argv[0]).stem, main))


def _timed(stage: str, main: Callable[[], int | None]) -> int | None:
    checkout, started = main_checkout(), time.monotonic()
    number = 1 + [*SAMPLE].index(stage)
    left = about(seconds_left(checkout, stage))
    print(f"stage {number} of {len(SAMPLE)}, {stage}: {left} to the verdict", flush=True)
    try:
        status = main()
    except Exception as error:
        with suppress(OSError):  # on a full disk
            write_json(checkout / FAILED, {"stage": stage, "error": line_of(error) or type(error).__name__})
        raise
    with updating(checkout / TIMES) as times:
        times[stage] = round(time.monotonic() - started, 1)
    return status


def expected_seconds(checkout: Path) -> dict[str, float]:
    """Seconds of each stage in their order: as it took here last, else the sample's, in proportion to what is known."""
    known = {s: t for s, t in read_object(checkout / TIMES).items() if s in SAMPLE and isinstance(t, int | float)}
    usual = sum(SAMPLE[stage] for stage in known)
    pace = sum(known.values()) / usual if usual else 1.0
    return {stage: float(known.get(stage, pace * seconds)) for stage, seconds in SAMPLE.items()}


def seconds_left(checkout: Path, stage: str, done: float = 0.0) -> float:
    """From a stage of which the share `done` is done to the end of the pipeline."""
    expected = expected_seconds(checkout)
    return sum(list(expected.values())[list(expected).index(stage) :]) - done * expected[stage]


def round_seconds(checkout: Path) -> float:
    """A round with new conversations: the base model is read in the first one only."""
    return seconds_left(checkout, "intake" if (checkout / "models/base/base.json").is_file() else "base")


def about(seconds: float) -> str:
    """`about 40 s`, `about 5 min`."""
    return f"about {max(1, round(seconds))} s" if seconds < 90 else f"about {round(seconds / 60)} min"
