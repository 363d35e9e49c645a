"""`deploy --server`: a version on vLLM or llama-server."""

import argparse
import shlex
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fine_tuning.commands.bundle import champion_bundle, kept_gguf, registered_bundle
from fine_tuning.common.errors import UserError
from fine_tuning.common.names import host_key
from fine_tuning.common.project import main_checkout, sha256_file
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.settings import ADAPTER, PROMPT
from fine_tuning.integration.other_servers import START_VLLM, OpenAIServer, deploy_adapter, deploy_gguf
from fine_tuning.model_management import champion
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.model_registry import ADAPTER_TAG, ModelRegistry, ModelVersion
from fine_tuning.model_management.model_switcher import STAMP
from fine_tuning.schema.chat_format import ChatSettings

PORTS = {"vllm": 8000, "llama-server": 8080}  # where they listen by themselves
PRESETS = Path(".whetstone/llama-server.ini")


def deploy_elsewhere(
    arguments: argparse.Namespace, settings: DeploySettings, registry: ModelRegistry, version: ModelVersion | None
) -> None:
    """Deploy a version, or the champion that no registry here knows, to every --host."""
    about = champion.read_champion() if version is None else version.tags
    number = int(about["version"]) if version is None else version.number
    kind, presets = about.get("kind", ADAPTER), main_checkout() / PRESETS
    if arguments.canary is not None:
        raise UserError("--canary needs Ollama: leave out --server")
    port = PORTS[arguments.server]
    for url in arguments.host or ["127.0.0.1"]:
        vllm = arguments.server == "vllm"
        start = START_VLLM if vllm else f"`llama-server --models-preset {shlex.quote(str(presets))}`"
        with OpenAIServer(url, port, start, settings.timeout, settings.stream_timeout) as server:
            if vllm:
                if kind == PROMPT:
                    raise UserError(f"version {number} is a prompt and has no adapter: deploy it to Ollama")
                deploy_adapter(server, registry.name, number, _adapter(version, about), print)
            else:
                bundle = registered_bundle(registry, version, None) if version else champion_bundle()
                gguf = (version and kept_gguf(version)) or bundle.gguf
                deploy_gguf(server, registry.name, number, gguf, bundle.request.get("parameters") or {}, presets, print)
        if version is not None:
            stamp = datetime.now(UTC).strftime(STAMP)
            registry.set_tags(number, {f"live.{stamp}": host_key(server.url)})
        if kind != ADAPTER or read_params("chat", ChatSettings).system_prompt:
            print("note: this server adds no system prompt and no examples: `gateway` with --upstream does (serve)")


def _adapter(version: ModelVersion | None, about: dict[str, str]) -> Path:
    """The folder of a version's adapter on this machine: the registry's, which nobody changes, or the champion's."""
    folders = [champion.FOLDER / "adapter"]
    if version is not None and version.artifacts.startswith("file:///"):
        folders.insert(0, Path(unquote(urlsplit(version.artifacts).path), "adapter"))
    for folder in folders:
        weights = folder / "adapter_model.safetensors"
        if weights.is_file() and sha256_file(weights) == about.get(ADAPTER_TAG):
            return folder
    raise UserError("the adapter of this version is not on this machine: `dvc pull` at its commit, then deploy again")
