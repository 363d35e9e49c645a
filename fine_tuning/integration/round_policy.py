"""What a round may do by itself, and who hears of it: section `rounds` of params.yaml."""

import re
import subprocess
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fine_tuning.common.settings import Settings

NOTIFY_SECONDS = 30.0


def _hours(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"([01]?\d|2[0-3])-([01]?\d|2[0-3])", text):
        raise ValueError("two hours of the day such as 22-6")
    return text


class RoundsSettings(Settings):
    """Section `rounds` of params.yaml."""

    promote: Literal["ask", "canary", "auto"]
    min_conversations: int = Field(ge=1)
    min_pairs: int = Field(ge=1)
    hours: Annotated[str | None, AfterValidator(_hours)]
    max_minutes: int | None = Field(ge=1)
    commit: bool
    notify: str | None


def notify(settings: RoundsSettings, text: str) -> None:
    """Run the command that was configured, with the text as its last argument. One that fails or hangs is left."""
    if settings.notify:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["/bin/sh", "-c", f'{settings.notify} "$@"', "notify", text],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=NOTIFY_SECONDS,
            )  # fmt: skip
