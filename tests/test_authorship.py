"""Authorship: whose a reply is, from the file or the log to the test split, and what it costs to get it wrong."""

import csv
import json
import random

import pytest

from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.data_export import DataExporter
from fine_tuning.data_collection.importers import import_file
from fine_tuning.data_collection.storage.sample import sample_conversations
from fine_tuning.data_preparation.authorship import common_words, is_by_a_person
from fine_tuning.data_preparation.selection import select

REPLY = "Pull the plug, wait for ten seconds, and then put it back in again."


def authors(conversation: dict) -> list[str]:
    """`person`, `edited` or the model of every trained reply."""
    messages, trained = select(conversation, "not_disliked")
    return [
        "person" if message.get("person") else "edited" if message.get("edited") else message.get("model", "unknown")
        for message, wanted in zip(messages, trained, strict=True)
        if wanted
    ]


def logged(tmp_path, edit: str | None = None, **metadata) -> dict:
    logger = ConversationLogger(tmp_path / "log.jsonl")
    identity = logger.log_conversation("How do I restart it?", REPLY, metadata)
    logger.log_feedback(identity, 1)
    if edit is not None:
        logger.log_edit(identity, edit)
    (conversation,) = logger.read_conversations()
    return conversation


def imported(tmp_path, record: dict) -> dict:
    (tmp_path / "file.jsonl").write_text(json.dumps(record) + "\n")
    (item,) = import_file(tmp_path / "file.jsonl")
    return item.conversation


def turns(**fields) -> list[dict]:
    return [{"role": "user", "content": "How?"}, {"role": "assistant", "content": REPLY, **fields}]


def test_an_exchange_that_was_logged_without_a_model_has_an_unknown_author(tmp_path):
    assert authors(logged(tmp_path)) == ["unknown"]


def test_neither_a_session_nor_a_source_of_its_own_makes_it_a_persons(tmp_path):
    assert authors(logged(tmp_path, session_id="s", source="helpdesk")) == ["unknown"]


def test_a_logged_model_stays_the_author_of_what_somebody_liked(tmp_path):
    assert authors(logged(tmp_path, model="whetstone:3")) == ["whetstone:3"]


def test_an_import_that_names_no_model_is_a_persons(tmp_path):
    assert authors(imported(tmp_path, {"messages": turns()})) == ["person"]
    assert authors(imported(tmp_path, {"prompt": "How?", "completion": REPLY})) == ["person"]
    assert authors(imported(tmp_path, {"messages": turns(model="gpt-4o")})) == ["gpt-4o"]


def test_the_sample_is_a_persons():
    assert {author for conversation in sample_conversations() for author in authors_or_none(conversation)} == {"person"}


def authors_or_none(conversation: dict) -> list[str]:
    return authors(conversation) if select(conversation, "not_disliked") else []


def test_a_chats_export_has_an_unknown_author_where_it_names_none(tmp_path):
    def node(role, text, parent, **metadata):
        content = {"content_type": "text", "parts": [text]}
        return {"parent": parent, "message": {"author": {"role": role}, "content": content, "metadata": metadata}}

    tree = {"q": node("user", "How?", None), "a": node("assistant", REPLY, "q")}
    assert authors(imported(tmp_path, {"mapping": tree, "current_node": "a"})) == ["unknown"]
    tree["a"] = node("assistant", REPLY, "q", model_slug="gpt-4o")
    assert authors(imported(tmp_path, {"mapping": tree, "current_node": "a"})) == ["gpt-4o"]
    tree = {
        "q": {"id": "q", "role": "user", "content": "How?", "parentId": None},
        "a": {"id": "a", "role": "assistant", "content": REPLY, "parentId": "q"},
    }
    chat = {"id": "c", "chat": {"history": {"messages": tree, "currentId": "a"}}}
    assert authors(imported(tmp_path, chat)) == ["unknown"]
    assert authors(imported(tmp_path, chat) | {"source": "import"}) == ["unknown"]  # as earlier versions imported it


def test_a_log_that_is_imported_is_a_log_all_the_same(tmp_path):
    assert authors(imported(tmp_path, {"user_message": "How?", "assistant_response": REPLY})) == ["unknown"]
    with open(tmp_path / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows([["user_message", "assistant_response"], ["How?", REPLY]])
    (item,) = import_file(tmp_path / "log.csv")
    assert authors(item.conversation) == ["unknown"]


@pytest.mark.parametrize("name", ["json", "csv", "chatml", "alpaca", "instruction", "openai", "sharegpt"])
@pytest.mark.parametrize("models", [("m:1", "m:1"), ("m:1", "n:2"), (None, None), ("m:1", None)])
def test_an_export_that_is_imported_has_the_authors_that_it_had(tmp_path, name, models):
    logger = ConversationLogger(tmp_path / "log.jsonl")
    for number, model in enumerate(models):
        logger.log_conversation(f"{number}?", f"{number}.", {"session_id": "s"} | ({"model": model} if model else {}))
    (log,) = logger.read_conversations()
    person = imported(tmp_path, {"messages": [m for n in "ab" for m in ({"role": "user", "content": n}, turns()[1])]})
    for conversation in (log, person):
        path = DataExporter(tmp_path).export([conversation], name)
        (item,) = import_file(path)
        if name == "csv" and conversation is person:
            continue  # a table of exchanges is taken for a log, of which nobody knows who wrote it
        assert authors(item.conversation) == authors(conversation)


def test_an_import_says_how_many_replies_it_takes_for_a_persons_and_takes_the_model(tmp_path):
    (tmp_path / "f.jsonl").write_text(json.dumps({"messages": [*turns(), *turns(model="gpt-4o")]}) + "\n")
    (item,) = import_file(tmp_path / "f.jsonl", model="llama3:8b")
    assert authors(item.conversation) == ["llama3:8b", "gpt-4o"]


def edited_words(share: float, seed: int = 0) -> str:
    """REPLY twenty times over, with this share of its words replaced."""
    words = (REPLY + " ") * 20
    words = words.split()
    for index in random.Random(seed).sample(range(len(words)), round(share * len(words))):
        words[index] = f"own{index}"
    return " ".join(words)


@pytest.mark.parametrize(
    ("share", "author"), [(0.01, "edited"), (0.1, "edited"), (0.5, "edited"), (0.79, "edited"), (0.8, "person")]
)
def test_an_edit_is_a_persons_from_four_fifths_of_its_words(tmp_path, share, author):
    conversation = logged(tmp_path, edited_words(share), model="whetstone:3")
    conversation["messages"][1]["content"] = edited_words(0)
    assert authors(conversation) == [author]


@pytest.mark.parametrize(
    "edit",
    [
        "Pull the plug, wait for ten seconds.",  # shortened
        REPLY.upper().replace(",", " –"),  # other case and punctuation
        "🔌",
    ],
)
def test_an_edit_that_adds_no_words_is_not_a_persons(tmp_path, edit):
    assert authors(logged(tmp_path, edit, model="whetstone:3")) == ["edited"]


def test_an_edit_in_another_script_is_counted_by_characters(tmp_path):
    conversation = logged(tmp_path, "请拔掉插头等待五秒", model="m")
    conversation["messages"][1]["content"] = "请拔掉插头等待十秒"
    assert authors(conversation) == ["edited"]


def test_rare_ideographs_are_characters_too(tmp_path):
    text = "".join(map(chr, range(0x20000, 0x20010)))
    conversation = logged(tmp_path, text + "。完", model="m")
    conversation["messages"][1]["content"] = text
    assert authors(conversation) == ["edited"]


def test_another_reply_of_the_model_put_in_place_is_not_a_persons(tmp_path):
    other = "Switch the router off and on, please, and tell me whether the light is green."
    conversation = logged(tmp_path, other, model="whetstone:3")
    assert authors(conversation) == ["person"]
    conversation["messages"][1]["alternatives"] = [{"role": "assistant", "content": other, "model": "whetstone:2"}]
    assert authors(conversation) == ["edited"]


def test_any_edit_of_what_a_person_wrote_is_a_persons(tmp_path):
    conversation = imported(tmp_path, {"messages": turns()})
    conversation["feedback"] = [{"message_id": conversation["messages"][1]["id"], "edited": REPLY + " Done."}]
    assert authors(conversation) == ["person"]


def test_common_words_are_the_longest_common_subsequence():
    def plain(first, second):
        lengths = [0] * (len(second) + 1)
        for one in first:
            before = lengths[:]
            for at, other in enumerate(second, start=1):
                lengths[at] = before[at - 1] + 1 if one == other else max(before[at], lengths[at - 1])
        return lengths[-1]

    rng = random.Random(0)
    for _ in range(300):
        first, second = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert common_words(first, second) == plain(first, second)


def test_a_very_long_edit_takes_no_time_to_speak_of():
    text = " ".join(f"word{index % 997}" for index in range(400_000))
    conversation = {"messages": [{"role": "assistant", "content": text, "model": "m"}]}
    assert not is_by_a_person(conversation, 0, text)
