"""The conversations of a build, each a few rows that a scratch file takes over: memory does not grow with their number.

A first look at every conversation notes where it stands and whether it can be used; the texts are read again only
where they are wanted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, Protocol

import orjson

from fine_tuning.common.records import line_ranges
from fine_tuning.data_preparation.selection import TrainOn, read_conversation, structure_problem, unused_because
from fine_tuning.data_preparation.sorted_rows import SortedRows
from fine_tuning.data_preparation.splits import LEFT_OUT, SPLITS, Deal, Fractions, salted_fractions

PART_BYTES = 16 << 20
_LOOK, _CLUSTER, _SPLIT, _TWIN, _HANDED_DOWN = range(5)  # what is told of a conversation
_FIRST = itemgetter(0)

# id, part, place, date, is of the sample, problem, why it is not trained on, why it is not held out, characters
Look = tuple[str, int, int, str, bool, str | None, str | None, str | None, int]


class DealtRow(NamedTuple):
    """A conversation that was dealt to a split: its turn in it, where it stands, its cluster and how long it is."""

    sample: bool
    turn: float
    id: str
    part: int
    place: int
    cluster: str
    characters: int


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
        self.parts = [(path.resolve(), *ends) for path in paths for ends in line_ranges(path, part_bytes)]

    def conversations(self) -> Iterator[dict]:
        """All of them, in order."""
        for path in dict.fromkeys(path for path, *_ in self.parts):
            with open(path, "rb") as file:
                yield from (read_conversation(orjson.loads(line)) for line in file)

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


def look_at(conversation: dict, part: int, place: int, train_on: TrainOn) -> Look:
    """What is to be known of a conversation before any is dealt."""
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
        self._told = self._rows(_FIRST)  # (id, what is told, and that)
        self._dealt = self._rows()  # (id, split)
        self._splits = defaultdict(self._rows)  # split → what makes a `DealtRow`
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

    def note(self, looks: Iterable[Look]) -> None:
        """Take conversations in; the newest version of an id is the one that came last."""
        for look in looks:
            self._told.add((look[0], _LOOK, look))

    def deal(
        self,
        clusters: Iterable[tuple[str, str]],
        dealt: Iterable[tuple[str, str]],
        fractions: Fractions,
        salt: str,
        twins: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Give every usable conversation a split and its turn in it.

        Args:
            clusters: (conversation id, cluster id); who is not named stands alone.
            dealt: (conversation id, split) of earlier builds.
            twins: (id of a duplicate that was dropped, id of the conversation that stays for it).
        """
        for identity, cluster in clusters:
            self._told.add((identity, _CLUSTER, cluster))
        for identity, split in dealt:
            self._told.add((identity, _SPLIT, split))
        self._hand_down(twins)
        members = self._members()
        deal, joined = Deal(fractions, salt), self._rows()  # (cluster, split of its newcomers)
        for cluster, rows in groupby(members, _FIRST):
            dates, splits = set(), set()
            for _, split, look in rows:
                dates.add(look[3])
                splits.add(split)
            joined.add((cluster, deal.newcomers(cluster, min(dates), splits)))
        moved = deal.moved()
        # The order of the salted hash: any first n are a fair sample, and stay much the same when data grow.
        turn = salted_fractions(f"{salt}/order")
        for (cluster, split), (_, rows) in zip(joined, groupby(members, _FIRST), strict=True):
            for _, earlier, look in rows:
                self._put(look, cluster, earlier or moved.get(cluster, split), turn)

    def _hand_down(self, twins: Iterable[tuple[str, str]]) -> None:
        """A dropped duplicate's split is that of what stays for it, and was said under its id: held out stays so."""
        any_twin = False
        for dropped, kept in twins:
            self._told.add((dropped, _TWIN, kept))
            any_twin = True
        if not any_twin:
            return
        handed_down = self._rows()
        for _, told in groupby(self._told, _FIRST):
            newest = {what: value for _, what, value in told}
            if newest.get(_TWIN) is not None and newest.get(_SPLIT, LEFT_OUT) != LEFT_OUT:
                handed_down.add((newest[_TWIN], SPLITS.index(newest[_SPLIT])))
        for kept, rank in handed_down:  # of several the last, which is held out if any is
            self._told.add((kept, _HANDED_DOWN, SPLITS[rank]))

    def _members(self) -> SortedRows:
        """(cluster, earlier split, look) of the conversations that can be used, by cluster; others are left out."""
        members = self._rows(_FIRST)
        for identity, told in groupby(self._told, _FIRST):
            newest: list[Any] = [None] * 5
            for _, what, value in told:
                newest[what] = value
            look, cluster, split, _, handed_down = newest
            split = split or handed_down
            problem = look[5] if look else "deleted"
            if problem is None:
                self.all_characters += look[8]
                members.add((identity if cluster is None else cluster, split, look))
                continue
            if problem != "deleted":
                self._leave_out(identity, problem, 0)
            if split:
                self._dealt.add((identity, split))
        return members

    def _put(self, look: Look, cluster: str, split: str, turn: Callable[[str], float]) -> None:
        identity, part, place, _, sample, _, untrained, unmeasured, characters = look
        self._dealt.add((identity, split))
        if split == LEFT_OUT:
            self._leave_out(identity, "bridges_splits", characters)
        elif unused := untrained if split == "train" else unmeasured:
            self._leave_out(identity, unused, characters)
        else:
            self._splits[split].add((sample, turn(identity), identity, part, place, cluster, characters))
            self._sizes[split] += 1

    def rows(self, split: str) -> Iterator[DealtRow]:
        """All that were dealt to a split, in their turn, people's own before the sample's."""
        return map(DealtRow._make, self._splits[split])

    def places(self, split: str) -> Iterator[tuple[int, list[tuple[int, str]]]]:
        """(part, [(place, id)]) of all that were dealt to a split, as they stand."""
        standing = self._rows()
        for _, _, identity, part, place, *_ in self._splits[split]:
            standing.add((part, place, identity))
        for part, rows in groupby(standing, _FIRST):
            yield part, [(place, identity) for _, place, identity in rows]

    def leave_out(self, rows: Iterable[DealtRow], split: str, reason: str) -> None:
        """Count conversations that were dealt to a split as out of it; `rows` has them still."""
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

    def dealt(self) -> Iterator[tuple[str, str]]:
        """(id, split) of every deal, earlier ones too, in order of id."""
        return iter(self._dealt)
