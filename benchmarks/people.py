"""Precision, recall and time of masking names, addresses and dates of birth, and alarms on conversations.

    python -m benchmarks.people [--model package:NAME|FOLDER|HUB_ID] [--threshold T] [--misses] [FILE.jsonl ...]

The labelled cases are tests/people_cases.jsonl (English, German, French; written for this, with characters of books,
brands, places and code that are nobody's data). A value is found when all its characters are masked; a hit is right
when it touches one; both as exact type and ends are given too. The threshold was chosen on the odd lines, so the even
ones are shown apart. Conversations are files of data/clean: what is masked there is counted, not judged.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from scipy.stats import binomtest

from benchmarks.masking import labels
from fine_tuning.common.records import read_jsonl
from fine_tuning.data_collection.personal_data import people
from fine_tuning.data_collection.personal_data.finder import PEOPLE, Hit
from fine_tuning.data_collection.personal_data.people import MODEL, Find, PeopleSettings

CASES = Path(__file__).parents[1] / "tests" / "people_cases.jsonl"


def score(cases: Iterable[dict], find: Find) -> tuple[Counter[str], list[str]]:
    """Counts of values and hits by outcome, and what went wrong in words."""
    counts: Counter[str] = Counter()
    misses = []
    for case in cases:
        text, expected, got = case["text"], labels(case), set(find(case["text"]))
        masked = {place for hit in got for place in range(hit.start, hit.end)}
        missed = {hit for hit in expected if not masked.issuperset(range(hit.start, hit.end))}
        wrong = {hit for hit in got if not any(_touch(hit, value) for value in expected)}
        counts.update(
            values=len(expected), found=len(expected - missed), hits=len(got), right=len(got - wrong),
            exact=len(got & expected), negative=not expected, alarms=not expected and bool(got),
        )  # fmt: skip
        for kind in {hit.type for hit in expected}:
            counts[f"values {kind}"] += sum(hit.type == kind for hit in expected)
            counts[f"found {kind}"] += sum(hit.type == kind for hit in expected - missed)
        for word, hits in (("missed", missed), ("none", wrong)):
            misses += [f"{word} {hit.type} {text[hit.start : hit.end]!r} in {text!r}" for hit in sorted(hits)]
    return counts, misses


def _touch(one: Hit, other: Hit) -> bool:
    return one.start < other.end and other.start < one.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("conversations", nargs="*", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threshold", type=float, default=people.THRESHOLD)
    parser.add_argument("--misses", action="store_true")
    args = parser.parse_args()
    people.THRESHOLD = args.threshold
    find = people.people_finder(PeopleSettings(people="mask", people_model=args.model))
    cases = list(read_jsonl(CASES))
    parts = {"odd lines": cases[::2], "even lines": cases[1::2]}
    parts |= {name: [case for case in cases if case["language"] == name] for name in ("en", "de", "fr")}
    for name, some in parts.items():
        counts, misses = score(some, find)
        kinds = (f"{kind} {counts[f'found {kind}']}/{counts[f'values {kind}']}" for kind in PEOPLE)
        print(
            f"{name:11} {len(some)} texts: precision {_share(counts['right'], counts['hits'])}, recall "
            f"{_share(counts['found'], counts['values'])} ({', '.join(kinds)}), {counts['exact']} exact; alarms in "
            f"{counts['alarms']} of {counts['negative']} negatives"
        )
        if args.misses and name.endswith("lines"):
            print(*misses, sep="\n")
    print("cases:", _time([case["text"] for case in cases], find))
    for path in args.conversations:
        texts = [message["content"] for line in read_jsonl(path) for message in line["messages"]]
        print(f"{path.name}:", _time(texts, find))


def _time(texts: list[str], find: Find) -> str:
    started = time.process_time()
    found = [find(text) for text in texts]
    milliseconds = (time.process_time() - started) / len(texts) * 1000
    kinds = Counter(hit.type for hits in found for hit in hits)
    length = sum(map(len, texts)) / len(texts)
    return (
        f"{len(texts)} texts of {length:.0f} characters, {milliseconds:.1f} ms of CPU each, hits in "
        f"{_share(sum(map(bool, found)), len(texts))} of them: {dict(kinds)}"
    )


def _share(part: int, whole: int) -> str:
    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{part / whole:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
