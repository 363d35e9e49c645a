"""From a tag, a version or a reply to what made it, and from a conversation to the models it taught."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fine_tuning.commands.lineage import trace
from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.model_management.model_switcher import STAMP
from tests.registered import here, sh


@pytest.fixture
def registry(promoted):
    return open_registry("trial")


@pytest.fixture
def log(promoted):
    return ConversationLogger(Path("inbox/conversations.jsonl"), durable=False)


def went_live(registry, number: int, ago: timedelta) -> None:
    stamp = (datetime.now(UTC) - ago).strftime(STAMP)
    registry.set_tags(number, {f"live.{stamp}": "127.0.0.1_11434", "ollama.127.0.0.1_11434.digest": "d" * 64})


def test_a_version_is_traced_to_run_commit_lock_parameters_and_data(promoted, registry):
    (version,) = trace(registry, "2")["versions"]
    assert version["run"]["id"] == registry.version(2).run_id
    assert version["commit"]["id"] == sh(promoted, "git rev-parse HEAD~1").strip()
    assert version["commit"]["subject"] == "Train again"
    assert version["adapter_commit"] == {"id": version["commit"]["id"], "subject": "Train again"}
    lock = hashlib.sha256(sh(promoted, "git show HEAD~1:dvc.lock").encode()).hexdigest()
    assert version["dvc_lock"] == {"sha256": lock, "kept": True, "in_commit": True}
    assert version["parameters"]["train"]["seed"] == 2
    assert version["parameters"]["trial"] == {"verdict": "PROMOTE"}
    assert version["data"]["shards"][0]["name"] == "first.jsonl"
    assert version["conversations"] == {"train": ["c1", "c2"], "validation": ["c3"], "test": ["c4"]}
    assert version["base"] == {"model": "tiny", "revision": "r1"}
    assert version["promoted"]["by"] == "Trial" and version["promoted"]["at"]


@pytest.mark.parametrize(
    ("asked", "number"), [("1", 1), ("v1", 1), ("trial:1", 1), ("champion", 2), ("previous", 1), ("trial:champion", 2)]
)
def test_versions_tags_and_aliases_are_understood(registry, asked, number):
    assert trace(registry, asked)["versions"][0]["version"] == number


def test_live_is_the_version_that_went_live_last(registry):
    went_live(registry, 2, timedelta(hours=2))
    went_live(registry, 1, timedelta(hours=1))
    (version,) = trace(registry, "trial:live")["versions"]
    assert version["version"] == 1 and version["went_live"][0]["host"] == "127.0.0.1_11434"
    assert version["deployments"][0]["digest"] == "d" * 64


@pytest.mark.parametrize(
    ("metadata", "number"),
    [
        ({"model": "trial:1"}, 1),
        ({"model": "trial:live", "version": 2}, 2),
        ({"model": "models/champion/package/model.gguf", "version": 1}, 1),
        ({"model": "models/base/base-Q8_0.gguf"}, None),
        ({"model": "trial:live"}, 1),
        ({"model": "trial:9"}, None),
        ({"model": "trial:anna@ADAPTER"}, 2),  # serve.adapters
        ({"model": "trial:anna@00000000"}, None),
        ({}, None),
    ],
)
def test_a_reply_is_traced_to_the_version_that_wrote_it(registry, log, metadata, number):
    went_live(registry, 1, timedelta(hours=1))
    adapter = registry.version(2).tags["adapter_sha256"][:8]
    if "model" in metadata:
        metadata |= {"model": metadata["model"].replace("ADAPTER", adapter)}
    identity = log.log_conversation("Where is it?", "In the drawer", {"session_id": "s1", **metadata})
    went_live(registry, 2, timedelta(hours=-1))
    found = trace(registry, identity)
    assert found["reply"]["conversation"] == "s1"
    assert [version["version"] for version in found["versions"]] == ([number] if number else [])
    assert "In the drawer" not in json.dumps(found) and "Where is it" not in json.dumps(found)


def test_a_conversation_is_traced_to_the_models_it_taught(registry):
    found = trace(registry, "c3")
    assert found["conversation"] == {
        "id": "c3",
        "in": ["data/conversations/first.jsonl"],
        "splits": {1: "validation", 2: "validation"},
    }
    assert [version["version"] for version in found["versions"]] == [1, 2]


def test_a_conversation_that_was_deleted_here_is_still_known_by_the_models(promoted, registry):
    sh(promoted, "chmod -R u+w data && rm data/conversations/first.jsonl")
    assert trace(registry, "c1")["conversation"]["in"] == []


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("nobody", "no version, reply or conversation"),
        ("9", "has no version 9"),
        ("candidate", "no version is the candidate"),
        ("trial:live", "nothing went live"),
        ("trial:latest", "none of the registry's tags"),
        ("other:1", "knows trial and not other"),
        ("../../etc/passwd", "not a name, version or id"),
        ("a b", "not a name, version or id"),
    ],
)
def test_what_nothing_is_called_is_one_clear_line(registry, asked, reason):
    with pytest.raises(UserError, match=reason):
        trace(registry, asked)


def test_it_prints_text_and_json(registry, capsys):
    here("lineage", "champion")
    shown = capsys.readouterr().out
    for part in (
        "trial version 2 (champion)",
        "Train again",
        "the commit has it",
        " by Trial",
        "seed=2",
        "first.jsonl: 4",
        "train 2",
    ):
        assert part in shown
    here("lineage", "c4", "--json")
    assert json.loads(capsys.readouterr().out)["conversation"]["splits"] == {"1": "test", "2": "test"}
