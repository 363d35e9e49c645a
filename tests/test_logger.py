"""The inbox: what is acknowledged is on disk, whole, once, whoever else writes or crashes."""

import errno
import json
import multiprocessing
import os
import re
import resource
import stat
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.conversation_logger import EVENTS, ConversationLogger
from fine_tuning.erasure.records import Selection
from fine_tuning.schema.conversation import version_hash


@pytest.fixture
def logger(tmp_path):
    return ConversationLogger(tmp_path / "conversations.jsonl")


def test_the_seed_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = ConversationLogger("conversations.jsonl")
    identity = logger.log_conversation(
        "What is machine learning?", "Machine learning is…", {"session_id": "test_session"}
    )
    assert isinstance(identity, str) and identity
    assert logger.get_conversation_stats()["total_conversations"] == 1


def test_an_exchange_is_one_json_line_that_only_its_owner_reads(logger):
    identity = logger.log_conversation("Hello\u2028there", "Hi\nyou", {"session_id": "s", "model": "m:1"})
    (line,) = logger.path.read_bytes().split(b"\n")[:-1]
    event = json.loads(line)
    assert (event["id"], event["user_message"], event["assistant_response"]) == (
        identity,
        "Hello\u2028there",
        "Hi\nyou",
    )
    assert stat.S_IMODE(logger.path.stat().st_mode) == 0o600


def test_exchanges_of_a_session_are_one_conversation(logger):
    for text in ("one", "two", "three"):
        logger.log_conversation(text, text.upper(), {"session_id": "s"})
    logger.log_conversation("alone", "ALONE")
    stats = logger.get_conversation_stats()
    assert (stats["total_conversations"], stats["total_exchanges"]) == (2, 4)
    talk = logger.read_conversations()[0]
    assert [m["content"] for m in talk["messages"]] == ["one", "ONE", "two", "TWO", "three", "THREE"]


def test_the_same_id_again_counts_once(logger):
    for _ in range(3):
        logger.log_conversation("q", "a", {"session_id": "s"}, id="e1")
    assert logger.get_conversation_stats()["total_exchanges"] == 1


def test_feedback_edit_and_delete_change_what_is_read(logger):
    first = logger.log_conversation("q1", "a1", {"session_id": "s"})
    second = logger.log_conversation("q2", "a2", {"session_id": "s"})
    logger.log_feedback(first, 1, comment="good", by="ann")
    logger.log_feedback(first, -1, by="ann")
    logger.log_edit(second, "better", by="ann")
    (talk,) = logger.read_conversations()
    assert {e["message_id"]: (e["rating"], e.get("comment"), e.get("edited")) for e in talk["feedback"]} == {
        first: (-1, "good", None),
        second: (None, None, "better"),
    }
    logger.log_delete(message_id=first)
    assert [m["content"] for m in logger.read_conversations()[0]["messages"]] == ["q2", "a2"]
    logger.log_delete(conversation_id="s")
    assert logger.read_conversations() == []


def test_what_was_said_before_a_deletion_rests_on_it_and_what_is_said_after_it_does_not(logger):
    for number in (1, 2, 3):
        logger.log_conversation(f"q{number}", f"a{number}", {"session_id": "s"}, id=f"e{number}")
    logger.log_delete(message_id="e2")
    logger.log_conversation("q4", "a4", {"session_id": "s"})
    logger.log_delete(message_id="e4")
    (talk,) = logger.read_conversations()
    assert [(m["content"], m.get("gap", False)) for m in talk["messages"][:4]] == [
        ("q1", False), ("a1", False), ("q3", True), ("a3", False)
    ]  # fmt: skip
    assert not any(message.get("gap") for message in talk["messages"][4:])


def test_statistics_count_days_models_lengths_and_judgements(logger):
    one = logger.log_conversation("12345678", "1234", {"model": "m:1"}, timestamp="2026-01-01T10:00:00Z")
    logger.log_conversation("1234", "1234", {"model": "m:2"}, timestamp="2026-01-02T10:00:00Z")
    logger.log_feedback(one, 1)
    stats = logger.get_conversation_stats()
    assert stats["conversations_per_day"] == {"2026-01-01": 1, "2026-01-02": 1}
    assert stats["exchanges_per_model"] == {"m:1": 1, "m:2": 1}
    assert (stats["total_tokens"], stats["average_user_length"], stats["feedback_share"]) == (5, 6.0, 0.5)
    assert stats["liked"] == 1


def test_the_tokens_of_a_reply_are_those_that_were_logged_with_it(logger):
    logger.log_conversation("12345678", "1234" * 10, {"session_id": "s", "tokens": 3})
    logger.log_conversation("1234", "1234", {"session_id": "s", "tokens": "many"})
    assert logger.get_conversation_stats()["total_tokens"] == 2 + 3 + 1 + 1


def test_odd_authors_and_times_are_counted_all_the_same(logger):
    logger.log_conversation("q", "a", {"model": ["m", 1], "source": {"x": 1}})
    logger.log_conversation("q", "a", timestamp=datetime(2026, 1, 2, tzinfo=UTC))
    stats = logger.get_conversation_stats()
    assert stats["exchanges_per_model"] == {"['m', 1]": 1, "unknown": 1}
    assert stats["conversations_per_day"]["2026-01-02"] == 1


@pytest.mark.parametrize(
    "log",
    [
        lambda logger: logger.log_conversation("q", "a", id=5),
        lambda logger: logger.log_conversation("q", "a", timestamp=1_700_000_000),
        lambda logger: logger.log_conversation("q", "a", ["m:1"]),
        lambda logger: logger.log_conversation("q", "a", "m:1"),
        lambda logger: logger.log_conversation(None, "a"),
        lambda logger: logger.log_edit("e", None),
        lambda logger: logger.log_edit("e", 5),
        lambda logger: logger.log_feedback(["e"], 1),
        lambda logger: logger.log_feedback("e", 1, comment={"a": 1}),
        lambda logger: logger.log_feedback("e", 1, conversation_id=["e"]),
        lambda logger: logger.log_preference("e", 5),
        lambda logger: logger.log_preference("e", ["f", 5]),
        lambda logger: logger.log_delete(message_id=["e"]),
    ],
)
def test_what_could_not_be_read_again_is_refused_in_one_line(logger, log):
    logger.log_conversation("q", "a", id="e")
    size = logger.path.stat().st_size
    with pytest.raises(UserError, match="could not be logged") as told:
        log(logger)
    assert "\n" not in str(told.value)
    assert logger.path.stat().st_size == size


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["e", "s", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["model", "replaces"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = ["id", "conversation_id", "message_id", "user_message", "assistant_response", "content", "rating", "over", "by",
        "comment", "metadata", "timestamp"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"event": st.sampled_from(EVENTS)}) | st.dictionaries(st.sampled_from(KEYS), ODD))
)
def test_no_line_of_a_log_keeps_the_others_from_being_read(tmp_path_factory, odd):
    logger = ConversationLogger(tmp_path_factory.mktemp("log") / "log.jsonl", durable=False)
    logger.log_conversation("q", "a", {"session_id": "s"}, id="e")
    sound = {"event": "feedback", "id": "f", "message_id": "e", "rating": 1}
    with open(logger.path, "ab") as file:
        for event in odd:
            file.write(json.dumps(sound | event).encode() + b"\n")
    logger.log_conversation("last", "word", id="z")
    conversations = logger.read_conversations()
    assert conversations[-1]["messages"][-1]["content"] == "word"
    logger.get_conversation_stats()
    assert all(version_hash(conversation) for conversation in conversations)


def test_what_the_disk_refuses_with_the_sync_is_undone_too(logger, monkeypatch):
    logger.log_conversation("fits", "yes")

    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(UserError, match="Disk quota exceeded"):
        logger.log_conversation("does not", "fit")
    monkeypatch.undo()
    logger.log_conversation("next", "yes")
    assert [e["user_message"] for e in logger.read_events()] == ["fits", "next"]


def test_lone_surrogates_and_odd_metadata_are_kept(logger):
    logger.log_conversation("half \ud83d", "fine", {"path": logger.path})
    (exchange,) = logger.read_events()
    assert exchange["user_message"] == "half \ud83d"
    assert exchange["metadata"]["path"] == str(logger.path)


def test_a_torn_last_line_is_set_aside_and_never_merged(logger):
    logger.log_conversation("whole", "yes")
    with open(logger.path, "ab") as file:
        file.write(b'{"event":"exchange","id":"torn","user_mess')
    assert [e["user_message"] for e in logger.read_events()] == ["whole"]
    logger.log_conversation("next", "yes")
    assert [e["user_message"] for e in logger.read_events()] == ["whole", "next"]
    assert b'"torn"' in logger.path.with_name("conversations.jsonl.torn").read_bytes()


def _log_many(path, count, name):
    logger = ConversationLogger(path, durable=False)
    for number in range(count):
        logger.log_conversation(f"{name} {number}", "x" * 5000)


def test_eight_processes_and_threads_at_once_lose_nothing(tmp_path):
    path = tmp_path / "conversations.jsonl"
    workers = [multiprocessing.Process(target=_log_many, args=(path, 50, f"p{n}")) for n in range(4)]
    workers += [threading.Thread(target=_log_many, args=(path, 50, f"t{n}")) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    written = {e["user_message"] for e in ConversationLogger(path).read_events()}
    assert written == {f"{kind}{n} {number}" for kind in "pt" for n in range(4) for number in range(50)}


def _log_on_a_full_disk(path, sender):
    logger = ConversationLogger(path)
    logger.log_conversation("fits", "yes")
    size = os.path.getsize(path)
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
    try:
        logger.log_conversation("does not fit", "secret " * 100)
    except UserError as error:
        sender.send((str(error), os.path.getsize(path) - size))


def _tear_on_a_full_disk(path, sender):
    logger = ConversationLogger(path)
    torn = b'{"event":"exchange","id":"torn' + b"x" * 5000
    with open(path, "ab") as file:
        file.write(torn)
    path.with_name("conversations.jsonl.torn").write_bytes(b"before\n" + b"y" * 9000 + b"\n")
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        logger.log_conversation("next", "yes")
    except UserError as error:
        sender.send((str(error), path.read_bytes().endswith(torn)))


def test_a_torn_line_that_cannot_be_set_aside_whole_stays_where_it_is(tmp_path):
    path = tmp_path / "conversations.jsonl"
    ConversationLogger(path).log_conversation("whole", "yes")
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_tear_on_a_full_disk, args=(path, sender))
    process.start()
    message, stays = receiver.recv()
    process.join()
    assert stays and "could not be logged" in message
    assert path.with_name("conversations.jsonl.torn").read_bytes().endswith(b"y\n")
    ConversationLogger(path).log_conversation("next", "yes")
    assert [e["user_message"] for e in ConversationLogger(path).read_events()] == ["whole", "next"]
    assert b"xxx" in path.with_name("conversations.jsonl.torn").read_bytes()


def test_a_short_write_is_undone_and_one_clear_error(tmp_path):
    path = tmp_path / "conversations.jsonl"
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_log_on_a_full_disk, args=(path, sender))
    process.start()
    message, grown = receiver.recv()
    process.join()
    assert grown == 0
    assert "could not be logged" in message and "secret" not in message and "\n" not in message
    assert [e["user_message"] for e in ConversationLogger(path).read_events()] == ["fits"]


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be logged"):
        ConversationLogger(tmp_path / "file" / "log.jsonl").log_conversation("q", "a")


def test_a_session_with_an_odd_name_is_one_conversation_under_a_plain_one(tmp_path):
    logger = ConversationLogger(tmp_path / "log.jsonl")
    for session in ("../etc/passwd", "../etc/passwd", "room 1\nrole: system", "plain-1"):
        logger.log_conversation("question", "reply", {"session_id": session})
    ids = [event["conversation_id"] for event in logger.read_events()]
    assert ids[0] == ids[1] != ids[2] and ids[3] == "plain-1"
    assert all(re.fullmatch(r"session-[0-9a-f]{32}", name) for name in ids[:3])
    assert len(logger.read_conversations()) == 3
    assert Selection(session="../etc/passwd").takes({"id": ids[0]})


def test_all_who_spoke_in_a_conversation_are_known_so_that_each_can_be_forgotten(logger):
    for user in ("ann", "ben", "ann"):
        logger.log_conversation("question", f"reply to {user}", {"session_id": "s", "user_id": user})
    (conversation,) = logger.read_conversations()
    assert [Selection(user=user).takes(conversation) for user in ("ann", "ben", "cy")] == [True, True, False]
    for odd in (5, "ann", [["x"], None], {"a": 1}):
        logger.log_conversation("question", "reply", {"session_id": "t", "user_id": 7, "users": odd})
    odd = logger.read_conversations()[1]
    assert len(odd["messages"]) == 8 and Selection(user="7").takes(odd) and not Selection(user="ben").takes(odd)
