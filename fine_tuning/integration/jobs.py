"""Commands that the app starts: one at a time, watched from any page, stopped by a button or with the app."""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.protection import protect

LOG = Path(".whetstone/app/job.log")
TAIL_BYTES = 64 << 10
STOP_SECONDS = 20.0  # training saves a checkpoint before it obeys
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STAGE = re.compile(r"^(?:Running stage|Stage) '([\w@-]+)'")


class Job:
    """A running or finished command with its output in a file; `title` is what the pages call it."""

    def __init__(self, title: str, command: list[str], checkout: Path) -> None:
        self.title = title
        self.command = command
        self.log = checkout / LOG
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        self.stopped = False
        self._ended: float | None = None
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        with open(self.log, "wb") as log:
            # A session of its own: a stop reaches the whole tree, and Ctrl-C on the app's terminal is ours to pass on.
            self._process = subprocess.Popen(
                command,
                cwd=checkout,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
            )

    @property
    def running(self) -> bool:
        if self._process.poll() is None:
            return True
        self._ended = self._ended or time.time()
        return False

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return (time.time() if self.running else self._ended or time.time()) - self.started

    def lines(self) -> list[str]:
        """The last lines of its output as a terminal would show them: a progress bar is its newest state."""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        newest = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in CONTROL.sub("", text).split("\n"))
        return [line.rstrip() for line in newest if line.strip()]

    def stages(self) -> list[str]:
        """The DVC stages that it ran or skipped so far, in their order."""
        with open(self.log, "rb") as log:
            found = (STAGE.match(line.decode("utf-8", "replace")) for line in log)
            return list(dict.fromkeys(match[1] for match in found if match))

    def outcome(self) -> str:
        """One line: what came of it."""
        if self.stopped:
            return "stopped"
        said = self.lines()
        if self.returncode == 0:
            return said[-1] if said else "done"
        errors = [line.partition("error: ")[2] for line in said if line.startswith("error: ")]
        errors += [line.partition("ERROR: ")[2] for line in said if line.startswith("ERROR: ")]
        return errors[0] if errors else f"ended with status {self.returncode}: its output says why"

    def stop(self, patience: float = STOP_SECONDS) -> None:
        """End it and everything that it started: politely as Ctrl-C does, then not."""
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if not self.running:
                return
            self.stopped = True
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


class Jobs:
    """The commands of one process: at most one runs."""

    def __init__(self) -> None:
        self.latest: Job | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    @property
    def running(self) -> Job | None:
        latest = self.latest
        return latest if latest is not None and latest.running else None

    def start(self, title: str, command: list[str], checkout: Path) -> Job:
        """Start a command. Raises UserError if another one runs."""
        with self._lock:
            if (other := self.running) is not None:
                raise UserError(f"{other.title} is running: wait for its end, or stop it where it is shown")
            protect(checkout)
            self.latest = Job(title, command, checkout)
            return self.latest

    def stop(self) -> None:
        """End the running one."""
        if (job := self.running) is not None:
            job.stop(patience=5.0)


jobs = Jobs()


def own_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fine_tuning", *arguments]


def dvc_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]
