"""What callers give: what is no conversation is one line or is left out, at every door of the data half."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import dump_line
from fine_tuning.data_collection.conversation_logger import ConversationLogger, conversation_stats
from fine_tuning.data_collection.data_cleaner import DataCleaner
from fine_tuning.data_collection.data_export import DataExporter
from fine_tuning.data_collection.importers import Imported, import_file
from fine_tuning.data_collection.storage.shards import versions
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.formatter import FORMATS, TrainingDataFormatter
from fine_tuning.data_preparation.selection import structure_problem
from fine_tuning.schema.conversation import fold, version_hash

EXCHANGE = {"user_message": "What is a lake?", "assistant_response": "Water that stays."}
LISTS = [None, 5, "text", EXCHANGE, [None], ["text"], [EXCHANGE, 5]]


@pytest.mark.parametrize("conversations", LISTS)
def test_what_is_no_list_of_conversations_is_one_line_at_every_door(tmp_path, conversations):
    doors = [
        DataCleaner().filter_conversations,
        DataExporter(tmp_path).export_all_formats,
        TrainingDataFormatter().create_training_pairs,
        DatasetBuilder().build_dataset,
    ]
    for door in doors:
        with pytest.raises(UserError, match="give a list of dicts") as told:
            door(conversations)
        assert "\n" not in str(told.value) and "lake" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, 5, b"text", ["text"]])
def test_what_is_no_text_is_one_line(text):
    for door in (DataCleaner().clean_text, DataCleaner().find_personal_data):
        with pytest.raises(UserError, match="is no text: give a str"):
            door(text)


@pytest.mark.parametrize("lengths", [{"min_length": "5"}, {"max_length": 1.5}, {"min_length": 10, "max_length": 5}])
def test_lengths_that_cannot_be_are_one_line(lengths):
    with pytest.raises(UserError, match="_length"):
        DataCleaner(**lengths)


@pytest.mark.parametrize("odd", [{1}, [1], {"a": 1}, bytearray(b"a"), ([],)])
@pytest.mark.parametrize("place", [("messages", 1, "id"), ("feedback", 0, "message_id")])
def test_an_id_that_nothing_can_be_told_by_is_malformed(odd, place):
    record = changed(WHOLE[1], place, odd)
    assert structure_problem(record) == "malformed"
    assert DataCleaner().clean_conversation(record).drop.reason.endswith("_malformed")
    built = DatasetBuilder().build_dataset([record, EXCHANGE])
    assert sum(map(len, built.values())) == 1


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats(0, 2)
    | st.sampled_from(["", "user", "c-0", "2026-01-01"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", "rating", "content"]), inner),
    max_leaves=4,
)
WHOLE = [
    EXCHANGE | {"id": "e", "timestamp": "2026-01-01", "feedback": [{"message_id": "e", "rating": 1}],
                "metadata": {"session_id": "s", "model": "m", "tokens": 3,
                             "history": [{"role": "user", "content": "Hello"}]}},
    {"id": "c", "source": "x", "started_at": "2026-01-01", "metadata": {"user_id": "ann"}, "restored": True,
     "messages": [{"id": "c-0", "role": "user", "content": "What is a lake?"},
                  {"id": "c-1", "role": "assistant", "content": "Water that stays.", "incomplete": "stopped",
                   "model": "m", "alternatives": [{"id": "c-2", "role": "assistant", "content": "A pond."}]}],
     "feedback": [{"message_id": "c-1", "rating": -1, "edited": "Still water.", "over": ["c-2"], "comment": "so"}]},
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_record_that_is_odd_anywhere_passes_every_door_or_is_left_out(tmp_path_factory, data):
    record = data.draw(st.sampled_from(WHOLE))
    odd = changed(record, data.draw(st.sampled_from([place for place in places(record) if place])), data.draw(ODD))
    cleaned = DataCleaner().clean_conversation(odd).conversation
    given = [odd] if cleaned is None else [odd, cleaned]
    exporter = DataExporter(tmp_path_factory.getbasetemp() / "odd")
    paths = exporter.export_all_formats([*given, EXCHANGE])
    for name, counts in exporter.counts.items():
        assert sum(counts.values()) == len(given) + 1
        items = list(import_file(paths[name]))
        assert sum(isinstance(item, Imported) for item in items) >= 1, (name, items)
    for format in FORMATS:
        TrainingDataFormatter(format).create_training_pairs(given)
    built = DatasetBuilder().build_dataset([*given, EXCHANGE])
    assert json.loads(json.dumps(built))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_line_of_a_shard_that_is_odd_anywhere_takes_events_or_is_passed_over(tmp_path_factory, data):
    record = WHOLE[1] | {"deleted_messages": ["c-9"]}
    place = data.draw(st.sampled_from([place for place in places(record) if place]))
    events_fit(tmp_path_factory.getbasetemp() / "odd.jsonl", changed(record, place, data.draw(ODD | st.just(...))))


@pytest.mark.parametrize("key", ["feedback", "metadata", "source", "started_at"])
def test_a_line_of_a_shard_takes_events_without_what_need_not_be_there(tmp_path, key):
    assert events_fit(tmp_path / "shard.jsonl", {name: WHOLE[1][name] for name in WHOLE[1].keys() - {key}})


def test_a_line_of_a_shard_with_an_empty_id_takes_events(tmp_path):
    assert events_fit(tmp_path / "shard.jsonl", WHOLE[1] | {"id": ""})


def events_fit(shard, record):
    """Whether a line is a conversation; then every kind of event can be applied to it, again and again."""
    logger = ConversationLogger(shard.with_name("log.jsonl"), durable=False)
    logger.path.unlink(missing_ok=True)
    shard.write_bytes(dump_line(record))
    for version in versions([shard]):
        identity = version["id"]
        before, target = version_hash(version), {"conversation_id": identity}
        assert conversation_stats([version])["total_conversations"] == 1
        Tombstones(shard.with_name("forgotten.jsonl")).cover(version)
        logger.log_feedback("c-1", 1, by="ann", **target)
        logger.log_preference("c-2", ["c-1"], by="ann", **target)
        logger.log_conversation("Why?", "So.", {"session_id": identity, "replaces": "c-2"}, id="e1")
        logger.log_conversation("And?", "So.", {"session_id": identity, "user_id": "bob"}, id="e2")
        logger.log_edit("e1", "For that.", **target)
        logger.log_delete(message_id="c-0", **target)
        fold(logger.read_events(), known := {identity: version})
        assert version_hash(version) != before
        logger.log_delete(conversation_id=identity)
        fold(logger.read_events(), known)
        assert version["deleted"] and version["messages"] == []
        return True
    return False


def places(value, path=()):
    """The path of every value within a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(value, path, new):
    """A copy of a JSON value with another one at a path, or with none there (`...`)."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    if copy[path[0]] is ...:
        del copy[path[0]]
    return copy
