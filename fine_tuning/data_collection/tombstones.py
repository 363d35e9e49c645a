"""Tombstones: what was forgotten, by hashes alone, so that no import, seal or shard of another clone brings it back.

One JSON line a conversation, {"id": hash of its id, "contents": [hash of what a version of it said], "at": a day}, in
a file that git keeps: other clones refuse it too.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from fine_tuning.errors import UserError
from fine_tuning.records import dump_line, read_lines, replacing


class Tombstones:
    """The tombstones of a file; a file that is not there has none.

    Raises:
        UserError: a line of it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: dict[str, dict] = {}
        for number, line in read_lines(self.path) if self.path.exists() else ():
            if not line:  # all that is committed before anything is forgotten: DVC warns of an empty file
                continue
            try:
                record = json.loads(line)
                known = self._lines.setdefault(record["id"], record)
                known["contents"] = sorted({*known["contents"], *record["contents"]})
            except (ValueError, TypeError, KeyError):
                raise UserError(f"line {number} of {self.path} is damaged: `git checkout {self.path}`") from None
        self._contents = {content for record in self._lines.values() for content in record["contents"]}

    def __len__(self) -> int:
        return len(self._lines)

    def names(self, identity: str) -> bool:
        """Whether a conversation of this id was forgotten."""
        return bool(self._lines) and id_hash(identity) in self._lines

    def cover(self, conversation: dict) -> bool:
        """Whether a conversation was forgotten, under this id or another one with the same messages."""
        if not self._lines:
            return False
        return self.names(conversation["id"]) or content_hash(conversation) in self._contents

    def add(self, versions: Iterable[dict]) -> None:
        """Remember versions of conversations as forgotten. Doing it again changes nothing."""
        today = datetime.now(UTC).date().isoformat()
        for version in versions:
            key = id_hash(version["id"])
            record = self._lines.setdefault(key, {"id": key, "contents": [], "at": today})
            if version["messages"]:
                record["contents"] = sorted({*record["contents"], content_hash(version)})
                self._contents.update(record["contents"])
        with replacing(self.path) as file:
            file.writelines(dump_line(self._lines[key]) for key in sorted(self._lines))


def id_hash(identity: str) -> str:
    """What stands for a conversation's id in a tombstone."""
    return hashlib.sha256(b"conversation\0" + identity.encode("utf-8", "surrogatepass")).hexdigest()


def content_hash(conversation: dict) -> str:
    """What stands for the messages of one version."""
    said = [[message.get("role"), message.get("content")] for message in conversation["messages"]]
    return hashlib.sha256(b"messages\0" + json.dumps(said).encode("ascii")).hexdigest()
