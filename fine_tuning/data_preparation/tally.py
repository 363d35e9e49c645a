"""Counts over prepared rows: conversations, tokens and lengths of each split and source."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fine_tuning.common.errors import count_of
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.schema.prepared import COUNTS, numbers

if TYPE_CHECKING:
    from pyarrow import RecordBatch


BY_SOURCE = ("conversations", "windows", "tokens", "trained_tokens")


class Tally:
    """Counts over the rows of a split."""

    def __init__(self) -> None:
        self.lengths: Counter[int] = Counter()  # tokens of a window → windows
        self.totals: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}

    def watch(self, batches: "Iterable[RecordBatch]") -> "Iterator[RecordBatch]":
        """Pass batches of encoded rows on and count them."""
        for batch in batches:
            tokens, window = np.diff(numbers(batch, "input_ids")), numbers(batch, "window")
            self.lengths.update(tokens.tolist())
            counts = {name: numbers(batch, name) for name in COUNTS}
            counts |= {"tokens": tokens, "windows": np.ones_like(window), "conversations": window == 0}
            self.totals.update({name: int(values.sum()) for name, values in counts.items()})
            self.totals["several_windows"] += int((window == 1).sum())
            sources = batch.column("source").dictionary_encode()
            places = np.frombuffer(sources.indices.buffers()[1], np.int32)[: len(window)]
            for place, source in enumerate(sources.dictionary.to_pylist()):
                own = {name: int(counts[name][places == place].sum()) for name in BY_SOURCE}
                self.by_source.setdefault(source, Counter()).update(own)
            yield batch

    def as_json(self) -> dict[str, Any]:
        """What `add` takes."""
        return {"lengths": [*self.lengths.items()], "totals": self.totals, "by_source": self.by_source}

    def add(self, counts: dict[str, Any]) -> None:
        """Add the counts of other rows."""
        self.lengths.update(dict(counts["lengths"]))
        self.totals.update(counts["totals"])
        for source, own in counts["by_source"].items():
            self.by_source.setdefault(source, Counter()).update(own)

    def statistics(self) -> dict[str, Any]:
        """For the metrics of the split. Lengths are those of windows: most conversations are one.

        `several_windows` counts conversations; `windows_left_out` are those of held-out conversations that were not
        drawn, because one may have a hundredth of max_held_out_tokens; `lost_turns` are turns whose prompt alone leaves
        no room for a reply, `lost_reply_tokens` what of their and of other replies no window has room for.
        """
        totals, tokens, windows = self.totals, self.totals["tokens"], self.lengths.total()
        below, median = 0, 0
        for length, count in sorted(self.lengths.items()):
            median = length if below <= windows // 2 else median
            below += count
        counted = ("conversations", "windows_left_out", "several_windows", "tokens", "trained_tokens", "control_tokens")
        lost = ("lost_end_of_reply", "lost_turns", "lost_reply_tokens")
        return {name: totals[name] for name in counted + lost} | {
            "windows": windows,
            "trained_share": round(totals["trained_tokens"] / tokens, 4) if tokens else 0.0,
            "tokens_mean": round(tokens / windows, 1) if windows else 0.0,
            "tokens_median": median,
            "tokens_max": max(self.lengths, default=0),
            "by_source": {source: dict(counts) for source, counts in sorted(self.by_source.items())},
        }


def statistics(
    tallies: Mapping[str, Tally],
    left_out: Mapping[str, int],
    characters: int = 0,
    unused: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Counts and lengths of each split and source, and what was left out for what reason.

    Args:
        left_out: reason → conversations.
        characters, unused: of the messages of all conversations, and by reason of those that were left out.
    """
    conversations = sum(tally.totals["conversations"] for tally in tallies.values())
    return {
        "conversations": conversations + sum(left_out.values()),
        "left_out": dict(sorted(left_out.items())),
        "characters": characters,
        "characters_left_out": dict(sorted((unused or {}).items())),
        "splits": {split: tallies[split].statistics() for split in SPLITS},
    }


def tokens_by_source(tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """One row a split and source, named after both: its conversations, tokens and tokens that are trained."""
    return [
        {"part": f"{split}: {source}"} | {name: counts[name] for name in BY_SOURCE}
        for split in SPLITS
        for source, counts in sorted(tallies[split].by_source.items())
    ]


def length_histogram(tallies: Mapping[str, Tally], bins: int = 16) -> list[dict[str, int]]:
    """Windows of each split by length in tokens: one row a bin, named by its upper end."""
    longest = max(max(tally.lengths, default=0) for tally in tallies.values()) or 1
    width = -(-longest // bins)
    rows = [{"tokens": width * number} | dict.fromkeys(SPLITS, 0) for number in range(1, bins + 1)]
    for split in SPLITS:
        for length, count in tallies[split].lengths.items():
            rows[-(-length // width) - 1][split] += count
    return rows


def report(tallies: Mapping[str, Tally], left_out: Counter[str], new: int) -> Iterator[str]:
    """What was prepared, what was left out for what reason, and what no window holds: a line each.

    `new` are conversations that had no split before.
    """
    totals = {split: tallies[split].totals for split in SPLITS}
    counts = ", ".join(f"{totals[split]['conversations']} {split}" for split in SPLITS)
    yield f"{counts}; {totals['train']['tokens']} tokens to train on; {count_of(new, 'new conversation')}"
    if left_out:
        yield f"left out: {', '.join(f'{count} {reason}' for reason, count in left_out.most_common())}"
    if lost := sum(total["lost_reply_tokens"] for total in totals.values()):
        yield f"{lost} tokens of replies are in no window of chat.max_length: their turns are too long"
