"""Precision and recall of masking per type, with Wilson intervals of 95 %, on labelled cases, and every miss.

    python -m benchmarks.masking [CASES.jsonl ...] [--phones SEED]

--phones adds valid phone numbers of many countries, drawn with libphonenumber's metadata, in sentences of their
languages (phone_sentences.json), and other numbers in texts that have no phone number.

A case is a line {"text", "hits": [[type, value], ...], "source"}: the values in the order in which they stand, and the
standard or documentation that says what they are; without hits it is a negative one. The default are the cases that
the tests hold to a floor. A value counts only if its type and both its ends are right.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import binomtest

from fine_tuning.common.records import read_jsonl
from fine_tuning.data_collection.personal_data.finder import TYPES, Hit, find

CASES = Path(__file__).parents[1] / "tests" / "personal_data_cases.jsonl"
PHONE_SENTENCES = Path(__file__).parent / "phone_sentences.json"


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


def phone_cases(seed: int, each: int = 4) -> Iterator[dict]:
    """Cases with a valid phone number of a country in a sentence of its language, and cases with other numbers only.

    Args:
        each: how many cases are made of a sentence. The numbers are mobile and landline ones, written nationally,
            internationally, or as digits alone.
    """
    sentences = json.loads(PHONE_SENTENCES.read_text(encoding="utf-8"))
    draw = random.Random(seed)
    for region, templates in sentences["phones"].items():
        for template in templates:
            for _ in range(each):
                number = _phone(region, draw)
                source = f"libphonenumber: {region}, {template}"
                yield {"text": template.format(n=number), "hits": [["PHONE", number]], "source": source}
    for template in sentences["others"]:
        for _ in range(each):
            text = re.sub(r"\{(\w+)\}", lambda match: _figure(match.group(1), draw), template)
            yield {"text": text, "hits": [], "source": f"negative: {template}"}


def _phone(region: str, draw: random.Random) -> str:
    """A random valid number of a country, as it is written there or abroad."""
    import phonenumbers as library

    kind = draw.choice(
        (library.PhoneNumberType.MOBILE, library.PhoneNumberType.MOBILE, library.PhoneNumberType.FIXED_LINE)
    )
    example = library.national_significant_number(library.example_number_for_type(region, kind))
    number = None
    while number is None or not library.is_valid_number_for_region(number, region):
        # the first digits say what kind of number it is
        digits = example[:3] + "".join(draw.choice("0123456789") for _ in example[3:])
        number = library.parse(digits, region)
    formats = library.PhoneNumberFormat
    written = draw.choice((formats.NATIONAL, formats.NATIONAL, formats.INTERNATIONAL, formats.E164, None))
    if written is None:
        return re.sub(r"\D", "", library.format_number(number, formats.NATIONAL))
    return library.format_number(number, written)


def _figure(name: str, draw: random.Random) -> str:
    """A figure of one kind: dN is N digits, the others are what their name says."""
    if re.fullmatch(r"d\d+", name):
        return str(draw.randrange(10 ** (int(name[1:]) - 1), 10 ** int(name[1:])))
    month, day = draw.randint(1, 12), draw.randint(1, 28)
    date = f"{draw.randint(1950, 2035)}-{month:02}-{day:02}"
    isbn = f"978{draw.randrange(10**9):09}"
    values = {
        "day": f"{day:02}", "mon": str(month), "year": date[:4], "p": str(draw.randint(10, 1999)),
        "date": draw.choice((date, f"{day:02}.{month:02}.{date[:4]}", f"{month:02}/{day:02}/{date[:4]}")),
        "time": f"{draw.randrange(24):02}:{draw.randrange(60):02}:{draw.randrange(60):02}",
        "ts": str(draw.randint(10**9, 19 * 10**8)), "v": ".".join(str(draw.randrange(30)) for _ in range(3)),
        "isbn13": isbn + str(-sum(int(c) * (1 + 2 * (i % 2)) for i, c in enumerate(isbn)) % 10),
        "isbn10": f"{draw.randrange(10**9):09}{draw.choice('0123456789X')}", "lib": draw.choice(("torch", "numpy")),
        "price": draw.choice((f"{draw.randrange(10**6)}.{draw.randrange(100):02}", f"{draw.randrange(10**7):,}")),
        "lat": f"{draw.uniform(-90, 90):.5f}", "lon": f"{draw.uniform(-180, 180):.5f}",
        "m": f"{draw.uniform(-9, 99):.3f}",
        "pi": "3.14159265358979323846"[: draw.randint(8, 22)], "hex": f"{draw.randrange(16**10):010x}",
        "uuid": "-".join(f"{draw.randrange(16**n):0{n}x}" for n in (8, 4, 4, 4, 12)),
    }  # fmt: skip
    return values[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", type=Path, default=[CASES])
    parser.add_argument("--phones", type=int, metavar="SEED", help="add drawn phone numbers and other figures")
    arguments = parser.parse_args()
    cases = [case for path in arguments.cases for case in read_jsonl(path)]
    if arguments.phones is not None:
        cases += phone_cases(arguments.phones)
    outcome = score(cases)
    print(f"{len(cases)} cases, {sum(not case['hits'] for case in cases)} of them negative")
    print(f"{'':14}{'values':>8}   {'precision':24}{'recall':24}")
    for kind in TYPES:
        precision, recall = _share(*outcome.precision(kind)), _share(*outcome.recall(kind))
        print(f"{kind:14}{outcome.recall(kind)[1]:8}   {precision:24}{recall}")
    for kind, miss in sorted(outcome.misses):
        print(f"{kind} {miss}")


def _share(part: int, whole: int) -> str:
    if not whole:
        return "no value"
    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{part / whole:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
