"""`gateway`: a proxy in front of a model's server that records what chat clients and models say."""

import argparse
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import main_checkout, root
from fine_tuning.common.settings import parse_settings, read_params
from fine_tuning.integration.chat_models import AppSettings, ChatModel, local_models
from fine_tuning.integration.gateway.health import TOKEN, announce
from fine_tuning.integration.gateway.proxy import Serving, Upstream, application
from fine_tuning.integration.gateway.recorder import GatewaySettings, Recorder
from fine_tuning.integration.ollama_client import is_loopback, normalise_host, ollama_host
from fine_tuning.integration.served_adapters import with_adapters
from fine_tuning.integration.served_examples import ServeSettings, context_of, served_examples
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.runtime.llama_engine import LlamaEngine

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ENDS_WITHIN = 5  # seconds that streams have after SIGTERM


def serve(arguments: argparse.Namespace) -> None:
    """Serve until interrupted. Raises UserError if a parameter is wrong, the port is taken, or other machines could
    talk to it without a token."""
    checkout = main_checkout(root())
    settings = read_params("gateway", GatewaySettings)
    if token := os.environ.get(TOKEN):
        settings = parse_settings("gateway", settings.model_dump() | {"token": token}, GatewaySettings, f"${TOKEN}")
    local = is_loopback(arguments.bind)
    if not local and settings.token is None:
        raise UserError(f"--bind {arguments.bind} lets other machines in: set ${TOKEN} to 16 characters or more first")
    with ExitStack() as stack:
        listening = stack.enter_context(
            _listen(arguments.bind, settings.port if arguments.port is None else arguments.port)
        )
        port = listening.getsockname()[1]
        upstream = _upstream(arguments.upstream, checkout, stack)
        names = {*settings.allowed_hosts, *(LOOPBACK if local else (arguments.bind, *LOOPBACK))}
        recorder = Recorder(checkout, settings.record)
        serving = _serving(checkout)
        app = application(upstream, recorder, names, port, settings.token, settings.manage_models, serving)
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, server_header=False, date_header=False, proxy_headers=False,
            timeout_graceful_shutdown=ENDS_WITHIN,
        )  # fmt: skip
        print(f"gateway http://{arguments.bind}:{port} -> {upstream.url}; Ctrl-C ends it", flush=True)
        if not local:
            print(
                f"warning: whoever reaches {arguments.bind} and has the token can use it", file=sys.stderr, flush=True
            )
        announce(checkout, arguments.bind, port)
        uvicorn.Server(config).run(sockets=[listening])


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "ports go from 0 to 65535"
        raise UserError(f"cannot listen at {address}, port {port} ({why}): choose another with --port") from None


def _upstream(given: str | None, checkout: Path, stack: ExitStack) -> Upstream:
    deploy = read_params("deploy", DeploySettings)
    if given not in ("champion", "adapters"):
        url = ollama_host(deploy.host) if given is None else normalise_host(given, given="--upstream")
        return Upstream(url.removesuffix("/v1"), deploy.timeout, deploy.stream_timeout, name=deploy.name)
    app, local = read_params("app", AppSettings), local_models(checkout)
    first = next((model for model in local if model.name == ("Champion" if given == "champion" else "Base")), None)
    choices: dict[str, ChatModel] = {}
    if first is None:
        raise UserError(
            "there is no champion yet: `python -m fine_tuning promote` makes one" if given == "champion"
            else "there is no base yet: run `dvc repro base`"
        )  # fmt: skip
    if given == "adapters":
        first, *made = with_adapters([first], checkout, deploy.name, read_params("serve", ServeSettings).adapters)
        if problem := next((model.problem for model in made if model.problem), None):
            raise UserError(problem)
        if not made:
            raise UserError("serve.adapters in params.yaml names no adapter: give each a name and its file")
        choices = {model.address: model for model in (*made, first)}
    engine = LlamaEngine(first.gguf, app.context, app.threads, app.slots, app.timeout, first.adapters)
    stack.enter_context(engine)
    said = {"model": first.tag, "version": first.version, "engine": "embedded"}
    return Upstream(engine.base_url, deploy.timeout, app.timeout, key=engine.api_key, model=said, choices=choices)


def _serving(checkout: Path) -> Serving:
    serve, app = read_params("serve", ServeSettings), read_params("app", AppSettings)
    context = context_of(app)
    examples = served_examples(checkout, serve.examples, context) if serve.examples else None
    return Serving(examples, serve.system_prompt, app.max_tokens, context)
