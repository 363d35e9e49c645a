"""Precision and recall of masking per type, with Wilson intervals of 95 %, on labelled cases, and every miss.

    python -m benchmarks.masking [CASES.jsonl ...]

A case is a line {"text", "hits": [[type, value], ...], "source"}: the values in the order in which they stand, and the
standard or documentation that says what they are; without hits it is a negative one. The default are the cases that
the tests hold to a floor. A value counts only if its type and both its ends are right.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fine_tuning.data_collection.personal_data import TYPES, Hit, find
from fine_tuning.integration.votes import wilson
from fine_tuning.records import read_jsonl

CASES = Path(__file__).parents[1] / "tests" / "personal_data_cases.jsonl"


@dataclass
class Outcome:
    """Per type how many values were found, missed and found where none is, and the misses in words."""

    found: Counter = field(default_factory=Counter)
    missed: Counter = field(default_factory=Counter)
    extra: Counter = field(default_factory=Counter)
    misses: list[tuple[str, str]] = field(default_factory=list)  # (type, what went wrong)

    def precision(self, kind: str) -> tuple[int, int]:
        """(right ones, all that were found)"""
        return self.found[kind], self.found[kind] + self.extra[kind]

    def recall(self, kind: str) -> tuple[int, int]:
        """(found ones, all that are there)"""
        return self.found[kind], self.found[kind] + self.missed[kind]


def labels(case: dict) -> set[Hit]:
    """The labelled values of a case with their places: each is looked for behind the one before it.

    Raises:
        ValueError: a value does not stand in the text.
    """
    hits, position = set(), 0
    for kind, value in case["hits"]:
        start = case["text"].index(value, position)
        position = start + len(value)
        hits.add(Hit(kind, start, position))
    return hits


def score(cases: Iterable[dict]) -> Outcome:
    """What masking, as it is set by default, finds in the cases beside what their labels say."""
    outcome = Outcome()
    for case in cases:
        expected, got = labels(case), set(find(case["text"]))
        for tally, hits in (
            (outcome.found, expected & got),
            (outcome.missed, expected - got),
            (outcome.extra, got - expected),
        ):
            tally.update(hit.type for hit in hits)
        for word, hits in (("missed", expected - got), ("none", got - expected)):
            for kind, start, end in sorted(hits):
                value, around = case["text"][start:end], case["text"][max(0, start - 30) : end + 20]
                outcome.misses.append((kind, f"{word}: {value!r} in {around!r} ({case['source']})"))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", type=Path, default=[CASES])
    cases = [case for path in parser.parse_args().cases for case in read_jsonl(path)]
    outcome = score(cases)
    print(f"{len(cases)} cases, {sum(not case['hits'] for case in cases)} of them negative")
    print(f"{'':14}{'values':>8}   {'precision':24}{'recall':24}")
    for kind in TYPES:
        precision, recall = _share(*outcome.precision(kind)), _share(*outcome.recall(kind))
        print(f"{kind:14}{outcome.recall(kind)[1]:8}   {precision:24}{recall}")
    for kind, miss in sorted(outcome.misses):
        print(f"{kind} {miss}")


def _share(part: int, whole: int) -> str:
    interval = wilson(part, whole)
    return f"{part / whole:.3f} ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "no value"


if __name__ == "__main__":
    main()
