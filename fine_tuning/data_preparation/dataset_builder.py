"""Datasets: conversations in; sticky train, validation and test splits with token ids and labels out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from pydantic import Field

from fine_tuning.common.columns import stretches
from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import Map
from fine_tuning.common.settings import Settings
from fine_tuning.data_preparation.catalogue import (
    Catalogue,
    Conversations,
    FactSettings,
    HeldConversations,
    Span,
    read_spans,
)
from fine_tuning.data_preparation.decontamination import HeldOut, repeating
from fine_tuning.data_preparation.encoded_memo import EncodedMemo
from fine_tuning.data_preparation.encodings import Chosen, HeldRows
from fine_tuning.data_preparation.selection import TrainOn, read_conversation, select
from fine_tuning.data_preparation.splits import (
    ENOUGH_TEST_CLUSTERS,
    NAMES,
    SPLITS,
    Fractions,
    Ledger,
    fractions_of,
    salted_hashes,
)
from fine_tuning.schema.chat_format import RenderError, encode_windows, load_tokenizer
from fine_tuning.schema.conversation import each_record
from fine_tuning.schema.prepared import PreparedRow, encoded_row

if TYPE_CHECKING:
    from fine_tuning.schema.chat_format import ChatTokenizer

PIECE_CHARACTERS = 4 << 20  # of messages that are encoded at a time: their rows fill a file of the memo
PORTION = 256  # conversations that are encoded until a budget is looked at again


class PrepareSettings(Settings):
    """Section `prepare` of params.yaml."""

    train_on: TrainOn
    validation_fraction: float = Field(gt=0, lt=0.5)
    test_fraction: float = Field(gt=0, lt=0.5)
    salt: str = Field(min_length=1, max_length=64)
    latest_from: date | None = Field(strict=False)
    decontamination_words: int = Field(ge=0)
    max_train_tokens: int | None = Field(ge=1)
    max_sample_tokens: int | None = Field(ge=1)
    max_held_out_tokens: int | None = Field(ge=1)
    engine: str | None
    canaries: int = Field(ge=0)


@dataclass
class Build:
    """What `DatasetBuilder.build` made of the conversations. Every one of them is in a split or in `left_out`."""

    splits: dict[str, list[PreparedRow]]
    assigned: dict[str, str]  # conversation id → split, for the ledger
    left_out: dict[str, str] = field(default_factory=dict)  # conversation id → reason


@dataclass
class DatasetBuilder:
    """Deals conversations into splits and, given a tokenizer, into token ids and labels.

    Args:
        train_on: which replies of the train split are trained: `all`; `not_disliked`, those without a thumb down;
            `endorsed`, only liked and edited ones. Others stay as context. An edit always replaces the reply, and
            validation and test always use `not_disliked`, so that results compare whatever is trained on.
        validation_fraction, test_fraction: shares of clusters.
        salt: deals and samples differ from salt to salt.
        latest_from: ISO date; test is what started on or after it, instead of a fraction.
        decontamination_words: a train conversation that shares this many words in a row with a test conversation is
            left out, unless more than ten train conversations (of few, a tenth) say them; 0 leaves all in.
        max_train_tokens, max_held_out_tokens: a sample of train, of validation and of test, with at most this many
            tokens; None for all. Of a held-out conversation in several windows, some that have a hundredth of them.
        max_sample_tokens: tokens of train that may come from conversations of the source "sample".
        tokenizer: a tokenizer, or the folder of one, which every process loads for itself; None: rows hold messages.
        system_prompt, max_length: how to encode; a longer conversation is several examples.

    Raises:
        UserError: an argument is none that `prepare` in params.yaml could have.
    """

    train_on: TrainOn = "all"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    salt: str = "whetstone"
    latest_from: str | None = None
    decontamination_words: int = 12
    max_train_tokens: int | None = None
    max_sample_tokens: int | None = None
    max_held_out_tokens: int | None = None
    tokenizer: "ChatTokenizer | str | Path | None" = None
    system_prompt: str | None = None
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.train_on not in get_args(TrainOn):
            raise UserError(f"train_on = {self.train_on!r} is unknown: choose one of {', '.join(get_args(TrainOn))}")
        if not isinstance(self.salt, str) or not self.salt:
            raise UserError("the salt is no text or empty: give one, and keep it")
        limits = ("max_train_tokens", "max_sample_tokens", "max_held_out_tokens")
        for name in ("decontamination_words", *limits, "max_length"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or number < 0):
                raise UserError(f"{name} = {number!r} is no whole number from 0: give one")
        shares = (self.validation_fraction, self.test_fraction)
        if not all(isinstance(share, (int, float)) and share >= 0 for share in shares) or sum(shares) >= 1:
            raise UserError(
                f"validation_fraction = {shares[0]!r} and test_fraction = {shares[1]!r} leave nothing to train on, or "
                "are no shares: give two numbers from 0 that are below 1 together"
            )
        try:
            day = self.latest_from and date.fromisoformat(self.latest_from).isoformat()
        except (TypeError, ValueError):
            raise UserError(f"latest_from = {self.latest_from!r} is no date: give one such as 2026-01-31") from None
        self.fractions = Fractions(*shares, day)
        if isinstance(self.tokenizer, str):
            self.tokenizer = Path(self.tokenizer)
        self.held_out = HeldOut(self.decontamination_words)

    def build_dataset(self, conversations: Iterable[dict]) -> dict[str, list[dict]]:
        """Train, validation and test rows of logged exchanges or conversations with `messages`.

        Equal conversations, and exchanges of one session, share a split; little data may leave test or validation
        empty.

        Raises:
            UserError: nothing is left to train on.
        """
        newest = _newest(conversations)
        built = self.build(newest, clusters=_equal_clusters(newest))
        if not built.splits["train"]:
            reasons = sorted(Counter(built.left_out.values()).items())
            why = ", ".join(f"{count} {reason}" for reason, count in reasons) or "nothing was given"
            raise UserError(f"no conversation is left to train on: {why}")
        return {split: [row.stored() for row in built.splits[split]] for split in SPLITS}

    def build(
        self,
        conversations: Iterable[dict],
        clusters: Mapping[str, str],
        assigned: Mapping[str, str] | None = None,
    ) -> Build:
        """Deal, select and encode.

        Args:
            clusters: conversation id → cluster id of its near-duplicates; ids that are missing stand alone.
            assigned: conversation id → split of earlier builds (the ledger).
        """
        held, ledger = HeldConversations(conversations), Ledger(None, self.salt, assigned or {})
        catalogue, encoded = self.catalogue(held, clusters.items(), ledger), HeldRows()
        every = self.choose(held, catalogue, encoded)
        splits = {split: list(encoded.take(chosen.ordered(catalogue))) for split, chosen in every}
        newest = {one["id"]: row for row, one in enumerate(held.spans(np.arange(len(catalogue.facts))))}
        split_of = {identity: int(catalogue.split[row]) for identity, row in newest.items()}
        dealt = {identity: NAMES[split] for identity, split in split_of.items() if split >= 0}
        left_out = {identity: catalogue.left_out_because(row) for identity, row in newest.items()}
        return Build(
            {split: splits[split] for split in SPLITS},
            {**(assigned or {}), **dealt},
            {identity: reason for identity, reason in left_out.items() if reason},
        )

    def catalogue(
        self,
        conversations: Conversations,
        clusters: Iterable[tuple[str, str]],
        ledger: Ledger,
        run: Map = map,
        dropped_duplicates: Iterable[tuple[str, str]] = (),
    ) -> Catalogue:
        """Give every usable conversation a split.

        Args:
            clusters: (conversation id, cluster id) of near-duplicates; who is not named stands alone.
            ledger: splits of earlier builds.
            run: what maps a function over pieces of work, in order: `map`, or an engine's.
            dropped_duplicates: (id of one, id of the conversation that stays for it), which inherits the other's split.
        """
        facts = conversations.facts(FactSettings(self.train_on, self.salt, self.decontamination_words), run)
        return Catalogue(facts, clusters, ledger, self.fractions, self.salt, dropped_duplicates)

    def choose(
        self,
        conversations: Conversations,
        catalogue: Catalogue,
        encoded: HeldRows | EncodedMemo,
        run: Map = map,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> Iterator[tuple[str, Chosen]]:
        """Which rows the test, validation and train split have; `catalogue` then knows why others are in none.

        Args:
            encoded: takes up the rows of conversations, and may know some; where it writes files, there is a tokenizer.
            progress: is told how many conversations were encoded.
        """
        self.held_out = HeldOut(self.decontamination_words)
        for split in ("test", "validation", "train"):
            rows = catalogue.rows(split)
            if split == "train" and self.decontamination_words:
                catalogue.leave_out(self._repeating(conversations, rows), "overlaps_test")
                rows = rows[catalogue.reason[rows] == 0]
            chosen = self._chosen(split, rows, conversations, catalogue, encoded, run, progress)
            if split == "test" and self.decontamination_words:
                for conversation in read_spans(conversations.spans(np.unique(chosen.rows))):
                    self.held_out.add(_selected(conversation, "not_disliked")[0])
            yield split, chosen

    def overlaps_test(self, messages: list[dict]) -> bool:
        """Whether messages share a run of words with the test split that was dealt last."""
        return bool(self.decontamination_words and self.held_out.shared_with(messages))

    def _repeating(self, conversations: Conversations, rows: np.ndarray) -> np.ndarray:
        """Those rows of train that repeat the test split."""
        pieces = self.held_out.pieces
        if not len(pieces):
            return rows[:0]
        found = np.sort(rows[conversations.holding(pieces)[rows]])
        shared = {}
        for row, conversation in zip(found.tolist(), read_spans(conversations.spans(found)), strict=True):
            if runs := self.held_out.shared_with(_selected(conversation, self.train_on)[0]):
                shared[row] = runs
        return np.array(sorted(repeating(shared, len(rows))), int)

    def _chosen(
        self, split: str, rows: np.ndarray, conversations: Conversations, catalogue: Catalogue,
        encoded: HeldRows | EncodedMemo, run: Map, progress: Callable[[int], Any],
    ) -> Chosen:  # fmt: skip
        """The windows that a split has, of rows of the catalogue that it could have in their order."""
        limits = ("max_train_tokens", "max_sample_tokens") if split == "train" else ("max_held_out_tokens",)
        budgets = {limit: budget for limit in limits if (budget := getattr(self, limit)) is not None}
        train_on = self.train_on if split == "train" else "not_disliked"
        encode = partial(
            _encode, train_on=train_on, tokenizer=self.tokenizer, system_prompt=self.system_prompt,
            max_length=self.max_length, files=_files_of(self.tokenizer),
        )  # fmt: skip
        lines, sample = catalogue.facts.column("line", rows), catalogue.sample[rows] > 0
        # Without feedback it is the same whatever is trained on.
        lines[catalogue.facts.column("judged", rows) > 0, 0] ^= np.uint64(get_args(TrainOn).index(train_on) + 1)
        found = encoded.find(lines)
        unknown = np.flatnonzero(found["place"] < 0)
        lines = lines[unknown]
        some: dict[int, np.ndarray] = {}  # of conversations not all of whose windows are measured, those that are
        end, spent = len(rows), dict.fromkeys(budgets, 0)
        for start, stop in pairwise(_portions(sample, budgets)):
            missing = start + np.flatnonzero(found["place"][start:stop] < 0)
            missing = missing[np.argsort(rows[missing])]
            piece_of = np.cumsum(catalogue.facts.column("characters", rows[missing])) // PIECE_CHARACTERS
            pieces = [missing[slice(*ends)] for ends in zip(*stretches(piece_of), strict=True)]
            work = ((lines[np.searchsorted(unknown, piece)], conversations.spans(rows[piece])) for piece in pieces)
            for piece, known in zip(pieces, encoded.encode(encode, work, run), strict=True):
                found[piece] = known
                progress(len(piece))
            if "max_held_out_tokens" in budgets:
                for at in start + np.flatnonzero(found["windows"][start:stop] > 1):
                    lengths, _ = encoded.lengths(*found[["place", "windows"]][at].tolist())
                    (identity,) = (one["id"] for one in read_spans(conversations.spans(rows[at : at + 1])))
                    some[int(at)] = kept = _some_windows(identity, lengths, self.max_held_out_tokens, self.salt)
                    found["tokens"][at] = lengths[kept].sum()
            over = {}
            for limit, budget in budgets.items():
                # Rows come with people's own conversations first: the sample only fills what they leave.
                tokens = found["tokens"][start:stop] * (sample[start:stop] if limit == "max_sample_tokens" else 1)
                sums = spent[limit] + np.cumsum(tokens)
                late = np.flatnonzero((tokens > 0) & (sums > tokens) & (sums > budget))
                if len(late):
                    over[limit] = start + int(late[0])
                spent[limit] = int(sums[-1]) if len(sums) else spent[limit]
            if over:
                limit = min(over, key=over.__getitem__)
                end = over[limit]
                catalogue.leave_out(rows[end:], limit)
                break
        del lines, sample, unknown  # a fifth of the memory
        catalogue.reason[rows[:end]] = found["reason"][:end]
        return _windows_of(rows[:end], found[:end], some, encoded)


def _portions(sample: np.ndarray, budgets: Mapping[str, int]) -> list[int]:
    """Where portions of rows begin: no more than one is encoded in vain."""
    if not budgets:
        return [0, len(sample)]
    free = 0 if budgets.keys() - {"max_sample_tokens"} else int((~sample).sum())
    return [0, *range(free, len(sample), PORTION), len(sample)]


def _some_windows(identity: str, lengths: np.ndarray, budget: int, salt: str) -> np.ndarray:
    """Windows of a held-out conversation with at most a hundredth of the budget, drawn by the salt; one at least.

    Windows of one conversation are alike: measuring is surer with few of each of many conversations.
    """
    hashes = map(salted_hashes(f"{salt}/window"), (f"{identity}#{window}" for window in range(len(lengths))))
    drawn = np.argsort(fractions_of(np.fromiter(hashes, np.uint64)), kind="stable")
    fitting = np.cumsum(lengths[drawn]) <= budget // ENOUGH_TEST_CLUSTERS
    return np.sort(drawn[: max(1, int(fitting.sum()))])


def _windows_of(
    rows: np.ndarray, found: np.ndarray, some: Mapping[int, np.ndarray], encoded: HeldRows | EncodedMemo
) -> Chosen:
    order = np.argsort(rows).astype(np.int32)
    rows, found = rows[order], found[order]
    windows = np.where(found["reason"] == 0, found["windows"], 0)
    starts = np.cumsum(windows) - windows
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), windows)
    within = (np.arange(len(owner)) - starts[owner]).astype(np.int32)
    wanted, counts = np.ones(len(owner), bool), {}
    for place in np.flatnonzero(np.isin(order, list(some))).tolist():
        if windows[place]:
            numbers, start = some[int(order[place])], int(starts[place])
            wanted[start : start + windows[place]] = False
            wanted[start + numbers] = True
            lost = encoded.lengths(*found[["place", "windows"]][place].tolist())[1]
            counts[place] = lost, int(windows[place]) - len(numbers)
    owner, within = owner[wanted], within[wanted]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    numbers = (np.arange(len(owner)) - np.repeat(first, np.diff(first, append=len(owner)))).astype(np.int32)
    changed = {
        int(np.searchsorted(owner, at)): {"lost_turns": lost[0], "lost_reply_tokens": lost[1], "windows_left_out": left}
        for at, (lost, left) in counts.items()
    }
    return Chosen(found["place"][owner] + within, rows[owner], within, numbers, changed)


def _encode(
    spans: list[Span],
    train_on: TrainOn,
    tokenizer: "ChatTokenizer | Path | None",
    system_prompt: str | None,
    max_length: int,
    files: Sequence[Path],
) -> list[list[PreparedRow] | str]:
    """The windows of each conversation, or why there are none. `files` of the tokenizer come along to a worker."""
    encoded: list[list[PreparedRow] | str] = []
    for conversation in read_spans(spans):
        messages, trained = _selected(conversation, train_on)
        fields = {"id": conversation["id"], "source": conversation.get("source") or "unknown"}
        fields |= {"conversation": messages, "trained": trained}
        if tokenizer is None:
            encoded.append([PreparedRow(messages=messages, **fields)])
            continue
        try:
            found = encode_windows(loaded(tokenizer), messages, system_prompt, max_length, trained)
        except RenderError:
            encoded.append("template")
            continue
        rows = [encoded_row(window, window=number, **fields) for number, window in enumerate(found.encoded)]
        if rows:
            rows[0].counts = {**rows[0].counts, "lost_turns": found.lost_turns, "lost_reply_tokens": found.lost_tokens}
        encoded.append(rows or "too_long")
    return encoded


def _selected(conversation: dict, train_on: TrainOn) -> tuple[list[dict], list[bool]]:
    found = select(conversation, train_on)
    assert found is not None  # the catalogue left out those of which nothing is used
    return found


def _files_of(tokenizer: "ChatTokenizer | Path | None") -> list[Path]:
    return [path for path in sorted(tokenizer.glob("*.j*")) if path.is_file()] if isinstance(tokenizer, Path) else []


def loaded(tokenizer: "ChatTokenizer | Path") -> "ChatTokenizer":
    """The tokenizer, or that of a folder; what needs none does not wait for its libraries."""
    return _load(tokenizer) if isinstance(tokenizer, Path) else tokenizer


@lru_cache(maxsize=1)
def _load(folder: Path) -> "ChatTokenizer":
    from fine_tuning.schema.light_tokenizer import light_tokenizer

    return light_tokenizer(folder) or load_tokenizer(folder)


def _newest(records: Iterable[dict]) -> list[dict]:
    """The newest version of each conversation, without deleted ones."""
    newest = {}
    for record in each_record(records):
        conversation = read_conversation(record)
        newest[conversation["id"]] = conversation
    return [conversation for conversation in newest.values() if not conversation.get("deleted")]


def _equal_clusters(conversations: Sequence[dict]) -> dict[str, str]:
    """Clusters for conversations that come without: equal texts, and exchanges of one session.

    Sessions count only where there are enough of them to fill three splits.
    """
    by_session = len({c["session"] for c in conversations if "session" in c}) >= len(SPLITS)
    first: dict[Any, str] = {}
    clusters: dict[str, str] = {}
    for conversation in conversations:
        identity = conversation["id"]
        if by_session and "session" in conversation:
            key: Any = conversation["session"]
        else:
            messages = conversation["messages"] if isinstance(conversation["messages"], list) else []
            texts = [str(message.get("content")) for message in messages if isinstance(message, dict)]
            key = ("text", "\n".join(texts).casefold())
        if (cluster := first.setdefault(key, identity)) != identity:
            clusters[identity] = cluster
    return clusters
