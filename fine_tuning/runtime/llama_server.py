"""The child process of LlamaEngine: a request on stdin, one GGUF served on 127.0.0.1 until stdin closes.

It imports nothing of this project, so that it starts quickly and runs from any folder.
"""

import json
import os
import select
import signal
import sys
from typing import Any


def parameters(request: dict[str, Any]) -> Any:
    """llama.cpp's parameters for the request of LlamaEngine; `context` is tokens a slot."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.model_alias = {os.path.basename(request["gguf"])}  # what replies name: no path of this machine
    for path in request["adapters"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path = path
        params.lora_adapters = [*params.lora_adapters, adapter]
    params.n_ctx = request["context"] * request["slots"]
    params.n_parallel = request["slots"]
    params.n_threads_http = request["slots"] + 2
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = request["threads"]
        cpu.poll = 0  # waiting threads sleep: polling beside a busy process makes two threads slower than one
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [request["api_key"]]
    params.ui = False
    params.offline = True
    params.warmup = False
    # Neither shrink the context nor keep closed conversations in memory: the caller has stated what it needs.
    params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = 1
    return params


def end_with_stdin() -> None:
    """Fork a watcher that kills this process, whatever it is doing, once stdin is closed.

    No thread could: llama.cpp holds the interpreter's lock while it loads a model. Nor would Linux's PR_SET_PDEATHSIG
    do: the signal comes when the thread ends that started this process, and those of a Streamlit page end early.
    """
    server, (ended, held) = os.getpid(), os.pipe()
    if os.fork():
        os.close(ended)  # `held` stays open as long as this process lives
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(held)
    os.closerange(1, 3)
    if ended not in select.select([0, ended], [], [])[0]:
        os.kill(server, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """Answer {"address"} or {"error"} on stdout, then serve until the parent closes stdin or dies."""
    request = json.loads(sys.stdin.readline())
    end_with_stdin()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's output goes to the log, whichever stream it uses
    try:
        import xllamacpp

        server = xllamacpp.Server(parameters(request))
        answer = {"address": server.listening_address}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    if "address" in answer:
        sys.stdin.read()
    # Threads of llama.cpp may block an orderly exit for ever; the kernel frees everything.
    os._exit(0)


if __name__ == "__main__":
    main()
