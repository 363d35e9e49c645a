"""Datasets: conversations in; sticky train, validation and test splits with token ids and labels out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_tuning.data_preparation.selection import TrainOn, read_conversation, select, structure_problem
from fine_tuning.data_preparation.splits import (
    LEFT_OUT,
    SPLITS,
    Fractions,
    Member,
    assign_splits,
    salted_fraction,
)
from fine_tuning.data_preparation.tokenizer import Encoded, RenderError, encode_conversation
from fine_tuning.errors import UserError
from fine_tuning.records import replacing
from fine_tuning.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerFast

# Letters of scripts that write no spaces count as words of their own.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+")
_LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() or code == 95 else 32 for code in range(128)) * 2


class PrepareSettings(Settings):
    """Section `prepare` of params.yaml."""

    train_on: TrainOn
    validation_fraction: float = Field(gt=0, lt=0.5)
    test_fraction: float = Field(gt=0, lt=0.5)
    salt: str = Field(min_length=1, max_length=64)
    latest_from: date | None = Field(strict=False)
    decontamination_words: int = Field(ge=0)
    max_train_tokens: int | None = Field(ge=1)
    max_held_out_tokens: int | None = Field(ge=1)
    canaries: int = Field(ge=0)


@dataclass
class Example:
    """A conversation that may be trained on. `trained[i]` says whether `messages[i]` enters the loss."""

    id: str
    source: str
    cluster: str
    messages: list[dict]
    trained: list[bool]
    encoded: Encoded | None = None

    def row(self) -> dict[str, Any]:
        """The example as a plain record, with ids and labels where it was encoded."""
        row = {"id": self.id, "source": self.source, "cluster": self.cluster, "messages": self.messages}
        if self.encoded is not None:
            row |= {
                "messages": self.encoded.messages,
                "input_ids": self.encoded.input_ids,
                "labels": self.encoded.labels,
            }
        return row


@dataclass
class Build:
    """What `DatasetBuilder.build` made of the conversations. Every one of them is in a split or in `left_out`."""

    splits: dict[str, list[Example]]
    dealt: dict[str, str]  # conversation id → split, for the ledger
    left_out: dict[str, str] = field(default_factory=dict)  # conversation id → reason


class SplitRows(dict[str, list[dict]]):
    """The rows of each split by its name. Light: nothing of `datasets` is imported until it is asked for."""

    def to_datasets(self) -> "DatasetDict":
        """The same as a Hugging Face DatasetDict; messages keep their role and content."""
        from datasets import Dataset, DatasetDict, Features, List, Value

        columns = {
            "id": Value("string"),
            "source": Value("string"),
            "cluster": Value("string"),
            "messages": List({"role": Value("string"), "content": Value("string")}),
        }
        if any("input_ids" in row for rows in self.values() for row in rows):
            columns |= {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
        return DatasetDict(
            {
                split: Dataset.from_dict(
                    {name: [_plain(name, row[name]) for row in rows] for name in columns}, features=Features(columns)
                )
                for split, rows in self.items()
            }
        )


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
            tokens; None for all.
        tokenizer, system_prompt, max_length: how to encode; without a tokenizer, rows hold messages only.
        progress: wraps the examples of a split while they are encoded.
    """

    def __init__(
        self,
        train_on: TrainOn = "all",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        salt: str = "whetstone",
        latest_from: str | None = None,
        decontamination_words: int = 12,
        max_train_tokens: int | None = None,
        max_held_out_tokens: int | None = None,
        tokenizer: "PreTrainedTokenizerFast | None" = None,
        system_prompt: str | None = None,
        max_length: int = 512,
        progress: Callable[[str, list[Example]], Iterable[Example]] = lambda _, examples: examples,
    ) -> None:
        self.train_on = train_on
        self.fractions = Fractions(validation_fraction, test_fraction, latest_from)
        self.salt = salt
        self.decontamination_words = decontamination_words
        self.max_train_tokens = max_train_tokens
        self.max_held_out_tokens = max_held_out_tokens
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.progress = progress

    def build_dataset(self, conversations: Iterable[dict]) -> SplitRows:
        """Train, validation and test rows of logged exchanges or conversations with `messages`.

        Equal conversations, and exchanges of one session, share a split; little data may leave test or validation
        empty.

        Raises:
            UserError: nothing is left to train on.
        """
        newest = _newest(conversations)
        built = self.build(newest, clusters=_equal_clusters(newest))
        if not built.splits["train"]:
            raise UserError(f"no conversation is left to train on: {_reasons(built.left_out)}")
        return SplitRows({split: [example.row() for example in built.splits[split]] for split in SPLITS})

    def build(
        self,
        conversations: Iterable[dict],
        clusters: Mapping[str, str],
        dealt: Mapping[str, str] | None = None,
    ) -> Build:
        """Deal, select and encode.

        Args:
            clusters: conversation id → cluster id of its near-duplicates; ids that are missing stand alone.
            dealt: conversation id → split of earlier builds (the ledger).
        """
        left_out: dict[str, str] = {}
        usable = []
        for conversation in _newest(conversations):
            problem = structure_problem(conversation)
            if problem:
                left_out[conversation["id"]] = problem
            else:
                usable.append(conversation)
        members = [Member(c["id"], clusters.get(c["id"], c["id"]), c.get("started_at")) for c in usable]
        assigned = assign_splits(members, dealt or {}, self.fractions, self.salt)

        examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for conversation, member in zip(usable, members, strict=True):
            split = assigned[member.id]
            if split == LEFT_OUT:
                left_out[member.id] = "bridges_splits"
                continue
            selected = select(conversation, self.train_on if split == "train" else "not_disliked")
            if selected is None:
                left_out[member.id] = "not_endorsed"
            else:
                source = conversation.get("source") or "unknown"
                examples[split].append(Example(member.id, source, member.cluster, *selected))
        # The order of the salted hash: any first n are a fair sample, and stay much the same when data grow.
        for split in SPLITS:
            examples[split].sort(key=lambda example: (salted_fraction(self.salt + "/order", example.id), example.id))
        for split in ("test", "validation", "train"):
            if split == "train" and self.decontamination_words:
                examples[split] = self._decontaminate(examples[split], examples["test"], left_out)
            if self.tokenizer is not None:
                examples[split] = self._encode(split, examples[split], left_out)
        return Build(examples, {**(dealt or {}), **assigned}, left_out)

    def _decontaminate(self, train: list[Example], test: list[Example], left_out: dict[str, str]) -> list[Example]:
        """Leave out of `train` what repeats `test` (runs of words as in Brown et al. 2020, appendix C; theirs have 13).

        A run that two texts share holds half a run that starts at a multiple of its length in either of them, so those
        few are looked up first.
        """
        length, half = self.decontamination_words, (self.decontamination_words + 1) // 2
        held_out = [words for example in test for words in _long_texts(example, length)]
        halves = {run for words in held_out for run in _runs(words, half)}
        suspects = [
            example
            for example in (train if halves else ())
            if any(not halves.isdisjoint(_apart(words, half)) for words in _long_texts(example, length))
        ]
        runs = {run for words in held_out for run in _runs(words, length)} if suspects else set()
        shared = {
            example.id: runs.intersection(run for words in _long_texts(example, length) for run in _runs(words, length))
            for example in suspects
        }
        conversations = Counter(run for of_example in shared.values() for run in of_example)
        # What more than ten conversations say, or a tenth of few, is a common phrase and no sign of a copy (NeMo
        # Curator's TaskDecontamination has the same ten).
        common = min(10, max(1, len(train) // 10))
        repeats = {identity for identity, found in shared.items() if any(conversations[run] <= common for run in found)}
        left_out.update(dict.fromkeys(repeats, "overlaps_test"))
        return [example for example in train if example.id not in repeats]

    def _encode(self, split: str, examples: list[Example], left_out: dict[str, str]) -> list[Example]:
        limit = "max_train_tokens" if split == "train" else "max_held_out_tokens"
        budget = getattr(self, limit)
        kept: list[Example] = []
        total = 0
        # The budget goes to people's own conversations first: the sample only fills what they leave.
        examples = sorted(examples, key=lambda example: example.source == "sample")
        for index, example in enumerate(self.progress(split, examples)):
            try:
                encoded = encode_conversation(
                    self.tokenizer, example.messages, self.system_prompt, self.max_length, example.trained
                )
            except RenderError:
                left_out[example.id] = "template"
                continue
            if not encoded.trained_tokens:
                left_out[example.id] = "too_long"
                continue
            total += len(encoded.input_ids)
            if budget is not None and kept and total > budget:
                left_out.update((rest.id, limit) for rest in examples[index:])
                break
            example.encoded = encoded
            kept.append(example)
        return kept


# -----------------------------------------------------------------------------
# files


def write_split(path: str | Path, examples: Sequence[Example]) -> None:
    """Write encoded examples as Parquet: id, source, cluster, messages (JSON), input_ids, labels (int32).

    The same examples give the same bytes.
    """
    from datasets import Dataset, Features, List, Value

    features = Features(
        {name: Value("string") for name in ("id", "source", "cluster", "messages")}
        | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    )
    rows = [example.row() for example in examples]
    columns = {name: [row[name] for row in rows] for name in features}
    # JSON, because the optional keys of messages would become nulls in every Arrow struct.
    columns["messages"] = [json.dumps(messages, ensure_ascii=False) for messages in columns["messages"]]
    with replacing(path) as file, _no_progress_bars():
        Dataset.from_dict(columns, features=features).to_parquet(file)


def read_split(path: str | Path) -> "Dataset":
    """Read a split that `write_split` wrote, in memory: no copy of private conversations in a cache elsewhere.

    Raises:
        UserError: the file is missing.
    """
    from datasets import Dataset
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    return Dataset(parquet.read_table(path))


def statistics(built: Build) -> dict[str, Any]:
    """Counts and lengths of each split and source, and how many were left out for what reason."""
    reasons = Counter(built.left_out.values())
    return {
        "conversations": sum(map(len, built.splits.values())) + len(built.left_out),
        "left_out": dict(sorted(reasons.items())),
        "splits": {split: _split_statistics(examples) for split, examples in built.splits.items()},
    }


def length_histogram(built: Build, bins: int = 16) -> list[dict[str, int]]:
    """Conversations of each split by length in tokens: one row a bin, named by its upper end."""
    lengths = {split: [len(e.encoded.input_ids) for e in examples] for split, examples in built.splits.items()}
    longest = max((length for of_split in lengths.values() for length in of_split), default=1)
    width = -(-longest // bins)
    rows = []
    for upper in range(width, width * bins + 1, width):
        rows.append({"tokens": upper} | {s: sum(upper - width < n <= upper for n in lengths[s]) for s in SPLITS})
    return rows


def _split_statistics(examples: Sequence[Example]) -> dict[str, Any]:
    encoded = [example.encoded for example in examples]
    lengths = sorted(len(e.input_ids) for e in encoded)
    tokens, trained = sum(lengths), sum(e.trained_tokens for e in encoded)
    by_source: dict[str, Counter[str]] = {}
    for example in examples:
        counts = by_source.setdefault(example.source, Counter())
        counts.update(
            conversations=1, tokens=len(example.encoded.input_ids), trained_tokens=example.encoded.trained_tokens
        )
    return {
        "conversations": len(examples),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": round(trained / tokens, 4) if tokens else 0.0,
        "tokens_mean": round(tokens / len(lengths), 1) if lengths else 0.0,
        "tokens_median": lengths[len(lengths) // 2] if lengths else 0,
        "tokens_max": lengths[-1] if lengths else 0,
        "lost_oldest_turns": sum(e.dropped_messages > 0 for e in encoded),
        "lost_end_of_reply": sum(e.cut_tokens > 0 for e in encoded),
        "by_source": {source: dict(counts) for source, counts in sorted(by_source.items())},
    }


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


# -----------------------------------------------------------------------------
# records


def _newest(records: Iterable[dict]) -> list[dict]:
    """The newest version of each conversation, without deleted ones."""
    newest = {}
    for record in records:
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
            texts = [str(m.get("content")) for m in conversation["messages"] or () if isinstance(m, dict)]
            key = ("text", "\n".join(texts).casefold())
        clusters[identity] = first.setdefault(key, identity)
    return clusters


def _long_texts(example: Example, least: int) -> Iterable[list[bytes]]:
    """The words of every message of at least `least` words, system messages apart."""
    for message in example.messages:
        # A text of fewer characters cannot have as many words.
        if message["role"] != "system" and len(message["content"]) >= least:
            words = _words(message["content"])
            if len(words) >= least:
                yield words


def _runs(words: list[bytes], length: int) -> Iterable[tuple[bytes, ...]]:
    """`length` neighbouring words from every position."""
    return zip(*(words[start:] for start in range(length)), strict=False)


def _apart(words: list[bytes], length: int) -> Iterable[tuple[bytes, ...]]:
    """`length` neighbouring words, and the next, and the next."""
    return zip(*[iter(words)] * length, strict=False)


def _words(text: str) -> list[bytes]:
    """Lower case, in UTF-8: for ASCII, most of what there is, that is one pass of a table."""
    if text.isascii():
        return text.encode().translate(_LETTERS).split()
    return [word.encode() for word in _WORD.findall(text.casefold())]


def _plain(column: str, value: Any) -> Any:
    return [{"role": m["role"], "content": m["content"]} for m in value] if column == "messages" else value


def _reasons(left_out: Mapping[str, str]) -> str:
    counts = Counter(left_out.values())
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing was given"
