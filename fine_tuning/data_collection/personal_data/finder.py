"""Personal data in text: candidates by patterns that cannot run away, decided by validators.

Order of precedence: SECRET, URL, EMAIL, IP, MAC, IBAN, CREDIT_CARD, US_SSN, NATIONAL_ID, PHONE. Where two overlap the
longer one counts, of two equal ones the earlier in this order. Every pattern starts only where its first character
can start a value and repeats with an upper bound or possessively, so a scan is linear in the text.
"""

import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Literal, NamedTuple, get_args

from fine_tuning.common.writing_systems import ascii_forms
from fine_tuning.data_collection.personal_data import account_numbers, net_addresses, secret_patterns

PersonalDataType = Literal[
    "SECRET", "URL", "EMAIL", "IP", "MAC", "IBAN", "CREDIT_CARD", "US_SSN", "NATIONAL_ID", "PHONE"
]
TYPES: tuple[str, ...] = get_args(PersonalDataType)
PEOPLE = ("PERSON", "ADDRESS", "BIRTH_DATE")  # what `people` finds
PLACEHOLDER = re.compile(r"<(" + "|".join(TYPES + PEOPLE) + r")_(\d{1,6})>")
REGIONS = ("US", "GB", "DE", "FR")
_ROUNDS = 16
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"\w+")
_SEPARATOR = re.compile(r"[\s().:/-]+")


class Hit(NamedTuple):
    type: str
    start: int
    end: int


def find(text: str, types: Iterable[str] = TYPES, regions: tuple[str, ...] = REGIONS) -> list[Hit]:
    """The personal data of a text in its order, without overlaps.

    Args:
        types: which of TYPES to look for.
        regions: countries (ISO 3166) whose national phone numbers count; numbers with a + always do, and behind a label
            (Tel., mobile number, 電話) or where a sentence gives somebody's number those of any country.
    """
    text = ascii_forms(text)
    unmasked = PLACEHOLDER.sub("", text) if "<" in text else text  # the number of a placeholder is no value
    if not _may_hold(unmasked):
        return []
    wanted = set(types)
    hits: list[Hit] = []
    digits = _count_digits(unmasked)
    for kind, finder in _finders(text, digits):
        if kind in wanted:
            hits += [Hit(kind, start, end) for start, end in finder(text)]
    if "PHONE" in wanted and digits >= 7:
        from fine_tuning.data_collection.personal_data.phone_numbers import find_phones  # libphonenumber is large

        spans = [(start, end) for _, start, end in hits]
        hits += [Hit("PHONE", start, end) for start, end in find_phones(text, regions, spans)]
    return without_overlaps(hits) if len(hits) > 1 else hits


def may_hold(text: str) -> bool:
    """Whether `find` could find anything: false for most texts, at a tenth of its cost."""
    return _may_hold(ascii_forms(text))


def _may_hold(text: str) -> bool:
    if "@" in text or "://" in text or "hf_" in text or "api_org_" in text:
        return True
    if _count_digits(text) or net_addresses.INNER_DOT.search(text):
        return True
    return secret_patterns.names_a_secret(text.lower()) or text.count(":") >= 5 or text.count("-") >= 5


_NO_DIGITS = bytes(code for code in range(128) if not chr(code).isdigit())


def _count_digits(text: str) -> int:
    # a tenth of the pattern's time
    return len(text.encode().translate(None, _NO_DIGITS)) if text.isascii() else len(_DIGIT.findall(text))


def _finders(text: str, digits: int) -> Iterator[tuple[str, Callable[[str], Iterator[tuple[int, int]]]]]:
    """The finders that the characters of the text leave possible: most texts have neither @ nor many digits."""
    yield "SECRET", secret_patterns.find_secrets
    dots, colons = text.count("."), text.count(":")
    if dots or "://" in text:
        yield "URL", net_addresses.find_urls
    if "@" in text:
        yield "EMAIL", net_addresses.find_emails
    if colons >= 5 or dots >= 2 or text.count("-") >= 5 or (digits and net_addresses.MAC_NAME.search(text)):
        yield "MAC", net_addresses.find_macs
    if digits == 0:
        return
    if dots >= 3 or colons >= 2:
        yield "IP", net_addresses.find_ips
    if digits >= 4:
        yield "NATIONAL_ID", account_numbers.find_national_ids
    if digits >= 6:
        yield "IBAN", account_numbers.find_ibans
    if digits >= 9:
        yield "US_SSN", account_numbers.find_ssns
    if digits >= 12:
        yield "CREDIT_CARD", account_numbers.find_cards


def without_overlaps(hits: list[Hit]) -> list[Hit]:
    """Of hits that overlap the longest, then the earliest in TYPES and PEOPLE; in their order. Sorts `hits`."""
    hits.sort(key=lambda hit: (hit.start - hit.end, (TYPES + PEOPLE).index(hit.type), hit.start))
    taken: list[tuple[int, Hit]] = []
    for hit in hits:
        index = bisect(taken, hit.start, key=itemgetter(0))
        free_before = index == 0 or taken[index - 1][1].end <= hit.start
        if free_before and (index == len(taken) or hit.end <= taken[index][0]):
            taken.insert(index, (hit.start, hit))
    return [hit for _, hit in taken]


class Masker:
    """Replaces personal data in the texts of one conversation by numbered placeholders, the same for the same value.
    What `find_people` finds, where it is set, is replaced when no pattern finds anything more."""

    find_people: Callable[[str], list[Hit]] | None = None

    def __init__(self, types: Iterable[str] = TYPES, regions: tuple[str, ...] = REGIONS) -> None:
        self._types, self._regions = tuple(types), regions
        self._names: dict[tuple[str, str], str] = {}
        self._persons: list[set[str]] = []  # the words of each person's name
        self._used: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def reserve(self, text: str) -> None:
        """Keep the numbers of placeholders that stand in a text already, from an earlier cleaning or by hand."""
        if "<" in text:
            for match in PLACEHOLDER.finditer(text):
                kind, number = match.group(1), int(match.group(2))
                self._used[kind] = max(self._used.get(kind, 0), number)

    def mask(self, text: str) -> str:
        """The text with its personal data replaced. What a replacement uncovers beside it is replaced too."""
        for _ in range(_ROUNDS):
            hits = find(text, self._types, self._regions) or (self.find_people(text) if self.find_people else [])
            if not hits:
                break
            pieces, position = [], 0
            for hit in hits:
                pieces += (text[position : hit.start], self._name(hit.type, text[hit.start : hit.end]))
                position = hit.end
            text = "".join(pieces) + text[position:]
        return text

    def _name(self, kind: str, value: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        key = (kind, self._same_person(value) if kind == "PERSON" else _same_value(kind, value))
        if key not in self._names:
            self._used[kind] = self._used.get(kind, 0) + 1
            self._names[key] = f"<{kind}_{self._used[kind]}>"
        return self._names[key]

    def _same_person(self, name: str) -> str:
        """The first person of the conversation whose name has all these words, or only such: Anna is Anna Weber."""
        words = set(_WORD.findall(name.casefold()))
        same = (number for number, known in enumerate(self._persons) if words <= known or known <= words)
        if (number := next(same, None)) is None:
            number = len(self._persons)
            self._persons.append(words)
        self._persons[number] |= words
        return str(number)


def _same_value(kind: str, value: str) -> str:
    """The value without how it was written: 555-0100 and 555 0100 are one number."""
    value = ascii_forms(value)
    if kind in ("SECRET", "URL"):
        return value
    if kind in ("EMAIL", "IP"):
        return value.lower()
    return _SEPARATOR.sub("", value).upper()
