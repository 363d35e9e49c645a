"""Training speed on this machine, kept for estimates and budgets. No output depends on it."""

import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, write_json
from fine_tuning.training.settings import TrainSettings

SPEED = Path(".whetstone/speed.json")  # in the main checkout
SHORT = 20  # steps, of which the first are slow
_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,7})s)?")


class Speed(NamedTuple):
    """Tokens a second, what trained at that speed, and its parameters where they were recorded."""

    tokens_per_second: float
    what: str
    parameters: int | None = None


def record_speed(path: Path, speed: Speed, steps: int = SHORT) -> None:
    """Remember the speed of a run of some steps that has ended.

    0 is not recorded: a run that was resumed after its last step had nothing left to train. Nor is that of a short run
    where one is known.
    """
    if speed.tokens_per_second > 0 and (steps >= SHORT or read_speed(path) is None):
        write_json(path, speed._asdict())


def read_speed(path: Path) -> Speed | None:
    """Speed of the last run here; None where none was measured."""
    try:
        found = read_json(path)
        return Speed(float(found["tokens_per_second"]), str(found["what"]), found.get("parameters"))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def expected(tokens: int, settings: TrainSettings, speed: Speed | None) -> str:
    """How long training on `tokens` will take, in words."""
    wanted = tokens * settings.epochs
    if settings.max_steps is not None:
        wanted = min(wanted, settings.max_steps * settings.batch_tokens * settings.gradient_accumulation)
    if speed is None:
        return "how long that takes is not known yet: nothing was trained here before"
    pace = speed.tokens_per_second
    return f"about {tqdm.format_interval(wanted / pace)} at the {pace:.0f} tokens/s last measured here ({speed.what})"


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `30m`, `2h` or `1h30m`. Raises UserError if it is none of these, or no time at all."""
    match = _DURATION.fullmatch(text.strip().lower())
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise UserError(f"{text!r} is no time: give one such as 90s, 30m, 2h or 1h30m")
    return seconds
