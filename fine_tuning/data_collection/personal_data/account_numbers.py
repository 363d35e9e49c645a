"""Numbers that name a person or an account: IBAN, cards, social security and other national numbers.

A pattern proposes and a checksum decides. Every pattern repeats possessively or with an upper bound.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

from fine_tuning.data_collection.personal_data.patterns import PATTERNS, Expressions

_NO_DIGITS = re.compile(r"\D+")


def _digits(text: str) -> str:
    return _NO_DIGITS.sub("", text)


_FORMS = PATTERNS["national_id"]["forms"]
_RE = Expressions("account", forms="".join(f"(?P<{name}>{form})|" for name, (form, *_) in _FORMS.items()))
_CALLED = {word: checks for words, checks in PATTERNS["national_id"]["called"].items() for word in words.split()}
_CALLED_WITHIN = PATTERNS["national_id"]["called_within"]
_WORD = re.compile(r"[^\W\d_]+")


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Spans of IBANs of the length that their country has, with a right checksum."""
    for head in _RE.iban_head.finditer(text):
        length = _iban_lengths().get(head.group()[:2].upper())
        rest = _iban_rest(length).match(text, head.end()) if length else None
        value = "".join(filter(str.isalnum, head.group() + rest.group())) if rest else ""
        if rest and _stdnum("iso7064.mod_97_10").is_valid(value[4:] + value[:4]):
            yield head.start(), rest.end()


@cache
def _iban_rest(length: int) -> re.Pattern[str]:
    return re.compile(rf"(?:[ \u00a0\u202f-]?[A-Za-z0-9]){{{length - 4}}}(?![A-Za-z0-9])")


@cache
def _iban_lengths() -> dict[str, int]:
    """Country → length of its IBANs, from the registry (ISO 13616) that python-stdnum carries."""
    from stdnum import numdb

    return {
        country: 4 + sum(int(count) for count in re.findall(r"(\d+)!", properties["bban"]))
        for _, country, _, properties, _ in numdb.get("iban").prefixes
    }


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Spans of card numbers; what is called an order, an ISBN and the like is none."""
    for run in _RE.card.finditer(text):
        before = text[max(0, run.start() - 30) : run.start()]
        if _RE.not_a_card.search(before):
            continue
        called = _RE.called_a_card.search(before) is not None
        parts = [run] if len(_digits(run.group())) <= 19 else _RE.card_groups.finditer(text, *run.span())
        for part in parts:
            if _is_card(_digits(part.group()), called):
                yield part.span()
    for match in _RE.dotted_card.finditer(text):
        if _is_card(_digits(match.group()), called=False):
            yield match.span()


def _is_card(digits: str, called: bool) -> bool:
    """Luhn checksum, and the length and prefix of a known scheme (ISO/IEC 7812) unless it is called a card."""
    schemes = PATTERNS["card"]["schemes"]
    scheme = any(low <= digits[: len(low)] <= high and len(digits) in lengths for low, high, lengths in schemes)
    return (scheme or called) and len(set(digits)) > 1 and _stdnum("luhn").is_valid(digits)


def find_ssns(text: str) -> Iterator[tuple[int, int]]:
    """Spans of US social security numbers that were given out."""
    ssn = _stdnum("us.ssn")
    for match in _RE.ssn.finditer(text):
        if ssn.is_valid(_digits(match.group())):
            yield match.span()
    if "ssn" in text.lower() or "ecurity" in text:
        for match in _RE.bare_ssn.finditer(text):
            if ssn.is_valid(match.group(1)):
                yield match.span(1)


def find_national_ids(text: str) -> Iterator[tuple[int, int]]:
    """Spans of national numbers that are unmistakable, or are called what they are."""
    for match in _RE.national.finditer(text):
        kind, value, start = match.lastgroup or "", match.group(), match.start()
        before = text[max(0, start - 40) : start]
        if kind == "called" or not _national_check(kind, value, before):
            value = _called_number(value, before)
        if value:
            yield start, start + len(value)


def _national_check(kind: str, value: str, before: str) -> bool:
    if kind in ("sin", "aadhaar", "pan") and not _RE.named_id.search(before):
        return False
    checks = _FORMS[kind][1:]
    return not checks or _is_valid(checks, value)


def _called_number(value: str, before: str) -> str:
    """The number of which the words before it say what it is, without the groups behind it; empty if it is none."""
    words = _WORD.findall(before)[-4:]
    checks = next((_CALLED[word] for word in map(str.lower, words) if word in _CALLED), [])
    if not checks and not before.isascii():
        checks = next((found for name, found in _CALLED_WITHIN.items() if name in before[-20:]), [])
    if "id" in map(str.lower, words) and _RE.not_an_id.search(before):
        return ""
    while checks and value and not _is_valid(checks, value):
        value = value[: max(map(value.rfind, " ./+-"), default=0)] if _GROUPED.search(value) else ""
    return value if checks else ""


_GROUPED = re.compile(r"[ ./+-]")


def _is_valid(checks: Sequence[str], value: str) -> bool:
    return any(_stdnum(name).is_valid(value) for name in checks)


@cache
def _stdnum(name: str) -> ModuleType:
    return import_module(f"stdnum.{name}")
