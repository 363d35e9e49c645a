"""The conversations of a build as rows in a scratch file, so that memory does not grow with their number.

A first scan of every conversation notes where it stands and whether it can be used; the texts are read again only
where they are wanted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, NamedTuple

import orjson

from fine_tuning.common.records import line_ranges
from fine_tuning.data_preparation.selection import TrainOn, read_conversation, structure_problem, unused_because
from fine_tuning.data_preparation.sorted_rows import SortedRows
from fine_tuning.data_preparation.splits import LEFT_OUT, SPLITS, Fractions, SplitAssignment, salted_fractions

PART_BYTES = 16 << 20
NO_FEEDBACK = b'"feedback":[]'  # in the line of a conversation that has none; within a text quotes are escaped
_SCAN, _CLUSTER, _SPLIT, _DUPLICATE_OF, _INHERITED = range(5)  # the facts about a conversation
_FIRST = itemgetter(0)

# id, part, place, date, is of the sample, problem, why it is not trained on, why it is not held out, characters
Scan = tuple[str, int, int, str, bool, str | None, str | None, str | None, int]


class AssignedRow(NamedTuple):
    """A conversation that was assigned to a split: its turn in it, where it stands, its cluster and how long it is."""

    sample: bool
    turn: float
    id: str
    part: int
    place: int
    cluster: str
    characters: int


class HeldConversations:
    """Conversations in memory; they are one part."""

    parts = (None,)

    def __init__(self, conversations: Iterable[dict]) -> None:
        self._held = list(map(read_conversation, conversations))

    def scan(self, part: int, train_on: TrainOn) -> list[Scan]:
        """Scan every conversation of a part."""
        return [scan_conversation(conversation, part, place, train_on) for place, conversation in enumerate(self._held)]

    def read(self, part: int, places: Iterable[int]) -> Iterator[dict]:
        """The conversations at these places of a part."""
        return map(self._held.__getitem__, places)


class ConversationFiles:
    """Conversations in files of one JSON object a line; a part is a stretch of a file, a place the offset of a line."""

    def __init__(self, paths: Iterable[Path], part_bytes: int = PART_BYTES) -> None:
        self.parts = [(path.resolve(), *ends) for path in paths for ends in line_ranges(path, part_bytes)]

    def judged(self) -> Iterator[dict]:
        """Those with feedback, in order."""
        for path in dict.fromkeys(path for path, *_ in self.parts):
            with open(path, "rb") as file:
                yield from (read_conversation(orjson.loads(line)) for line in file if NO_FEEDBACK not in line)

    def scan(self, part: int, train_on: TrainOn) -> list[Scan]:
        """Scan every conversation of a part."""
        path, place, end = self.parts[part]
        scans = []
        with open(path, "rb") as file:
            file.seek(place)
            while place < end:
                line = file.readline()
                scans.append(scan_conversation(read_conversation(orjson.loads(line)), part, place, train_on))
                place += len(line)
        return scans

    def read(self, part: int, places: Iterable[int]) -> Iterator[dict]:
        """The conversations at these places of a part."""
        return (read_conversation(orjson.loads(line)) for line in self.lines(part, places))

    def lines(self, part: int, places: Iterable[int]) -> Iterator[bytes]:
        """Their lines as they are."""
        file = self._opened(self.parts[part][0])
        for place in places:
            file.seek(place)
            yield file.readline()

    @cached_property
    def _opened(self) -> Callable[[Path], BinaryIO]:
        """Opens a file; the last ones stay open, because conversations are wanted in any order."""
        return lru_cache(64)(partial(open, mode="rb", buffering=4096))


Conversations = HeldConversations | ConversationFiles


def scan_conversation(conversation: dict, part: int, place: int, train_on: TrainOn) -> Scan:
    """What the assignment of splits needs to know of a conversation."""
    problem = "deleted" if conversation.get("deleted") else structure_problem(conversation)
    sound = problem is None
    held_out = unused_because(conversation, "not_disliked") if sound else None
    return (
        conversation["id"],
        part,
        place,
        str(conversation.get("started_at") or "")[:10],
        conversation.get("source") == "sample",
        problem,
        held_out if train_on == "not_disliked" or not sound else unused_because(conversation, train_on),
        held_out,
        sum(len(message["content"]) for message in conversation["messages"]) if sound else 0,
    )


class Catalogue:
    """Which conversation is in which split, and why others are in none. Use as a context manager."""

    def __init__(self) -> None:
        self._scratch = SpooledTemporaryFile(max_size=1)  # noqa: SIM115 (no file until something is written)
        self._facts = self._rows(_FIRST)  # (id, which fact, its value)
        self._assigned = self._rows()  # (id, split)
        self._splits = defaultdict(self._rows)  # split → what makes an `AssignedRow`
        self._sizes: Counter[str] = Counter()
        self._left_out = self._rows()  # (id, reason)
        self._reasons: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()  # of messages: reason → of conversations that are in no split
        self.all_characters = 0  # of every conversation of sound structure

    def _rows(self, key: Callable[[tuple], Any] | None = None) -> SortedRows:
        return SortedRows(self._scratch, key)

    def __enter__(self) -> "Catalogue":
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def note(self, scans: Iterable[Scan]) -> None:
        """Take conversations in; the newest version of an id is the one that came last."""
        for scan in scans:
            self._facts.add((scan[0], _SCAN, scan))

    def assign(
        self,
        clusters: Iterable[tuple[str, str]],
        assigned: Iterable[tuple[str, str]],
        fractions: Fractions,
        salt: str,
        dropped_duplicates: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Give every usable conversation a split and its turn in it.

        Args:
            clusters: (conversation id, cluster id); who is not named stands alone.
            assigned: (conversation id, split) of earlier builds.
            dropped_duplicates: (id of a duplicate that was dropped, id of the conversation that stays for it).
        """
        for identity, cluster in clusters:
            self._facts.add((identity, _CLUSTER, cluster))
        for identity, split in assigned:
            self._facts.add((identity, _SPLIT, split))
        self._inherit(dropped_duplicates)
        members = self._members()
        assignment, joined = SplitAssignment(fractions, salt), self._rows()  # (cluster, split of its newcomers)
        for cluster, rows in groupby(members, _FIRST):
            dates, splits = set(), set()
            for _, split, scan in rows:
                dates.add(scan[3])
                splits.add(split)
            joined.add((cluster, assignment.newcomers(cluster, min(dates), splits)))
        moved = assignment.moved()
        # The order of the salted hash: any first n are a fair sample, and stay much the same when data grow.
        turn = salted_fractions(f"{salt}/order")
        for (cluster, split), (_, rows) in zip(joined, groupby(members, _FIRST), strict=True):
            for _, earlier, scan in rows:
                self._put(scan, cluster, earlier or moved.get(cluster, split), turn)

    def _inherit(self, dropped_duplicates: Iterable[tuple[str, str]]) -> None:
        """Pass the earlier split of a dropped duplicate on to the conversation that stays for it."""
        any_dropped = False
        for dropped, kept in dropped_duplicates:
            self._facts.add((dropped, _DUPLICATE_OF, kept))
            any_dropped = True
        if not any_dropped:
            return
        inherited = self._rows()
        for _, facts in groupby(self._facts, _FIRST):
            newest = {what: value for _, what, value in facts}
            if newest.get(_DUPLICATE_OF) is not None and newest.get(_SPLIT, LEFT_OUT) != LEFT_OUT:
                inherited.add((newest[_DUPLICATE_OF], SPLITS.index(newest[_SPLIT])))
        for kept, rank in inherited:  # of several the last, which is held out if any is
            self._facts.add((kept, _INHERITED, SPLITS[rank]))

    def _members(self) -> SortedRows:
        """(cluster, earlier split, scan) of the conversations that can be used, by cluster; others are left out."""
        members = self._rows(_FIRST)
        for identity, facts in groupby(self._facts, _FIRST):
            newest: list[Any] = [None] * 5
            for _, what, value in facts:
                newest[what] = value
            scan, cluster, split, _, inherited = newest
            split = split or inherited
            problem = scan[5] if scan else "deleted"
            if problem is None:
                self.all_characters += scan[8]
                members.add((identity if cluster is None else cluster, split, scan))
                continue
            if problem != "deleted":
                self._leave_out(identity, problem, 0)
            if split:
                self._assigned.add((identity, split))
        return members

    def _put(self, scan: Scan, cluster: str, split: str, turn: Callable[[str], float]) -> None:
        identity, part, place, _, sample, _, untrained, unmeasured, characters = scan
        self._assigned.add((identity, split))
        if split == LEFT_OUT:
            self._leave_out(identity, "bridges_splits", characters)
        elif unused := untrained if split == "train" else unmeasured:
            self._leave_out(identity, unused, characters)
        else:
            self._splits[split].add((sample, turn(identity), identity, part, place, cluster, characters))
            self._sizes[split] += 1

    def rows(self, split: str) -> Iterator[AssignedRow]:
        """All that were assigned to a split, in their turn, people's own before the sample's."""
        return map(AssignedRow._make, self._splits[split])

    def places(self, split: str) -> Iterator[tuple[int, list[tuple[int, str]]]]:
        """(part, [(place, id)]) of all that were assigned to a split, as they stand."""
        standing = self._rows()
        for _, _, identity, part, place, *_ in self._splits[split]:
            standing.add((part, place, identity))
        for part, rows in groupby(standing, _FIRST):
            yield part, [(place, identity) for _, place, identity in rows]

    def leave_out(self, rows: Iterable[AssignedRow], split: str, reason: str) -> None:
        """Count conversations as left out of their split; `rows` still yields them."""
        for row in rows:
            self._leave_out(row.id, reason, row.characters)
            self._sizes[split] -= 1

    def _leave_out(self, identity: str, reason: str, characters: int) -> None:
        self._left_out.add((identity, reason))
        self._reasons[reason] += 1
        self.characters[reason] += characters

    def count(self, split: str) -> int:
        """Conversations that are in a split."""
        return self._sizes[split]

    def left_out(self) -> dict[str, str]:
        """Conversation id → why it is in no split."""
        return dict(self._left_out)

    def count_left_out(self) -> Counter[str]:
        """How many conversations are in no split, by reason."""
        return Counter(dict(sorted(self._reasons.items())))

    def assigned(self) -> Iterator[tuple[str, str]]:
        """(id, split) of every deal, earlier ones too, in order of id."""
        return iter(self._assigned)
