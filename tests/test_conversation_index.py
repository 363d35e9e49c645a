"""The index that the pages read: whatever is logged, sealed, forgotten or deleted, it says what the files say."""

import itertools
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as hypothesis

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import CONVERSATIONS, LOG, MANIFEST
from fine_tuning.common.records import dump_line, write_json, write_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.conversation_logger import ConversationLogger, rewrite_log
from fine_tuning.data_collection.storage import log_index
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.data_collection.storage.shards import shard_paths, versions, write_shard
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.data_preparation.splits import Ledger
from fine_tuning.integration import data_view
from fine_tuning.integration.conversation_index import ConversationIndex, Texts, conversation_index
from fine_tuning.schema.conversation import fold
from tests.project import ROOT
from tests.test_odd_records import ODD, changed, places

KINDS = ("say", "judge", "edit", "delete", "undo", "close", "seal", "forget", "erase", "bring", "torn")
STEPS = hypothesis.lists(hypothesis.tuples(hypothesis.sampled_from(KINDS), hypothesis.integers(0, 3)), max_size=14)


def in_the_files(checkout: Path) -> dict[str, dict]:
    """Every conversation as logs and shards have it, read from their beginning."""
    known = {version["id"]: version for version in versions(shard_paths(checkout / CONVERSATIONS, checkout / MANIFEST))}
    logs = [*sorted((checkout / "inbox/closed").glob("*.jsonl")), checkout / LOG]
    fold([event for log in logs for event in ConversationLogger(log).read_events()], known)
    return {identity: c for identity, c in known.items() if c["messages"]}


def take(step: str, number: int, checkout: Path, logger: ConversationLogger, said: list[str]) -> None:
    identity = f"s{number}"
    shards = checkout / CONVERSATIONS
    if step == "say":
        said.append(logger.log_conversation(f"Question {len(said)}?", "It is.", {"session_id": identity}))
    elif step == "judge" and said:
        logger.log_feedback(said[number % len(said)], 1)
    elif step == "edit":
        logger.log_edit(f"{said[-1]}" if said else "nobody", "It is not.", conversation_id=identity)
    elif step == "delete":
        logger.log_delete(identity)
    elif step == "undo":
        logger.undo_delete(identity)
    elif step == "close":
        close_log(logger.path, shards)
    elif step == "seal":
        for log in close_log(logger.path, shards):
            seal_log(log, shards, checkout / MANIFEST)
            log.unlink()
    elif step == "forget":
        rewrite_log(logger.path, lambda _, event: event is None or event.get("conversation_id") != identity)
    elif step == "erase":
        for shard in list(shards.glob("*.jsonl"))[:1]:
            shard.unlink()
    elif step == "bring":
        prefix = f"20000101T00000000{number}-import"
        messages = [{"id": f"m{number}", "role": "user", "content": f"Imported {number}"}]
        record = {"id": identity, "messages": messages, "feedback": [], "metadata": {}}
        write_shard(shards, prefix, [record])
    elif step == "torn":
        logger.path.parent.mkdir(exist_ok=True)
        with open(logger.path, "ab") as file:
            file.write(b'{"event": "exchange", "id": "half')


@settings(max_examples=80, deadline=None)
@given(STEPS)
@example([("say", 0), ("seal", 0), ("say", 0), ("close", 0), ("say", 1), ("seal", 0), ("say", 2)])
@example([("say", 0), ("say", 1), ("forget", 0), ("judge", 1), ("seal", 0), ("erase", 0)])
@example([("say", 0), ("seal", 0), ("delete", 0), ("undo", 0), ("delete", 0), ("seal", 0)])
@example([("say", 0), ("seal", 0), ("bring", 1), ("say", 1), ("delete", 0)])
def test_after_every_step_the_index_says_what_the_files_say(steps):
    with tempfile.TemporaryDirectory() as name:
        checkout, said = Path(name), []
        (checkout / CONVERSATIONS).mkdir(parents=True)
        index, logger = ConversationIndex(checkout), ConversationLogger(checkout / LOG, durable=False)
        for step, number in steps:
            take(step, number, checkout, logger, said)
            there = in_the_files(checkout)
            rows, names = index.columns()
            numbers = np.flatnonzero(rows["there"])
            assert {found.id: found.messages for found in index.summaries(numbers)} == {
                identity: len(c["messages"]) for identity, c in there.items()
            }
            assert numbers.tolist() == sorted(index.numbers(there)) == sorted(index.with_words(""))
            days = sorted(names["day"][code] for code in rows["day"][numbers])
            assert days == sorted(str(c.get("started_at") or "")[:10] for c in there.values())
            assert all(index.conversation(identity) == c for identity, c in there.items())
            assert there.keys().isdisjoint(found.id for found in index.deleted()[0])


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    logger, index = ConversationLogger(tmp_path / LOG, durable=False), ConversationIndex(tmp_path)
    (tmp_path / CONVERSATIONS).mkdir(parents=True)
    for number in range(300):
        logger.log_conversation(f"Question {number}?", "Yes.", {"session_id": f"s{number}"})
    assert index.listed("chat")[1] == 300
    read, reader = [], log_index.read_event
    monkeypatch.setattr(log_index, "read_event", lambda line: read.append(line) or reader(line))
    logger.log_conversation("One more?", "Yes.", {"session_id": "s7"})
    assert index.conversation("s7")["messages"][-2]["content"] == "One more?"
    assert len(read) <= 6, "the new event, and those of its conversation"


def test_ratings_are_counted_by_when_a_conversation_was_spoken_in_last(tmp_path):
    log = tmp_path / "inbox/conversations.jsonl"
    logger = ConversationLogger(log)
    for rating in (1, 1, -1, None):
        reply = logger.log_conversation("What is it?", "It.")
        if rating:
            logger.log_feedback(reply, rating=rating)
    index = ConversationIndex(tmp_path)
    assert index.ratings("2020-01-01", "2100-01-01") == (2, 3)
    assert index.ratings("2020-01-01", "2021-01-01") == (0, 0)


def test_a_search_finds_words_of_any_message_or_of_a_given_name(tmp_path):
    logger, index = ConversationLogger(tmp_path / LOG, durable=False), ConversationIndex(tmp_path)
    for number, text in enumerate(("Über Äpfel", "100 % pears", "plums")):
        logger.log_conversation(
            text, "Fruit.", {"session_id": f"s{number}"}, timestamp=f"2026-01-0{number + 1}T00:00:00Z"
        )

    def found(words: str) -> list[str]:
        listed, count = index.listed("chat", words, {"s2": "Breakfast"}, limit=2)
        assert len(listed) == min(count, 2)
        return [entry.id for entry in listed]

    assert found("") == ["s2", "s1"]
    assert found("äpfel über") == ["s0"]
    assert found("%") == ["s1"]
    assert found("BREAK fruit") == ["s2"]
    assert found("grapes") == []
    assert found("S0") == ["s0"]
    assert found(" ".join(["plums", *(f"word{number}" for number in range(2000))])) == []
    assert found("\ud800") == []


def test_a_search_finds_rare_and_common_words_wherever_texts_lie(monkeypatch):
    monkeypatch.setattr("fine_tuning.integration.conversation_index.AT_ONCE", 5)
    draw, texts, held = random.Random(7), Texts(), {}
    for _ in range(300):
        number, words = draw.randrange(1, 60), draw.choices(("", "a", "b", "äb", "rare"), (5, 9, 9, 5, 1), k=3)
        texts.put(number, " ".join(words))
        held[number] = " ".join(words)
        if draw.random() < 0.2:
            texts.remove(number)
            del held[number]
        for wanted in (["a"], ["b"], ["äb", "a"], ["rare"], ["none"], [""]):
            having = [number for number, text in held.items() if all(word in text for word in wanted)]
            assert sorted(texts.having(wanted)) == sorted(having)


def test_an_id_is_found_whatever_its_case(tmp_path):
    messages = [{"id": "m", "role": "user", "content": "Why?"}]
    write_shard(tmp_path / CONVERSATIONS, "20260101T000000000-import", [{"id": "ChatGPT-7F", "messages": messages}])
    index = ConversationIndex(tmp_path)
    assert index.with_words("ChatGPT-7F") == index.with_words("chatgpt") == [1]


def test_a_shard_that_no_index_can_hold_is_named_at_every_visit_until_it_is_gone(tmp_path):
    record = {"id": "c", "messages": [{"id": "m", "role": "user", "content": "Why?"}]}
    write_shard(tmp_path / CONVERSATIONS, "20260101T000000000-import", [record])
    newer = tmp_path / CONVERSATIONS / "20260102T000000000-import-newer.jsonl"
    newer.write_bytes(dump_line(record | {"id": "d"}) + dump_line(record | {"id": "e", "schema_version": 99}))
    index = ConversationIndex(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"newer\.jsonl was written by another version of this project"):
            index.state()
    newer.unlink()
    assert index.count(set()) == (1, 0, 1)


def test_the_newest_version_is_that_of_the_last_shard_also_when_the_manifest_says_another_order(tmp_path):
    for day, text in (("1", "First"), ("2", "Second")):
        message = {"id": f"m{day}", "role": "user", "content": text}
        write_shard(tmp_path / CONVERSATIONS, f"2026010{day}T000000000-import", [{"id": "c", "messages": [message]}])
    index, names = ConversationIndex(tmp_path), [path.name for path in shard_paths(tmp_path / CONVERSATIONS)]
    assert index.conversation("c")["messages"][0]["content"] == "Second"
    write_json(tmp_path / MANIFEST, {"shards": [{"name": name} for name in reversed(names)]})
    assert index.conversation("c")["messages"][0]["content"] == "First"


@pytest.mark.parametrize("odd", [{"at": 5}, {"at": ["x"]}, {"content": "\ud800"}, {"id": ["x"]}])
def test_a_shard_by_hand_with_values_of_odd_types_is_listed(tmp_path, odd):
    said = [{"id": "q", "role": "user", "content": "Why?", "at": "2026-01-01T00:00:00Z"} | odd]
    said.append({"id": "r", "role": "assistant", "content": "So.", "at": "2026-01-01T00:00:00Z"})
    record = {"id": "c", "source": "other", "messages": said, "feedback": [{"message_id": "r", "rating": "1"}]}
    write_shard(tmp_path / CONVERSATIONS, "20260101T000000000-import", [record])
    (found,), count = ConversationIndex(tmp_path).listed("other")
    assert (count, found.id, found.messages, found.rating) == (1, "c", 2, 0)


@settings(max_examples=200, deadline=None)
@given(hypothesis.data())
def test_what_is_said_of_a_conversation_that_is_odd_anywhere_stops_neither_index_nor_seal(data):
    message = {"id": "c-1", "role": "assistant", "content": "So.", "alternatives": [{"id": "c-2", "content": "No."}]}
    whole = {"id": "c", "source": "x", "started_at": "2026-01-01", "messages": [message], "metadata": {"user_id": "a"},
             "feedback": [{"message_id": "c-1", "rating": -1, "over": ["c-2"], "by": "ann"}],
             "deleted_messages": ["d"]}  # fmt: skip
    place = data.draw(hypothesis.sampled_from([place for place in places(whole) if place]))
    odd = changed(whole, place, data.draw(ODD))
    with tempfile.TemporaryDirectory() as name:
        shard = Path(name) / CONVERSATIONS / "20260101T000000000-import.jsonl"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(dump_line(odd))
        index, logger = ConversationIndex(Path(name)), ConversationLogger(Path(name) / LOG, durable=False)
        index.state()
        for act in (
            lambda: logger.log_feedback("c-1", 1),
            lambda: logger.log_preference("c-2", ["c-1"], "ann", conversation_id="c"),
            lambda: logger.log_conversation("Why?", "So.", {"session_id": "c", "replaces": "c-1", "user_id": "b"}),
            lambda: logger.log_delete(conversation_id="c", message_id="c-1"),
            lambda: logger.log_delete(conversation_id="c"),
        ):
            act()
            index.state()
        for log in close_log(logger.path, shard.parent):
            seal_log(log, shard.parent, Path(name) / MANIFEST)


def test_a_conversation_is_opened_whose_id_has_no_utf_8(tmp_path):
    record = {"id": "c\ud800", "source": "chat", "messages": [{"id": "m", "role": "user", "content": "Why?"}]}
    write_shard(tmp_path / CONVERSATIONS, "20260101T000000000-import", [record])
    index = ConversationIndex(tmp_path)
    (found,), _ = index.listed("chat")
    assert index.conversation(found.id, "chat")["id"] == "c\ud800"


def test_what_was_masked_is_found_in_a_last_line_without_an_end(tmp_path):
    (tmp_path / "1-chat.jsonl").write_bytes(
        b'{"id":"a","messages":[]}\n{"id":"b","messages":["<EMAIL_1> or <PHONE_1>"]}'
    )
    assert list(data_view._masked_in(tmp_path / "1-chat.jsonl")) == [("b", "EMAIL\nPHONE")]


def test_two_people_who_open_the_page_data_at_once_get_the_same(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    records = [
        {"id": f"c{number}", "messages": [{"id": "m", "role": "user", "content": "Why?"}], "feedback": []}
        for number in range(4)
    ]
    write_shard(tmp_path / CONVERSATIONS, "20260101T000000000-import", records)
    outcomes = data_view._outcomes(tmp_path, conversation_index(tmp_path).state()[1])
    identities, both, others = ConversationIndex.identities, threading.Barrier(2), itertools.count()

    def interleaved(index, first, *limit):
        found = identities(index, first, *limit)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5 if first == 1 else 0)
            while next(others) and len(outcomes._keys) == first:  # the second goes on when the first has its keys
                time.sleep(0.01)
        return found

    monkeypatch.setattr(ConversationIndex, "identities", interleaved)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(data_view.entries, [tmp_path] * 2)
    assert first.equals(second) and len(outcomes._keys) == 1 + len(records)


def prepared(checkout: Path, texts: list[str]) -> None:
    """A checkout that was cleaned, with a ledger under the salt of params.yaml."""
    shutil.copy(ROOT / "params.yaml", checkout)
    messages = [[{"id": "m", "role": "user", "content": text}] for text in texts]
    records = [{"id": f"c{number}", "messages": said} for number, said in enumerate(messages)]
    shard, _ = write_shard(checkout / CONVERSATIONS, "20260101T000000000-import", records)
    write_json(checkout / MANIFEST, {"shards": [{"name": shard.name}]})
    (checkout / "data/clean").mkdir()
    (checkout / "data/clean/rejected.jsonl").write_bytes(b"")
    write_jsonl(checkout / "data/clean" / shard.name, records)
    salt = read_params("prepare", PrepareSettings, checkout / "params.yaml").salt
    Ledger(checkout / data_view.LEDGER, salt).append((f"c{number}", "test") for number in range(len(texts)))


def test_conversations_are_counted_by_length_and_state(tmp_path):
    prepared(tmp_path, ["Why?", "Why " * 24, "Why?" * 25, "w" * 10_000])
    ConversationLogger(tmp_path / LOG, durable=False).log_conversation("New?", "Yes.")
    found = data_view.entries(tmp_path)
    table = data_view.counted(found["length"], found["fate"])
    assert table["kept"].to_dict() == {"0 from 0": 2, "1 from 100": 1, "5 from 10,000": 1}
    assert table["new"].to_dict() == {"0 from 0": 1, "1 from 100": 0, "5 from 10,000": 0}


def test_another_salt_shows_other_splits_at_once(tmp_path):
    prepared(tmp_path, ["Why?"])
    assert data_view.entries(tmp_path)["split"].tolist() == ["test"]
    params = tmp_path / "params.yaml"
    params.write_text(params.read_text().replace("salt: whetstone", "salt: another"))
    assert data_view.entries(tmp_path)["split"].tolist() == ["none"]


def test_the_page_data_shows_what_there_is_while_a_run_removes_files(tmp_path, monkeypatch):
    prepared(tmp_path, ["Mail <EMAIL_1>", "Why?"])

    def removing(reader, path):
        Path(path).unlink()
        return reader(path)

    for name in ("_masked_in", "read_lines"):
        monkeypatch.setattr(data_view, name, partial(removing, getattr(data_view, name)))
    assert data_view.entries(tmp_path)["masked"].tolist() == ["", ""]
    assert data_view.twin(tmp_path, "c0") is None
