"""Imports: every known form is recognised, what is not taken has a line and a reason, twice is once."""

import csv
import gzip
import json
import math
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.data_cleaner import DataCleaner
from fine_tuning.data_collection.importers import Imported, Problem, import_file
from fine_tuning.data_collection.storage.sample import sample_conversations, write_sample
from fine_tuning.data_collection.storage.shards import write_shard
from fine_tuning.data_preparation.selection import select
from tests.project import ROOT


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
        {"role": "user", "content": [{"type": "text", "text": "Look:"}]},
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
              "annotation": {"rating": 1, "reason": "accurate_information", "comment": "nice"}},
    }  # fmt: skip
    chat = {"history": {"messages": nodes, "currentId": "3"}, "title": "x"}
    export = [{"id": "abc", "user_id": "ann", "chat": chat, "created_at": 1}]
    (conversation,) = taken(write(tmp_path / "chats.json", export))
    assert turns(conversation) == EXCHANGE
    reply = conversation["messages"][1]
    assert reply["model"] == "b"
    said = {"rating": 1, "comment": "accurate_information: nice", "by": "ann"}
    assert conversation["feedback"] == [said | {"message_id": reply["id"]}]
    assert conversation["metadata"]["user_id"] == "ann"


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


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_an_array_of_turns_is_one_conversation(tmp_path, name):
    (rows,) = RECORDS[name].values()
    (found,) = taken(write(tmp_path / "chat.json", rows))
    assert turns(found) == EXCHANGE
    system = {key: "system" if key in ("role", "from") else "Be brief." for key in rows[0]}
    (found,) = taken(write(tmp_path / "system.json", [system, *rows]))
    assert turns(found) == [("system", "Be brief."), *EXCHANGE]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [row | {"chat_id": "7"} for row in rows],
        lambda rows: [*rows, rows[0] | {"session_id": "8"}],
        lambda rows: [{"role": "system", "content": "A"}, *rows, {"role": "system", "content": "B"}, *rows],
        lambda rows: [*rows, {"from": "human", "value": "And?"}],
        lambda rows: [rows[0], rows[1] | {"role": "doctor"}],
    ],
)
def test_turns_of_nobody_knows_whom_are_not_one_conversation(tmp_path, change):
    rows = change(RECORDS["messages"]["messages"])
    path = write(tmp_path / "dump.json", rows)
    assert not taken(path)
    assert [line for line, _ in problems(path)] == list(range(1, len(rows) + 1))


def test_a_record_beside_turns_or_with_a_role_is_a_record(tmp_path):
    whole = RECORDS["messages"]
    path = write(tmp_path / "mixed.json", [*whole["messages"], whole])
    assert [turns(conversation) for conversation in taken(path)] == [EXCHANGE] and len(problems(path)) == 2
    path = write(tmp_path / "named.json", [whole | {"role": "user", "content": "title"}] * 2)
    assert len(taken(path)) == 2 and not problems(path)


@pytest.mark.parametrize("column", ["rows", "mapping", "chat"])
def test_a_column_may_have_the_name_of_what_other_records_hold(tmp_path, column):
    path = write(tmp_path / "table.csv", f"prompt,completion,{column}\nWhat is a lake?,Water that stays.,3\n")
    (found,) = taken(path)
    assert turns(found) == EXCHANGE
    records = [RECORDS["prompt-completion"] | {column: value} for value in (3, [], {"a": 1})]
    path = lines(tmp_path / "records.jsonl", *records)
    assert len(taken(path)) == (2 if column == "mapping" else 3)


def test_a_wrong_byte_late_in_an_array_is_told_with_what_was_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fine_tuning.data_collection.importing.containers.CHUNK", 1000)
    record = json.dumps(RECORDS["messages"]).encode()
    path = tmp_path / "late.json"
    path.write_bytes(b"[" + b",\n".join([record] * 200) + b",\n\xff]")
    assert 0 < len(taken(path)) <= 200
    ((line, reason),) = problems(path)
    assert line == len(taken(path)) + 1 and "not UTF-8" in reason and "were not read" in reason


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
    monkeypatch.setattr("fine_tuning.data_collection.importing.containers.CHUNK", 100)
    records = [{"prompt": f"p{n}", "completion": "x" * (n * 7 % 400)} for n in range(1, 200) if n * 7 % 400]
    assert len(taken(write(tmp_path / "f.json", json.dumps(records, indent=1)))) == len(records)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolon.csv", 'Instruction;Input;Output\r\n"What is; a lake?";;"Water, that stays."\r\n'),
        ("tab.csv", "prompt\tcompletion\nWhat is; a lake?\tWater, that stays.\n"),
        ("bar.txt", "prompt|completion\nWhat is; a lake?|Water, that stays.\n"),
        ("nested.csv", 'id,messages\n1,"[{""role"":""user"",""content"":""What is; a lake?""},'
                       '{""role"":""assistant"",""content"":""Water, that stays.""}]"\n'),
        ("other name.csv", "session_id;role;content\n1;user;What is, a lake?\n1;assistant;Water, that stays.\n"),
        ("no name.csv", "role;content\nuser;What is, a lake?\nassistant;Water, that stays.\n"),
        ("pretty.txt", json.dumps(RECORDS["messages"], indent=2)),
        ("wrapped.json", json.dumps({"data": [RECORDS["messages"]]})),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with BOM"])
def test_every_dialect_and_encoding_of_a_table_or_document(tmp_path, name, text, encoding):
    data = text.encode(encoding) if "BOM" not in encoding else b"\xfe\xff" + text.encode("utf-16-be")
    for suffix, packed in (("", data), (".gz", gzip.compress(data))):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(packed)
        (talk,) = taken(path)
        assert problems(path) == []
        assert [text.replace(";", "").replace(",", "") for _, text in turns(talk)] == [text for _, text in EXCHANGE]


def test_json_lines_are_known_by_their_lines_whatever_the_name_and_the_length(tmp_path):
    long = {"prompt": "q" * 10_000, "completion": "a"}
    path = lines(tmp_path / "f.json", long, RECORDS["messages"], "{broken", long)
    assert len(taken(path)) == 3
    assert problems(path) == [(3, "not JSON")]
    assert len(taken(lines(tmp_path / "g.json", "{torn", long, long))) == 2


def test_a_row_of_csv_that_is_wrong_costs_nothing_but_itself(tmp_path):
    rows = [
        "conversation_id,role,content",
        "A,user,1",
        "A,assistant,2",
        'B,"x"y,z',
        "C,user,a, b",
        "D,user,3",
        ",,",
        "A,user,4",
    ]
    path = write(tmp_path / "f.csv", "\n".join([*rows, 'E,user,"open', "F,user,5", ""]))
    assert [turns(c) for c in taken(path)] == [[("user", "1"), ("assistant", "2")], [("user", "3")]]
    assert sorted(problems(path)) == [
        (4, "not CSV (',' expected after '\"')"),
        (5, "4 cells under 3 columns"),
        (8, "its conversation began in rows further up: sort the rows by conversation_id"),
        (9, "not CSV (unexpected end of data)"),
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, suffix):
    import zstandard

    text = "".join(f"{json.dumps({'prompt': str(n), 'completion': str(hash((n, 'x')))})}\n" for n in range(30_000))
    whole = {"gz": gzip.compress, "zst": zstandard.compress}[suffix](text.encode())
    path = tmp_path / f"f.jsonl.{suffix}"
    path.write_bytes(whole)
    assert len(taken(path)) == 30_000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read to its end"):
        taken(path)


BOMB = """
import resource, sys
from fine_tuning.data_collection.importers import import_file
from fine_tuning.common.errors import run
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
run(lambda: sum(1 for _ in import_file(sys.argv[1])) and None)
"""


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize(
    "start", ['{"a":1}\n{"a":"', '{"a": "', '[{"a": "', "[1,", "<|im_start|>user\n", "question,answer\n"]
)
def test_a_decompression_bomb_is_one_line_before_it_fills_the_memory(tmp_path, suffix, start):
    import zstandard

    path = tmp_path / f"bomb.{suffix}"
    with gzip.open(path, "wb", 1) if suffix == "gz" else zstandard.open(path, "wb") as file:
        file.write(start.encode())
        for _ in range(300):
            file.write((b" " if start == "[1," else b"a") * (1 << 20))
    assert path.stat().st_size < 2 << 20
    done = subprocess.run([sys.executable, "-c", BOMB, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "disk" not in line and "memory" not in line


@pytest.mark.parametrize("name", ["lines.jsonl", "document.json", "array.json", "talk.txt", "table.csv"])
def test_one_piece_of_a_file_that_would_fill_the_memory_is_one_line(tmp_path, monkeypatch, name):
    from fine_tuning.data_collection.importing import containers

    for limit in ("LARGEST", "CHUNK"):
        monkeypatch.setattr(containers, limit, 1000)
    start, end = {
        "lines.jsonl": ('{"a":"', '"}'),
        "document.json": ('{"a":"', '"}'),
        "array.json": ('[{"a":"', '"}]'),
    }.get(name, ("<|im_start|>user\n", "<|im_end|>\n") if name == "talk.txt" else ("question,answer\na,", "\n"))
    path = write(tmp_path / name, start + "x" * 5000 + end)
    with pytest.raises(UserError, match="in one piece: write one conversation a line"):
        list(import_file(path))


def test_text_after_an_array_and_a_zip_archive_are_told(tmp_path):
    path = write(tmp_path / "f.json", json.dumps([RECORDS["alpaca"]]) + " and more")
    assert problems(path) == [(2, "text after the end of the array, which was not read")]
    (tmp_path / "export.zip").write_bytes(b"PK\x03\x04....")
    with pytest.raises(UserError, match="unzip"):
        taken(tmp_path / "export.zip")


@pytest.mark.parametrize("after", ["<|im_start|>assistant\nWater that", "lost words"])
def test_chatml_outside_of_whole_turns_is_not_lost_without_a_word(tmp_path, after):
    text = RECORDS["chatml"]["text"]
    reason = "chatml: a turn has no end, or text stands outside of the turns"
    assert problems(write(tmp_path / "a.chatml", text + "\n" + text + after)) == [(2, reason)]
    assert problems(lines(tmp_path / "b.jsonl", {"text": text + after})) == [(1, reason)]
    assert problems(lines(tmp_path / "c.jsonl", {"text": f"<s>{text}</s>\n<|im_start|>assistant\n"})) == []


def test_chatml_in_another_encoding_is_not_taken_with_holes(tmp_path):
    path = tmp_path / "chat.txt"
    path.write_bytes(RECORDS["chatml"]["text"].replace("lake", "Wörthersee").encode("latin-1"))
    assert not taken(path)
    ((line, reason),) = problems(path)
    assert line == 1 and "not UTF-8" in reason


def test_what_is_missing_in_a_table_is_no_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q", "q"], "completion": [float("nan"), 1.5]}), path)
    assert [c["messages"][1]["content"] for c in taken(path)] == ["", "1.5"]


def test_what_json_has_no_type_for_is_text_or_missing_and_costs_no_other_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    table = pyarrow.table(
        {
            "prompt": ["q"] * 3,
            "completion": ["a"] * 3,
            "timestamp": [math.inf, 1.7e9, math.nan],
            "metadata": [{"at": datetime(2026, 1, 31), "cost": Decimal("1.5"), "score": math.nan, "seal": b"\xff"}] * 3,
            "expires": pyarrow.array([0, 1 << 62, 0], pyarrow.timestamp("us")),
        }
    )
    pyarrow.parquet.write_table(table, path)
    assert problems(path) == [(2, "a value is not UTF-8, or a time is out of range")]
    shard, count = write_shard(tmp_path, "import", taken(path))
    assert count == 2
    metadata = json.loads(shard.read_text().splitlines()[0])["metadata"]
    assert metadata == {"at": "2026-01-31 00:00:00", "cost": "1.5", "score": None, "seal": None}


def test_calls_of_tools_and_refusals_stay(tmp_path):
    call = {"name": "f", "arguments": "{}"}
    said = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "content": "43"},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    (talk,) = taken(lines(tmp_path / "f.jsonl", {"messages": said}))
    texts = [text for _, text in turns(talk)]
    assert texts[1].startswith("Let me see.\n") and json.loads(texts[1].split("\n")[1]) == {"tool_calls": [call]}
    assert json.loads(texts[3]) == {"function_call": call} and texts[5] == "No."


QUESTION = {"role": "user", "content": "What is a lake?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Water that stays.", "A car."))
PREFERENCES = {
    "texts": {"prompt": "What is a lake?", "chosen": GOOD["content"], "rejected": BAD["content"]},
    "turns": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "whole": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "both": {"prompt": "What is a lake?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "alpaca": {"instruction": "What is", "input": "a lake?", "chosen": GOOD["content"], "rejected": BAD["content"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "What is a lake?"}],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    "anthropic": {
        key: f"\n\nHuman: What is a lake?\n\nAssistant: {reply['content']}"
        for key, reply in (("chosen", GOOD), ("rejected", BAD))
    },
    "anthropic prompt": {
        "prompt": "\n\nHuman: What is a lake?\n\nAssistant:", "chosen": GOOD["content"], "rejected": BAD["content"]
    },
}  # fmt: skip
BETTER, WORSE = GOOD["content"], BAD["content"]
RANKED = {
    "UltraFeedback": {
        "instruction": "What is a lake?",
        "completions": [{"response": WORSE, "overall_score": 2.0}, {"response": BETTER, "overall_score": 8.5}],
    },
    "Nectar": {
        "prompt": "\n\nHuman: What is a lake?\n\nAssistant: ",
        "answers": [{"answer": BETTER, "rank": 1.0}, {"answer": WORSE, "rank": 2.0}],
    },
    "LLaMA-Factory": {"instruction": "What is", "input": "a lake?", "output": [BETTER, WORSE]},
    "scores": {"prompt": [QUESTION], "responses": [BETTER, BETTER, WORSE, ""], "scores": [3, 3, 1, 0]},
    "ranks": {"prompt": "What is a lake?", "responses": [WORSE, BETTER, WORSE], "ranks": [2, 1, 3]},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_is_a_reply_with_a_worse_alternative(tmp_path, name):
    path = lines(tmp_path / "f.jsonl", PREFERENCES[name])
    (talk,) = taken(path)
    assert formats(path) == {"preference"}
    assert [(role, " ".join(text.split())) for role, text in turns(talk)] == EXCHANGE
    (other,) = talk["messages"][1]["alternatives"]
    assert other["content"] == "A car."
    assert talk["feedback"] == [{"message_id": talk["messages"][1]["id"], "over": [other["id"]]}]


@pytest.mark.parametrize("name", RANKED)
def test_of_a_ranked_list_the_best_reply_is_preferred_to_the_worse_ones(tmp_path, name):
    (talk,) = taken(lines(tmp_path / "f.jsonl", RANKED[name]))
    assert [(role, " ".join(text.split())) for role, text in turns(talk)] == EXCHANGE
    (other,) = talk["messages"][1]["alternatives"]
    assert other["content"] == "A car."
    assert talk["feedback"] == [{"message_id": talk["messages"][1]["id"], "over": [other["id"]]}]


def test_the_models_of_a_ranked_list_are_kept(tmp_path):
    scored = [{"response": text, "score": n, "model": f"model-{n}"} for n, text in enumerate((WORSE, BETTER))]
    (talk,) = taken(lines(tmp_path / "f.jsonl", {"prompt": "What is a lake?", "completions": scored}))
    reply = talk["messages"][1]
    assert (reply["model"], reply["alternatives"][0]["model"]) == ("model-1", "model-0")


@pytest.mark.parametrize(
    ("key", "replies", "beside", "reason"),
    [
        ("responses", [BETTER, WORSE], {}, "ranked list: its replies have no scores or ranks"),
        ("responses", [BETTER, WORSE], {"scores": [1]}, "ranked list: its replies have no scores or ranks"),
        ("answers", [{"answer": BETTER, "rank": "first"}] * 2, {}, "ranked list: its replies have no scores or ranks"),
        ("completions", [{"said": BETTER}, {"said": WORSE}], {"scores": [1, 2]}, "ranked list: a reply has no text"),
        ("responses", [BETTER, WORSE], {"scores": [1, 2], "prompt": " "}, "ranked list: there is no question"),
    ],
)
def test_a_list_of_replies_that_ranks_nothing_is_quarantined(tmp_path, key, replies, beside, reason):
    record = {"prompt": "What is a lake?", key: replies} | beside
    assert problems(lines(tmp_path / "f.jsonl", record)) == [(1, reason)]


@pytest.mark.parametrize("rejected", [GOOD["content"], "", " ", None])
def test_a_rejected_reply_that_is_empty_or_equal_makes_no_pair_and_is_reported(tmp_path, rejected):
    record = {"prompt": "What is a lake?", "chosen": GOOD["content"], "rejected": rejected}
    (item,) = import_file(lines(tmp_path / "f.jsonl", record))
    assert item.conversation["feedback"] == [] and turns(item.conversation) == EXCHANGE
    assert item.left_out == ("no pair: the other reply is empty, or the same",)


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_with_a_label_is_liked_or_disliked(tmp_path, name, key):
    good, bad = (True, 1, "true", "good", "Desirable", "chosen"), (False, 0, "False", "0", "bad", "undesirable", -1)
    for label in (*good, *bad, None, ""):
        rating = 1 if label in good else -1 if label in bad else None
        (talk,) = taken(lines(tmp_path / "f.jsonl", RECORDS[name] | {key: label}))
        wanted = [{"message_id": talk["messages"][-1]["id"], "rating": rating}] if rating else []
        assert talk["feedback"] == wanted, label


@pytest.mark.parametrize("label", ["x", 2, 0.5, "so-so", ["bad"]])
def test_a_record_with_a_label_that_says_neither_is_quarantined(tmp_path, label):
    reason = "its `label` says neither good nor bad: write true or false, or take it out"
    row, inside = RECORDS["messages"] | {"label": label}, {"messages": [QUESTION, GOOD | {"label": label}]}
    assert problems(lines(tmp_path / "f.jsonl", row, inside)) == [(1, reason), (2, reason)]


def test_a_label_is_about_the_completion_that_is_trained_or_about_its_own_message(tmp_path):
    def rated(messages, **beside):
        (talk,) = taken(lines(tmp_path / "f.jsonl", {"messages": messages, **beside}))
        places = {message["id"]: place for place, message in enumerate(talk["messages"])}
        return {places[entry["message_id"]]: entry["rating"] for entry in talk["feedback"]}

    system = {"role": "system", "content": "Be brief."}
    assert rated([system, QUESTION, GOOD, QUESTION, BAD, QUESTION], label=False) == {4: -1}
    assert rated([QUESTION, GOOD, QUESTION, BAD], label=False, system="Be brief.") == {4: -1}
    assert rated([QUESTION, GOOD, QUESTION, BAD | {"weight": 0}], label=True) == {1: 1}
    assert rated([QUESTION, BAD | {"label": False}, QUESTION, GOOD | {"label": True}], label=False) == {1: -1, 3: 1}
    # A completion may call a tool: all that it says was judged, and nothing of the prompt.
    tool = {"role": "tool", "content": "12:00"}
    assert rated([QUESTION, GOOD, QUESTION, BAD, tool, BAD], label=False) == {3: -1, 5: -1}
    (talk,) = taken(
        lines(tmp_path / "f.jsonl", {"prompt": [QUESTION, GOOD, QUESTION], "completion": [BAD], "label": 0})
    )
    assert [entry["message_id"] for entry in talk["feedback"]] == [talk["messages"][3]["id"]]


def test_a_label_in_a_row_of_a_csv_is_about_its_message(tmp_path):
    path = write(
        tmp_path / "f.csv", "role,content,label,weight\nuser,q,,\nassistant,a,false,\nuser,r,,\nassistant,b,,0\n"
    )
    (talk,) = taken(path)
    assert talk["feedback"] == [{"message_id": talk["messages"][1]["id"], "rating": -1}]
    assert talk["messages"][3]["weight"] == 0 and len(left_out(path)) == 1


@pytest.mark.parametrize(
    ("row", "missing", "kept"),
    [
        (b"1,user,\xff\n", 1, ["q1", "a1", "q4", "a4"]),
        (b"1,assistant,\xff\n", 1, ["q1", "a1", "q4", "a4"]),
        (b"1,user,\xff\n1,assistant,\xff\n", 2, ["q1", "a1", "q4", "a4"]),
    ],
)
def test_rows_of_a_csv_that_cannot_be_read_leave_a_gap(tmp_path, row, missing, kept):
    good = [
        f"1,{role},{role[0].replace('u', 'q')}{number}\n".encode()
        for number in (1, 2, 4)
        for role in ("user", "assistant")
    ]
    good[2:4] = [line for line in good[2:4] if line.split(b",")[1] not in row]
    good.insert(3 if b"assistant" in row and b"user" not in row else 2, row)
    (tmp_path / "f.csv").write_bytes(b"conversation_id,role,content\n" + b"".join(good))
    (talk,) = taken(tmp_path / "f.csv")
    cleaned = DataCleaner().clean_conversation(talk).conversation
    assert [m["content"] for m in cleaned["messages"]] == kept
    assert [m["content"] for m in cleaned["messages"] if m.get("gap")] == ["q4"]
    assert len(problems(tmp_path / "f.csv")) == missing


def test_a_row_of_an_exchange_that_cannot_be_read_leaves_a_gap(tmp_path):
    rows = b"session_id,prompt,completion\n1,q1,a1\n1,\xff,a2\n1,q3,a3\n"
    (tmp_path / "f.csv").write_bytes(rows)
    (talk,) = taken(tmp_path / "f.csv")
    assert [(m["content"], m.get("gap", False)) for m in talk["messages"]] == [
        ("q1", False), ("a1", False), ("q3", True), ("a3", False)
    ]  # fmt: skip


@pytest.mark.parametrize("models", [{"model": "m:1"}, {"models": ["m:1", "m:1"]}])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt-completion", "chatml"])
def test_a_model_beside_the_messages_wrote_the_replies_that_name_none(tmp_path, name, models):
    (talk,) = taken(lines(tmp_path / "f.jsonl", RECORDS[name] | models))
    assert talk["messages"][1]["model"] == "m:1"
    (talk,) = taken(
        lines(tmp_path / "g.jsonl", {"messages": [QUESTION, GOOD | {"model": "n:2"}, QUESTION, GOOD], **models})
    )
    assert [message.get("model") for message in talk["messages"]] == [None, "n:2", None, "m:1"]


@pytest.mark.parametrize(("weight", "kept"), [(0, True), ("0", True), (False, True), (1, False), (None, False)])
def test_a_reply_of_weight_0_is_context_only(tmp_path, weight, kept):
    rows = [QUESTION, BAD | {"weight": weight}, QUESTION, GOOD]
    shares = [{"from": m["role"], "value": m["content"]} | {k: m[k] for k in m.keys() & {"weight"}} for m in rows]
    for record in ({"messages": rows}, {"conversations": shares}):
        (talk,) = taken(lines(tmp_path / "f.jsonl", record))
        assert [message.get("weight") for message in talk["messages"]] == [None, 0 if kept else None, None, None]
        assert left_out(tmp_path / "f.jsonl") == ["a reply is context only: the file gives it the weight 0"] * kept
        _, trained = select(DataCleaner().clean_conversation(talk).conversation, "all")
        assert trained == [False, not kept, False, True]


def test_a_weight_of_neither_0_nor_1_is_not_taken_for_1(tmp_path):
    path = lines(tmp_path / "f.jsonl", {"messages": [QUESTION, GOOD | {"weight": 0.5}]})
    assert problems(path) == [(1, "the `weight` of a message is neither 0 nor 1")]


# -----------------------------------------------------------------------------
# what stands beside the messages, and what is no text

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


def left_out(path):
    return [reason for item in import_file(path) if isinstance(item, Imported) for reason in item.left_out]


@pytest.mark.parametrize("answer", ["response", "output"])
def test_the_context_of_a_question_stands_below_it(tmp_path, answer):
    record = {"instruction": "Where is it?", "context": "Lake Como is in Italy.", answer: "In Italy.", "category": "qa"}
    (talk,) = taken(lines(tmp_path / "dolly.jsonl", record))
    assert turns(talk) == [("user", "Where is it?\n\nLake Como is in Italy."), ("assistant", "In Italy.")]
    path = lines(tmp_path / "odd.jsonl", {"question": "q", "answer": "a", "context": {"title": ["x"]}})
    assert not taken(path) and problems(path) == [(1, "a message is no text")]


@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt-completion"])
def test_tools_and_a_system_prompt_beside_the_turns_are_in_the_system_message(tmp_path, name):
    for tools in (TOOLS, json.dumps(TOOLS)):
        (talk,) = taken(lines(tmp_path / "f.jsonl", RECORDS[name] | {"tools": tools, "system": "Be brief."}))
        (role, text), *rest = turns(talk)
        assert role == "system" and rest == EXCHANGE
        prompt, _, definitions = text.partition("\n")
        assert prompt == "Be brief." and json.loads(definitions) == {"tools": TOOLS}
    (talk,) = taken(lines(tmp_path / "f.jsonl", RECORDS[name] | {"tools": []}))
    assert turns(talk) == EXCHANGE


def test_tools_of_a_system_message_stay_with_it(tmp_path):
    system = {"role": "system", "content": "Be brief.", "tools": json.dumps(TOOLS)}
    (talk,) = taken(lines(tmp_path / "f.jsonl", {"messages": [system, QUESTION, GOOD]}))
    assert json.loads(turns(talk)[0][1].partition("\n")[2]) == {"tools": TOOLS}


def test_anthropic_calls_and_results_are_messages_of_their_own(tmp_path):
    record = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "A clock is needed.", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "a", "name": "clock", "input": {"zone": "UTC"}},
                {"type": "tool_use", "id": "b", "name": "clock", "input": {"zone": "CET"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "12:00"},
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "13:00"}]}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Noon."}]},
        ],
    }  # fmt: skip
    (talk,) = taken(lines(tmp_path / "f.jsonl", record))
    roles, texts = zip(*turns(talk), strict=True)
    assert roles == ("system", "user", "assistant", "tool", "tool", "assistant")
    said, _, calls = texts[2].partition("\n")
    assert said == "Let me see." and texts[3:] == ("12:00", "13:00", "Noon.")
    assert [(c["id"], json.loads(c["function"]["arguments"])) for c in json.loads(calls)["tool_calls"]] == [
        ("a", {"zone": "UTC"}), ("b", {"zone": "CET"})]  # fmt: skip
    assert talk["messages"][2]["reasoning"] == "A clock is needed."
    assert DataCleaner().clean_conversation(talk).drop is None


IMAGES = {
    "openai": {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {}}]},
    "anthropic": {"role": "user", "content": [{"type": "image", "source": {}}, {"type": "text", "text": "See"}]},
    "hugging face": {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "See"}]},
    "placeholder": {"role": "user", "content": "<image>\nWhat is on it?"},
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_conversation_ends_before_an_image_and_says_so(tmp_path, name):
    path = lines(tmp_path / "f.jsonl", {"messages": [QUESTION, GOOD, IMAGES[name], BAD, QUESTION, GOOD], "label": True})
    (talk,) = taken(path)
    assert turns(talk) == EXCHANGE
    assert left_out(path) == ["the conversation ends before an image, which is not text"]
    path = lines(tmp_path / "g.jsonl", {"messages": [IMAGES[name], GOOD]})
    assert not taken(path)
    assert problems(path) == [(1, "messages: a question has an image, which is not text")]


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "question-answer"])
def test_an_image_in_a_column_is_part_of_the_question(tmp_path, name):
    path = lines(tmp_path / "f.jsonl", RECORDS[name] | {"images": ["a.png"]}, RECORDS[name] | {"images": []})
    assert [turns(talk) for talk in taken(path)] == [EXCHANGE]
    assert problems(path) == [(1, f"{name}: a question has an image, which is not text")]


def test_a_tag_that_is_talked_about_is_no_image(tmp_path):
    path = lines(tmp_path / "f.jsonl", {"prompt": "What does <image> do in SVG?", "completion": "It embeds one."})
    assert len(taken(path)) == 1 and not left_out(path)


def test_a_reply_with_what_only_chatgpt_saw_is_context_only(tmp_path):
    path = write(tmp_path / "conversations.json", chatgpt_export())
    (talk,) = taken(path)
    assert talk["messages"][1]["weight"] == 0
    assert left_out(path) == ["a reply is context only: it rests on what a tool returned, which is not in the record"]
    export = chatgpt_export()
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"}
    export[0]["mapping"]["q"]["message"]["content"] = {"content_type": "multimodal_text", "parts": [picture, "This?"]}
    assert problems(write(tmp_path / "conversations.json", export)) == [
        (1, "chatgpt: a question has an image, which is not text")
    ]


# -----------------------------------------------------------------------------
# Open WebUI

WEBUI = Path(__file__).parent / "open_webui"


def test_open_webui_replies_in_output_and_thumbs_beside_the_path():
    lakes, clock = taken(WEBUI / "chats_all.ndjson")
    assert turns(lakes)[:2] == EXCHANGE
    reply = lakes["messages"][1]
    (other,) = reply["alternatives"]
    assert (reply["reasoning"], other["content"], other["model"]) == (
        "They ask about water.",
        "A kind of car.",
        "gemma:2b",
    )
    assert lakes["feedback"] == [
        {"message_id": reply["id"], "rating": 1, "comment": "short and right", "by": "ann"},
        {"message_id": other["id"], "rating": -1, "comment": "factual", "by": "ann"},
    ]
    assert [role for role, _ in turns(clock)] == ["user", "assistant", "tool", "assistant"]
    assert "clock" in turns(clock)[1][1] and turns(clock)[2:] == [("tool", "12:00"), ("assistant", "It is noon.")]
    assert DataCleaner().clean_conversation(clock).drop is None


def test_open_webui_thoughts_and_calls_in_the_text():
    (talk,) = taken(WEBUI / "chats_export.json")
    assert [text for _, text in turns(talk)][1::2] == ["A small one.", "Three metres."]
    assert talk["messages"][1]["reasoning"] == "> Size matters."
    assert [message.get("weight") for message in talk["messages"]] == [None, None, None, 0]
    assert len(left_out(WEBUI / "chats_export.json")) == 1


def test_open_webui_a_reply_that_failed_costs_its_question_and_leaves_a_gap(tmp_path):
    export = open_webui_export()
    export["chat"]["history"]["messages"] |= {
        "3": {"parentId": "2", "role": "user", "content": "r"},
        "4": {"parentId": "3", "role": "assistant", "content": "", "error": {"content": "unavailable"}},
        "5": {"parentId": "4", "role": "user", "content": "s"},
        "6": {"parentId": "5", "role": "assistant", "content": "c"},
    }
    export["chat"]["history"]["currentId"] = "6"
    (talk,) = taken(write(tmp_path / "chats.json", [export]))
    cleaned = DataCleaner().clean_conversation(talk).conversation
    assert [(m["content"], m.get("gap", False)) for m in cleaned["messages"]] == [
        ("q", False), ("a", False), ("s", True), ("c", False)
    ]  # fmt: skip


def test_open_webui_ratings_of_another_branch_are_counted_as_left_out(tmp_path):
    export = open_webui_export()
    export["chat"]["history"]["messages"] |= {
        "3": {"parentId": None, "role": "user", "content": "q, asked otherwise"},
        "4": {"parentId": "3", "role": "assistant", "content": "b", "annotation": {"rating": -1}},
    }
    (reason,) = left_out(write(tmp_path / "chats.json", [export]))
    assert "rating" in reason
    assert not left_out(write(tmp_path / "one.json", [open_webui_export()]))


@pytest.mark.parametrize("tag", ["", 'type="reasoning" ', 'type="reasoning"><summary></details>'])
def test_open_webui_text_full_of_tags_is_read_in_linear_time(tmp_path, tag):
    export = open_webui_export()
    export["chat"]["history"]["messages"]["2"]["content"] = f"<details {tag}" * 50_000
    started = perf_counter()
    assert len(list(import_file(write(tmp_path / "chats.json", [export])))) == 1
    assert perf_counter() - started < 5  # it took minutes


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_key_of_a_foreign_message_is_never_printed(tmp_path, role):
    messages = [QUESTION, GOOD]
    messages = [m | {"lost": "private words"} if m["role"] == role else m for m in messages]
    path = lines(tmp_path / "f.jsonl", {"messages": messages})
    (talk,) = taken(path)
    assert turns(talk) == EXCHANGE and "weight" not in talk["messages"][1] and not left_out(path)


@pytest.mark.parametrize("where", ["user", "assistant"])
def test_open_webui_files_and_sources_are_not_left_out_without_a_word(tmp_path, where):
    export = open_webui_export()
    nodes = export["chat"]["history"]["messages"]
    nodes["1" if where == "user" else "2"]["files" if where == "user" else "sources"] = [{"type": "file", "name": "x"}]
    path = write(tmp_path / "chats.json", [export])
    if where == "user":
        assert problems(path) == [(1, "open-webui: a question has a file, which is not text")]
    else:
        (talk,) = taken(path)
        assert talk["messages"][1]["weight"] == 0 and len(left_out(path)) == 1


def test_open_webui_feedback_is_a_rating_or_a_preference_of_the_arena_s_winner():
    path = WEBUI / "feedbacks_export.json"
    plain, won, lost = taken(path)
    assert turns(plain) == EXCHANGE
    assert plain["feedback"] == [{"message_id": plain["messages"][1]["id"], "rating": -1, "by": "ann"}]
    assert won["feedback"] == [{"message_id": "s2", "rating": 1, "by": "ann", "over": ["s1"]}]
    assert [m["model"] for m in (won["messages"][1], *won["messages"][1]["alternatives"])] == ["b:1", "a:1"]
    assert lost["feedback"] == [
        {"message_id": "t1", "rating": -1, "by": "ann"},
        {"message_id": "t2", "rating": None, "over": ["t1"], "by": "ann"},
    ]
    assert [line for line, _ in problems(path)] == [4]


def test_an_imported_exchange_keeps_its_author_and_that_it_was_broken_off(tmp_path):
    told = {"model": "m:1", "version": "3", "incomplete": "stopped", "session_id": "s", "user_id": "ann"}
    (talk,) = taken(lines(tmp_path / "f.jsonl", RECORDS["exchange"] | {"id": "e", "metadata": told}))
    reply = talk["messages"][1]
    assert (reply["model"], reply["version"], reply["incomplete"]) == ("m:1", "3", "stopped")
    assert talk["metadata"] == {"user_id": "ann"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "hi", "completion": "ho"},
        {"instruction": "hi", "output": "ho"},
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        {"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"},
        {"chatml": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ],
    ids=lambda record: "-".join(record),
)
@pytest.mark.parametrize(("given", "kept"), [("ann", "ann"), (7, "7")])
def test_whose_conversation_it_is_stays_known_in_every_form(tmp_path, record, given, kept):
    (talk,) = taken(lines(tmp_path / "f.jsonl", record | {"user_id": given}))
    assert talk["metadata"]["user_id"] == kept


def test_a_question_under_user_is_no_persons_name(tmp_path):
    (talk,) = taken(lines(tmp_path / "f.jsonl", {"prompt": "hi", "completion": "ho", "user": "What?"}))
    assert "user" not in talk["metadata"]


def test_whose_rows_of_csv_they_are_stays_known(tmp_path):
    (tmp_path / "f.csv").write_text("conversation_id,user_id,role,content\na,ann,user,hi\na,ann,assistant,ho\n")
    (talk,) = taken(tmp_path / "f.csv")
    assert talk["metadata"]["user_id"] == "ann"


SOUND = {"content_type": "audio_asset_pointer", "asset_pointer": "sediment://file_1", "format": "wav"}


def test_what_was_spoken_to_chatgpt_is_its_transcript(tmp_path):
    export = chatgpt_export()
    part = {"content_type": "audio_transcription", "text": "What is a lake?", "direction": "in"}
    export[0]["mapping"]["q"]["message"]["content"] = {"content_type": "multimodal_text", "parts": [part, SOUND]}
    (talk,) = taken(write(tmp_path / "conversations.json", export))
    assert turns(talk) == EXCHANGE


def open_webui_export():
    nodes = {
        "1": {"parentId": None, "role": "user", "content": "q", "timestamp": 1},
        "2": {"parentId": "1", "role": "assistant", "content": "a", "annotation": {"rating": 1, "comment": "c"}},
    }
    return {"id": "abc", "chat": {"history": {"messages": nodes, "currentId": "2"}}, "created_at": 1}


OWN = {
    "id": "x", "source": "chat", "started_at": None, "restored": True, "metadata": {"a": 1},
    "messages": [QUESTION, GOOD | {"id": "1", "alternatives": [BAD | {"id": "2"}]}],
    "feedback": [{"message_id": "1", "over": ["2"]}],
}  # fmt: skip
WEBUI_RECORDS = [json.loads((WEBUI / "chats_all.ndjson").read_text().splitlines()[1])]
WEBUI_RECORDS += json.loads((WEBUI / "feedbacks_export.json").read_text())[1:2]
KNOWN = [*RECORDS.values(), *PREFERENCES.values(), *chatgpt_export(), open_webui_export(), OWN, *WEBUI_RECORDS]


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
    first, count = write_sample(tmp_path / "a")
    second, _ = write_sample(tmp_path / "b")
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
