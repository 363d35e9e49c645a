"""Imports: every known form is recognised, what is not taken has a line and a reason, twice is once."""

import csv
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.data_collection.importers import Imported, Problem, import_file
from fine_tuning.data_collection.sample import sample_conversations
from fine_tuning.data_collection.shards import write_shard
from fine_tuning.errors import UserError


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(path, *records):
    return write(path, "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))


def taken(path):
    return [item.conversation for item in import_file(path) if isinstance(item, Imported)]


def formats(path):
    return {item.format for item in import_file(path) if isinstance(item, Imported)}


def problems(path):
    return [(item.line, item.reason) for item in import_file(path) if isinstance(item, Problem)]


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation["messages"]]


EXCHANGE = [("user", "What is a lake?"), ("assistant", "Water that stays.")]

RECORDS = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in EXCHANGE]},
    "sharegpt": {"conversations": [{"from": role, "value": text} for role, text in EXCHANGE]},
    "alpaca": {"instruction": "What is a lake?", "input": "", "output": "Water that stays."},
    "prompt-completion": {"prompt": "What is a lake?", "completion": "Water that stays."},
    "exchange": {"user_message": "What is a lake?", "assistant_response": "Water that stays."},
    "question-answer": {"question": "What is a lake?", "answer": "Water that stays."},
    "chatml": {"text": "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in EXCHANGE)},
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("container", ["jsonl", "json", "jsonl.gz", "json.zst"])
def test_every_form_in_every_container(tmp_path, name, container):
    record = RECORDS[name]
    text = json.dumps([record] * 2) if "jsonl" not in container else f"{json.dumps(record)}\n" * 2
    data = text.encode()
    if container.endswith("gz"):
        data = gzip.compress(data)
    elif container.endswith("zst"):
        import zstandard

        data = zstandard.compress(data)
    path = tmp_path / f"file.{container}"
    path.write_bytes(data)
    assert [turns(c) for c in taken(path)] == [EXCHANGE, EXCHANGE]
    assert formats(path) == {name}


def test_what_is_told_names_the_form_inside_the_container(tmp_path):
    assert formats(write(tmp_path / "a.txt", RECORDS["chatml"]["text"])) == {"chatml"}
    assert formats(write(tmp_path / "b.csv", "instruction,input,output\nWhat?,,That.\n")) == {"csv of alpaca"}
    assert formats(write(tmp_path / "c.csv", "conversation_id,role,content\n1,user,What?\n1,assistant,That.\n")) == {
        "csv"
    }


def test_openai_messages_with_parts_tools_and_developer(tmp_path):
    call = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    (conversation,) = taken(lines(tmp_path / "f.jsonl", {"messages": messages}))
    assert [role for role, _ in turns(conversation)] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns(conversation)[1] == ("user", "Look:")
    assert json.loads(turns(conversation)[2][1]) == {"tool_calls": call}


def test_alpaca_with_input_system_and_history(tmp_path):
    record = {
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
        "system": "You translate.",
        "history": [["Hello?", "Bonjour."]],
    }
    (conversation,) = taken(write(tmp_path / "f.json", [record]))
    assert turns(conversation) == [
        ("system", "You translate."),
        ("user", "Hello?"),
        ("assistant", "Bonjour."),
        ("user", "Translate.\n\nchat"),
        ("assistant", "cat"),
    ]


def test_chatml_text_with_several_conversations(tmp_path):
    def turn(role, text):
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    text = turn("system", "S") + turn("user", "a\n\nb") + turn("assistant", "c") + "\n" + turn("user", "d")
    text += turn("assistant", "e") + turn("system", "T") + turn("user", "f") + turn("assistant", "g")
    talks = [turns(c) for c in taken(write(tmp_path / "talk.txt", text))]
    assert talks == [
        [("system", "S"), ("user", "a\n\nb"), ("assistant", "c")],
        [("user", "d"), ("assistant", "e")],
        [("system", "T"), ("user", "f"), ("assistant", "g")],
    ]


def chatgpt_export():
    def node(name, parent, role, text, **fields):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}, **fields}
        return {"id": name, "parent": parent, "message": message}

    mapping = {
        "root": {"id": "root", "parent": None, "message": None},
        "s": node("s", "root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
        "q": node("q", "s", "user", "What is a lake?", create_time=1_700_000_000.5),
        "old": node("old", "q", "assistant", "A first try."),
        "call": node("call", "q", "assistant", "search('lake')", recipient="browser"),
        "result": node("result", "call", "tool", "found"),
        "new": node("new", "result", "assistant", "Water that stays.", metadata={"model_slug": "gpt-4o"}),
    }
    identity = {"conversation_id": "11111111-2222-3333-4444-555555555555", "title": "Lakes"}
    return [{**identity, "create_time": 1_700_000_000.0, "mapping": mapping, "current_node": "new"}]


def test_chatgpt_takes_the_path_from_the_current_node(tmp_path):
    (conversation,) = taken(write(tmp_path / "conversations.json", chatgpt_export()))
    assert turns(conversation) == EXCHANGE
    assert conversation["id"] == "chatgpt-11111111-2222-3333-4444-555555555555"
    assert conversation["started_at"] == "2023-11-14T22:13:20.000Z"
    assert conversation["messages"][1]["model"] == "gpt-4o"
    assert "Lakes" not in json.dumps(conversation)


def test_open_webui_takes_the_current_path_and_the_ratings(tmp_path):
    nodes = {
        "1": {"id": "1", "parentId": None, "role": "user", "content": "What is a lake?", "timestamp": 1_700_000_000},
        "2": {"id": "2", "parentId": "1", "role": "assistant", "content": "Wrong.", "model": "a"},
        "3": {"id": "3", "parentId": "1", "role": "assistant", "content": "Water that stays.", "model": "b",
              "annotation": {"rating": 1, "comment": "nice"}},
    }  # fmt: skip
    export = [{"id": "abc", "chat": {"history": {"messages": nodes, "currentId": "3"}, "title": "x"}, "created_at": 1}]
    (conversation,) = taken(write(tmp_path / "chats.json", export))
    assert turns(conversation) == EXCHANGE
    reply = conversation["messages"][1]
    assert reply["model"] == "b"
    assert conversation["feedback"] == [{"rating": 1, "comment": "nice", "message_id": reply["id"]}]


def test_csv_a_message_a_row_or_an_exchange_a_row(tmp_path):
    one = tmp_path / "one.csv"
    with open(one, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["conversation_id", "role", "content"])
        rows.writerows([["1", "user", "What is a lake?"], ["1", "assistant", "Water that stays."], ["2", "user", "x"]])
    assert [turns(c) for c in taken(one)] == [EXCHANGE, [("user", "x")]]
    two = write(tmp_path / "two.csv", "\ufeffQuestion,Answer\r\nWhat is a lake?,Water that stays.\r\n")
    assert [turns(c) for c in taken(two)] == [EXCHANGE]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    table = pyarrow.Table.from_pylist([RECORDS["messages"], RECORDS["messages"]])
    pyarrow.parquet.write_table(table, path)
    assert [turns(c) for c in taken(path)] == [EXCHANGE, EXCHANGE]


def test_what_is_not_taken_has_its_line_and_reason(tmp_path):
    path = tmp_path / "f.jsonl"
    good = json.dumps(RECORDS["messages"]).encode()
    bad = [b"{broken", b"\xff\xfe", b'{"x": NaN}', b'{"a": 1}', b"7", b'{"n": ' + b"1" * 5000 + b"}", b"[" * 100_000,
           b'{"messages": [{"role": "robot", "content": "x"}]}', b'{"messages": [{"role": "user", "content": ""}]}',
           b'{"messages": [{"role": "user", "content": {"x": 1}}]}']  # fmt: skip
    path.write_bytes(b"\n".join([good, *bad, b"", good]))
    assert len(taken(path)) == 2
    assert problems(path) == [
        (2, "not JSON"),
        (3, "not UTF-8"),
        (4, "not JSON"),
        (5, "none of the known forms"),
        (6, "the record is no object"),
        (7, "not JSON"),
        (8, "not JSON"),
        (9, "a turn has an unknown role"),
        (10, "messages: no message has text"),
        (11, "a message is no text"),
    ]


def test_an_array_that_ends_early_keeps_what_came_before(tmp_path):
    path = write(tmp_path / "f.json", json.dumps([RECORDS["alpaca"]] * 3)[:-20])
    assert len(taken(path)) == 2
    assert problems(path) == [(3, "not JSON, or the file ends early; the records after it were not read")]


def test_a_large_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("fine_tuning.data_collection.importers.CHUNK", 100)
    records = [{"prompt": f"p{n}", "completion": "x" * (n * 7 % 400)} for n in range(1, 200) if n * 7 % 400]
    assert len(taken(write(tmp_path / "f.json", json.dumps(records, indent=1)))) == len(records)


def test_unknown_and_empty_files_are_one_clear_error(tmp_path):
    for name, content in (("x.bin", "no conversation at all"), ("y.json", "")):
        with pytest.raises(UserError):
            taken(write(tmp_path / name, content))
    with pytest.raises(UserError, match="not a file"):
        taken(tmp_path / "missing.json")


def test_equal_records_are_counted_and_ids_do_not_depend_on_the_run(tmp_path):
    path = lines(tmp_path / "f.jsonl", RECORDS["messages"], RECORDS["alpaca"], RECORDS["messages"])
    first, second = taken(path), taken(path)
    assert first == second
    assert len({c["id"] for c in first}) == 3


def test_small_ids_of_other_files_are_not_trusted(tmp_path):
    one = taken(lines(tmp_path / "a.jsonl", RECORDS["messages"] | {"id": "1"}))
    two = taken(lines(tmp_path / "b.jsonl", RECORDS["alpaca"] | {"id": "1", "output": "Other."}))
    assert one[0]["id"] != two[0]["id"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_end_in_records_problems_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        items = list(import_file(path))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(item, (Imported, Problem)) for item in items)


# -----------------------------------------------------------------------------
# the sample


def test_the_sample_is_the_same_bytes_every_time(tmp_path):
    first, count = write_shard(tmp_path / "a", "sample", sample_conversations())
    second, _ = write_shard(tmp_path / "b", "sample", sample_conversations())
    assert count == 2026
    assert first.name == second.name == "sample-119876d5e9ee.jsonl"
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_mode & 0o222 == 0


def test_the_sample_has_the_traps_that_it_is_known_for():
    conversations = list(sample_conversations())
    assert len({c["id"] for c in conversations}) == 2026
    assert len({json.dumps(turns(c)) for c in conversations}) == 899
    support = [c for c in conversations if c["metadata"]["category"] == "tech_support"]
    assert len(support) == 1050
    assert len({c["messages"][0]["content"] for c in support}) == 10
    assert sum(c["messages"][-1]["role"] == "user" for c in conversations) > 20
