"""`rounds`: what the next round waits for; `--watch` runs one when enough is new; `--install` writes a service.

One watcher and one round at a time. A round that fails leaves everything as it was and is tried again after a pause
that doubles; .whetstone/rounds.json has it and the reason, so that both survive a restart.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from string import Template

from filelock import FileLock, Timeout

from fine_tuning.commands.canary import settle
from fine_tuning.commands.round import finish, interrupt, take_followed
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import changes_by_hand, main_checkout, root
from fine_tuning.common.records import replacing
from fine_tuning.common.settings import read_params
from fine_tuning.integration import round_policy
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.jobs import own_command
from fine_tuning.integration.round_policy import ROUND_LOCK, RoundsSettings, waits_for

LOOK_SECONDS = 60.0
LOG = Path(".whetstone/round.log")  # output of the last round that was begun here


def rounds(arguments: argparse.Namespace) -> None:
    """Say what the next round waits for, watch, or write the service. Raises UserError if a parameter is wrong, or
    another process watches this checkout."""
    checkout = main_checkout(root())
    settings = read_params("rounds", RoundsSettings)
    if arguments.install:
        install(checkout)
    elif arguments.watch:
        signal.signal(signal.SIGTERM, interrupt)
        try:
            with FileLock(checkout / round_policy.WATCH_LOCK, timeout=0):
                watch(checkout)
        except Timeout:
            raise UserError("another `rounds --watch` runs in this checkout: one is enough") from None
    else:
        waits = waits_for(checkout, settings)
        print("\n".join(["the next round waits:", *waits] if waits else ["`rounds --watch` would begin a round now"]))


def watch(checkout: Path) -> None:
    """Look once a minute, until interrupted; say what is waited for whenever that changes."""
    said: list[str] | None = None
    while True:
        waits = step(checkout, read_params("rounds", RoundsSettings))
        if waits and waits != said:
            print(f"waits: {'; '.join(waits)}", flush=True)
        said = waits
        time.sleep(LOOK_SECONDS)


def step(checkout: Path, settings: RoundsSettings) -> list[str]:
    """Run what is due; what is waited for, where nothing is."""
    failures = round_policy.failures(checkout)
    try:
        settle(Canary(checkout))
        if not round_policy.pause_left(checkout) and not changes_by_hand(checkout):
            with FileLock(ROUND_LOCK, timeout=0):
                finish(settings)
        if round_policy.follow_is_due(checkout, settings):
            with FileLock(ROUND_LOCK, timeout=0):
                take_followed(settings)
        if waits := waits_for(checkout, settings):
            return waits
        run_round(checkout, settings)
        return []
    except Timeout:
        return ["another round is running"]
    except (UserError, OSError) as error:  # OSError: on a full disk
        if round_policy.failures(checkout) == failures:  # the round itself has not noted it
            round_policy.note_failure(checkout, str(error))
        round_policy.notify(settings, f"The round failed: {error}")
        return [f"it failed: {error}"]


def run_round(checkout: Path, settings: RoundsSettings) -> None:
    """A round as a process of its own, at low priority, its output in LOG. Raises UserError if it failed, or took
    longer than rounds.max_minutes; everything is as it was."""
    print("a round begins", flush=True)
    command = ["nice", "-n", "10", *own_command("round")]
    with open(checkout / LOG, "wb") as log:
        process = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT)
    try:
        process.wait(settings.max_minutes and 60 * settings.max_minutes)
    except subprocess.TimeoutExpired:
        process.terminate()
        late = f"it took longer than rounds.max_minutes ({settings.max_minutes}): results are as they were"
        raise UserError(late) from None
    finally:
        process.wait()
    lines = (checkout / LOG).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if process.returncode:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(errors[-1] if errors else f"status {process.returncode}: {LOG} says why")
    print(lines[-1], flush=True)


def install(checkout: Path) -> None:
    """Write a service of this user that watches this checkout, and say how to start it."""
    name, command = f"whetstone-{checkout.name}", own_command("rounds", "--watch")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if sys.platform == "darwin":
        file = Path.home() / "Library/LaunchAgents" / f"{name}.plist"
        text, start = launchd_unit(name, command, checkout, path), f"launchctl load -w {file}"
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        file, text = home / "systemd/user" / f"{name}.service", systemd_unit(command, checkout, path)
        start = f"systemctl --user daemon-reload && systemctl --user enable --now {name}"
    with replacing(file) as written:
        written.write(text.encode())
    print(f"wrote {file}; it begins with: {start}")


def systemd_unit(command: list[str], checkout: Path, path: str) -> str:
    """A unit for `systemctl --user`: words are quoted as in C, % names a value of systemd's, $ a variable."""
    values = {"folder": str(checkout), "path": json.dumps(f"PATH={path}", ensure_ascii=False)}
    values["command"] = " ".join(json.dumps(word, ensure_ascii=False).replace("$", "$$") for word in command)
    template = Template(Path(__file__).with_name("rounds.service").read_text(encoding="utf-8"))
    return template.substitute({name: text.replace("%", "%%") for name, text in values.items()})


def launchd_unit(name: str, command: list[str], checkout: Path, path: str) -> str:
    words = "".join(f"<string>{escape(word)}</string>" for word in command)
    values = {"name": escape(name), "folder": escape(str(checkout)), "path": escape(path), "command": words}
    return Template(Path(__file__).with_name("rounds.plist").read_text(encoding="utf-8")).substitute(values)
