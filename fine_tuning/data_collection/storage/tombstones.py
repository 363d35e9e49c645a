"""Tombstones: what was forgotten, by keyed hashes alone, so that no import, seal or other clone brings it back.

One JSON line a conversation in a file that git keeps, so that other clones refuse it too: {"key": name of the key,
"id": hash of its id, "messages": [hash of a message's id], "contents": [hash of what a version of it said], "at": a
day}. The keys lie beside the shards, `forgotten-NAME.key`, and travel with them by DVC: who has the git repository
alone cannot try out what was said. Lines of earlier versions of this project have no key; they are read, and get one
when something is added.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import dump_line, read_lines, replacing
from fine_tuning.schema.conversation import message_ids


class Tombstones:
    """The tombstones of a file; a file that is not there has none. Its keys are in `conversations` beside it. Raises
    UserError if a line of it is damaged, or its key is not in this clone."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path.parent / "conversations"
        self.keys = {file.stem.rpartition("-")[2]: file.read_bytes() for file in self.folder.glob("forgotten-*.key")}
        if damaged := [name for name, key in self.keys.items() if key_name(key) != name]:
            damaged_key = self.folder / f"forgotten-{damaged[0]}.key"
            raise UserError(f"{damaged_key} is damaged: remove it, then `dvc pull {self.folder}`")
        self._known: set[tuple[str | None, str, str]] = set()
        self._lines: dict[tuple[str | None, str], dict] = {}
        for number, line in read_lines(self.path) if self.path.exists() else ():
            if not line:  # all that is committed before anything is forgotten: DVC warns of an empty file
                continue
            try:
                record = json.loads(line)
                self._record(record.get("key"), record["id"], record.get("at", ""), record)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"line {number} of {self.path} is damaged: `git checkout {self.path}`") from None
        if missing := {key for key, _ in self._lines} - {None, *self.keys}:
            # The shards that came before the key may still hold it: `dvc pull` would hide what is in the cache.
            again = "`python -m fine_tuning forget --again`, then " if any(self.folder.glob("*.jsonl")) else ""
            raise UserError(
                f"tombstones in {self.path} cannot be checked: their key forgotten-{min(missing)}.key is not in "
                f"{self.folder}: {again}`dvc pull {self.folder}`"
            )

    def __len__(self) -> int:
        return len(self._lines)

    def names(self, identity: str) -> bool:
        """Whether a conversation of this id was forgotten."""
        return self._know("id", id_hash(identity))

    def cover(self, conversation: dict) -> bool:
        """Whether a conversation was forgotten, under this id or another one with the same messages."""
        if not self._lines:
            return False
        return self.names(conversation["id"]) or self._know("contents", content_hash(conversation))

    def concern(self, event: dict) -> bool:
        """Whether a logged event is about a conversation that was forgotten, or about a message of one."""
        named = self.names(str(event.get("conversation_id")))
        return named or self._know("messages", id_hash(str(event.get("message_id"))))

    def _know(self, kind: str, plain: str) -> bool:
        return any((key, kind, self._keyed(key, plain)) in self._known for key in (None, *self.keys))

    def _keyed(self, key: str | None, plain: str) -> str:
        return plain if key is None else hmac.new(self.keys[key], plain.encode(), "sha256").hexdigest()

    @cached_property
    def key(self) -> bytes:
        """The key of what is forgotten next: the first of this clone, or a new one, which `add` writes."""
        return self.keys[min(self.keys)] if self.keys else secrets.token_hex(32).encode()

    def stand_in(self, identity: str) -> str:
        """What a list may hold in the place of an id."""
        return hmac.new(self.key, id_hash(identity).encode(), "sha256").hexdigest()

    def stand_ins(self, identity: str) -> set[str]:
        """What lists hold in the place of an id, by every key, and by none in lists of earlier versions."""
        return {self._keyed(key, id_hash(identity)) for key in (None, *self.keys)}

    def add(self, versions: Iterable[dict]) -> int:
        """Remember versions of conversations as forgotten; returns how many lines that had no key have one now.

        Doing it again changes nothing.
        """
        today, name = datetime.now(UTC).date().isoformat(), key_name(self.key)
        if name not in self.keys:
            with replacing(self.folder / f"forgotten-{name}.key") as file:
                file.write(self.key)
            self.keys[name] = self.key
        records = []
        for version in versions:
            contents = [content_hash(version)] if version["messages"] else []
            messages = list(map(id_hash, message_ids(version)))
            records.append({"id": id_hash(version["id"]), "at": today, "contents": contents, "messages": messages})
        plain = [self._lines.pop(place) for place in [*self._lines] if place[0] is None]
        for record in records + plain:
            said = {kind: [self._keyed(name, value) for value in record[kind]] for kind in ("contents", "messages")}
            self._record(name, self._keyed(name, record["id"]), record["at"], said)
        with replacing(self.path) as file:
            file.writelines(dump_line(record) for _, record in sorted(self._lines.items(), key=str))
        return len(plain)

    def _record(self, key: str | None, identity: str, day: str, hashes: dict) -> None:
        record = self._lines.setdefault((key, identity), {"key": key, "id": identity, "at": day})
        self._known.add((key, "id", identity))
        for kind in ("contents", "messages"):
            record[kind] = sorted({*record.get(kind, ()), *hashes.get(kind, ())})
            self._known.update((key, kind, value) for value in record[kind])


def key_name(key: bytes) -> str:
    """Fingerprint of a key."""
    return hashlib.sha256(key).hexdigest()[:12]


def id_hash(identity: str) -> str:
    """Hash of an id, before it is keyed."""
    return hashlib.sha256(b"conversation\0" + identity.encode("utf-8", "surrogatepass")).hexdigest()


def content_hash(conversation: dict) -> str:
    """Hash of the messages of one version, before it is keyed."""
    said = [[message.get("role"), message.get("content")] for message in conversation["messages"]]
    return hashlib.sha256(b"messages\0" + json.dumps(said).encode("ascii")).hexdigest()
