"""Training speed on this machine, kept for estimates and budgets. No output depends on it."""

import re
from pathlib import Path

from tqdm import tqdm

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, write_json
from fine_tuning.training.settings import TrainSettings

SPEED = Path(".whetstone/speed.json")  # in the main checkout
_DURATION = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,7})s)?")


def record_speed(path: Path, tokens_per_second: float, what: str) -> None:
    """Remember the speed of a run that has ended, and with what base and method it was reached.

    0 is not recorded: a run that was resumed after its last step had nothing left to train.
    """
    if tokens_per_second > 0:
        write_json(path, {"tokens_per_second": tokens_per_second, "what": what})


def read_speed(path: Path) -> tuple[float, str] | None:
    """(tokens a second, what trained at that speed) of the last run here; None where none was measured."""
    try:
        found = read_json(path)
        return float(found["tokens_per_second"]), str(found["what"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def expected(tokens: int, settings: TrainSettings, speed: tuple[float, str] | None) -> str:
    """How long training on `tokens` will take, in words."""
    wanted = tokens * settings.epochs
    if settings.max_steps is not None:
        wanted = min(wanted, settings.max_steps * settings.batch_tokens * settings.gradient_accumulation)
    if speed is None:
        return "how long that takes is not known yet: nothing was trained here before"
    pace, what = speed
    return f"about {tqdm.format_interval(wanted / pace)} at the {pace:.0f} tokens/s last measured here ({what})"


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `30m`, `2h` or `1h30m`.

    Raises:
        UserError: it is none of these, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds:
        raise UserError(f"{text!r} is no time: give one such as 90s, 30m, 2h or 1h30m")
    return seconds
