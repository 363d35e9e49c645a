"""The conversations of a build, each a row of a scratch database: memory does not grow with their number.

A first look at every conversation notes where it stands and whether it can be used; the texts are read again only
where they are wanted.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import orjson

from fine_tuning.data_preparation.selection import TrainOn, read_conversation, selects, structure_problem
from fine_tuning.data_preparation.splits import LEFT_OUT, Deal, Fractions, salted_fraction

PART_BYTES = 16 << 20

# id, part, place, date, is of the sample, problem, may be trained on, may be held out
Look = tuple[str, int, int, str, bool, str | None, bool, bool]


class Row(NamedTuple):
    """A conversation that is in a split: where it stands, and its cluster."""

    id: str
    part: int
    place: int
    cluster: str


class Conversations(Protocol):
    """Conversations in parts that can be looked through one by one, wherever they are."""

    parts: Sequence[object]

    def look(self, part: int, train_on: TrainOn) -> list[Look]:
        """What is to be known of every conversation of a part."""

    def read(self, part: int, places: Iterable[int]) -> Iterator[dict]:
        """The conversations at these places of a part."""


class HeldConversations:
    """Conversations that are in memory."""

    parts = (None,)

    def __init__(self, conversations: Iterable[dict]) -> None:
        self._held = list(map(read_conversation, conversations))

    def look(self, part: int, train_on: TrainOn) -> list[Look]:
        """See `Conversations`."""
        return [look_at(conversation, part, place, train_on) for place, conversation in enumerate(self._held)]

    def read(self, part: int, places: Iterable[int]) -> Iterator[dict]:
        """See `Conversations`."""
        return map(self._held.__getitem__, places)


class ConversationFiles:
    """Conversations in files of one JSON object a line; a part is a stretch of a file, a place the offset of a line."""

    def __init__(self, paths: Iterable[Path], part_bytes: int = PART_BYTES) -> None:
        self.parts = [(path.resolve(), *ends) for path in paths for ends in _stretches(path, part_bytes)]

    def look(self, part: int, train_on: TrainOn) -> list[Look]:
        """See `Conversations`."""
        path, place, end = self.parts[part]
        looks = []
        with open(path, "rb") as file:
            file.seek(place)
            while place < end:
                line = file.readline()
                looks.append(look_at(read_conversation(orjson.loads(line)), part, place, train_on))
                place += len(line)
        return looks

    def read(self, part: int, places: Iterable[int]) -> Iterator[dict]:
        """See `Conversations`."""
        with open(self.parts[part][0], "rb") as file:
            for place in places:
                file.seek(place)
                yield read_conversation(orjson.loads(file.readline()))


def _stretches(path: Path, size: int) -> Iterator[tuple[int, int]]:
    start, total = 0, path.stat().st_size
    with open(path, "rb") as file:
        while start < total:
            file.seek(min(start + size, total) - 1)
            file.readline()
            yield start, file.tell()
            start = file.tell()


def look_at(conversation: dict, part: int, place: int, train_on: TrainOn) -> Look:
    """What is to be known of a conversation before any is dealt."""
    problem = "deleted" if conversation.get("deleted") else structure_problem(conversation)
    sound = problem is None
    return (
        conversation["id"],
        part,
        place,
        str(conversation.get("started_at") or "")[:10],
        conversation.get("source") == "sample",
        problem,
        sound and selects(conversation, train_on),
        sound and selects(conversation, "not_disliked"),
    )


class Catalogue:
    """Which conversation is in which split, and why others are in none. Use as a context manager."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # a file of its own that vanishes with it
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-16384", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        for table in (
            "look (id TEXT PRIMARY KEY, part INTEGER, place INTEGER, date TEXT, sample INTEGER, out TEXT, "
            "trainable INTEGER, holdable INTEGER) WITHOUT ROWID",
            "cluster (id TEXT PRIMARY KEY, cluster TEXT) WITHOUT ROWID",
            "ledger (id TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID",
            "joined (cluster TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID",
            "member (id TEXT PRIMARY KEY, part INTEGER, place INTEGER, cluster TEXT, split TEXT, sample INTEGER, "
            "turn REAL, out TEXT) WITHOUT ROWID",
        ):
            self._database.execute(f"CREATE TABLE {table}")
        self._database.execute("BEGIN")

    def __enter__(self) -> "Catalogue":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def note(self, looks: Iterable[Look]) -> None:
        """Take conversations in; the newest version of an id is the one that came last."""
        self._database.executemany("INSERT OR REPLACE INTO look VALUES (?, ?, ?, ?, ?, ?, ?, ?)", looks)

    def deal(
        self,
        clusters: Iterable[tuple[str, str]],
        dealt: Iterable[tuple[str, str]],
        fractions: Fractions,
        salt: str,
    ) -> None:
        """Give every usable conversation a split and its turn in it.

        Args:
            clusters: (conversation id, cluster id); who is not named stands alone.
            dealt: (conversation id, split) of earlier builds.
        """
        database, deal = self._database, Deal(fractions, salt)
        database.executemany("INSERT OR REPLACE INTO cluster VALUES (?, ?)", clusters)
        database.executemany("INSERT OR REPLACE INTO ledger VALUES (?, ?)", dealt)
        together = (
            "FROM look LEFT JOIN cluster USING (id) LEFT JOIN ledger USING (id) WHERE look.out IS NULL GROUP BY name"
        )
        found = database.execute(
            "SELECT coalesce(cluster, look.id) AS name, min(date), max(split IS NULL), "
            f"coalesce(group_concat(DISTINCT split), '') {together}"
        )
        database.executemany(
            "INSERT INTO joined VALUES (?, ?)",
            (
                (name, deal.newcomers(name, date, {*splits.split(",")} - {""} | ({None} if new else set())))
                for name, date, new, splits in found
            ),
        )
        database.executemany("UPDATE joined SET split = ?2 WHERE cluster = ?1", deal.moved().items())
        # The order of the salted hash: any first n are a fair sample, and stay much the same when data grow.
        database.create_function("turn", 1, lambda identity: salted_fraction(f"{salt}/order", identity))
        database.execute(
            "INSERT INTO member SELECT id, part, place, name, split, sample, turn(id), CASE "
            f"WHEN split = '{LEFT_OUT}' THEN 'bridges_splits' "
            "WHEN NOT CASE split WHEN 'train' THEN trainable ELSE holdable END THEN 'not_endorsed' END FROM "
            "(SELECT look.*, joined.cluster AS name, coalesce(ledger.split, joined.split) AS split FROM look "
            "LEFT JOIN cluster USING (id) LEFT JOIN ledger USING (id) "
            "JOIN joined ON joined.cluster = coalesce(cluster.cluster, look.id) WHERE look.out IS NULL)"
        )
        database.execute("CREATE INDEX in_turn ON member (split, sample, turn, id) WHERE out IS NULL")

    def rows(self, split: str) -> Iterator[Row]:
        """The conversations of a split in their turn, people's own before the sample's."""
        return map(
            Row._make,
            self._database.execute(
                "SELECT id, part, place, cluster FROM member WHERE split = ? AND out IS NULL ORDER BY sample, turn, id",
                (split,),
            ),
        )

    def places(self, split: str) -> Iterator[tuple[int, list[tuple[str, int]]]]:
        """(part, [(id, place)]) of the conversations of a split, as they stand."""
        for (part,) in self._database.execute("SELECT DISTINCT part FROM look ORDER BY part").fetchall():
            yield (
                part,
                self._database.execute(
                    "SELECT id, place FROM member WHERE part = ? AND split = ? AND out IS NULL ORDER BY place",
                    (part, split),
                ).fetchall(),
            )

    def leave_out(self, identities: Iterable[str], reason: str) -> None:
        """Take conversations out of their split."""
        self._database.executemany("UPDATE member SET out = ?2 WHERE id = ?1", ((i, reason) for i in identities))

    def leave_out_from(self, row: Row, split: str, reason: str) -> None:
        """Take a conversation, and all whose turn comes after its, out of their split."""
        self._database.execute(
            "UPDATE member SET out = ? WHERE split = ? AND out IS NULL AND "
            "(sample, turn, id) >= (SELECT sample, turn, id FROM member WHERE id = ?)",
            (reason, split, row.id),
        )

    def count(self, split: str) -> int:
        """Conversations that are in a split."""
        (count,) = self._database.execute(
            "SELECT count(*) FROM member WHERE split = ? AND out IS NULL", (split,)
        ).fetchone()
        return count

    def left_out(self) -> dict[str, str]:
        """Conversation id → why it is in no split."""
        return dict(self._database.execute(f"SELECT id, out FROM {_LEFT_OUT}"))

    def count_left_out(self) -> Counter[str]:
        """How many conversations are in no split, by reason."""
        return Counter(dict(self._database.execute(f"SELECT out, count(*) FROM {_LEFT_OUT} GROUP BY out")))

    def dealt(self) -> Iterator[tuple[str, str]]:
        """(id, split) of every deal, earlier ones too, in order of id."""
        return self._database.execute("SELECT id, split FROM ledger UNION SELECT id, split FROM member ORDER BY id")


_LEFT_OUT = (
    "(SELECT id, out FROM look WHERE out IS NOT NULL AND out != 'deleted' "
    "UNION ALL SELECT id, out FROM member WHERE out IS NOT NULL)"
)
