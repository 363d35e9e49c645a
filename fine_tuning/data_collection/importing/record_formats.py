"""What one record of a foreign file is: each known form is recognised by its keys and turned into messages.

A record that holds more than its messages can say is never taken as if it were whole. Definitions of tools, their calls
and what they returned are text. Before a message with an image, a sound or a file the conversation ends; a reply that
rests on something that the file does not hold has `weight` 0 and is context only. `Found.left_out` says so.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from fine_tuning.data_collection.importing import chatgpt, desktop_apps, open_webui, traces
from fine_tuning.data_collection.importing.pieces import (
    MEDIA,
    Found,
    NotRecognised,
    Problem,
    as_list,
    as_object,
    message_of,
    messages_in,
    messages_of,
    rating_of,
    role_of,
    text_of,
    unique_id,
)
from fine_tuning.schema.conversation import from_exchange

# (question, answer) columns of flat records, and what the format is called
PAIRS = {
    ("instruction", "output"): "alpaca",
    ("user_message", "assistant_response"): "exchange",
    ("prompt", "completion"): "prompt-completion",
    ("prompt", "response"): "prompt-response",
    ("instruction", "response"): "instruction-response",
    ("question", "answer"): "question-answer",
    ("query", "response"): "query-response",
    ("input", "output"): "input-output",
    ("user", "assistant"): "user-assistant",
}
_MEDIA_COLUMNS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
_PLACEHOLDER = re.compile(r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z")  # of LLaVA and LLaMA-Factory
_NOTHING = (None, "", "[]", [])
# columns that CSV and Parquet files hold as JSON text
_NESTED = ("messages", "conversations", "conversation")
_SCORES = (("overall_score", 1), ("score", 1))  # of the replies of a ranked list
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_CHATML_TURN = re.compile(r"<\|im_start\|>([^\n<]{1,64})\n(.*?)<\|im_end\|>|<\|endoftext\|>", re.DOTALL)
# Between and after the turns of a ChatML text: tokens that begin or end a document, and the prompt for a reply.
_CHATML_SPACE = re.compile(r"(?:\s|<[|/\w]{1,32}>)*(?:<\|im_start\|>assistant\s*)?")


@dataclass(frozen=True)
class CsvRows:
    """The rows of one conversation in a CSV file, each {column: cell}; "gap": True in one where rows before it are
    missing."""

    rows: list[dict]


def gathered(records: Iterable[tuple[int, Any] | Problem]) -> Iterator[tuple[int, Any] | Problem]:
    """The numbered records, those of one conversation as one: the calls of a trace, the messages of Jan. They come
    last: the next one may be anywhere in the file."""
    threads: dict[str, tuple[int, list[dict]]] = {}
    calls = traces.Calls()
    for item in records:
        record = None if isinstance(item, Problem) else item[1]
        try:
            if desktop_apps.is_jan(record):
                threads.setdefault(str(record["thread_id"]), (item[0], []))[1].append(record)
            elif (found := traces.calls_in(record)) is not None:
                for call in found:
                    if isinstance(call, NotRecognised):
                        yield Problem(item[0], str(call))
                    else:
                        calls.add(item[0], call)
            else:
                yield item
        except NotRecognised as problem:
            yield Problem(item[0], str(problem))
        except RecursionError:
            yield Problem(item[0], "nested too deeply")
    yield from ((line, {"jan": rows}) for line, rows in threads.values())
    yield from calls.found


def recognise(record: Any) -> Found:
    """Read one record. NotRecognised: the reason why it was not taken, without its content."""
    if isinstance(record, Found):
        return _whole(record)
    if isinstance(record, CsvRows):
        return _of_csv(record.rows)
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise NotRecognised("the record is no object")
    texts = {key: record[key] for key in _NESTED if isinstance(record.get(key), str)}
    record = record | {key: _loads(key, text) for key, text in texts.items() if text.lstrip().startswith("[{")}
    for applies, read in _FORMS:
        if applies(record):
            return _whole(read(record))
    raise NotRecognised("none of the known forms")


def _whole(found: Found) -> Found:
    """Leave out what cannot be kept whole: see the module's docstring."""
    messages = found.messages
    for place, message in enumerate(messages):
        if message.get("weight") == 0:
            found.left_out.append("a reply is context only: the file gives it the weight 0")
            continue
        if (lost := message.get("lost")) and message["role"] == "assistant":
            message["weight"] = 0
            found.left_out.append(f"a reply is context only: it rests on {lost}, which is not in the record")
        elif lost:
            start = max((i for i in range(place + 1) if messages[i]["role"] == "user"), default=0)
            del messages[start:]
            found.feedback = [entry for entry in found.feedback if entry.get("index", -1) < start]
            if found.judges or not any(kept["role"] == "assistant" for kept in messages):
                raise NotRecognised(f"{found.format}: a question has {lost}, which is not text")
            found.left_out.append(f"the conversation ends before {lost}, which is not text")
            break
    if not any(message["content"].strip() for message in messages):
        raise NotRecognised(f"{found.format}: no message has text")
    return found


# -----------------------------------------------------------------------------
# one reader a form


def _own(record: dict) -> Found:
    feedback = record.get("feedback") or []
    if not isinstance(feedback, list) or not all(isinstance(entry, dict) for entry in feedback):
        raise NotRecognised("whetstone: `feedback` is no list of objects")
    if not all(isinstance(message, dict) for message in record["messages"]):
        raise NotRecognised("the turns are no list of objects")
    entries = [{key: value for key, value in entry.items() if key != "index"} for entry in feedback]
    messages = list(map(_own_message, record["messages"]))
    source = record["source"] if isinstance(record["source"], str) else None
    found = Found("whetstone", messages, str(record["id"]), source, record["started_at"], _metadata(record), entries)
    found.restored = bool(record.get("restored"))
    return found


def _own_message(original: dict) -> dict:
    message = message_of(original, original.get("role"), original.get("content"))
    kept = ("id", "at", "version", "incomplete", "reasoning", "gap")
    message |= {key: original[key] for key in kept if original.get(key)}
    others = original.get("alternatives")
    if isinstance(others, list) and others:
        message["alternatives"] = [_own_message(other) for other in others if isinstance(other, dict)]
    return message


def _messages(record: dict) -> Found:
    """Turns with `role` and `content`, or ShareGPT's with `from` and `value`."""
    rows = next(record[key] for key in _NESTED if _has_turns(record.get(key)))
    return _found("sharegpt" if rows and "from" in rows[0] else "messages", record, messages_in(rows))


def _pair(record: dict) -> Found:
    (asked, answered), name = _pair_of(record)
    question, answer = record[asked], record[answered]
    if name == "exchange" and isinstance(question, str) and isinstance(answer, str):
        return _exchange(record)
    if name != "alpaca" and (isinstance(question, list) or isinstance(answer, list)):
        return _found(name, record, messages_in([*_as_turns(question, "user"), *_as_turns(answer, "assistant")]))
    return _flat(name, record, _question(record, asked), text_of(answer))


def _pair_of(record: dict) -> tuple[tuple[str, str], str] | None:
    return next((pair for pair in PAIRS.items() if pair[0][0] in record and pair[0][1] in record), None)


def _exchange(record: dict) -> Found:
    """A logged exchange, or a row of the CSV export, which has the rating beside it."""
    metadata = _metadata(record)
    known = from_exchange(record | {"metadata": metadata})
    found = _flat("exchange", record, record["user_message"], record["assistant_response"])
    reply = {key: value for key, value in known["messages"][1].items() if key not in ("id", "at")}
    found.messages[-1] = reply | {key: value for key, value in found.messages[-1].items() if key == "model"}
    found.metadata, found.source = known["metadata"], known["source"]
    if str(record.get("rating")) in ("1", "-1"):
        found.feedback = [{"index": len(found.messages) - 1, "rating": int(record["rating"])}]
    return found


def _preference(record: dict) -> Found:
    """Two replies to one question (TRL, LLaMA-Factory, Anthropic): the chosen one, and the rejected one as its
    alternative."""
    record = {key: _spoken(value) for key, value in record.items()}
    chosen, rejected = (messages_in(_as_turns(record[key], "assistant")) for key in ("chosen", "rejected"))
    before = chosen[:-1]
    if not any(message["role"] == "user" for message in before):
        before = _prompt_of(record) + before
    if not chosen or not rejected or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise NotRecognised("preference: `chosen` and `rejected` do not end with a reply")
    return _preferred("preference", record, [*before, chosen[-1]], rejected[-1:])


def _ranked(record: dict) -> Found:
    """Several replies to one question with scores or ranks (UltraFeedback, Nectar), or texts under `output`, the best
    one first (LLaMA-Factory): the best one, and the worse ones as its alternatives."""
    record = {key: _spoken(value) for key, value in record.items()}
    replies = record[_list_of_replies(record) or ""]
    values = _values(record, replies)
    if values is None:
        raise NotRecognised("ranked list: its replies have no scores or ranks")
    read = [_reply_of(reply) for reply in replies]
    best = values.index(max(values))
    worse = [reply for reply, value in zip(read, values, strict=True) if value < values[best]]
    return _preferred("ranked list", record, [*_prompt_of(record), read[best]], worse)


def _preferred(name: str, record: dict, messages: list[dict], worse: list[dict]) -> Found:
    """Messages, of which the last one was preferred to the worse ones."""
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise NotRecognised(f"{name}: there is no question")
    if lost := next((reply["lost"] for reply in worse if reply.get("lost")), None):
        raise NotRecognised(f"{name}: a reply has {lost}, which is not text")
    found = _found(name, record, messages)
    texts = {reply["content"]: reply for reply in worse if reply["content"].strip()}
    texts.pop(messages[-1]["content"], None)
    if texts:
        messages[-1]["alternatives"] = [*texts.values()]
        found.feedback = [{"index": len(messages) - 1, "over": True} | _by(record)]
    else:
        found.left_out.append("no pair: the other reply is empty, or the same")
    return found


def _prompt_of(record: dict) -> list[dict]:
    names = ("instruction", "prompt", "question", "conversations", "messages")
    asked = next((key for key in names if key in record), "")
    whole = isinstance(record.get(asked), list)
    return messages_in(record[asked]) if whole else _asked(record, _question(record, asked))


def _list_of_replies(record: dict) -> str | None:
    """Where a record has several replies to one question."""
    lists = [key for key in ("completions", "responses", "answers", "output") if isinstance(record.get(key), list)]
    return next((key for key in lists if len(record[key]) > 1 and (key != "output" or _are(str, record[key]))), None)


def _values(record: dict, replies: list[Any]) -> list[float] | None:
    """How good each reply is, the best one highest."""
    rows = list(map(as_object, replies))
    columns = [([row.get(key) for row in rows], sign) for key, sign in (("rank", -1), *_SCORES)]
    columns += [(as_list(record.get(key)), sign) for key, sign in (("ranks", -1), ("scores", 1))]
    if replies is record.get("output"):
        columns.append((list(range(len(replies))), -1))
    found = ((column, sign) for column, sign in columns if len(column) == len(replies) and _are((int, float), column))
    return next(([sign * value for value in column] for column, sign in found), None)


def _reply_of(reply: Any) -> dict:
    row = as_object(reply)
    text = next((row[key] for key in ("response", "answer", "completion", "text", "content") if key in row), None)
    if not isinstance(reply if text is None else text, str):
        raise NotRecognised("ranked list: a reply has no text")
    return message_of(row, "assistant", reply if text is None else text)


def _are(kind: Any, values: list[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _spoken(value: Any) -> Any:
    """The turns of a text in the form of Anthropic's preference sets; other values as they are."""
    if not (isinstance(value, str) and value.startswith("\n\nHuman:")):
        return value
    parts = _SPEAKER.split(value)[1:]
    turns = [{"role": who.lower(), "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]
    return turns if turns[-1]["content"] else turns[:-1]


def _by(record: dict) -> dict:
    """Who judged, where the record says so."""
    return {"by": record["by"]} if isinstance(record.get("by"), str) and record["by"] else {}


def _asked(record: dict, question: str) -> list[dict]:
    """A question, after the turns under `history`."""
    earlier = [text_of(text) for pair in _history(record.get("history")) for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([*earlier, question])]


def _question(record: dict, asked: str) -> str:
    """A question with what it is about below it: Alpaca's `input`, Dolly's `context`."""
    extra = (record.get(key) or "" for key in ("input", "context") if key != asked)
    return "\n\n".join(filter(None, map(text_of, (record.get(asked), *extra))))


def _found(name: str, record: dict, messages: list[dict]) -> Found:
    """A record's messages, with the system prompt, tools, images, models and judgement that stand beside them.

    A record's label judges its completion (TRL's `completion`, in LLaMA-Factory the last reply): all replies after the
    last question. Earlier replies are part of the prompt, and the label says nothing of them.
    """
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    system = record.get("system", record.get("system_prompt")) if first is None else first
    tools = {key: record[key] for key in ("tools", "functions") if key in record and record[key] not in _NOTHING}
    if tools or (first is None and isinstance(system, (str, list))):
        messages[: first is not None] = [message_of(tools, "system", system)]
    _mark_media(record, messages)
    models = record.get("models", record.get("model"))  # one a reply, or one for all
    replies = [message for message in messages if message["role"] == "assistant"]
    for message, model in zip(replies, models if isinstance(models, list) else repeat(models), strict=False):
        if isinstance(model, str) and not message.get("model"):
            message["model"] = model
    feedback = [{"index": i, "rating": m["rating"]} for i, m in enumerate(messages) if m.get("rating")]
    if not feedback and (rating := rating_of(record)):
        judged = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
        asked = max((i for i in range(max(judged, default=0)) if messages[i]["role"] == "user"), default=0)
        feedback = [{"index": index, "rating": rating} | _by(record) for index in judged if index >= asked]
    identity, started = unique_id(record), _started(record)
    return Found(name, messages, identity, started_at=started, metadata=_metadata(record), feedback=feedback)


def _mark_media(record: dict, messages: list[dict]) -> None:
    """Mark user messages with a placeholder for an image, video or sound; the first one if only a column has it."""
    users = [message for message in messages if message["role"] == "user"]
    for message in users:
        if ">" in message["content"] and (place := _PLACEHOLDER.search(message["content"])):
            message["lost"] = MEDIA[place[1] or place[2]]
    column = next((key for key in _MEDIA_COLUMNS.intersection(record) if record[key]), None)
    if column and users and not any("lost" in message for message in users):
        users[0]["lost"] = MEDIA[column.removesuffix("s")]


def _flat(name: str, record: dict, question: str, answer: str) -> Found:
    """One question and answer, with the turns before them under `history`."""
    return _found(name, record, [*_asked(record, question), {"role": "assistant", "content": answer}])


def _chatml(record: dict) -> Found:
    conversations = list(from_chatml(record["text"]))
    if len(conversations) != 1:
        raise NotRecognised("chatml: the record holds several conversations")
    return _found("chatml", record, _chatml_turns(conversations[0]))


def _chatml_turns(turns: list[dict]) -> list[dict]:
    if any(turn["role"] is None for turn in turns):
        raise NotRecognised("chatml: a turn has no end, or text stands outside of the turns")
    return messages_in(turns)


def from_chatml(text: str) -> Iterator[list[dict]]:
    """The turns of each conversation of a ChatML text: a new one begins at a system turn, an empty line or
    <|endoftext|>. Text that is in no turn is one without a role, so that it is not lost without a word.
    """
    turns: list[dict] = []
    end = 0
    for turn in _CHATML_TURN.finditer(text):
        between, role = text[end : turn.start()], turn.group(1)
        turns += _outside(between)
        apart = role is None or "\n\n" in between.replace("\r", "")
        if turns and (apart or role.strip() == "system"):
            yield turns
            turns = []
        if role is not None:
            whole = "<|im_start|>" not in turn.group(2)
            turns.append({"role": role.strip() if whole else None, "content": turn.group(2)})
        end = turn.end()
    turns += _outside(text[end:])
    if turns:
        yield turns


def _outside(text: str) -> list[dict]:
    return [] if _CHATML_SPACE.fullmatch(text) else [{"role": None, "content": text}]


def _of_csv(rows: list[dict]) -> Found:
    """Rows of one conversation in a CSV file: a message a row (role, content) or an exchange a row."""
    first, identity = rows[0], unique_id({"id": rows[0].get("conversation_id")})
    if {"role", "content"} <= first.keys():
        return _whole(
            replace(_found("csv", {}, _rows(rows)), id=identity, started_at=_started(first), metadata=_metadata(first))
        )
    whole = None
    for row in rows:
        part = _recognise_row(row)
        if whole is None:
            whole = replace(part, format=f"csv of {part.format}", id=identity or part.id)
            continue
        said = [message for message in part.messages if message["role"] != "system"]
        if row.get("gap") is True:
            said[0]["gap"] = True
        shift = len(whole.messages) + len(said) - len(part.messages)
        whole.messages += said
        whole.feedback += [entry | {"index": entry["index"] + shift} for entry in part.feedback]
        whole.left_out += part.left_out
    return whole


def _rows(rows: list[dict]) -> list[dict]:
    """The messages of rows with a role and a content. Where rows are missing, cleaning drops what is left of exchanges:
    a question or reply that may be the missing one is there, and empty.
    """
    messages: list[dict] = []
    for row in rows:
        (message,) = messages_of(row, role_of(row.get("role")), row.get("content"))
        if row.get("gap") is True:
            if messages[-1]["role"] == "user":
                messages.append({"role": "assistant", "content": ""})
            if message["role"] != "user":
                messages.append({"role": "user", "content": ""})
            message["gap"] = True
        messages.append(message)
    return messages


def _recognise_row(row: dict) -> Found:
    """Empty cells are columns that are not used, unless nothing is recognised without them. The CSV export writes an
    empty system prompt as an apostrophe."""
    used = {key: value for key, value in row.items() if value}
    if not used.get("system", "x").strip("'"):
        used["system"] = used["system"][1:]
    try:
        return recognise(used)
    except NotRecognised:
        return recognise({key: value for key, value in row.items() if key != "system"} | used)


# -----------------------------------------------------------------------------
# pieces


def _as_turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _loads(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotRecognised(f"`{key}` is not JSON") from None


def _history(value: Any) -> list[Any]:
    """Pairs of earlier turns; CSV has them as JSON text."""
    if isinstance(value, str) and value.strip():
        value = _loads("history", value)
    pairs = value or []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise NotRecognised("`history` is no list of pairs")
    return pairs


def _started(record: dict) -> Any:
    times = map(record.get, ("started_at", "timestamp", "created_at", "create_time"))
    return next(filter(None, times), None)


def _metadata(record: dict) -> dict:
    """The metadata of a record, and who spoke where the record says so beside its messages."""
    # In a record of question and answer, `user` may be the question.
    keys = ("user_id", "user") if {"messages", "conversations", "chosen"} & record.keys() else ("user_id",)
    named = {key: str(record[key]) for key in keys if isinstance(record.get(key), str | int)}
    return named | (record["metadata"] if isinstance(record.get("metadata"), dict) else {})


def _has(*keys: str) -> Callable[[dict], bool]:
    return lambda record: all(key in record for key in keys)


def _has_turns(rows: Any) -> bool:
    return isinstance(rows, list) and (not rows or bool({"role", "from"} & as_object(rows[0]).keys()))


_FORMS: list[tuple[Callable[[dict], bool], Callable[[dict], Found]]] = [
    (lambda record: isinstance(record.get("mapping"), dict), chatgpt.read_chatgpt),
    (
        lambda r: "snapshot" in r and all(isinstance(r.get(key), dict) for key in ("data", "meta", "snapshot")),
        open_webui.read_feedback,
    ),
    (lambda record: bool({"history", "messages"} & as_object(record.get("chat")).keys()), open_webui.read_chat),
    (desktop_apps.is_lm_studio, desktop_apps.read_lm_studio),
    (_has("jan"), lambda record: desktop_apps.read_jan(record["jan"])),
    (_has("chosen", "rejected"), _preference),
    (_list_of_replies, _ranked),
    (lambda r: _has("id", "source", "started_at", "feedback")(r) and _has_turns(r.get("messages")), _own),
    (lambda record: any(_has_turns(record.get(key)) for key in _NESTED), _messages),
    (_pair_of, _pair),
    (
        lambda record: _has_turns(record.get("chatml")),
        lambda record: _found("chatml", record, _chatml_turns(record["chatml"])),
    ),
    (lambda record: isinstance(record.get("text"), str) and "<|im_start|>" in record["text"], _chatml),
]
