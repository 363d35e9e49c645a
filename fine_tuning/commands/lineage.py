"""`lineage`: from a tag, a version or a reply to all that made it; from a conversation to every model it taught."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from fine_tuning.common.dvc_files import show_file
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.names import split_tag
from fine_tuning.common.project import CONVERSATIONS, LOG, root, run_command
from fine_tuning.common.records import read_lines
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.model_management.model_deployer import LIVE, DeploySettings
from fine_tuning.model_management.model_registry import (
    ADAPTER_TAG,
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    ModelRegistry,
    ModelVersion,
    open_registry,
)
from fine_tuning.model_management.model_switcher import deployments, went_live
from fine_tuning.schema.conversation import as_conversation, versions_of
from fine_tuning.training.tracking import flatten

IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
COMMIT = re.compile(r"[0-9a-f]{40,64}")
SHOWN_SECTIONS = ("base", "chat", "train", "package")


def lineage(arguments: argparse.Namespace) -> None:
    root()
    registry = open_registry(read_params("deploy", DeploySettings).name)
    found = trace(registry, arguments.name)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(as_text(found), end="")


def trace(registry: ModelRegistry, asked: str) -> dict[str, Any]:
    """What is known of a version (`3`, `name:3`), a tag (`name:live`), an alias, a reply or a conversation: {"asked",
    "reply"?, "conversation"?, "versions"}, the versions that it is, that wrote it or learned from it. Raises UserError
    if nothing here is called that."""
    named = _named_version(registry, asked)
    if named is not None:
        return {"asked": asked, "versions": [describe_version(registry, registry.version(named))]}
    if not IDENTITY.fullmatch(asked):
        raise UserError("that is not a name, version or id: use letters, digits, . _ and -")
    places = list(_places_of(asked))
    taught = {
        version.number: split
        for version in registry.versions()
        for split, members in conversations_of(registry, version, holding=asked).items()
        if asked in members
    }
    if not places and not taught:
        raise UserError(f"no version, reply or conversation here is called {asked}: `dvc pull` brings what others have")
    reply = next((place["reply"] for place in places if place.get("reply")), None)
    if reply:
        number = _author(registry, reply)
        versions = [] if number is None else [describe_version(registry, registry.version(number))]
        return {"asked": asked, "reply": reply, "versions": versions}
    conversation = {"id": asked, "in": [place["file"] for place in places], "splits": taught}
    described = [describe_version(registry, registry.version(number)) for number in sorted(taught)]
    return {"asked": asked, "conversation": conversation, "versions": described}


# ------------------------------------------------------------------------------------------------------------ versions


def _named_version(registry: ModelRegistry, asked: str) -> int | None:
    """The version that a number, a tag or an alias names; None if it has the form of none of them."""
    name, tag = split_tag(asked) if ":" in asked else (registry.name, asked)
    if name != registry.name:
        raise UserError(f"the registry knows {registry.name} and not {name}: look at deploy.name in params.yaml")
    if re.fullmatch(r"v?[1-9][0-9]{0,8}", tag or ""):
        return int(tag.removeprefix("v"))
    if tag in (CHAMPION, PREVIOUS, CANDIDATE):
        version = registry.by_alias(tag)
        if version is None:
            raise UserError(f"no version is the {tag}: `python -m fine_tuning list`")
        return version.number
    if tag == LIVE:
        history = went_live(registry.versions())
        if not history:
            raise UserError(f"nothing went live as {name}:live yet: `python -m fine_tuning deploy`")
        return history[-1].number
    if ":" in asked:
        raise UserError(f"{asked} is none of the registry's tags: `python -m fine_tuning list` shows them")
    return None


def describe_version(registry: ModelRegistry, version: ModelVersion) -> dict[str, Any]:
    """All that made a version and became of it, from its tags and from what the registry kept of its origin."""
    tags = version.tags
    commit = given if COMMIT.fullmatch(given := tags.get("git_commit", "")) else "none"
    kept = {name: registry.read(version, f"provenance/{name}") for name in ("dvc.lock", "params.yaml")}
    manifest = json.loads(registry.read(version, "provenance/manifest.json") or b"{}")
    committed = show_file(Path.cwd(), commit, "dvc.lock") if commit != "none" else None
    return {
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "registered_at": version.created_at.isoformat(timespec="seconds"),
        "verdict": tags.get("verdict"),
        "forced_reason": tags.get("forced_reason"),
        "promoted": {"at": tags.get("promoted_at"), "by": tags.get("promoted_by")},
        "run": {"id": version.run_id, "tracking": registry.uri, "artifacts": version.artifacts},
        "commit": {"id": commit, "dirty": tags.get("git_dirty") == "true", "subject": _subject(commit)},
        "adopted_from": tags.get("adopted_from"),
        "adapter_commit": {"id": (made := tags.get("adapter_commit", "none")), "subject": _subject(made)},
        "dvc_lock": {
            "sha256": tags.get("dvc_lock_sha256"),
            "kept": kept["dvc.lock"] is not None,
            "in_commit": committed is not None and hashlib.sha256(committed).hexdigest() == tags.get("dvc_lock_sha256"),
        },
        "parameters": yaml.safe_load(kept["params.yaml"] or b"{}"),
        "base": {"model": tags.get("base_model"), "revision": tags.get("base_revision")},
        "data": {"md5": tags.get("data_md5"), "shards": manifest.get("shards", [])},
        "conversations": conversations_of(registry, version),
        "adapter_sha256": tags.get("adapter_sha256"),
        "gguf_sha256": tags.get("gguf_sha256"),
        "eval_set_sha256": tags.get("eval_set_sha256"),
        "deployments": [
            {"host": host, "digest": digest, "deployed_at": tags.get(f"ollama.{host}.deployed_at")}
            for host, digest in deployments(version)
        ],
        "went_live": [
            {"host": event.host, "at": event.at.isoformat(timespec="seconds")} for event in went_live([version])
        ],
    }


def conversations_of(registry: ModelRegistry, version: ModelVersion, holding: str = "") -> dict[str, list[str]]:
    """{split: ids of conversations} of a version; empty if the registry lost the list, or it does not hold an id."""
    kept = registry.read(version, "provenance/conversations.json") or b"{}"
    return json.loads(kept) if holding.encode() in kept else {}


def _subject(commit: str) -> str | None:
    if not COMMIT.fullmatch(commit):
        return None
    try:
        return run_command("git", "log", "-1", "--format=%s", commit).strip()
    except UserError:
        return None


# ------------------------------------------------------------------------------------------- replies and conversations


def _places_of(identity: str) -> Iterator[dict[str, Any]]:
    """Files that hold a conversation or a reply of this id. No content is passed on."""
    asked = identity.encode()
    for path in sorted(CONVERSATIONS.glob("*.jsonl")):
        for _, line in read_lines(path):
            if asked in line:  # only such lines are parsed
                with suppress(ValueError, AttributeError):
                    yield from _places_in(as_conversation(json.loads(line)), identity, path)
    for path in filter(Path.is_file, [LOG, *sorted((LOG.parent / "closed").glob("*.jsonl"))]):
        for conversation in ConversationLogger(path).read_conversations():
            yield from _places_in(conversation, identity, path)


def _places_in(conversation: dict, identity: str, path: Path) -> Iterator[dict[str, Any]]:
    if conversation["id"] == identity:
        yield {"file": path.as_posix()}
    for message in conversation.get("messages") or []:
        for said in versions_of(message):
            if said.get("id") == identity and said.get("role") == "assistant":
                reply = {"id": identity, "conversation": conversation["id"], "in": path.as_posix()}
                author = {name: said.get(name) for name in ("model", "version", "at")}
                yield {"file": path.as_posix(), "reply": reply | author}


def _author(registry: ModelRegistry, reply: dict) -> int | None:
    """The version that wrote a reply: the one logged with it, the one in its tag, or the one that was live then."""
    known = {version.number for version in registry.versions()}
    if isinstance(reply.get("version"), int):
        return reply["version"] if reply["version"] in known else None
    name, _, tag = str(reply.get("model") or "").partition(":")
    if name != registry.name:
        return None
    if adapter := tag.partition("@")[2]:  # serve.adapters
        of = (v.number for v in registry.versions() if v.tags.get(ADAPTER_TAG, "").startswith(adapter))
        return next(of, None)
    if tag.isdecimal() and tag.isascii():
        return int(tag) if int(tag) in known else None
    if tag == LIVE and reply.get("at"):
        with suppress(ValueError):  # not a time
            at = datetime.fromisoformat(reply["at"])
            return next((event.number for event in reversed(went_live(registry.versions())) if event.at <= at), None)
    return None


# ---------------------------------------------------------------------------------------------------------------- text


def as_text(found: dict[str, Any]) -> str:
    """What `trace` found, for reading, each line with its end."""
    text = Path(__file__).with_name("lineage.txt.jinja").read_text(encoding="utf-8")
    template = Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.render(found, count_of=count_of, parameters=_shown_parameters)


def _shown_parameters(version: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sections = [name for name in SHOWN_SECTIONS if name != "train" or not version["adopted_from"]]
    given = version["parameters"] or {}
    return {name: flatten(given[name]) for name in sections if isinstance(given.get(name), dict)}
