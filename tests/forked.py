"""`python` for the projects of tests: a process that has imported the heavy libraries forks one for each command.

Importing torch, transformers, peft and MLflow takes longer than what a stage does with a tiny model. Nothing of this
project is imported before the fork, so every project runs its own code. Forked processes share one seed of hashes: a
test that compares the bytes of two runs starts an interpreter of its own for one (`Project.run(..., forked=False)`).
The workers of `pytest -n` are forked from the same process: they import none of the libraries again.
"""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# For what a test kills and goes on from at once: of a forked command only the client is dead by then.
INTERPRETER = sys.executable
HEAVY = (
    "transformers.models.llama.modeling_llama", "transformers.pipelines", "peft", "accelerate", "datasets", "evaluate",
    "rouge_score.rouge_scorer", "sacrebleu", "scipy.stats", "mlflow", "mlflow.store.tracking.sqlalchemy_store",
    "dvc.cli.parser", "dvc.repo", "dvc.repo.reproduce", "dvc.repo.experiments", "pyarrow.parquet", "safetensors.torch",
    "mlflow.pyfunc", "gguf", "altair", "streamlit",
)  # fmt: skip
SHARED = "WHETSTONE_FORKED"  # names the folder in the environment of workers
CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
if sys.argv[0].endswith("/dvc"):
    sys.argv[1:1] = ["-m", "dvc"]
if sys.argv[0].endswith("/worker"):  # as execnet starts one: `worker -u -c CODE`
    sys.argv[1:] = ["-c", "import sys; sys.executable = {python!r}; " + sys.argv[3]]
first = (sys.argv + [""])[1]
if first not in ("-m", "-c") and (not first or first[0] == "-") or "PYTHONHASHSEED" in os.environ:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
file = os.memfd_create("request")
os.write(file, json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
socket.send_fds(server, [b"x"], [0, 1, 2, file])
status = int(server.recv(16) or b"1")
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def folder() -> Path:
    """A folder with the programs `python` and `dvc`, for the front of PATH; they work as long as this process.

    `worker` there is for the workers of this process, which share the folder.
    """
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    kept = tempfile.TemporaryDirectory(prefix="forked-")
    place = Path(kept.name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place / "socket"))
    listener.listen(64)
    program = place / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=str(place / "socket")))
    program.chmod(0o700)
    for name in ("dvc", "worker"):
        (place / name).symlink_to(program)
    started = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), str(program)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[listener.fileno()],
        env={name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
        | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"},
    )  # fmt: skip
    listener.close()
    atexit.register(lambda: (started.stdin.close(), started.wait(), kept.cleanup()))
    return place


def serve(listener: socket.socket) -> list[str]:
    """Fork for each client that connects, until the input ends; returns, in the forked process, what to run."""
    started = 0
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        while started and os.waitpid(-1, os.WNOHANG)[0]:
            started -= 1
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _supervise(client)
        client.close()
        started += 1


def _supervise(client: socket.socket) -> list[str]:
    """Fork once more: this process hands on signals and the exit status, and kills the command when its client dies."""
    _, files, _, _ = socket.recv_fds(client, 1, 4)
    if len(files) < 4:
        os._exit(0)
    child = os.fork()
    if child == 0:
        client.close()
        return _become(files)
    for file in files:
        os.close(file)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([client, ended], [], [])[0]):
        if ready:
            word = client.recv(1)
            os.killpg(child, word[0] if word else signal.SIGKILL)
            if not word:
                os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        client.send(str(status).encode())
    finally:
        os._exit(0)


def _become(files: list[int]) -> list[str]:
    """Take on the client's input, output, folder and environment."""
    import random

    import numpy

    os.setpgid(0, 0)
    with open(files[3], "rb") as request:
        request.seek(0)
        words, where, environment = json.load(request)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    random.seed()
    numpy.random.seed()
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in environment)
    sys.path[0] = {"-m": where, "-c": ""}.get(words[0], os.path.dirname(os.path.abspath(words[0])))
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.executable = PROGRAM
    return words


if __name__ == "__main__":
    import gc
    import importlib

    LISTENER, PROGRAM = int(sys.argv[1]), sys.argv[2]
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    sys.argv = serve(socket.socket(fileno=LISTENER))
    status = None
    try:
        if sys.argv[0] == "-m":
            runpy._run_module_as_main(sys.argv.pop(1))
        elif sys.argv[0] == "-c":
            exec(compile(sys.argv.pop(1), "<string>", "exec"), globals())
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(status := end.code, str):
            raise
    # Taking all modules apart takes longer than the rest of a short command.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))
