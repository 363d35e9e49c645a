"""Which conversation a request continues: clients send the whole history each time.

A message is a node, the hash of the node before it and of its role and text, as simonw/llm keeps its logs; the first
node stands for the person. Of every exchange that the gateway logged, the nodes of question and reply are known: a
request whose history ends with the last reply of a conversation continues it, one that ends with the last question asks
for another reply to it, and any other history starts a conversation, a branch if it begins like a known one.

The nodes live in a temporary database, made anew from shards and log when the gateway starts, so that no trace of a
conversation outlasts it.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from fine_tuning.common.names import session_name
from fine_tuning.common.project import CONVERSATIONS, LOG, MANIFEST
from fine_tuning.data_collection.conversation_logger import read_event
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.schema.conversation import alternatives_of

SOURCE = "gateway"
Said = dict[str, str]
"""A message: {"role", "content"}."""

# What clients strip from a reply, or keep in it, when they send it again.
_THOUGHTS = re.compile(r'<think>.*?</think>|<details type="reasoning".*?</details>', re.DOTALL)
_OURS = b'"source":"gateway"'
_TABLES = """
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
    CREATE TABLE exchange (
        id TEXT PRIMARY KEY, conversation TEXT, root TEXT, parent BLOB, question BLOB, reply BLOB, turns INT,
        whole INT
    );
    CREATE TABLE node (node BLOB, root TEXT, exchange TEXT, PRIMARY KEY (node, root));
    CREATE TABLE conversation (id TEXT PRIMARY KEY, root TEXT, last TEXT);
    CREATE INDEX of_root ON conversation (root);
"""


class _Known(NamedTuple):
    """An exchange that was logged; `reply` is the node of its reply, `last` the last one of its conversation."""

    id: str
    conversation: str
    root: str
    parent: bytes
    question: bytes
    reply: bytes
    turns: int
    whole: bool
    last: str


@dataclass(frozen=True)
class Place:
    """Where an exchange belongs.

    Args:
        root: the id that a conversation and its branches have in common.
        parent, question: the nodes before the question and of it.
        turns: how many questions the model was shown.
        replaces: the exchange whose reply is asked for once more.
        history: the messages before the question that the conversation does not have in the log.
    """

    conversation: str
    root: str
    parent: bytes
    question: bytes
    turns: int
    replaces: str | None = None
    history: Sequence[Said] = field(default=())


def node_after(node: bytes, role: str, text: str) -> bytes:
    """The node of a message. White space around it and a model's thoughts in it do not count."""
    said = _THOUGHTS.sub("", text).strip().encode("utf-8", "surrogatepass")
    return hashlib.sha256(node + role.encode() + b"\0" + said).digest()[:16]


def nodes_of(person: str | None, messages: Iterable[Said]) -> list[bytes]:
    """The person's node and those of the messages."""
    nodes = [node_after(b"", "person", person or "")]
    for message in messages:
        nodes.append(node_after(nodes[-1], message["role"], message["content"]))
    return nodes


class MessageChain:
    """The nodes of what was logged; for one thread at a time."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(_TABLES)

    def place(self, nodes: list[bytes], history: Sequence[Said], question: str, name: str | None, new: str) -> Place:
        """Where a question belongs that follows `history`, whose nodes are `nodes`.

        Args:
            name: the conversation's id, if the client sent one: then only that one is looked at.
            new: an id for a conversation that starts here.
        """
        root = session_name(name) if name else None
        parent, asked = nodes[-1], node_after(nodes[-1], "user", question)
        if (known := self._at(parent, root)) and known.id == known.last and known.reply == parent:
            return Place(known.conversation, known.root, parent, asked, known.turns + 1)
        if (known := self._at(asked, root)) and known.id == known.last:
            return Place(known.conversation, known.root, parent, asked, known.turns, replaces=known.id)
        turns = _questions(history) + 1
        known = self._newest(root) if root else next(filter(None, map(self._at, nodes[:0:-1])), None)
        if known and root:
            # Texts may differ from what was logged: Open WebUI puts retrieved text into a question on its way to the
            # model, and sends the bare question the next time.
            if turns == known.turns + 1:
                return Place(known.conversation, root, known.reply, node_after(known.reply, "user", question), turns)
            if turns == known.turns > 1 and node_after(known.parent, "user", question) == known.question:
                return Place(known.conversation, root, known.parent, known.question, turns, replaces=known.id)
        if root is None:
            return Place(new, known.root if known else new, parent, asked, turns, history=history)
        return Place(f"{root[:90]}-{new}" if known else root, root, parent, asked, turns, history=history)

    def same(self, place: Place, reply: str) -> str | None:
        """The exchange that has this question and this reply, whole, already."""
        known = self._at(node_after(place.question, "assistant", reply), place.root)
        return known.id if known and known.whole else None

    def add(self, exchange: str, place: Place, reply: str, whole: bool) -> None:
        """Take in what is logged."""
        node = node_after(place.question, "assistant", reply)
        row = (exchange, place.conversation, place.root, place.parent, place.question, node, place.turns, whole)
        self._rows("INSERT OR REPLACE INTO exchange VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *row)
        for each in (place.question, node):
            self._rows("INSERT OR REPLACE INTO node VALUES (?, ?, ?)", each, place.root, exchange)
        self._rows("INSERT OR REPLACE INTO conversation VALUES (?, ?, ?)", place.conversation, place.root, exchange)

    def conversation_of(self, exchange: str) -> str | None:
        """The conversation of an exchange; None if it is not known."""
        found = self._rows("SELECT conversation FROM exchange WHERE id = ?", exchange)
        return found[0][0] if found else None

    def _at(self, node: bytes, root: str | None = None) -> _Known | None:
        """The newest exchange whose question or reply a node is."""
        condition, values = ("AND node.root = ?", [root]) if root else ("", [])
        return self._known(
            f"node JOIN exchange ON exchange.id = node.exchange WHERE node = ? {condition} ORDER BY node.rowid DESC",
            *(node, *values),
        )

    def _newest(self, root: str) -> _Known | None:
        """The last exchange of the newest conversation of a root."""
        return self._known(
            "conversation c JOIN exchange ON exchange.id = c.last WHERE c.root = ? ORDER BY c.rowid DESC", root
        )

    def _known(self, source: str, *values: Any) -> _Known | None:
        last = "(SELECT last FROM conversation WHERE id = exchange.conversation)"
        found = self._rows(f"SELECT exchange.*, {last} FROM {source} LIMIT 1", *values)
        return _Known(*found[0]) if found else None

    def _rows(self, query: str, *values: Any) -> list[tuple]:
        return self._db.execute(query, values).fetchall()

    # -----------------------------------------------------------------------------------------------------------------

    def load(self, checkout: Path) -> None:
        """Take in what the gateway logged before: sealed conversations, then the logs."""
        self._db.execute("BEGIN")
        for path in shard_paths(checkout / CONVERSATIONS, checkout / MANIFEST):
            for line in _our_lines(path):
                self._add_sealed(orjson.loads(line))
        live = checkout / LOG
        for path in [*sorted((live.parent / "closed").glob("*.jsonl")), *([live] if live.exists() else [])]:
            for line in _our_lines(path):
                event = read_event(line)
                if event is not None and event["event"] == "exchange":
                    self._add_logged(event)
        self._db.execute("COMMIT")

    def _add_logged(self, event: dict[str, Any]) -> None:
        metadata, conversation = event["metadata"], event["conversation_id"]
        history = metadata.get("history")
        known = self._known("exchange WHERE id = ?", metadata.get("replaces") or "")
        if known is None and history is None:
            known = self._known("exchange WHERE id = (SELECT last FROM conversation WHERE id = ?)", conversation)
            parent, turns = (known.reply, known.turns + 1) if known else (nodes_of(metadata.get("user_id"), ())[0], 1)
        elif known is not None:
            parent, turns = known.parent, known.turns
        else:
            parent, turns = nodes_of(metadata.get("user_id"), history)[-1], 1 + _questions(history)
        question = node_after(parent, "user", event["user_message"])
        place = Place(conversation, metadata.get("branch_of") or conversation, parent, question, turns)
        self.add(event["id"], place, event["assistant_response"], "incomplete" not in metadata)

    def _add_sealed(self, conversation: dict[str, Any]) -> None:
        metadata = {key: value for key, value in conversation["metadata"].items() if key in ("user_id", "branch_of")}
        first, before = True, []
        for message in conversation["messages"]:
            # The log names a question after its reply.
            asked = before[-1] if before and before[-1].get("id") == f"{message.get('id')}-user" else None
            if asked is None or message["role"] != "assistant":
                before.append(message)
                continue
            event = {"conversation_id": conversation["id"], "user_message": asked["content"]}
            placed = {"history": before[:-1]} if first else {}
            for reply in (*alternatives_of(message), message):
                cut = {"incomplete": reply["incomplete"]} if "incomplete" in reply else {}
                said = {"id": reply["id"], "assistant_response": reply["content"], "metadata": metadata | placed | cut}
                self._add_logged(event | said)
                placed = {"replaces": reply["id"]}
            first, before = False, []


def _questions(messages: Iterable[Said]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _our_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from (line for line in file if _OURS in line and line.endswith(b"\n"))
