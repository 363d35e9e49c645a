"""Counts over prepared examples: conversations, tokens and lengths of each split and source."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fine_tuning.data_preparation.splits import SPLITS

if TYPE_CHECKING:
    from fine_tuning.data_preparation.dataset_builder import Example


class Tally:
    """What was counted of the examples of a split: four bytes for each."""

    def __init__(self) -> None:
        self.lengths = array("I")
        self.totals: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}

    def watch(self, examples: "Iterable[Example]") -> "Iterator[Example]":
        """Pass encoded examples on and count them."""
        for example in examples:
            encoded = example.encoded
            tokens = len(encoded.input_ids)
            self.lengths.append(tokens)
            counts = {"conversations": 1, "tokens": tokens, "trained_tokens": encoded.trained_tokens}
            self.by_source.setdefault(example.source, Counter()).update(counts)
            self.totals.update(counts)
            self.totals["control_tokens"] += encoded.control_ids
            self.totals["lost_oldest_turns"] += encoded.dropped_messages > 0
            self.totals["lost_end_of_reply"] += encoded.cut_tokens > 0
            self.totals["shortened"] += encoded.dropped_messages > 0 or encoded.cut_tokens > 0
            yield example

    def statistics(self) -> dict[str, Any]:
        """For the metrics of the split."""
        totals, lengths = self.totals, sorted(self.lengths)
        tokens, trained = totals["tokens"], totals["trained_tokens"]
        return {
            "conversations": len(lengths),
            "tokens": tokens,
            "trained_tokens": trained,
            "control_tokens": totals["control_tokens"],
            "trained_share": round(trained / tokens, 4) if tokens else 0.0,
            "tokens_mean": round(tokens / len(lengths), 1) if lengths else 0.0,
            "tokens_median": lengths[len(lengths) // 2] if lengths else 0,
            "tokens_max": lengths[-1] if lengths else 0,
            "lost_oldest_turns": totals["lost_oldest_turns"],
            "lost_end_of_reply": totals["lost_end_of_reply"],
            "by_source": {source: dict(counts) for source, counts in sorted(self.by_source.items())},
        }


def statistics(tallies: Mapping[str, Tally], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Counts and lengths of each split and source, and how many were left out for what reason."""
    return {
        "conversations": sum(len(tally.lengths) for tally in tallies.values()) + sum(left_out.values()),
        "left_out": dict(sorted(left_out.items())),
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
    """Conversations of each split by length in tokens: one row a bin, named by its upper end."""
    longest = max((max(tally.lengths, default=1) for tally in tallies.values()), default=1)
    width = -(-longest // bins)
    counts = {split: Counter(-(-length // width) for length in tallies[split].lengths) for split in SPLITS}
    return [{"tokens": width * number} | {s: counts[s][number] for s in SPLITS} for number in range(1, bins + 1)]
