"""The schema of conversations: one judge of form for the cleaner, the exporter and preparation, and a version."""

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_jsonl, write_jsonl
from fine_tuning.data_collection.data_cleaner import DataCleaner
from fine_tuning.data_collection.data_export import DataExporter
from fine_tuning.data_collection.storage.shards import versions, write_shard
from fine_tuning.data_preparation.selection import structure_problem
from fine_tuning.schema.conversation import SCHEMA_VERSION, can_be_folded, problem_of

ASKED = {"id": "q", "role": "user", "content": "How do I reset my router at home?"}
REPLY = {"id": "a", "role": "assistant", "content": "Hold the reset button for ten seconds."}
SOUND = {"id": "c", "source": "chat", "started_at": None, "messages": [ASKED, REPLY], "feedback": [], "metadata": {}}
RATED = {"message_id": "a", "rating": 1}

UNSOUND = [
    ({"messages": "hello"}, "messages_malformed"),
    ({"messages": [ASKED, "hello"]}, "messages_malformed"),
    ({"messages": [ASKED, REPLY | {"content": None}]}, "content_is_no_text"),
    ({"messages": [ASKED, REPLY | {"id": ["a"]}]}, "messages_malformed"),
    ({"messages": [ASKED, REPLY | {"role": "narrator"}]}, "unknown_role"),
    ({"messages": [ASKED, REPLY | {"role": ["assistant"]}]}, "unknown_role"),
    ({"feedback": {"a": 1}}, "feedback_or_metadata_malformed"),
    ({"feedback": ["liked"]}, "feedback_or_metadata_malformed"),
    ({"feedback": [RATED | {"rating": "up"}]}, "feedback_or_metadata_malformed"),
    ({"feedback": [RATED | {"edited": 4}]}, "feedback_or_metadata_malformed"),
    ({"feedback": [RATED | {"over": "b"}]}, "feedback_or_metadata_malformed"),
    ({"metadata": ["zoe"]}, "feedback_or_metadata_malformed"),
]


@pytest.mark.parametrize(("change", "reason"), UNSOUND)
def test_what_is_unsound_is_unsound_for_everybody(change, reason, tmp_path):
    conversation = SOUND | change
    assert problem_of(conversation).reason == reason
    assert DataCleaner().clean_conversation(conversation).drop.reason == reason
    exporter = DataExporter(tmp_path)
    exporter.export([conversation], "chatml")
    assert exporter.counts["chatml"] == {"exported": 0, "skipped": 1}
    if "metadata" not in change:  # preparation reads no metadata of what cleaning wrote
        assert structure_problem(conversation) == "malformed"


@pytest.mark.parametrize("change", [{}, {"feedback": [RATED | {"over": ["b"]}]}, {"messages": [ASKED, REPLY, ASKED]}])
def test_what_is_sound_is_sound_for_everybody(change, tmp_path):
    conversation = SOUND | change
    assert problem_of(conversation) is None and can_be_folded(conversation)
    assert DataCleaner().clean_conversation(conversation).drop is None
    exporter = DataExporter(tmp_path)
    exporter.export([conversation], "json")
    assert exporter.counts["json"] == {"exported": 1, "skipped": 0}
    assert structure_problem(conversation) is None


def test_a_shard_bears_the_version_of_its_form_and_what_clients_send_stays(tmp_path):
    sent = {
        "reasoning": "It is a router.",
        "tool_calls": [{"id": "1", "name": "look_up", "arguments": {"what": "router"}}],
        "attachments": [{"type": "image/png", "name": "router.png", "sha256": "0" * 64}],
        "retrieved": [{"source": "manual.pdf", "start": 0, "end": 8}],
    }
    conversation = SOUND | {"messages": [ASKED, REPLY | sent], "tools": [{"name": "look_up"}]}
    shard, _ = write_shard(tmp_path / "shards", "chat", [conversation])
    assert next(read_jsonl(shard)) == conversation | {"schema_version": SCHEMA_VERSION}
    assert next(versions([shard]))["messages"][1] == REPLY | sent


def test_an_older_shard_is_read_and_a_newer_one_is_refused(tmp_path):
    shard = tmp_path / "shard.jsonl"
    write_jsonl(shard, [SOUND])
    assert [version["id"] for version in versions([shard])] == ["c"]
    write_jsonl(shard, [SOUND | {"schema_version": SCHEMA_VERSION + 1}])
    with pytest.raises(UserError, match="another version of this project"):
        list(versions([shard]))
