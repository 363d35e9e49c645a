"""Chats of other programs: databases, folders of files, and traces. Formats as their sources define them."""

import contextlib
import itertools
import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.importers import Imported, Problem, import_file, import_records
from fine_tuning.data_collection.importing.databases import last_change
from fine_tuning.schema.conversation import version_hash
from tests.test_importers import EXCHANGE, left_out, lines, problems, taken, turns, write
from tests.test_importers import KNOWN as IMPORTED
from tests.test_odd_records import changed, places

WEBUI = Path(__file__).parent / "open_webui"
LLM = Path(__file__).parent / "llm"

# Columns of Open WebUI 0.12.4 (models/chats.py, models/chat_messages.py, models/feedbacks.py)
WEBUI_TABLES = """
    CREATE TABLE chat (
        id VARCHAR PRIMARY KEY, user_id VARCHAR, title TEXT, chat JSON, created_at BIGINT, updated_at BIGINT,
        share_id TEXT, archived BOOLEAN, pinned BOOLEAN, meta JSON DEFAULT '{}', variables JSON, folder_id TEXT,
        tasks JSON, summary TEXT, current_message_id TEXT, last_read_at BIGINT, timer_at BIGINT
    );
    CREATE TABLE chat_message (
        id TEXT PRIMARY KEY, chat_id TEXT, user_id TEXT, role TEXT, parent_id TEXT, content JSON, output JSON,
        model_id TEXT, files JSON, sources JSON, embeds JSON, meta JSON, done BOOLEAN, status_history JSON,
        error JSON, usage JSON, context_summary TEXT, created_at BIGINT, updated_at BIGINT
    );
    CREATE TABLE feedback (
        id TEXT PRIMARY KEY, user_id TEXT, version BIGINT, type TEXT, data JSON, meta JSON, snapshot JSON,
        created_at BIGINT, updated_at BIGINT
    );
"""


def insert(db, table, **values):
    values = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in values.items()}
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    db.execute(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})", list(values.values()))


def webui_database(path, chats=(), feedback=()):
    """A webui.db as Open WebUI leaves it while it runs: what was written last is in the log beside it."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(WEBUI_TABLES)
    for number, chat in enumerate(chats, start=1):
        row = {key: chat.get(key) for key in ("id", "user_id", "title", "chat", "created_at")}
        insert(db, "chat", **row, updated_at=1_800_000_000 + number, meta=chat.get("meta", {}))
    for number, row in enumerate(feedback, start=1):
        insert(db, "feedback", **{**row, "id": str(number), "updated_at": 1_800_000_100 + number})
    return db


def webui_chats():
    return [json.loads(line) for line in (WEBUI / "chats_all.ndjson").read_text().splitlines()]


def test_a_live_webui_db_holds_what_its_exports_hold(tmp_path):
    feedback = json.loads((WEBUI / "feedbacks_export.json").read_text())
    with webui_database(tmp_path / "webui.db", webui_chats(), feedback) as db:
        assert (tmp_path / "webui.db-wal").stat().st_size > 0
        items = list(import_file(tmp_path / "webui.db"))
        db.execute("UPDATE chat SET title = 'the program can write meanwhile'")
    exported = [item for name in ("chats_all.ndjson", "feedbacks_export.json") for item in import_file(WEBUI / name)]
    assert [type(item) for item in items] == [type(item) for item in exported]
    assert [i.conversation for i in items if isinstance(i, Imported)] == [
        i.conversation for i in exported if isinstance(i, Imported)
    ]
    assert not [name for name in tmp_path.iterdir() if name.name.endswith(".tmp")]


def test_of_webui_db_what_the_program_keeps_for_itself_is_left_out_and_a_message_beside_the_tree_is_not(tmp_path):
    tree = {"history": {"messages": {}, "currentId": None}}
    chats = [{"id": "c", "user_id": "ann", "chat": tree}, {"id": "i", "chat": tree, "meta": {"internal": True}}]
    with webui_database(tmp_path / "webui.db", chats) as db:
        for chat in ("c", "i"):
            insert(db, "chat_message", id=f"{chat}-q", chat_id=chat, role="user", content='"What is a lake?"')
            insert(
                db, "chat_message", id=f"{chat}-a", chat_id=chat, role="assistant", parent_id="q", model_id="m:1",
                content='"Water that stays."', created_at=1_700_000_000,
            )  # fmt: skip
        db.execute("UPDATE chat SET current_message_id = 'a'")
        (talk,) = taken(tmp_path / "webui.db")
    assert turns(talk) == EXCHANGE and talk["id"] == "open-webui-c"
    assert talk["messages"][1] == {
        "id": "a", "role": "assistant", "content": "Water that stays.", "model": "m:1",
        "at": "2023-11-14T22:13:20.000Z",
    }  # fmt: skip


def test_feedback_without_a_snapshot_is_about_the_chat_that_it_names(tmp_path):
    chat = webui_chats()[0]
    reply = "11111111-0000-4000-8000-000000000003"
    row = {"user_id": "bob", "data": {"rating": -1}, "meta": {"chat_id": chat["id"], "message_id": reply}}
    with webui_database(tmp_path / "webui.db", [chat], [row | {"snapshot": None}]):
        _, judged = taken(tmp_path / "webui.db")
    assert {"message_id": reply, "rating": -1, "by": "bob"} in judged["feedback"]


@pytest.mark.parametrize("version", ["0.26", "0.36"])
def test_logs_db_of_llm_by_whichever_version_wrote_it(tmp_path, version):
    with sqlite3.connect(tmp_path / "logs.db") as db:
        db.executescript((LLM / f"logs-{version}.sql").read_text())
    lakes, summed, clock = taken(tmp_path / "logs.db")
    assert turns(lakes) == [("system", "Be brief."), *EXCHANGE, ("user", "And a pond?"), ("assistant", "A small one.")]
    assert {m.get("model") for m in lakes["messages"] if m["role"] == "assistant"} == {"echo-1"}
    assert lakes["messages"][-1]["at"].startswith("2026-11-29T16:07:")
    assert turns(summed)[0] == ("user", "A long text.\nSum it up.")
    assert [role for role, _ in turns(clock)] == ["user", "assistant", "tool", "assistant"]
    assert "UTC" in turns(clock)[1][1] and turns(clock)[2:] == [("tool", "12:00"), ("assistant", "It is noon.")]
    assert [reason for _, reason in problems(tmp_path / "logs.db")] == ["llm: a question has a file, which is not text"]


def test_a_thread_that_the_new_tables_have_is_not_taken_from_the_old_ones_again(tmp_path):
    with sqlite3.connect(tmp_path / "logs.db") as db:
        db.executescript((LLM / "logs-0.36.sql").read_text())
        row = db.execute("SELECT id, thread_id FROM turns").fetchone()
        db.execute("INSERT INTO responses (id, prompt, response, conversation_id) VALUES (?, 'q', 'a', ?)", row)
        db.execute("INSERT INTO responses (id, prompt, response, model) VALUES ('old', 'q', 'a', 'm')")
    assert [talk["id"] for talk in taken(tmp_path / "logs.db")][3:] == ["llm-old"]


def test_of_a_database_only_what_changed_is_read(tmp_path):
    with webui_database(tmp_path / "webui.db", webui_chats()) as db:
        since = last_change(tmp_path / "webui.db")
        assert since < 1_800_000_001
        db.execute("UPDATE chat SET updated_at = 1800090000 WHERE id = ?", (webui_chats()[1]["id"],))
        (item,) = import_file(tmp_path / "webui.db", since=last_change(tmp_path / "webui.db"))
        assert webui_chats()[1]["id"] in item.conversation["id"]
        assert len(list(import_file(tmp_path / "webui.db", since=since))) == len(webui_chats())


def test_a_database_of_another_program_or_none_is_one_line(tmp_path):
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute("CREATE TABLE cars (id)")
    (tmp_path / "torn.db").write_bytes((tmp_path / "x.db").read_bytes()[:100] + b"x" * 500)
    for name, words in (("x.db", "no known program"), ("torn.db", "cannot be read as a database")):
        with pytest.raises(UserError, match=words) as caught:
            list(import_file(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("program", ["webui", "0.26", "0.36"])
def test_a_database_that_is_odd_anywhere_ends_in_records_problems_or_one_error(tmp_path, program):
    path = tmp_path / "x.db"
    if program == "webui":
        feedback = json.loads((WEBUI / "feedbacks_export.json").read_text())
        webui_database(path, webui_chats(), feedback).close()
    else:
        with sqlite3.connect(path) as db:
            db.executescript((LLM / f"logs-{program}.sql").read_text())
    whole = path.read_bytes()
    with sqlite3.connect(path) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(name, row[1]) for name in names for row in db.execute(f'PRAGMA table_info("{name}")')]
    endings = set()
    for (table, column), odd in itertools.product(columns, (None, 7, b"\xff", "x", "[7]", '{"a": [1]}')):
        path.write_bytes(whole)
        db = sqlite3.connect(path, isolation_level=None)
        with contextlib.closing(db), contextlib.suppress(sqlite3.IntegrityError):
            db.execute(f'UPDATE OR IGNORE "{table}" SET "{column}" = ?', (odd,))
        try:
            items = list(import_file(path))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            endings.add(len(items))
    assert len(endings) > 1


def test_messages_of_a_logs_db_that_follow_each_other_in_a_circle_end(tmp_path):
    with sqlite3.connect(tmp_path / "logs.db") as db:
        db.executescript((LLM / "logs-0.36.sql").read_text())
        db.execute("UPDATE messages SET parent_hash = hash")
    assert len(list(import_file(tmp_path / "logs.db"))) == 4


def lm_version(role, *texts, **more):
    if role == "user":
        return {"type": "singleStep", "role": role, "content": [{"type": "text", "text": text} for text in texts]}
    steps = [{"type": "contentBlock", "content": [{"type": "text", "text": text}]} for text in texts]
    steps += [{"type": "debugInfoBlock", "debugInfo": "x"}]
    return {"type": "multiStep", "role": role, "steps": steps, "senderInfo": {"senderName": "m:1"}} | more


LM_STUDIO = {
    "name": "Lakes", "createdAt": 1_784_921_389_195, "systemPrompt": "Be brief.",
    "messages": [
        {"versions": [lm_version("user", "What is a lake?")], "currentlySelected": 0},
        {
            "versions": [
                lm_version("assistant", "A car."),
                lm_version("assistant", "Hm.", "Water that stays."),
            ],
            "currentlySelected": 1,
        },
    ],
}  # fmt: skip
LM_STUDIO["messages"][1]["versions"][1]["steps"][0]["style"] = {"type": "thinking", "ended": True}


def test_lm_studio_takes_the_version_that_is_shown(tmp_path):
    (talk,) = taken(write(tmp_path / "1784921389195.conversation.json", LM_STUDIO))
    assert turns(talk) == [("system", "Be brief."), *EXCHANGE]
    reply = talk["messages"][2]
    assert (reply["model"], reply["reasoning"]) == ("m:1", "Hm.")
    assert [other["content"] for other in reply["alternatives"]] == ["A car."]
    assert (talk["id"], talk["started_at"]) == ("lm-studio-1784921389195", "2026-07-24T19:29:49.195Z")


def test_lm_studio_images_and_tools_are_not_left_out_without_a_word(tmp_path):
    record = json.loads(json.dumps(LM_STUDIO))
    record["messages"][1]["versions"][1]["steps"].append({"type": "toolStatus", "status": "done"})
    (talk,) = taken(path := write(tmp_path / "a.json", record))
    assert talk["messages"][2]["weight"] == 0 and len(left_out(path)) == 1
    record["messages"][0]["versions"][0]["content"].append({"type": "file", "fileType": "image"})
    assert problems(write(tmp_path / "b.json", record)) == [
        (1, "lm-studio: a question has an image, which is not text")
    ]


def jan_message(number, role, *parts, **more):
    return {
        "id": f"m{number}", "object": "thread.message", "thread_id": "t", "role": role, "status": "ready",
        "created_at": 1_700_000_000 + number, "content": list(parts),
    } | more  # fmt: skip


def said(text, kind="text"):
    return {"type": kind, "text": {"value": text, "annotations": []}}


def test_jan_messages_of_a_thread_are_one_conversation_wherever_they_stand(tmp_path):
    other = jan_message(9, "user", said("Alone?"), thread_id="u")
    path = lines(
        tmp_path / "messages.jsonl",
        jan_message(1, "user", said("What is a lake?")),
        other,
        jan_message(2, "assistant", said("Hm.", "reasoning"), said("Water that stays."), status="stopped"),
    )
    talk, _ = taken(path)
    assert turns(talk) == EXCHANGE and talk["id"] == "jan-t"
    assert talk["messages"][1] == {
        "id": "m2", "role": "assistant", "content": "Water that stays.", "incomplete": "stopped", "reasoning": "Hm.",
        "at": "2023-11-14T22:13:22.000Z",
    }  # fmt: skip


# -----------------------------------------------------------------------------
# traces


def parts(role, text, **more):
    return {"role": role, "parts": [{"type": "text", "content": text}]} | more


ASKED, SAID = parts("user", "What is a lake?"), parts("assistant", "Water that stays.", finish_reason="stop")
MORE, LAST = parts("user", "And a pond?"), parts("assistant", "A small one.", finish_reason="length")


def attributes(asked, replies, **more):
    return {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.response.model": "m:1",
        "gen_ai.input.messages": json.dumps(asked), "gen_ai.output.messages": json.dumps(replies),
    } | more  # fmt: skip


def otlp(*spans):
    """A line of OTLP's JSON, as the collector's file exporter writes it."""
    typed = [
        span
        | {"attributes": [{"key": key, "value": {"stringValue": value}} for key, value in span["attributes"].items()]}
        for span in spans
    ]
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": typed}]}]}


def span(number, values):
    return {
        "traceId": f"t{number}",
        "spanId": "s",
        "startTimeUnixNano": f"170000000{number}000000000",
        "attributes": values,
    }


def test_spans_of_one_conversation_are_one_whether_it_is_named_or_not(tmp_path):
    first, second = attributes([ASKED], [SAID]), attributes([ASKED, SAID, MORE], [LAST])
    path = lines(tmp_path / "traces.jsonl", otlp(span(1, first)), otlp(span(2, {"http.route": "/"}), span(3, second)))
    (talk,) = taken(path)
    assert turns(talk) == [*EXCHANGE, ("user", "And a pond?"), ("assistant", "A small one.")]
    assert [(m.get("model"), m.get("incomplete")) for m in talk["messages"]][1::2] == [("m:1", None), ("m:1", "length")]
    assert talk["messages"][1]["at"] == "2023-11-14T22:13:21.000Z"
    named = [values | {"gen_ai.conversation.id": name} for values in (first, second) for name in ("a", "b")]
    path = lines(tmp_path / "named.jsonl", *(otlp(span(n, values)) for n, values in enumerate(named)))
    assert [len(talk["messages"]) for talk in taken(path)] == [4, 4]
    assert len({talk["id"] for talk in taken(path)}) == 2


def test_a_span_as_an_sdk_prints_it_with_system_instructions_tools_and_thoughts(tmp_path):
    call = {"type": "tool_call", "id": "1", "name": "clock", "arguments": {"zone": "UTC"}}
    rows = [ASKED, {"role": "assistant", "parts": [call]},
            {"role": "tool", "parts": [{"type": "tool_call_response", "id": "1", "response": "12:00"}]}]  # fmt: skip
    thought = {"type": "reasoning", "content": "Easy."}
    reply = {
        "role": "assistant",
        "parts": [thought, {"type": "text", "content": "It is noon."}],
        "finish_reason": "stop",
    }
    values = attributes(rows, [reply], **{"gen_ai.system_instructions": [{"type": "text", "content": "Be brief."}]})
    printed = {"name": "chat m", "context": {"trace_id": "0x1", "span_id": "0x2"}, "start_time": "2026-01-02T03:04:05Z"}
    (talk,) = taken(lines(tmp_path / "spans.jsonl", printed | {"attributes": values}))
    assert [role for role, _ in turns(talk)] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns(talk)[0] == ("system", "Be brief.") and "clock" in turns(talk)[2][1]
    assert talk["messages"][-1]["reasoning"] == "Easy." and talk["started_at"] == "2026-01-02T03:04:05.000Z"


def test_one_span_that_cannot_be_read_costs_the_others_of_its_line_nothing(tmp_path):
    odd = attributes([{"role": "robot", "parts": []}], [SAID])
    path = lines(tmp_path / "t.jsonl", otlp(span(1, odd), span(2, attributes([ASKED], [SAID]))))
    (talk,) = taken(path)
    assert turns(talk) == EXCHANGE and problems(path) == [(1, "a turn has an unknown role")]


def test_a_span_without_its_words_or_with_an_image_says_so(tmp_path):
    bare = {key: value for key, value in attributes([ASKED], [SAID]).items() if "messages" not in key}
    seen = {"role": "user", "parts": [{"type": "uri", "modality": "image", "uri": "x"}]}
    path = lines(tmp_path / "t.jsonl", otlp(span(1, bare)), otlp(span(2, attributes([seen], [SAID]))))
    (first, one), (second, two) = problems(path)
    assert (first, second) == (1, 2) and "content captured" in one and "an image" in two


LANGFUSE = {
    "id": "o1", "trace_id": "t1", "type": "GENERATION", "start_time": "2026-05-29 13:46:19.963000",
    "input": json.dumps([{"role": "user", "content": "What is a lake?"}]),
    "output": json.dumps({"role": "assistant", "content": "Water that stays."}),
    "provided_model_name": "m:1", "session_id": "s", "user_id": "ann",
}  # fmt: skip
API = {
    "id": "o1", "traceId": "t1", "type": "GENERATION", "startTime": "2026-05-29T13:46:19.963Z", "model": "m:1",
    "input": {"messages": [{"role": "user", "content": "What is a lake?"}]},
    "output": {"choices": [{"message": {"role": "assistant", "content": "Water that stays."}}]},
}  # fmt: skip
PARTS = LANGFUSE | {"output": [{"type": "text", "text": "Water that stays."}]}  # as Anthropic's API answers
TRACE = {"id": "t1", "sessionId": "s", "userId": "ann", "observations": [API, API | {"type": "SPAN"}]}


@pytest.mark.parametrize("record", [LANGFUSE, PARTS, API | {"sessionId": "s", "userId": "ann"}, TRACE])
def test_langfuse_generations_of_every_export(tmp_path, record):
    path = lines(tmp_path / "o.jsonl", record, LANGFUSE | {"type": "SPAN"})
    (talk,) = taken(path)
    assert turns(talk) == EXCHANGE and talk["messages"][1]["model"] == "m:1"
    assert talk["messages"][1]["at"] == "2026-05-29T13:46:19.963Z" and talk["metadata"] == {"user_id": "ann"}
    assert [line for line, _ in problems(path)] == [2]


def test_the_same_trace_in_another_file_is_the_same_conversation_and_a_longer_one_its_next_version(tmp_path):
    short = taken(lines(tmp_path / "1.jsonl", LANGFUSE))
    rows = [json.loads(LANGFUSE["input"])[0], json.loads(LANGFUSE["output"]), {"role": "user", "content": "And?"}]
    longer = taken(
        lines(tmp_path / "2.jsonl", LANGFUSE | {"id": "o2", "trace_id": "t2", "input": rows, "output": "Done."})
    )
    assert short[0]["id"] == longer[0]["id"] and len(longer[0]["messages"]) == 4
    assert short == taken(tmp_path / "1.jsonl")


KNOWN = [*IMPORTED, LM_STUDIO, jan_message(1, "assistant", said("a"), said("b", "reasoning")), LANGFUSE, API, TRACE]
KNOWN += [otlp(span(1, attributes([ASKED], [SAID, LAST]))), {"attributes": attributes([ASKED], [SAID])}]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.sampled_from(["", "user", "x", "<|im_start|>"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=4,
)


@settings(max_examples=800, deadline=None)
@given(st.data())
def test_a_record_that_is_odd_anywhere_is_taken_or_a_problem(data):
    record = data.draw(st.sampled_from(KNOWN))
    odd = changed(record, data.draw(st.sampled_from(list(places(record)))), data.draw(ODD))
    (item,) = import_records([(1, odd)], "import", "2026-01-01T00:00:00.000Z")
    assert isinstance(item, (Imported, Problem))
    if isinstance(item, Imported):
        assert all(isinstance(m["content"], str) and isinstance(m["role"], str) for m in item.conversation["messages"])
        version_hash(item.conversation)
