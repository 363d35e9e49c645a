"""What the page Models shows: the candidate and whether it may be promoted, the versions, what is live, the lineage."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import ADAPTER, COMPARISON
from fine_tuning.common.records import read_json, read_object
from fine_tuning.evaluation.looks import LOOKS, looked_at
from fine_tuning.integration.chat_models import CHAMPION
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError
from fine_tuning.model_management.model_registry import ModelRegistry, ModelVersion
from fine_tuning.model_management.model_switcher import Live, ModelSwitcher, live_history
from fine_tuning.training.tracking import WEIGHTS

REPORT = Path("metrics/report.html")
PROMOTE = "PROMOTE"


@dataclass(frozen=True)
class Candidate:
    """What the last `dvc repro` made of the adapter. `obstacle` says why it cannot be promoted, even by force."""

    verdict: str
    reasons: list[str]
    adapter_sha256: str
    obstacle: str | None


@dataclass(frozen=True)
class RegistryState:
    """The registry and the server as they are now. `server_error` says why nothing is known of the server."""

    versions: list[ModelVersion]
    live: Live | None
    deployed: set[int]
    earlier: list[int]
    server_error: str | None


def candidate(checkout: Path) -> Candidate | None:
    """The compared candidate, None before the first comparison. Raises UserError if the comparison is damaged."""
    if not (checkout / COMPARISON).is_file():
        return None
    try:
        found = looked_at({} | read_json(checkout / COMPARISON), checkout / LOOKS)
        verdict, sha256 = str(found["verdict"]), str(found["adapter_sha256"])
        reasons = [str(reason) for reason in found["reasons"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{COMPARISON} is damaged: run `dvc repro compare`") from None
    obstacle = None
    if not (checkout / ADAPTER / WEIGHTS).is_file():
        obstacle = "its files are not here: run `dvc pull` or `dvc repro`"
    elif (named := read_object(checkout / CHAMPION)).get("adapter_sha256") == sha256 and named.get(
        "kind", "adapter"
    ) == found.get("kind", {}).get("name", "adapter"):
        obstacle = "it is the champion already"
    return Candidate(verdict, reasons, sha256, obstacle)


def registry_state(registry: ModelRegistry, client: OllamaClient) -> RegistryState:
    """Versions, and what is live on the server."""
    versions = registry.versions()
    switcher = ModelSwitcher(client, registry)
    try:
        live, names = switcher.live(), set(client.digests())
    except OllamaError as error:
        return RegistryState(versions, None, set(), [], str(error))
    deployed = {v.number for v in versions if v.tag in names and switcher.recorded_digest(v) is not None}
    current = live.version if live else None
    earlier = [number for _, number in live_history(versions, switcher.key) if number != current]
    return RegistryState(versions, live, deployed, earlier, None)


def reasons(registry: ModelRegistry, version: ModelVersion) -> list[str]:
    data = registry.read(version, "reports/comparison.json")
    try:
        return [str(reason) for reason in json.loads(data or b"{}").get("reasons") or []]
    except (ValueError, AttributeError):
        return []


def as_page(report: bytes) -> str:
    """An address of an HTML report. A page of this kind has no origin: whatever is in it cannot reach the app."""
    return "data:text/html;charset=utf-8;base64," + base64.b64encode(report).decode("ascii")


def lineage(tags: Mapping[str, str], names: list[str], live: bool) -> str:
    """Where a version comes from and where it went, as a Graphviz drawing."""

    def short(key: str) -> str:
        value = tags.get(key, "unknown")
        return value[:10] if len(value) >= 32 else value

    dirty = " (changed files)" if tags.get("git_dirty") == "true" else ""
    nodes = {
        "data": f"conversations\n{short('data_md5')}",
        "base": f"base\n{short('base_model')}",
        "code": f"commit\n{short('git_commit')}{dirty}",
        "adapter": f"adapter\n{short('adapter_sha256')}",
        "gguf": f"GGUF\n{short('gguf_sha256')}",
        "suite": f"held-out suite\n{short('eval_set_sha256')}",
        "verdict": f"verdict\n{tags.get('verdict', 'none')}",
        "version": "\n".join(names),
    }
    edges = ["data -> adapter", "base -> adapter", "code -> adapter", "adapter -> gguf", "gguf -> version",
             "suite -> verdict", "adapter -> verdict", "verdict -> version"]  # fmt: skip
    if live:
        nodes["live"] = "answers in the chat"
        edges.append("version -> live")
    lines = [f"{name} [label={json.dumps(label)}]" for name, label in nodes.items()]
    style = 'rankdir=TB; node [shape=box, style="rounded", fontname="sans-serif", fontsize=11]'
    return f"digraph {{ {style}; {'; '.join(lines + edges)} }}"


def row(version: ModelVersion, live: Live | None) -> dict[str, Any]:
    return {
        "version": version.number,
        "aliases": ", ".join(version.aliases),
        "live": live is not None and live.version == version.number,
        "verdict": "forced" if version.tags.get("forced_reason") else version.tags.get("verdict", ""),
        "registered": version.created_at,
        "commit": version.tags.get("git_commit", "")[:10],
        "base": version.tags.get("base_model", ""),
        "kind": version.tags.get("kind", "adapter"),
    }
