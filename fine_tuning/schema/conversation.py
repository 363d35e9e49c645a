"""The conversation record: its types, what counts as one, and how logged events change it.

A shard holds one conversation a line, as JSON in UTF-8: `Conversation` with its `Message`s and `Feedback`. Readers take
plain dicts of these types; `problem_of` is the one place that says whether a record is sound, `from_line` and `to_line`
read and write one. Keys that are absent mean "none"; keys that no type names are kept and read by nobody.

`schema_version` counts changes that older readers would misread; a record without it is of version 1. A newer one is
refused rather than misread.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from types import NoneType
from typing import Any, NamedTuple, TypedDict

import orjson

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import dump_line

ROLES = ("system", "user", "assistant", "tool")
SCHEMA_VERSION = 1
# sources whose replies a model wrote, named or not
CHATS = ("chat", "chatgpt", "open-webui", "llm", "lm-studio", "jan", "opentelemetry", "langfuse")
CHAT_IDS = ("chatgpt-", "open-webui-")  # how ids begin of what was imported from there, also before its source said so
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)


def now() -> str:
    return time_stamp(datetime.now(UTC))


def time_stamp(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds: it sorts as text."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Message(TypedDict, total=False):
    """One turn. `role` and `content` are there in every message."""

    id: str
    role: str  # one of ROLES
    content: str  # what was said, without the reasoning of a model
    model: str  # who wrote a reply, where a model did; none is named for a person's
    version: int | str  # the version of this project's model that wrote it
    at: str  # ISO 8601 in UTC
    tokens: int  # of the reply, as the server counted
    settings: dict[str, Any]  # how a reply was drawn: temperature and the like, and the system prompt
    incomplete: str | bool  # why a reply was not finished: it is not trained on
    weight: int  # 0 (OpenAI's): context only, not trained on, whatever its ratings
    # It followed something that was taken out (by cleaning, a deletion, a row that cannot be read): nothing before it
    # may be shown as its context.
    gap: bool
    alternatives: list["Message"]  # other replies to the same question
    reasoning: str  # a model's thoughts: recorded, not trained on
    tool_calls: list[dict[str, Any]]  # {"id", "name", "arguments"} of a reply: recorded, not trained on
    tool_call_id: str  # of a tool's message: the call that it answers
    parts: list[dict[str, Any]]  # the content as the client sent it, where it is more than text
    attachments: list[dict[str, Any]]  # references to files, {"type", "name", "sha256"}: their bytes are not recorded
    # Where text that was put into the content came from: {"source", "start", "end"}, characters of the content.
    retrieved: list[dict[str, Any]]


class Feedback(TypedDict, total=False):
    """What one person said of one message: the newest rating, comment, edit and preference."""

    message_id: str
    rating: int | None  # 1 liked, -1 disliked, None neither
    comment: str
    edited: str  # the text that the person put in its place
    over: list[str]  # ids of the alternatives that the message was preferred to
    by: str


class Conversation(TypedDict, total=False):
    """A conversation, the newest version of its id. A deleted one keeps its id and has no messages, so that older
    versions of it stay deleted."""

    schema_version: int
    id: str
    source: str
    started_at: str | None
    messages: list[Message]
    feedback: list[Feedback]
    metadata: dict[str, Any]
    deleted: bool
    deleted_messages: list[str]
    restored: bool  # a filter dropped it and a person wanted it back: it is masked as any other and filtered no more
    tools: list[dict[str, Any]]  # that the client offered, as JSON schemas


Record = dict[str, Any]  # a conversation, message, entry of feedback or event, as JSON has it


class Problem(NamedTuple):
    """Why a record is no sound conversation or is dropped, and the value that decided it."""

    reason: str
    value: Any


def each_record(conversations: Any) -> Iterator[Record]:
    """The records of what a caller gives as conversations. Raises UserError if one of them is no record."""
    wanted = "give a list of dicts with user_message and assistant_response, or with messages"
    if isinstance(conversations, (str, bytes, dict)) or not isinstance(conversations, Iterable):
        raise UserError(f"a {type(conversations).__name__} is no list of conversations: {wanted}")
    for number, record in enumerate(conversations, start=1):
        if not isinstance(record, dict):
            raise UserError(f"conversation {number} is a {type(record).__name__}: {wanted}")
        yield record


def problem_of(conversation: Record) -> Problem | None:
    """What is wrong with the form of a conversation; None for a sound one. What it says is judged by the cleaner.

    Messages are objects with a text, a role of ROLES and an id that tells them apart; feedback and metadata have the
    types of `Feedback` and of an object.
    """
    messages, feedback, metadata = map(conversation.get, ("messages", "feedback", "metadata"))
    if not isinstance(messages, list):
        return Problem("messages_malformed", type(messages).__name__)
    unknown = None
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return Problem("messages_malformed", type(message).__name__)
        if not isinstance(message.get("content"), str):
            return Problem("content_is_no_text", index)
        if not can_be_id(message.get("id")):
            return Problem("messages_malformed", "id")
        if unknown is None and message.get("role") not in ROLES:
            unknown = index
    if feedback and not (isinstance(feedback, list) and all(map(is_feedback, feedback))):
        return Problem("feedback_or_metadata_malformed", 0)
    if metadata and not isinstance(metadata, dict):
        return Problem("feedback_or_metadata_malformed", 0)
    return None if unknown is None else Problem("unknown_role", unknown)


def can_be_folded(record: Any) -> bool:
    """Whether events can be applied to what a shard's line holds, and it can be forgotten: an id, and parts of the
    right types. The line may still be unsound: then cleaning drops it with its reason."""
    feedback = record.get("feedback") or [] if isinstance(record, dict) else None
    return (
        isinstance(feedback, list)
        and isinstance(record.get("id"), str)
        and isinstance(record.get("started_at"), (str, NoneType))
        and isinstance(record.get("messages"), list)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in record["messages"])
        and all(isinstance(entry, dict) for entry in feedback)
        and isinstance(record.get("metadata") or {}, dict)
    )


def can_be_id(value: Any) -> bool:
    """Whether messages can be told apart by a value: no list, dict or set."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_feedback(entry: Any) -> bool:
    """Whether what a person said of a message can be read: a number as rating, a text as edit, a list as `over`."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("rating"), (int, float, NoneType))
        and isinstance(entry.get("edited"), (str, NoneType))
        and can_be_id(entry.get("message_id"))
        and isinstance(entry.get("over") or [], (list, tuple))
    )


def is_exchange(record: Record) -> bool:
    """Whether a record is a logged exchange rather than a conversation with `messages`."""
    return "messages" not in record and "user_message" in record


def from_exchange(exchange: Record) -> Record:
    """A conversation of one logged exchange. The assistant message bears the exchange's id. `metadata["history"]` is
    what stands before it: {"role", "content"} of each message.

    Metadata and feedback that are none stay as they are: the cleaner judges them.
    """
    given, feedback = exchange.get("metadata") or {}, exchange.get("feedback") or []
    metadata = dict(given) if isinstance(given, dict) else {}
    session, source, model = metadata.pop("session_id", None), metadata.pop("source", None), metadata.pop("model", None)
    user, assistant = exchange.get("user_message"), exchange.get("assistant_response")
    identity = exchange.get("id") or short_hash(["exchange", user, assistant])
    at = _time(exchange.get("timestamp"))
    question = {"id": f"{identity}-user", "role": "user", "content": user}
    reply = {"id": identity, "role": "assistant", "content": assistant}
    if model is not None:
        reply["model"] = str(model)
    if isinstance(tokens := metadata.get("tokens"), int) and tokens > 0:
        reply["tokens"] = metadata.pop("tokens")
    metadata.pop("replaces", None)  # for `fold`: alone, an exchange has nothing to replace
    for key in ("version", "incomplete", "settings", "weight", "reasoning", "tool_calls"):
        if (value := metadata.pop(key, None)) is not None:
            reply[key] = value
    if files := metadata.pop("attachments", None):
        question["attachments"] = files
    if at is not None:
        question["at"] = reply["at"] = at
    return {
        "id": str(exchange.get("conversation_id") or session or identity),
        "source": str(source or "chat"),
        "started_at": at,
        "messages": [*_context(identity, metadata.pop("history", None)), question, reply],
        "feedback": list(feedback) if isinstance(feedback, (list, tuple)) else feedback,
        "metadata": metadata if isinstance(given, dict) else given,
    }


def _context(identity: str, history: Any) -> Iterator[Record]:
    """What a client sent before a logged question and the log does not have: context only, replies by nobody known."""
    for place, message in enumerate(history if isinstance(history, list) else ()):
        said = message if isinstance(message, dict) else {}
        known = {"id": f"{identity}-{place}", "role": said.get("role"), "content": said.get("content")}
        yield known | ({"model": "unknown", "weight": 0} if known["role"] == "assistant" else {})


def _time(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_KEYS = {"id", "source", "started_at", "timestamp", "messages", "feedback", "metadata", "deleted", "restored"}


def as_conversation(record: Record) -> Record:
    """Either accepted form, a logged exchange or a conversation with `messages`, as a conversation. Nothing is checked
    beyond the form: the cleaner judges roles and contents."""
    if is_exchange(record):
        return from_exchange(record)
    messages = record.get("messages")
    conversation = {
        "id": str(record.get("id") or short_hash(["messages", messages])),
        "source": str(record.get("source") or "unknown"),
        "started_at": _time(record.get("started_at") or record.get("timestamp")),
        "messages": messages,
        "feedback": record.get("feedback") or [],
        "metadata": record.get("metadata") or {key: value for key, value in record.items() if key not in _KEYS},
    }
    if record.get("deleted"):
        conversation["deleted"] = True
    return conversation


def is_by_a_model(conversation: Record, index: int) -> bool:
    """Whether a model wrote the reply `messages[index]`: one is named, or it comes from a chat's export or the log."""
    messages, reply = conversation["messages"], conversation["messages"][index]
    # The log names a question after its reply.
    logged = index > 0 and messages[index - 1].get("id") == f"{reply.get('id')}-user"
    chat = logged or conversation.get("source") in CHATS or str(conversation.get("id")).startswith(CHAT_IDS)
    return chat or reply.get("model") is not None


def edits(conversation: Record) -> dict[str, str]:
    """Message id → the text that a person put in its place; the latest edit wins."""
    return {entry["message_id"]: entry["edited"] for entry in conversation["feedback"] if entry.get("edited")}


def short_hash(value: Any) -> str:
    """A hex digest of 24 digits of any JSON value that does not depend on key order."""
    return hashlib.sha256(_CANONICAL.encode(value).encode("ascii")).hexdigest()[:24]


def version_hash(conversation: Record) -> str:
    """What a version of a conversation says: messages, feedback, deletion. Source and times do not count."""
    messages = []
    for m in conversation["messages"]:
        others = sorted([str(a.get("content")), str(a.get("model"))] for a in alternatives_of(m))
        messages.append([*map(m.get, ("role", "content", "model", "weight")), *others])
    keys = ("message_id", "rating", "comment", "edited", "by")
    feedback = [[*map(entry.get, keys), *_over(entry)] for entry in conversation.get("feedback") or []]
    return short_hash([messages, feedback, bool(conversation.get("deleted"))])


def _over(entry: Record) -> list[Any]:
    over = entry.get("over") or []
    return list(over) if isinstance(over, (list, tuple)) else [over]


# -----------------------------------------------------------------------------
# feedback from version to version


def with_feedback_of(older: Record, newer: Record) -> Record:
    """`newer`, with what people said of the same words in `older`. Of one person's ratings, comments and edits of a
    reply the newer counts; none is lost because it is not repeated."""
    merged = copy.deepcopy(newer) | {"feedback": []}
    said: dict[tuple[Any, Any], list[tuple[int, Record]]] = {}
    for place, message in enumerate(merged["messages"]):
        for version in versions_of(message):
            said.setdefault((version.get("role"), version["content"]), []).append((place, version))
    pairs = []
    for place, message in enumerate(older["messages"]):
        for old in versions_of(message):
            same = said.get((old.get("role"), old["content"]), ())
            ranked = [(new.get("id") != old.get("id"), abs(there - place), n) for n, (there, new) in enumerate(same)]
            pairs += [(old, same[min(ranked)[-1]][1])] if same else []
    carry_feedback(older.get("feedback") or [], merged, pairs)
    for entry in newer["feedback"]:
        if entry.get("over"):
            _take_back(entry, merged["feedback"])
        if known := _entry_of(entry, merged["feedback"]):
            over = list(dict.fromkeys([*_over(known), *_over(entry)]))
            known |= {key: value for key, value in entry.items() if value is not None}
            known |= {"over": over} if over else {}
        else:
            merged["feedback"].append(entry)
    return merged | ({"restored": True} if older.get("restored") else {})


def carry_feedback(feedback: list[Record], conversation: Record, pairs: Iterable[tuple[Record, Record]]) -> None:
    """Add feedback on the first message of each pair to the second, which is `conversation`'s, and its alternatives."""
    names = {}
    for old, new in pairs:
        names[old.get("id")] = new.get("id")
        known = {version["content"]: version.get("id") for version in versions_of(new)}
        shown = any(new is message for message in conversation["messages"])
        for other in alternatives_of(old) if shown else ():
            name = known.get(other["content"])
            if name is None:
                taken = other.get("id") in known.values()
                name = short_hash([other["id"], other["content"]]) if taken else other.get("id")
                new["alternatives"] = [*alternatives_of(new), other | {"id": name}]
                known[other["content"]] = name
            names.setdefault(other.get("id"), name)
    for entry in feedback:
        if entry.get("message_id") in names:
            over = [names[name] for name in _over(entry) if name in names]
            moved = {key: value for key, value in entry.items() if key != "over"} | ({"over": over} if over else {})
            moved["message_id"] = names[entry["message_id"]]
            if moved not in conversation["feedback"]:
                conversation["feedback"].append(moved)


def versions_of(message: Record) -> list[Record]:
    """A reply and its alternatives."""
    return [message, *alternatives_of(message)] if "alternatives" in message else [message]


def alternatives_of(message: Record) -> list[Record]:
    """Other replies; a shard by hand may have something else there."""
    others = message.get("alternatives")
    found = [other for other in others if isinstance(other, dict)] if isinstance(others, list) else []
    return [other for other in found if isinstance(other.get("content"), str) and can_be_id(other.get("id"))]


def _alone(message: Record) -> Record:
    return {key: value for key, value in message.items() if key != "alternatives"}


def _entry_of(entry: Record, feedback: list[Record]) -> Record | None:
    """The earlier feedback of the same person on the same message."""
    key = (entry.get("message_id"), entry.get("by"))
    return next((e for e in feedback if (e.get("message_id"), e.get("by")) == key), None)


# -----------------------------------------------------------------------------
# lines

_ENDS_TO_COMMAS = bytes.maketrans(b":[]}", b",,,,")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_NINETEEN_DIGITS = b"0" * 19


def to_line(record: Record) -> bytes:
    """`dump_line` of what was read from JSON: the same bytes in a fifth of the time, where orjson writes them so. It
    does not write 1e+16, nor large integers, as Python does."""
    try:
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return dump_line(record)
    return dump_line(record) if b",e," in line.translate(_ENDS_TO_COMMAS, b"0123456789.-") else line


def from_line(line: bytes) -> Any:
    """The JSON of a line, integers of any size as they are; a third of `json.loads`'s time.

    Raises:
        ValueError: it is none, or none that orjson reads.
        RecursionError: it is too deep.
    """
    return json.loads(line) if has_long_number(line) else orjson.loads(line)


def has_long_number(line: bytes) -> bool:
    """Whether a line has nineteen digits in a row: orjson would round such an integer."""
    return _NINETEEN_DIGITS in line.translate(_ZEROS)


# -----------------------------------------------------------------------------
# events of the log


def fold(events: Iterable[Record], conversations: dict[str, Record]) -> list[Record]:
    """Apply logged events in their order to `conversations` (id → newest version), which is changed in place.

    An event that was applied before changes nothing, so a log can be folded again after a crash. Returns the events
    that name a conversation or a message nobody knows, and exchanges that say something else under an id that is taken.
    """
    for known in conversations.values():  # a shard by hand may lack them
        known |= {"feedback": known.get("feedback") or [], "metadata": known.get("metadata") or {}}
    owners = {identity: c for c in conversations.values() for identity in message_ids(c)}
    unmatched = []
    for event in events:
        if event["event"] == "exchange":
            if not _add_exchange(event, conversations, owners):
                unmatched.append(event)
            continue
        target: Any = event.get("conversation_id")
        named = target or target in conversations  # a shard by hand may have an empty id
        conversation = conversations.get(target) if named else owners.get(str(event.get("message_id")))
        if conversation is None:
            unmatched.append(event)
        elif event["event"] == "delete":
            _delete(event, conversation)
        elif event["event"] == "restore":
            if not conversation.get("deleted"):
                conversation["restored"] = True
        elif event["event"] != "vote":  # votes have files of their own
            _judge(event, conversation)
    return unmatched


def _add_exchange(event: Record, conversations: dict[str, Record], owners: dict[str, Record]) -> bool:
    """Whether it is there now, or was before; not if its id stands for another reply."""
    new = from_exchange(event)
    conversation = conversations.get(new["id"])
    if conversation is None:
        conversations[new["id"]] = conversation = new
    elif conversation.get("deleted") or event["id"] in deleted_messages(conversation):
        return True
    elif event["id"] in (replies := _replies(conversation)):
        return bool(replies[event["id"]] == event["assistant_response"])
    else:
        if not _replace(event, conversation, new["messages"]):
            conversation["messages"].extend(new["messages"])
        known, added = conversation["metadata"], new["metadata"]
        people = speakers(known) | speakers(added)
        conversation["metadata"] = added | known | ({"users": sorted(people)} if len(people) > 1 else {})
    for message in new["messages"]:
        owners[message["id"]] = conversation
    return True


def speakers(metadata: Record) -> set[str]:
    """The names of the people who spoke in a conversation, where its metadata tells them in any form."""
    several = metadata.get("users")
    named = [metadata.get("user_id"), metadata.get("user"), *(several if isinstance(several, list) else [])]
    return {str(name) for name in named if name not in (None, "")}


def message_ids(conversation: Record) -> Iterator[str]:
    """Ids of all messages, those of alternatives too."""
    for message in conversation["messages"]:
        yield from (m["id"] for m in versions_of(message) if isinstance(m.get("id"), str))


def deleted_messages(conversation: Record) -> list[str]:
    gone = conversation.get("deleted_messages")
    return [identity for identity in gone if isinstance(identity, str)] if isinstance(gone, list) else []


def _replies(conversation: Record) -> dict[str | None, str]:
    """Contents of all messages by id, those of alternatives too."""
    versions = (version for message in conversation["messages"] for version in versions_of(message))
    return {version.get("id"): version["content"] for version in versions if can_be_id(version.get("id"))}


def _replace(event: Record, conversation: Record, pair: list[Record]) -> bool:
    """Put a reply that was asked for once more in the place of the one before, which becomes an alternative of it."""
    replaced = (event.get("metadata") or {}).get("replaces")
    if replaced is None:
        return False
    messages = conversation["messages"]
    for index, message in enumerate(messages):
        others = alternatives_of(message)
        if index and replaced in (message.get("id"), *(other.get("id") for other in others)):
            messages[index - 1 : index + 1] = [pair[0], pair[1] | {"alternatives": [*others, _alone(message)]}]
            return True
    return False


def _prefer(event: Record, conversation: Record) -> None:
    """Show the preferred reply where one of its alternatives stood."""
    chosen = event["message_id"]
    messages = conversation["messages"]
    for index, message in enumerate(messages):
        others = alternatives_of(message)
        preferred = next((other for other in others if other.get("id") == chosen), None)
        if preferred is not None:
            if index and messages[index - 1].get("role") == "user":
                messages[index - 1]["id"] = f"{chosen}-user"
            kept = [other for other in others if other.get("id") != chosen]
            messages[index] = preferred | {"alternatives": [*kept, _alone(message)]}
            return


def _take_back(event: Record, feedback: list[Record]) -> None:
    """What the same person preferred before the other way round no longer holds."""
    for entry in feedback:
        same = entry.get("by") == event.get("by") and entry.get("message_id") in event["over"]
        if same and event["message_id"] in _over(entry):
            del entry["over"]


def _delete(event: Record, conversation: Record) -> None:
    gone = event.get("message_id")
    if gone is None:
        conversation.update(messages=[], feedback=[], metadata={}, deleted=True)
        for key in ("deleted_messages", "restored"):
            conversation.pop(key, None)
        return
    # With a reply go the other replies to its question; of those, one goes alone.
    lost = {gone} | {i for m in conversation["messages"] if m.get("id") == gone for i in message_ids({"messages": [m]})}
    partners = [*lost, *(f"{identity}-user" for identity in lost)]
    for before, message in pairwise(conversation["messages"]):  # what was said before the deletion rests on it
        if before.get("id") in partners:
            message["gap"] = True
    conversation["messages"] = [m for m in conversation["messages"] if m.get("id") not in partners]
    for message in conversation["messages"]:
        others = alternatives_of(message)
        message.pop("alternatives", None)
        if kept := [other for other in others if other.get("id") not in lost]:
            message["alternatives"] = kept
    conversation["feedback"] = [e for e in conversation["feedback"] if e.get("message_id") not in partners]
    conversation["deleted_messages"] = sorted({*deleted_messages(conversation), *lost})


def _judge(event: Record, conversation: Record) -> None:
    """A person has one entry a message: the newest rating, comment and edit, each kept until it is replaced."""
    if conversation.get("deleted") or event.get("message_id") in deleted_messages(conversation):
        return
    feedback = conversation["feedback"]
    entry = _entry_of(event, feedback)
    if entry is None:
        entry = {"message_id": event.get("message_id"), "rating": None}
        if event.get("by") is not None:
            entry["by"] = event["by"]
        feedback.append(entry)
    if event.get("over"):
        if entry.get("over") != event["over"]:  # otherwise it was applied before, and a newer reply may be shown by now
            _take_back(event, feedback)
            entry["over"] = list(event["over"])
            _prefer(event, conversation)
    elif event["event"] == "feedback":
        entry["rating"] = event.get("rating")
        if event.get("comment") is not None:
            entry["comment"] = event["comment"]
    else:
        entry["edited"] = event["content"]
