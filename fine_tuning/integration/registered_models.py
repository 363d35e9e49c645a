"""Earlier versions for the model picker: those whose GGUF DVC's cache holds and whose base is the current one."""

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from fine_tuning.common.dvc_files import cached
from fine_tuning.common.names import host_key
from fine_tuning.common.project import artifact_root, tracking_uri
from fine_tuning.common.records import read_object
from fine_tuning.integration.chat_models import BASE, ChatModel, champion_version
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.model_management.model_switcher import live_history
from fine_tuning.model_management.sqlite_registry import ModelVersion, read_versions

_background = ThreadPoolExecutor(1, thread_name_prefix="registry")


def registered_models(checkout: Path, name: str, stamp: Any) -> list[ChatModel]:
    """The versions that can answer here, the newest first, without the champion.

    The prompt of a version of another base would need that base's tokenizer. A registry on a server is asked in the
    background, once for each `stamp`: until it answers there are none.
    """
    if (champion := champion_version(checkout)) is None:
        return []
    versions = read_versions(tracking_uri(checkout), name, artifact_root(checkout))
    if versions is None:
        asked = _ask(checkout, name, stamp)
        # The page Models says what is wrong with the registry.
        versions = asked.result() if asked.done() and asked.exception() is None else []
    base = read_object(checkout / BASE / "base.json")
    now = (str(base.get("model") or "unknown"), str(base.get("revision") or "none"))
    return [
        ChatModel("Version", "embedded", version.tag, version.number, gguf)
        for version in reversed(versions)
        if version.number != champion
        and (version.tags.get("base_model"), version.tags.get("base_revision")) == now
        and (gguf := cached(checkout, version.tags.get("gguf_md5", "none"))) is not None
    ]


def live_since(checkout: Path, name: str, host: str, number: int) -> datetime | None:
    """When a version went live on a server; None where the registry is a server or does not know it."""
    versions = read_versions(tracking_uri(checkout), name, artifact_root(checkout)) or []
    times = [at for at, version in live_history(versions, host_key(host)) if version == number]
    return times[-1] if times else None


@cache
def _ask(checkout: Path, name: str, stamp: Any) -> Future[list[ModelVersion]]:
    return _background.submit(lambda: open_registry(name, checkout).versions())
