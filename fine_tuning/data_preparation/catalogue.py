"""The conversations of a build as columns of numbers: a row each, over which splits are decided.

What the assignment of splits has to know of a conversation are its facts: about a hundred bytes. Those of a file are
kept, so that only new lines are read; the texts are read again only where they are wanted.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fine_tuning.common.columns import equal_groups, find
from fine_tuning.common.parallel import Map
from fine_tuning.common.results import Memo
from fine_tuning.data_preparation.decontamination import HeldOut
from fine_tuning.data_preparation.selection import (
    TrainOn,
    read_conversation,
    structure_problem,
    texts_of,
    unused_because,
)
from fine_tuning.data_preparation.splits import SPLITS, Fractions, Ledger, deal, fractions_of, salted_hashes

# Why a conversation is in no split; the first two are no reason to tell of.
REASONS = (
    "", "deleted", "malformed", "no_reply", "context_only", "disliked", "not_endorsed", "bridges_splits",
    "overlaps_test", "template", "too_long", "max_train_tokens", "max_sample_tokens", "max_held_out_tokens",
)  # fmt: skip
FACT = np.dtype(
    [(name, np.uint64) for name in ("id", "turn", "draw")]  # salted hashes of the id: the ledger's, order, split
    + [("line", np.uint64, 2)]  # hash of the line
    + [
        (name, np.int64) for name in ("end", "pieces", "characters")
    ]  # where the line ends in its file, its `pieces` too
    + [("date", "S10")]
    + [(name, np.int8) for name in ("problem", "untrained", "unmeasured", "sample", "judged")]  # REASONS, and 0 or 1
)
BATCH = 1024
FACTS = "facts"  # the folder of the memo, and the file of facts in its entries


@dataclass(frozen=True)
class FactSettings:
    """What facts depend on besides the conversation."""

    train_on: TrainOn
    salt: str
    words: int  # decontamination_words

    def read(self, conversations: list[dict]) -> tuple[np.ndarray, list[list[int]]]:
        """Facts of conversations, and of each the pieces that decontamination looks at."""
        hashes = [salted_hashes(salt) for salt in (f"{self.salt}/ledger", f"{self.salt}/order", self.salt)]
        facts, pieces, held_out = np.zeros(len(conversations), FACT), [], HeldOut(self.words)
        for fact, conversation in zip(facts, conversations, strict=True):
            for name, salted_hash in zip(("id", "turn", "draw"), hashes, strict=True):
                fact[name] = salted_hash(conversation["id"])
            fact["date"] = str(conversation.get("started_at") or "").encode("utf-8", "replace")[:10]
            fact["sample"] = conversation.get("source") == "sample"
            fact["judged"] = bool(conversation.get("feedback"))
            problem = "deleted" if conversation.get("deleted") else structure_problem(conversation)
            fact["problem"] = REASONS.index(problem or "")
            if not problem:
                for name, policy in (("unmeasured", "not_disliked"), ("untrained", self.train_on)):
                    fact[name] = REASONS.index(unused_because(conversation, policy) or "")
                fact["characters"] = sum(len(message["content"]) for message in conversation["messages"])
            pieces.append(held_out.pieces_of(texts_of(conversation)) if self.words and not problem else [])
        facts["pieces"] = np.cumsum([len(found) for found in pieces])
        return facts, pieces


class Facts:
    """Facts of conversations, in tables that are in memory or in files, which have one column after the other."""

    def __init__(self, tables: Sequence[np.ndarray | Path]) -> None:
        self._tables = tables
        counts = [len(t) if isinstance(t, np.ndarray) else t.stat().st_size // FACT.itemsize for t in tables]
        self.starts = np.cumsum([0, *counts])  # the first row of each table, and how many there are

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of(self, number: int, name: str) -> np.ndarray:
        """A column of one table."""
        if isinstance(table := self._tables[number], np.ndarray):
            return table[name]
        (kind, before), count = FACT.fields[name][:2], int(self.starts[number + 1] - self.starts[number])
        return np.fromfile(table, kind, count, offset=count * before)

    def column(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """A column, or what it has of some rows; no table is read that has none of them, nor lies between."""
        if rows is None:
            return np.concatenate([np.empty(0, FACT[name]), *(self.of(n, name) for n in range(len(self._tables)))])
        if not len(rows):
            return np.empty(0, FACT[name])
        first, last = self.tables_of(np.array([rows.min(), rows.max()])).tolist()
        return np.concatenate([self.of(n, name) for n in range(first, last + 1)])[rows - self.starts[first]]

    def table(self) -> np.ndarray:
        """All of it, as rows of FACT."""
        found = np.empty(len(self), FACT)
        for name in FACT.names:
            found[name] = self.column(name)
        return found

    def tables_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the table that each of some rows is in."""
        return np.searchsorted(self.starts, rows, "right") - 1


class HeldConversations:
    """Conversations in memory."""

    def __init__(self, conversations: Iterable[dict]) -> None:
        self._held = list(map(read_conversation, conversations))

    def facts(self, settings: FactSettings, run: Map = map) -> Facts:
        """A row of FACT for each."""
        facts, pieces = settings.read(self._held)
        self._pieces = np.array([piece for found in pieces for piece in found], np.uint64)
        self._facts = Facts([facts])
        return self._facts

    def holding(self, pieces: np.ndarray) -> np.ndarray:
        """Whether each has one of these sorted pieces."""
        return _holding([(self._facts.of(0, "pieces"), self._pieces)], pieces)

    def spans(self, rows: np.ndarray) -> list[dict]:
        """What `read_spans` reads some rows of."""
        return [self._held[row] for row in rows.tolist()]


class ConversationFiles:
    """Conversations in files of one JSON object a line, whose facts are kept in a memo."""

    def __init__(self, paths: Iterable[Path], memo: Memo) -> None:
        self.paths, self._memo = [path.resolve() for path in paths], memo

    def facts(self, settings: FactSettings, run: Map = map) -> Facts:
        """A row of FACT for each line, in order."""
        make = partial(_make_facts, memo=self._memo, settings=settings)
        self.hashes = self._memo.hashes(self.paths)
        files = list(zip(self.paths, self.hashes, strict=True))
        deque(run(make, [file for file in files if _key(file, settings) not in self._memo]), 0)
        self._folders = list(map(make, files))
        self._memo.remove_unused()
        self._facts = Facts([folder / FACTS for folder in self._folders])
        return self._facts

    def holding(self, pieces: np.ndarray) -> np.ndarray:
        """Whether each has one of these sorted pieces."""
        files = (np.fromfile(folder / "pieces", np.uint64) for folder in self._folders)
        return _holding(((self._facts.of(n, "pieces"), own) for n, own in enumerate(files)), pieces)

    def spans(self, rows: np.ndarray) -> list[tuple[Path, int, int]]:
        """What `read_spans` reads some rows of: file, start and end of each line."""
        tables = self._facts.tables_of(rows)
        first = rows == self._facts.starts[tables]
        starts = np.where(first, 0, self._facts.column("end", rows - ~first))
        paths = [self.paths[number] for number in tables.tolist()]
        return list(zip(paths, starts.tolist(), self._facts.column("end", rows).tolist(), strict=True))


Conversations = HeldConversations | ConversationFiles
Span = dict | tuple[Path, int, int]


def read_spans(spans: Iterable[Span]) -> Iterator[dict]:
    """The conversations of some rows, here or on another machine."""
    with ExitStack() as stack:
        opened = lru_cache(64)(lambda path: stack.enter_context(open(path, "rb")))
        for span in spans:
            if isinstance(span, dict):
                yield span
            else:
                path, start, end = span
                opened(path).seek(start)
                yield read_conversation(orjson.loads(opened(path).read(end - start)))


def _holding(tables: Iterable[tuple[np.ndarray, np.ndarray]], wanted: np.ndarray) -> np.ndarray:
    """Whether the rows of tables have one of these sorted pieces: (where the pieces of each row end, pieces)."""
    # A table of the first bits first, which fits into the processor's cache.
    some, holding = np.zeros(1 << 20, bool), [np.zeros(0, bool)]
    some[wanted >> np.uint64(44)] = True
    for ends, own in tables:
        found = np.flatnonzero(some[own >> np.uint64(44)])
        found = found[find(wanted, own[found]) >= 0]
        holding.append(np.zeros(len(ends), bool))
        holding[-1][np.searchsorted(ends, found, "right")] = True
    return np.concatenate(holding)


class LineIndex:
    """Finds hashes of 128 bits, (rows, 2), again."""

    def __init__(self, lines: np.ndarray) -> None:
        first = np.ascontiguousarray(lines[:, 0])
        self._order = np.argsort(first, kind="stable").astype(np.int32)
        self._first, self._second = first[self._order], lines[self._order, 1]

    def find(self, lines: np.ndarray) -> np.ndarray:
        """The row of each; -1 for one that is not among them."""
        rows = find(self._first, np.ascontiguousarray(lines[:, 0]))
        known = np.flatnonzero(rows >= 0)
        same = self._second[rows[known]] == lines[known, 1]
        rows[known] = np.where(same, self._order[rows[known]], -1)
        return rows


def _key(file: tuple[Path, str], settings: FactSettings) -> list[Any]:
    return [file[0].name, *astuple(settings), file[1]]


def _make_facts(file: tuple[Path, str], memo: Memo, settings: FactSettings) -> Path:
    """The folder with the facts of a file, (path, SHA-256); those of lines that it had before are copied."""

    def make(folder: Path, earlier: Path | None) -> int:
        known = Facts([earlier / FACTS] if earlier else []).table()
        pieces = np.fromfile(earlier / "pieces", np.uint64) if earlier else np.empty(0, np.uint64)
        index, begins = LineIndex(known["line"]), np.concatenate([[0], known["pieces"]])
        tables, end, held = [np.empty(0, FACT)], 0, 0
        with open(file[0], "rb") as read_from, open(folder / "pieces", "wb") as file_of_pieces:
            while lines := list(islice(read_from, BATCH)):
                digests = b"".join(blake2b(line, digest_size=16).digest() for line in lines)
                hashes = np.frombuffer(digests, np.uint64).reshape(-1, 2)
                rows, counts, places = np.zeros(len(lines), FACT), np.zeros(len(lines), int), index.find(hashes)
                old, new = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
                first, read = places[old], settings.read([read_conversation(orjson.loads(lines[row])) for row in new])
                rows[old], rows[new] = known[first], read[0]
                counts[old], counts[new] = begins[first + 1] - begins[first], list(map(len, read[1]))
                own, copied = np.empty(counts.sum(), np.uint64), np.repeat(places >= 0, counts)
                shifts = np.repeat(begins[first] - np.cumsum(counts[old]) + counts[old], counts[old])
                own[copied] = pieces[shifts + np.arange(len(shifts))]
                own[~copied] = np.fromiter(chain.from_iterable(read[1]), np.uint64)
                rows["line"], rows["end"] = hashes, end + np.cumsum(list(map(len, lines)))
                rows["pieces"] = held + np.cumsum(counts)
                end, held = int(rows["end"][-1]), int(rows["pieces"][-1])
                tables.append(rows)
                file_of_pieces.write(own)
        table = np.concatenate(tables)
        with open(folder / FACTS, "wb") as facts:
            facts.writelines(np.ascontiguousarray(table[name]) for name in FACT.names)
        return len(table)

    key = _key(file, settings)
    return memo.files(key, make, key[:-1], key[-1:])[0]


def lines_of(folders: Iterable[Path]) -> np.ndarray:
    """(n, 2) hashes of the lines that folders of the memo have facts of."""
    return Facts([folder / FACTS for folder in folders]).column("line")


class Catalogue:
    """Which conversation is in which split, and why others are in none.

    Args:
        facts: of all versions of all conversations; the newest version of an id is the one that comes last.
        clusters: (conversation id, cluster id) of those that do not stand alone.
        ledger: the splits of earlier builds.
        dropped_duplicates: (id of a duplicate that was dropped, id of the conversation that stays for it), which
            inherits the other's split.
    """

    def __init__(
        self, facts: Facts, clusters: Iterable[tuple[str, str]], ledger: Ledger, fractions: Fractions, salt: str,
        dropped_duplicates: Iterable[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        self.facts, keys, self.sample = facts, facts.column("id"), facts.column("sample")
        named, names = _hashed(clusters, ledger)
        dropped, kept = _hashed(dropped_duplicates, ledger)
        passed_on = ledger.splits_of(dropped)
        inherits = (passed_on >= 0) & (passed_on < len(SPLITS))
        self._heirs, places = np.unique(ledger.keys(kept)[inherits], return_inverse=True)
        self._inherited = np.full(len(self._heirs), -1, np.int8)
        np.maximum.at(self._inherited, places, passed_on[inherits])  # of several the one that is held out

        newest = np.ones(len(facts), bool)
        versions, starts, sizes = equal_groups(keys)
        newest[versions] = False
        newest[versions[starts + sizes - 1]] = True
        self.split = np.where(newest, ledger.splits_of(keys), np.int8(-1))
        self._new = self.split < 0  # to the ledger
        places = find(self._heirs, keys)
        heirs = np.flatnonzero(newest & self._new & (places >= 0))
        self.split[heirs] = self._inherited[places[heirs]]
        self.reason = np.where(newest, facts.column("problem"), np.int8(_DELETED))

        members = np.flatnonzero(self.reason == 0).astype(np.int32)
        self.cluster, draws = keys, facts.column("draw")  # 64 bits of its id's hash
        order = np.argsort(named)
        places = find(named[order], keys)
        self._joined = np.flatnonzero(places >= 0).astype(np.int32)
        self._names = names[order[places[self._joined]]]
        self.cluster[self._joined] = ledger.keys(self._names)
        draws[self._joined] = np.fromiter(map(salted_hashes(salt), self._names), np.uint64)
        number = np.arange(len(members), dtype=np.int32)  # of a conversation's cluster: its first member
        several, starts, sizes = equal_groups(self.cluster[members])
        number[several] = np.repeat(several[starts], sizes)
        earlier = self.split[members]
        known, fresh, late = np.zeros((len(number), 3), bool), np.zeros(len(number), bool), np.ones(len(number), bool)
        dealt = (earlier >= 0) & (earlier < len(SPLITS))
        known[number[dealt], earlier[dealt]] = True
        fresh[number[earlier < 0]] = True
        if fractions.latest_from:
            late[number[facts.column("date")[members] < fractions.latest_from.encode()]] = False
        new = deal(fractions_of(draws[members]), late, known, fresh, fractions)
        self.split[members] = np.where(earlier >= 0, earlier, new[number])
        unused = np.where(self.split == 0, facts.column("untrained"), facts.column("unmeasured"))
        bridges = np.int8(REASONS.index("bridges_splits"))
        self.reason[members] = np.where(self.split[members] == len(SPLITS), bridges, unused[members])

    def rows(self, split: str) -> np.ndarray:
        """All rows of a split in ascending `orders`."""
        rows = np.flatnonzero((self.split == SPLITS.index(split)) & (self.reason == 0)).astype(np.int32)
        return rows[np.argsort(self.orders(rows), kind="stable")]

    def orders(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of 63 bits that sort rows: people's own before the sample's, and in the order of a salted hash, so
        that any first n are a fair sample, and stay much the same when data grow."""
        turns = (self.facts.column("turn", rows) >> np.uint64(2)).astype(np.int64)
        return turns | self.sample[rows].astype(np.int64) << 62

    def leave_out(self, rows: np.ndarray, reason: str) -> None:
        """Take rows out of their split."""
        self.reason[rows] = REASONS.index(reason)

    def cluster_names(self, rows: np.ndarray) -> np.ndarray:
        """The cluster of each of some rows; None: it stands alone."""
        names, places = np.full(len(rows), None), find(self._joined, rows)
        names[places >= 0] = self._names[places[places >= 0]]
        return names

    def left_out_because(self, row: int) -> str:
        """Why a conversation is in no split; "" for one that is in one, or deleted."""
        return REASONS[self.reason[row]] if self.reason[row] != _DELETED else ""

    def count(self, split: str) -> int:
        """Conversations that are in a split."""
        return int(((self.split == SPLITS.index(split)) & (self.reason == 0)).sum())

    @cached_property
    def all_characters(self) -> int:
        """Of messages of every conversation of sound structure."""
        return int(self.facts.column("characters")[self.reason != _DELETED].sum())

    def characters(self) -> dict[str, int]:
        """Of messages of conversations that are in no split, by reason."""
        sums = np.bincount(self.reason, self.facts.column("characters"), len(REASONS))
        return {reason: int(sums[REASONS.index(reason)]) for reason in self.count_left_out()}

    def count_left_out(self) -> Counter[str]:
        """How many conversations are in no split, by reason."""
        counts = zip(REASONS, np.bincount(self.reason, minlength=len(REASONS)).tolist(), strict=True)
        return Counter(
            {reason: count for reason, count in sorted(counts) if count and REASONS.index(reason) > _DELETED}
        )

    def remember(self, ledger: Ledger) -> int:
        """Append every deal to the ledger, those of heirs that are in no file too; returns how many are new."""
        dealt = (self.split >= 0) & self._new
        keys = np.concatenate([self.facts.column("id")[dealt], self._heirs])
        return ledger.append_keys(keys, np.concatenate([self.split[dealt], self._inherited]))


_DELETED = REASONS.index("deleted")


def _hashed(pairs: Iterable[tuple[str, str]], ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the first id of each pair, the second ids)."""
    pairs = list(pairs)
    return ledger.keys(first for first, _ in pairs), np.array([second for _, second in pairs], object)
