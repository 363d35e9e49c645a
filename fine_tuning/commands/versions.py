"""`list`: the versions in the registry, and which of them is live on each server."""

import argparse
import json

from fine_tuning.commands.bundle import kept_gguf
from fine_tuning.common.project import root
from fine_tuning.common.settings import read_params
from fine_tuning.integration.ollama_client import OllamaError, open_servers
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.model_management.model_switcher import Live, ModelSwitcher
from fine_tuning.model_management.sqlite_registry import ModelVersion


def list_versions(arguments: argparse.Namespace) -> None:
    root()
    settings = read_params("deploy", DeploySettings)
    registry = open_registry(settings.name)
    versions = registry.versions()
    live: dict[str, Live | None] = {}
    unreachable: dict[str, str] = {}
    with open_servers(settings, arguments.host) as servers:
        for server in servers:
            try:
                live[server.host] = ModelSwitcher(server, registry).live()
            except OllamaError as error:
                unreachable[server.host] = str(error)
    if arguments.json:
        print(json.dumps(_as_json(versions, live, unreachable), indent=2, ensure_ascii=False))
        return
    _print_table(settings.name, versions)
    for host, found in live.items():
        print(f"{host}: {_live_line(settings.name, found)}")
    for reason in unreachable.values():
        print(reason)


def what_is_live(live: Live) -> str:
    return f"version {live.version}" if live.version else "a model that is not in the registry"


def _live_line(name: str, live: Live | None) -> str:
    if live is None:
        return f"nothing is live as {name}:live: `python -m fine_tuning deploy`"
    since = f" since {live.since.isoformat(timespec='seconds')}" if live.since else ""
    return f"{name}:live is {what_is_live(live)}{since} (manifest {live.digest[:12]})"


def _print_table(name: str, versions: list[ModelVersion]) -> None:
    if not versions:
        print(f"{name} has no version yet: `python -m fine_tuning promote` makes the first")
        return
    print(f"{'version':>7}  {'made':16}  {'alias':9}  {'verdict':12}  {'adapter':12}  commit")
    for version in versions:
        tags = version.tags
        made = version.created_at.strftime("%Y-%m-%d %H:%M")
        verdict = tags.get("verdict", "") + ("*" if "forced_reason" in tags else "")
        commit = tags.get("git_commit", "")[:9] + ("+" if tags.get("git_dirty") == "true" else "")
        alias = ",".join(version.aliases)
        print(f"{version.number:>7}  {made}  {alias:9}  {verdict:12}  {tags.get('adapter_sha256', '')[:12]}  {commit}")
    if any("forced_reason" in version.tags for version in versions):
        print("* forced: `python -m fine_tuning list --json` has the reasons")


def _as_json(
    versions: list[ModelVersion], live: dict[str, Live | None], unreachable: dict[str, str]
) -> dict[str, object]:
    listed = [
        {
            "version": version.number,
            "name": version.name,
            "aliases": list(version.aliases),
            "created_at": version.created_at.isoformat(),
            "run_id": version.run_id,
            "tags": version.tags,
            "gguf": str(gguf) if (gguf := kept_gguf(version)) else None,
        }
        for version in versions
    ]
    hosts: dict[str, object] = dict.fromkeys(live)
    for host, found in live.items():
        if found:
            since = found.since.isoformat() if found.since else None
            hosts[host] = {"digest": found.digest, "version": found.version, "since": since}
    return {"versions": listed, "hosts": hosts, "unreachable": unreachable}
