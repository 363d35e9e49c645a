"""The conversations of a build as columns of numbers: a row each, over which splits are decided.

What the assignment of splits has to know of a conversation are its facts: about a hundred bytes. Those of a file are
kept, so that only new lines are read; the texts are read again only where they are wanted.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

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
from fine_tuning.data_preparation.splits import SPLITS, Fractions, Ledger, deal, fractions_of, salted_hashes, search

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


class HeldConversations:
    """Conversations in memory."""

    def __init__(self, conversations: Iterable[dict]) -> None:
        self._held = list(map(read_conversation, conversations))

    def facts(self, settings: FactSettings, run: Map = map) -> np.ndarray:
        """A row of FACT for each."""
        facts, pieces = settings.read(self._held)
        self._pieces = np.array([piece for found in pieces for piece in found], np.uint64)
        return facts

    def holding(self, facts: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Whether each has one of these sorted pieces."""
        return _holding(facts, self._pieces, pieces)

    def spans(self, rows: np.ndarray) -> list[dict]:
        """What `read_spans` reads some rows of."""
        return [self._held[row] for row in rows.tolist()]


class ConversationFiles:
    """Conversations in files of one JSON object a line, whose facts are kept in a memo."""

    def __init__(self, paths: Iterable[Path], memo: Memo) -> None:
        self.paths, self._memo = [path.resolve() for path in paths], memo

    def facts(self, settings: FactSettings, run: Map = map) -> np.ndarray:
        """A row of FACT for each line, in order."""
        make = partial(_make_facts, memo=self._memo, settings=settings)
        self.hashes = self._memo.hashes(self.paths)
        files = list(zip(self.paths, self.hashes, strict=True))
        deque(run(make, [file for file in files if _key(file, settings) not in self._memo]), 0)
        self._folders = list(map(make, files))
        self._memo.remove_unused()
        tables = [np.fromfile(folder / FACTS, FACT) for folder in self._folders]
        self._starts = np.cumsum([0, *map(len, tables)])
        facts = np.concatenate([np.empty(0, FACT), *tables])
        self._ends = facts["end"]
        return facts

    def holding(self, facts: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Whether each has one of these sorted pieces."""
        tables = np.split(facts, self._starts[1:-1])
        files = (np.fromfile(folder / "pieces", np.uint64) for folder in self._folders)
        return np.concatenate([_holding(*both, pieces) for both in zip(tables, files, strict=True)])

    def files_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the file that each of some rows is in."""
        return np.searchsorted(self._starts, rows, "right") - 1

    def spans(self, rows: np.ndarray) -> list[tuple[Path, int, int]]:
        """What `read_spans` reads some rows of: file, start and end of each line."""
        numbers = self.files_of(rows)
        starts = np.where(rows > self._starts[numbers], self._ends[rows - 1], 0)
        paths = [self.paths[number] for number in numbers.tolist()]
        return list(zip(paths, starts.tolist(), self._ends[rows].tolist(), strict=True))


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


def _holding(facts: np.ndarray, own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    # A table of the first bits first, which fits into the processor's cache.
    some = np.zeros(1 << 20, bool)
    some[wanted >> np.uint64(44)] = True
    found = np.flatnonzero(some[own >> np.uint64(44)])
    found = found[_find(wanted, own[found]) >= 0]
    holding = np.zeros(len(facts), bool)
    holding[np.searchsorted(facts["pieces"], found, "right")] = True
    return holding


class LineIndex:
    """Finds hashes of 128 bits, (rows, 2), again."""

    def __init__(self, lines: np.ndarray) -> None:
        self._order = np.argsort(lines[:, 0], kind="stable")
        self._ranked = lines[self._order]
        self._first = np.ascontiguousarray(self._ranked[:, 0])

    def find(self, lines: np.ndarray) -> np.ndarray:
        """The row of each; -1 for one that is not among them."""
        if not len(self._ranked):
            return np.full(len(lines), -1)
        places = np.minimum(search(self._first, lines[:, 0]), len(self._ranked) - 1)
        return np.where((self._ranked[places] == lines).all(axis=1), self._order[places], -1)


def _key(file: tuple[Path, str], settings: FactSettings) -> list[Any]:
    return [file[0].name, *astuple(settings), file[1]]


def _make_facts(file: tuple[Path, str], memo: Memo, settings: FactSettings) -> Path:
    """The folder with the facts of a file, (path, SHA-256); those of lines that it had before are copied."""

    def make(folder: Path, earlier: Path | None) -> list[int]:
        known = np.fromfile(earlier / FACTS, FACT) if earlier else np.empty(0, FACT)
        pieces = np.fromfile(earlier / "pieces", np.uint64) if earlier else np.empty(0, np.uint64)
        index, ends = LineIndex(known["line"]), [0, 0]
        with (
            open(file[0], "rb") as read_from,
            open(folder / FACTS, "wb") as facts,
            open(folder / "pieces", "wb") as held,
        ):
            while lines := list(islice(read_from, BATCH)):
                digests = b"".join(blake2b(line, digest_size=16).digest() for line in lines)
                rows, own = np.zeros(len(lines), FACT), [b""] * len(lines)
                rows["line"] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
                places = index.find(rows["line"])
                old, new = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
                read = settings.read([read_conversation(orjson.loads(lines[row])) for row in new])
                line = rows["line"].copy()
                rows[old], rows[new] = known[places[old]], read[0]
                rows["line"] = line
                for row, place in zip(old.tolist(), places[old].tolist(), strict=True):
                    own[row] = pieces[known["pieces"][place - 1] if place else 0 : known["pieces"][place]].tobytes()
                for row, found in zip(new.tolist(), read[1], strict=True):
                    own[row] = np.array(found, np.uint64).tobytes()
                rows["end"] = ends[0] + np.cumsum(list(map(len, lines)))
                rows["pieces"] = ends[1] + np.cumsum([len(one) // 8 for one in own])
                ends = [int(rows["end"][-1]), int(rows["pieces"][-1])]
                facts.write(rows.tobytes())
                held.write(b"".join(own))
        return ends

    key = _key(file, settings)
    return memo.files(key, make, key[:-1], key[-1:])[0]


def lines_of(folders: Iterable[Path]) -> np.ndarray:
    """(n, 2) hashes of the lines that folders of the memo have facts of."""
    return np.concatenate([np.empty((0, 2), np.uint64), *(np.fromfile(f / FACTS, FACT)["line"] for f in folders)])


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
        self, facts: np.ndarray, clusters: Iterable[tuple[str, str]], ledger: Ledger, fractions: Fractions, salt: str,
        dropped_duplicates: Iterable[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        self.facts, keys = facts, facts["id"]
        named = dict(clusters)
        dropped, kept = (ledger.keys(ids) for ids in ([], []))
        if pairs := list(dropped_duplicates):
            dropped, kept = (ledger.keys(ids) for ids in zip(*pairs, strict=True))
        passed_on = ledger.splits_of(dropped)
        inherits = (passed_on >= 0) & (passed_on < len(SPLITS))
        self._heirs, places = np.unique(kept[inherits], return_inverse=True)
        self._inherited = np.full(len(self._heirs), -1, np.int8)
        np.maximum.at(self._inherited, places, passed_on[inherits])  # of several the one that is held out

        newest = np.zeros(len(facts), bool)
        newest[len(facts) - 1 - np.unique(keys[::-1], return_index=True)[1]] = True
        self.split = np.where(newest, ledger.splits_of(keys), -1).astype(np.int8)
        self._new = self.split < 0  # to the ledger
        places = _find(self._heirs, keys)
        heirs = newest & (self.split < 0) & (places >= 0)
        self.split[heirs] = self._inherited[places[heirs]]
        self.reason = np.where(newest, facts["problem"], _DELETED).astype(np.int8)

        members = np.flatnonzero(self.reason == 0)
        self.cluster = cluster = keys.copy()  # 64 bits of its id's hash
        draws = facts["draw"].copy()
        order = np.argsort(name_keys := ledger.keys(named))
        self._name_keys, self._names = name_keys[order], np.fromiter(named.values(), object, len(named))[order]
        places = _find(self._name_keys, keys)
        joined = np.flatnonzero(places >= 0)
        cluster[joined] = ledger.keys(self._names)[places[joined]]
        draws[joined] = np.fromiter(map(salted_hashes(salt), self._names), np.uint64)[places[joined]]
        _, first, number = np.unique(cluster[members], return_index=True, return_inverse=True)
        earlier = self.split[members]
        known, fresh, late = np.zeros((len(first), 3), bool), np.zeros(len(first), bool), np.ones(len(first), bool)
        dealt = (earlier >= 0) & (earlier < len(SPLITS))
        known[number[dealt], earlier[dealt]] = True
        fresh[number[earlier < 0]] = True
        late[number[facts["date"][members] < (fractions.latest_from or "").encode()]] = False
        new = deal(fractions_of(draws[members][first]), late, known, fresh, fractions)
        self.split[members] = np.where(earlier >= 0, earlier, new[number])
        unused = np.where(self.split == 0, facts["untrained"], facts["unmeasured"])
        bridges = REASONS.index("bridges_splits")
        self.reason[members] = np.where(self.split[members] == len(SPLITS), bridges, unused[members])

    def rows(self, split: str) -> np.ndarray:
        """All rows of a split in ascending `orders`."""
        rows = np.flatnonzero((self.split == SPLITS.index(split)) & (self.reason == 0))
        return rows[np.argsort(self.orders(rows), kind="stable")]

    def orders(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of 63 bits that sort rows: people's own before the sample's, and in the order of a salted hash, so
        that any first n are a fair sample, and stay much the same when data grow."""
        sample = self.facts["sample"][rows].astype(np.int64)
        return (self.facts["turn"][rows] >> np.uint64(2)).astype(np.int64) | sample << 62

    def leave_out(self, rows: np.ndarray, reason: str) -> None:
        """Take rows out of their split."""
        self.reason[rows] = REASONS.index(reason)

    def cluster_names(self, rows: np.ndarray) -> np.ndarray:
        """The cluster of each of some rows; None: it stands alone."""
        names, places = np.full(len(rows), None), _find(self._name_keys, self.facts["id"][rows])
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
        return int(self.facts["characters"][self.reason != _DELETED].sum())

    def characters(self) -> dict[str, int]:
        """Of messages of conversations that are in no split, by reason."""
        sums = np.bincount(self.reason, self.facts["characters"], len(REASONS))
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
        keys = np.concatenate([self.facts["id"][dealt], self._heirs])
        return ledger.append_keys(keys, np.concatenate([self.split[dealt], self._inherited]))


_DELETED = REASONS.index("deleted")


def _find(ranked: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each key among sorted ones; -1 where it is none of them."""
    if not len(ranked):
        return np.full(len(keys), -1)
    places = np.minimum(search(ranked, keys), len(ranked) - 1)
    return np.where(ranked[places] == keys, places, -1)
