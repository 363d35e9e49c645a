"""Datasets: conversations in; sticky train, validation and test splits with token ids and labels out."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import orjson
from pydantic import Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import Map
from fine_tuning.common.settings import Settings
from fine_tuning.data_preparation.catalogue import (
    NO_FEEDBACK,
    AssignedRow,
    Catalogue,
    ConversationFiles,
    Conversations,
    HeldConversations,
)
from fine_tuning.data_preparation.decontamination import HeldOut, Run, repeating
from fine_tuning.data_preparation.encoded_memo import EncodedMemo
from fine_tuning.data_preparation.selection import TrainOn, read_conversation, select, texts_of
from fine_tuning.data_preparation.splits import ENOUGH_TEST_CLUSTERS, SPLITS, Fractions, salted_fractions
from fine_tuning.schema.chat_format import RenderError, encode_windows, load_tokenizer
from fine_tuning.schema.conversation import each_record
from fine_tuning.schema.prepared import PreparedRow, as_json, encoded_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 64  # conversations that are encoded at a time


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
    tokenizer: "PreTrainedTokenizerFast | str | Path | None" = None
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
        with Catalogue() as catalogue:
            held, known = HeldConversations(conversations), (assigned or {}).items()
            splits = {split: list(rows) for split, rows in self.assign(held, catalogue, clusters.items(), known)}
            return Build({split: splits[split] for split in SPLITS}, dict(catalogue.assigned()), catalogue.left_out())

    def assign(
        self,
        conversations: Conversations,
        catalogue: Catalogue,
        clusters: Iterable[tuple[str, str]],
        assigned: Iterable[tuple[str, str]],
        run: Map = map,
        dropped_duplicates: Iterable[tuple[str, str]] = (),
        memo: EncodedMemo | None = None,
    ) -> Iterator[tuple[str, Iterator[PreparedRow]]]:
        """The test, validation and train split, each with its rows; take each to its end before the next.

        Few conversations are in memory at a time, whatever their number, and of the test split what decontamination
        compares with.

        Args:
            catalogue: an empty one; it then knows who was assigned where, and who was left out.
            clusters: (conversation id, cluster id) of near-duplicates; who is not named stands alone.
            assigned: (conversation id, split) of earlier builds (the ledger).
            run: what maps a function over pieces of work, in order: `map`, or an engine's.
            dropped_duplicates: (id of one, id of the conversation that stays for it), which inherits the other's split.
            memo: of conversations that this tokenizer encoded before, where `run` is `map`.
        """
        scan = partial(conversations.scan, train_on=self.train_on)
        for scans in run(scan, range(len(conversations.parts))):
            catalogue.note(scans)
        catalogue.assign(clusters, assigned, self.fractions, self.salt, dropped_duplicates)
        self.held_out = held_out = HeldOut(self.decontamination_words)
        repeated: Set[str] = frozenset()
        for split in ("test", "validation", "train"):
            if split == "train" and self.decontamination_words:
                scan = partial(_shared_runs, conversations=conversations, train_on=self.train_on, held_out=held_out)
                found = chain.from_iterable(map(dict.items, run(scan, catalogue.places("train"))))
                repeated = repeating(dict(found), catalogue.count("train"))
                overlapping = (row for row in catalogue.rows(split) if row.id in repeated)
                catalogue.leave_out(overlapping, split, "overlaps_test")
            rows = self._prepared(split, repeated, conversations, catalogue, run, memo)
            yield split, held_out.watch(rows) if split == "test" and self.decontamination_words else rows

    def overlaps_test(self, messages: list[dict]) -> bool:
        """Whether messages share a run of words with the test split that was dealt last."""
        return bool(self.decontamination_words and self.held_out.shared_with(messages))

    def _prepared(
        self, split: str, without: Set[str], conversations: Conversations, catalogue: Catalogue, run: Map,
        memo: EncodedMemo | None,
    ) -> Iterator[PreparedRow]:  # fmt: skip
        limits = ("max_train_tokens", "max_sample_tokens") if split == "train" else ("max_held_out_tokens",)
        train_on = self.train_on if split == "train" else "not_disliked"
        encode = partial(
            _encode, conversations=conversations, split=split, train_on=train_on, tokenizer=self.tokenizer,
            system_prompt=self.system_prompt, max_length=self.max_length, memo=memo,
        )  # fmt: skip

        def assigned() -> Iterator[AssignedRow]:
            return (row for row in catalogue.rows(split) if row.id not in without)

        spent: Counter[str] = Counter()
        rows = assigned()
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        for row, windows in chain.from_iterable(run(encode, chunks)):
            if isinstance(windows, str):
                catalogue.leave_out([row], split, windows)
                continue
            if split != "train" and self.max_held_out_tokens is not None:
                windows = _some_windows(windows, self.max_held_out_tokens // ENOUGH_TEST_CLUSTERS, self.salt)
            tokens = sum(len(window.input_ids) for window in windows)
            for limit in limits:
                if limit == "max_sample_tokens" and not row.sample:
                    continue
                budget = getattr(self, limit)
                # Rows come with people's own conversations first: the sample only fills what they leave.
                if budget is not None and tokens and spent[limit] and spent[limit] + tokens > budget:
                    catalogue.leave_out((late for late in assigned() if late >= row), split, limit)
                    return
                spent[limit] += tokens
            yield from windows


def _some_windows(windows: list[PreparedRow], tokens: int, salt: str) -> list[PreparedRow]:
    """Windows of a held-out conversation with at most so many tokens, drawn by the salt; one at least. Numbered anew.

    Windows of one conversation are alike: measuring is surer with few of each of many conversations.
    """
    if len(windows) == 1:
        return windows
    draw, kept = salted_fractions(f"{salt}/window"), []
    for window in sorted(windows, key=lambda window: draw(f"{window.id}#{window.window}")):
        tokens -= len(window.input_ids)
        if kept and tokens < 0:
            break
        kept.append(window)
    kept.sort(key=lambda window: window.window)
    lost = {name: windows[0].counts[name] for name in ("lost_turns", "lost_reply_tokens")}
    lost["windows_left_out"] = len(windows) - len(kept)
    kept = [replace(window, window=number) for number, window in enumerate(kept)]
    kept[0].counts = kept[0].counts | lost
    return kept


def _encode(
    rows: list[AssignedRow],
    conversations: Conversations,
    split: str,
    train_on: TrainOn,
    tokenizer: "PreTrainedTokenizerFast | Path | None",
    system_prompt: str | None,
    max_length: int,
    memo: EncodedMemo | None,
) -> list[tuple[AssignedRow, list[PreparedRow] | str]]:
    """The windows of each conversation, or why there are none."""
    pairs: list[tuple[AssignedRow, list[PreparedRow] | str]] = []
    encode = partial(_windows, tokenizer=tokenizer, system_prompt=system_prompt, max_length=max_length)
    for row in rows:
        if memo and isinstance(conversations, ConversationFiles):
            (line,) = conversations.lines(row.part, [row.place])
            # Without feedback it is the same whatever is trained on.
            key = line if NO_FEEDBACK in line else train_on.encode() + line
            found = memo.get(key, partial(_packed, line, train_on, encode))
            if not isinstance(found, str):
                source, windows = found
                whole = _selected(line, train_on)[0] if split == "test" else ()  # decontamination needs it
                found = [
                    PreparedRow(
                        row.id, array("i", ids), array("i", labels), source, row.cluster, number, messages, whole,
                        counts=counts,
                    )
                    for number, (ids, labels, messages, counts) in enumerate(windows)
                ]  # fmt: skip
            pairs.append((row, found))
            continue
        (conversation,) = conversations.read(row.part, [row.place])
        messages, trained = select(conversation, train_on)
        fields = {"id": row.id, "source": conversation.get("source") or "unknown", "cluster": row.cluster}
        fields |= {"conversation": messages, "trained": trained}
        if tokenizer is None:
            pairs.append((row, [PreparedRow(messages=messages, **fields)]))
            continue
        encoded = encode(messages, trained)
        if isinstance(encoded, list):
            encoded = [PreparedRow(window=number, **own, **fields) for number, own in enumerate(encoded)]
        pairs.append((row, encoded))
    return pairs


def _selected(line: bytes, train_on: TrainOn) -> tuple[list[dict], list[bool]]:
    return select(read_conversation(orjson.loads(line)), train_on)


def _packed(line: bytes, train_on: TrainOn, encode: Callable[..., list[dict[str, Any]] | str]) -> Any:
    """(source, [ids, labels, messages and counts of each window]) as plain values, or why there is no window."""
    windows = encode(*_selected(line, train_on))
    if isinstance(windows, str):
        return windows
    return orjson.loads(line).get("source") or "unknown", [
        (
            array("i", window["input_ids"]).tobytes(),
            array("i", window["labels"]).tobytes(),
            as_json(window["messages"]),
            window["counts"],
        )
        for window in windows
    ]


def _windows(
    messages: list[dict],
    trained: list[bool],
    tokenizer: "PreTrainedTokenizerFast | Path",
    system_prompt: str | None,
    max_length: int,
) -> list[dict[str, Any]] | str:
    """Of each window the fields of its row that only the conversation decides, or why there are none."""
    try:
        found = encode_windows(loaded(tokenizer), messages, system_prompt, max_length, trained)
    except RenderError:
        return "template"
    windows = list(map(encoded_fields, found.encoded))
    if windows:
        windows[0]["counts"] |= {"lost_turns": found.lost_turns, "lost_reply_tokens": found.lost_tokens}
    return windows or "too_long"


_load = lru_cache(maxsize=1)(load_tokenizer)


def loaded(tokenizer: "PreTrainedTokenizerFast | Path") -> "PreTrainedTokenizerFast":
    """The tokenizer, or that of a folder; what needs none does not wait for its libraries."""
    return _load(tokenizer) if isinstance(tokenizer, Path) else tokenizer


def _shared_runs(
    part: tuple[int, list[tuple[int, str]]], conversations: Conversations, train_on: TrainOn, held_out: HeldOut
) -> dict[str, set[Run]]:
    """The runs of words that conversations of a part share with the held-out ones, where they share any."""
    number, places = part
    found: dict[str, set[Run]] = {}
    if not held_out.pieces:
        return found
    read = conversations.read(number, (place for place, _ in places))
    for (_, identity), conversation in zip(places, read, strict=True):
        if held_out.may_share(texts_of(conversation)):
            messages, _ = select(conversation, train_on)
            if shared := held_out.shared_with(messages):
                found[identity] = shared
    return found


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
