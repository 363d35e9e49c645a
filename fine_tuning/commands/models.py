"""Commands for models on Ollama: deploy, switch, rollback, prune."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from filelock import FileLock, Timeout
from tqdm import tqdm

from fine_tuning.commands.bundle import champion_bundle, registered_bundle
from fine_tuning.commands.canary import begin
from fine_tuning.commands.other_servers import deploy_elsewhere
from fine_tuning.commands.versions import what_is_live
from fine_tuning.common.errors import UserError
from fine_tuning.common.names import parse_version
from fine_tuning.common.project import main_checkout, root
from fine_tuning.common.records import updating
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.settings import ADAPTER
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.ollama_client import open_servers
from fine_tuning.integration.served_examples import SERVED
from fine_tuning.model_management.champion import read_champion
from fine_tuning.model_management.model_deployer import DeploySettings, ModelDeployer
from fine_tuning.model_management.model_registry import (
    ADAPTER_TAG,
    CHAMPION,
    ModelRegistry,
    ModelVersion,
    open_registry,
    registry_locks,
)
from fine_tuning.model_management.model_switcher import Live, ModelSwitcher


def deploy(arguments: argparse.Namespace) -> None:
    """Deploy a version to every host, one after the other; as a canary, beside what is live there."""
    if arguments.server != "ollama":
        registry = open_registry(_settings().name)
        deploy_elsewhere(arguments, _settings(), registry, _chosen(registry, arguments.version))
        return
    trial, live = arguments.canary is not None, None
    if trial and (arguments.host or not 0 < arguments.canary < 1):
        raise UserError("--canary takes a share between 0 and 1, such as 0.5, and acts on deploy.host, not on --host")
    for switcher in each_server(arguments):
        server, registry = switcher.server, switcher.registry
        version = _chosen(registry, arguments.version)
        if trial:
            live = _beside(switcher, version)
        if version is None:
            bundle, record = champion_bundle(), None
        else:
            bundle = registered_bundle(registry, version, switcher.recorded_digest(version))
            record = partial(switcher.record, version.number)
        with _progress() as progress:
            deployer = ModelDeployer(server, registry.name, print, progress, unproven=arguments.unproven)
            done = deployer.deploy(bundle, record, live=not trial)
        for note in done.notes:
            print(f"note: {note}")
        served = read_champion() if version is None else version.tags
        tag, examples = f"{registry.name}:{bundle.version}", int(served.get("examples") or 0)
        with updating(main_checkout() / SERVED) as kept:
            kept.pop(tag, None)
            if served.get("kind", ADAPTER) != ADAPTER:
                prompt = served.get("system_prompt")
                kept[tag] = {"kind": served["kind"], "system_prompt": prompt, "examples": examples}
        if examples:
            print(
                f"note: Ollama alone cannot look for the {examples} training exchanges that stand before each question "
                "to this version: the gateway and the chat app do, so ask it through them"
            )
        if trial:
            continue
        if version is not None:
            switcher.record_live(version.number)
        Canary(main_checkout()).stop(f"version {bundle.version} went live")
        if version is None:
            print("note: models/champion was deployed; the registry here does not know it, so switch cannot go back")
        print(f"{deployer.live} at {server.host} is version {bundle.version}: `ollama run {deployer.live}`")
    if trial and version is not None and live is not None:
        begin(registry, version.number, live, arguments.canary)


def switch(arguments: argparse.Namespace) -> None:
    number = parse_version(arguments.version, _settings().name)
    for switcher in each_server(arguments):
        before = switcher.switch(number)
        Canary(main_checkout()).stop(f"version {number} went live")
        print(f"{switcher.server.host}: {switcher.live_name} is version {number}{_was(before)}")


def rollback(arguments: argparse.Namespace) -> None:
    for switcher in each_server(arguments):
        before, number = switcher.rollback()
        Canary(main_checkout()).stop(f"version {number} went live")
        print(f"{switcher.server.host}: {switcher.live_name} is version {number} again{_was(before)}")


def prune(arguments: argparse.Namespace) -> None:
    if arguments.keep < 1:
        raise UserError("--keep takes a number from 1 on: the newest version always stays")
    for switcher in each_server(arguments):
        gone = switcher.prune(arguments.keep)
        print(f"{switcher.server.host}: {', '.join(gone) or 'nothing'} removed; `deploy VERSION` brings one back")
        if gone:
            print(
                "note: an Ollama that rewrites models (0.32 does) keeps what was uploaded for them until it is "
                "restarted, more than an hour after the upload: restart it to free that room"
            )


# ---------------------------------------------------------------------------------------------------------------- parts


def _settings() -> DeploySettings:
    root()
    return read_params("deploy", DeploySettings)


def each_server(arguments: argparse.Namespace) -> Iterator[ModelSwitcher]:
    """Every host in its turn, with no other process of this checkout at it; none is begun with unless all answer."""
    settings = _settings()
    with open_servers(settings, arguments.host) as servers:
        for server in servers:
            server.version()  # a server that is down is known before anything is loaded
        registry = open_registry(settings.name)
        for server in servers:
            switcher = ModelSwitcher(server, registry)
            with _host_lock(switcher.key):
                yield switcher


def _beside(switcher: ModelSwitcher, version: ModelVersion | None) -> int:
    """The live version of a server, beside which a canary of another one may run."""
    live = switcher.live()
    if version is None:
        raise UserError("the registry here does not know this champion: a canary needs a version that it can switch to")
    if live is None or live.version is None:
        raise UserError(f"no version of ours is live on {switcher.server.host}: `deploy` without --canary makes one so")
    if live.version == version.number:
        raise UserError(f"version {version.number} is live already: give another version for the canary")
    return live.version


def _chosen(registry: ModelRegistry, given: str | None) -> ModelVersion | None:
    """The version to deploy; None for a champion that came with git and that this registry does not know."""
    if given is not None:
        return registry.version(parse_version(given, registry.name))
    champion, named = registry.by_alias(CHAMPION), read_champion()
    if named.get("version") is None and champion is None:
        raise UserError("there is no champion yet: `python -m fine_tuning promote` makes one")
    adapter = named.get("adapter_sha256")
    if champion is not None and champion.tags.get(ADAPTER_TAG) == adapter:
        return champion
    if adapter and all(version.tags.get(ADAPTER_TAG) != adapter for version in registry.versions()):
        return None
    number = champion.number if champion else "none"
    raise UserError(
        f"the registry's champion is version {number}, models/champion.json names version {named.get('version')}: "
        "`git pull`, or give the version to deploy"
    )


@contextmanager
def _host_lock(key: str) -> Iterator[None]:
    """One deployment or switch at a time to a host, from this checkout."""
    path = registry_locks() / f"ollama-{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=5):
            yield
    except Timeout:
        raise UserError(f"another process deploys to this Ollama (it holds {path}): wait for it") from None


@contextmanager
def _progress() -> Iterator:
    """A progress bar of an upload; it shows itself only on a terminal."""
    with tqdm(unit="B", unit_scale=True, desc="upload", disable=None, leave=False) as bar:

        def show(sent: int, size: int) -> None:
            bar.total = size
            bar.update(sent - bar.n)

        yield show


def _was(before: Live | None) -> str:
    return f" (before: {what_is_live(before)})" if before else ""
