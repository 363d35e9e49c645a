"""Counts over prepared rows: conversations, tokens and lengths of each split and source."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fine_tuning.common.errors import count_of
from fine_tuning.data_preparation.splits import SPLITS

if TYPE_CHECKING:
    from fine_tuning.schema.prepared import PreparedRow


class Tally:
    """Counts over the rows of a split; four bytes a row."""

    def __init__(self) -> None:
        self.lengths = array("I")
        self.totals: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}

    def watch(self, rows: "Iterable[PreparedRow]") -> "Iterator[PreparedRow]":
        """Pass encoded rows on and count them."""
        for row in rows:
            tokens = len(row.input_ids)
            self.lengths.append(tokens)
            counts = {"conversations": int(row.window == 0), "windows": 1, "tokens": tokens}
            by_source = self.by_source.setdefault(row.source, Counter())
            by_source.update(counts, trained_tokens=row.counts["trained_tokens"])
            self.totals.update(counts, several_windows=int(row.window == 1))
            self.totals.update(row.counts)
            yield row

    def statistics(self) -> dict[str, Any]:
        """For the metrics of the split. Lengths are those of windows: most conversations are one.

        `several_windows` counts conversations; `windows_left_out` are those of held-out conversations that were not
        drawn, because one may have a hundredth of max_held_out_tokens; `lost_turns` are turns whose prompt alone leaves
        no room for a reply, `lost_reply_tokens` what of their and of other replies no window has room for.
        """
        totals, lengths = self.totals, sorted(self.lengths)
        tokens = totals["tokens"]
        counted = ("conversations", "windows_left_out", "several_windows", "tokens", "trained_tokens", "control_tokens")
        lost = ("lost_end_of_reply", "lost_turns", "lost_reply_tokens")
        return {name: totals[name] for name in counted + lost} | {
            "windows": len(lengths),
            "trained_share": round(totals["trained_tokens"] / tokens, 4) if tokens else 0.0,
            "tokens_mean": round(tokens / len(lengths), 1) if lengths else 0.0,
            "tokens_median": lengths[len(lengths) // 2] if lengths else 0,
            "tokens_max": lengths[-1] if lengths else 0,
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
        {"part": f"{split}: {source}"} | dict(counts)
        for split in SPLITS
        for source, counts in sorted(tallies[split].by_source.items())
    ]


def length_histogram(tallies: Mapping[str, Tally], bins: int = 16) -> list[dict[str, int]]:
    """Windows of each split by length in tokens: one row a bin, named by its upper end."""
    longest = max((max(tally.lengths, default=1) for tally in tallies.values()), default=1)
    width = -(-longest // bins)
    counts = {split: Counter(-(-length // width) for length in tallies[split].lengths) for split in SPLITS}
    return [{"tokens": width * number} | {s: counts[s][number] for s in SPLITS} for number in range(1, bins + 1)]


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
