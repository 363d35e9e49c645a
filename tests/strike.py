"""Run a function in forked children that meet with an accident, in the current folder.

    python -m tests.strike kill MODULE:FUNCTION[:ARGUMENT,…] STRIDE   killed at the 1st, (1 + STRIDE)th … write until
                                                                      one ends by itself
    python -m tests.strike full MODULE:FUNCTION[:ARGUMENT,…] BYTES    no file may grow beyond so many bytes

The last line says, as JSON, how often it was killed and with what status the last child ended. What a stage's module
has been imported once serves all children. Before each of them the stage's outputs are removed, as DVC does.
"""

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


def main() -> None:
    mode, target, number = sys.argv[1:]
    module, function, *arguments = target.split(":")
    called = getattr(importlib.import_module(module), function)
    outs = outputs(module.removeprefix("stages.")) if module.startswith("stages.") else []
    words = arguments[0].split(",") if arguments else []
    kills, limit = 0, 1
    while True:
        for out in outs:
            shutil.rmtree(out, ignore_errors=True) if Path(out).is_dir() else Path(out).unlink(missing_ok=True)
        prepare = (lambda limit=limit: die_at(limit)) if mode == "kill" else (lambda: fill_disk(int(number)))
        status = in_child(prepare, lambda: called(*words))
        if mode == "full" or not os.WIFSIGNALED(status):
            break
        kills += 1
        limit += int(number)
    print(json.dumps({"kills": kills, "status": os.waitstatus_to_exitcode(status)}))


def outputs(stage: str) -> list[str]:
    """What DVC removes before it runs a stage."""
    described = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][stage]
    entries = [*described.get("outs", []), *described.get("metrics", []), *described.get("plots", [])]
    named = [next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries]
    return [path for path, options in named if not options.get("persist")]


def in_child(prepare: Callable[[], object], called: Callable[[], object], seconds: float | None = None) -> int:
    """The wait status of a forked child that calls both, and is killed after so many seconds."""
    from fine_tuning.common.errors import run

    sys.stdout.flush()
    child = os.fork()
    if child:
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    try:
        prepare()
        run(called)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(70)


LOG_FOR_EVER = """
import itertools
from fine_tuning.data_collection.conversation_logger import ConversationLogger
logger = ConversationLogger("inbox/conversations.jsonl", durable=False)
for number in itertools.count():
    print(logger.log_conversation(f"question {number}", "x" * 20_000), flush=True)
"""


def acknowledged_before_a_kill(seconds: float) -> list[str]:
    """The ids that a logger gave out in the current folder until it was killed, so long after the first."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", LOG_FOR_EVER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as logger:
        first = logger.stdout.readline()
        time.sleep(seconds)
        logger.kill()
        return [first.strip(), *logger.stdout.read().split()]


def die_at(limit: int) -> None:
    """SIGKILL right before the write number `limit` that this process makes outside Python's own folders."""
    count = 0

    def hook(event: str, values: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = values
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = values[0]
        else:
            return
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not name or "__pycache__" in name or name.startswith(("/dev", "/proc", sys.prefix)):
            return
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fill_disk(size: int) -> None:
    """From now on a file that would grow beyond `size` bytes does not (EFBIG), nor does one that is longer already."""
    sys.dont_write_bytecode = True  # Python 3.11 keeps a file of it that was cut short (python/cpython#126606)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_locks(error: int) -> None:
    """From now on `flock` fails, as on a file system that has no locks: seccomp(2), a filter of one system call."""
    number = {"x86_64": 73, "aarch64": 32}[os.uname().machine]
    load, equal, answer = 0x20, 0x15, 0x06  # classic BPF
    code = [(load, 0, 0, 0), (equal, 0, 1, number), (answer, 0, 0, 0x50000 | error), (answer, 0, 0, 0x7FFF0000)]
    steps = b"".join(struct.pack("HBBI", *step) for step in code)
    buffer = ctypes.create_string_buffer(steps)
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):  # NO_NEW_PRIVS; SECCOMP, MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    main()
