"""Numbers that name a person or an account: IBAN, cards, social security and other national numbers.

A pattern proposes and a checksum decides. Every pattern repeats possessively or with an upper bound.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

from fine_tuning.common.writing_systems import JOINED, OTHER_NUMBERS, WORD

_NO_DIGITS = re.compile(r"\D+")


def _digits(text: str) -> str:
    return _NO_DIGITS.sub("", text)


_IBAN_HEAD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ \u00a0\u202f-]?[A-Za-z0-9])")
_CARD = re.compile(rf"\d(?<!{WORD}\d)(?<![.-]\d)(?:[ \u00a0\u202f-]?\d){{11,}}+(?!{WORD}|-|[.,]\d)")
# how cards are printed; among more digits than a card has, only these count
_CARD_GROUPS = re.compile(
    r"(?<!\d)(?:\d{4}([ \u00a0\u202f-])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?"
    r"|\d{4}([ \u00a0\u202f-])\d{6}\2\d{4,5}|\d{15,16})(?!\d)"
)
_DOTTED_CARD = re.compile(rf"\d(?<!{WORD}\d)(?<![.,-]\d)\d{{3}}(?:\.\d{{4}}){{3}}(?!{WORD}|-|[.,]\d)")
_NOT_A_CARD = re.compile(
    r"(?<![A-Za-z])(?:order|invoice|tracking|isbn|issn|ean|upc|gtin|sku|serial|imei|parcel|shipment|ticket|case|ref|id|"
    r"reference|timestamp|part|hash|(?:bestell|auftrag|rechnung|sendung|kunden)\w{0,8}|commande|facture|pedido|factura|"
    r"ordine|fattura|zam[oó]wieni\w{0,3}|bestelling|factuur|encomenda|fatura)\b"
    r"(?:[\s_.-]{0,2}(?:number|no|num|nr|n|id|code|is|was|ist|est)\b){0,3}[\s.:#=º°\"'-]{0,5}$"
    rf"|{OTHER_NUMBERS}{JOINED}$",
    re.IGNORECASE,
)
_CALLED_A_CARD = re.compile(
    r"(?:cards?|kart[eay]|kaart|\bcarte|tarjeta|\bcarta|cart[aã]o|visa|master ?card|amex|american express|\bdiners|"
    r"maestro|discover|カード|信用卡|卡[号號]|카드|"
    r"\bjcb|union ?pay|rupay|\btroy|\bmir)\b[^\d\n]{0,20}$",
    re.IGNORECASE,
)
_SSN = re.compile(rf"\d(?<!{WORD}\d)(?<!-\d)\d\d([- .])\d{{2}}\1\d{{4}}(?!{WORD}|-|\.\d)")
_BARE_SSN = re.compile(
    r"(?:\bssn|social security(?: number| no\.?| #)?)(?:\s{0,2}(?:is|:|=|#|-))?\s{0,2}(\d{9})(?!\d)", re.IGNORECASE
)
_NATIONAL = re.compile(
    rf"(?=[A-Z0-9])(?<!{WORD})(?<![.-])(?:"
    r"(?P<cpf>\d{3}\.\d{3}\.\d{3}-\d{2})"  # Brazil
    r"|(?P<nino>[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D])"  # United Kingdom
    r"|(?P<codice>[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z])"  # Italy
    r"|(?P<dni>(?:\d{8}|[XYZ]-?\d{7})-?[A-Z])"  # Spain
    r"|(?P<nir>[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2})"  # France
    r"|(?P<sin>\d{3}[ -]\d{3}[ -]\d{3})"  # Canada
    r"|(?P<aadhaar>[2-9]\d{3} \d{4} \d{4})"  # India
    r"|(?P<pan>[A-Z]{3}[PCHFATBLJG][A-Z]\d{4}[A-Z])"  # India, tax
    r"|(?P<curp>[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d)"  # Mexico
    r"|(?P<ahv>756\.\d{4}\.\d{4}\.\d{2})"  # Switzerland
    r"|(?P<nn>\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2})"  # Belgium
    r"|(?P<hetu>\d{6}[+A-FU-Y-]\d{3}[0-9A-Y])"  # Finland
    r"|(?P<rrn>\d{6}-\d{7})"  # South Korea
    r"|(?P<ric>[1-9]\d{16}[0-9X])"  # China
    r"|(?P<called>\d(?:[ ./+-]?\d){6,17}+(?:-?[A-Z]{1,2})?)"
    rf")(?!{WORD}|-|\.\d)"
)
# what each of them is checked by in python-stdnum
_CHECKS = {
    "cpf": ("br.cpf",),
    "codice": ("it.codicefiscale",),
    "dni": ("es.dni", "es.nie"),
    "nir": ("fr.nir",),
    "sin": ("ca.sin",),
    "aadhaar": ("in_.aadhaar",),
    "curp": ("mx.curp",),
    "ahv": ("ch.ssn",),
    "nn": ("be.nn",),
    "hetu": ("fi.hetu",),
    "rrn": ("kr.rrn",),
    "ric": ("cn.ric",),
}
# numbers that look like many others count only behind one of these words
# fmt: off
_CALLED = {
    word: checks
    for words, *checks in (
        ("pesel", "pl.pesel"), ("bsn burgerservicenummer sofinummer", "nl.bsn"), ("cpf", "br.cpf"), ("nhs", "gb.nhs"),
        ("steuer steueridentifikationsnummer identifikationsnummer idnr", "de.idnr"), ("pps ppsn", "ie.pps"),
        ("personnummer personnumret", "se.personnummer", "no.fodselsnummer"),
        ("fødselsnummer fodselsnummer", "no.fodselsnummer"), ("cpr", "dk.cpr"),
        ("nif contribuinte", "pt.nif", "es.nif"), ("itin", "us.itin"), ("tfn", "au.tfn"), ("cnp", "ro.cnp"),
        ("rodné rodne", "cz.rc"), ("oib", "hr.oib"), ("isikukood", "ee.ik"), ("asmens", "lt.asmens"),
        ("егн egn", "bg.egn"), ("αμκα amka", "gr.amka"), ("svnr sozialversicherungsnummer", "at.vnr"),
        ("kimlik tckn", "tr.tckimlik"), ("rut", "cl.rut", "uy.rut"), ("aadhaar aadhar", "in_.aadhaar"),
        ("sin insurance", "ca.sin"), ("ird", "nz.ird"), ("sécurité securite sécu nir", "fr.nir"),
        ("african sa id", "za.idnr"), ("инн", "ru.inn"), ("іпн рнокпп", "ua.rntrc"), ("nik ktp", "id.nik"),
        ("nric ic mykad", "my.nric"), ("cnic", "pk.cnic"), ("cuil cuit", "ar.cuit"),
        ("cédula cedula", "do.cedula", "ec.ci"), ("kennitala", "is_.kennitala"), ("emšo emso", "si.emso"),
    )
    for word in words.split()
}
# in scripts without spaces, or with marks within their words
_CALLED_WITHIN = {
    "マイナンバー": ["jp.in_"], "個人番号": ["jp.in_"], "주민": ["kr.rrn"], "ประชาชน": ["th.pin"],
    "आधार": ["in_.aadhaar"], "ת.ז": ["il.idnr"], "תעודת זהות": ["il.idnr"],
}
# fmt: on
_WORD = re.compile(r"[^\W\d_]+")


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Spans of IBANs of the length that their country has, with a right checksum."""
    for head in _IBAN_HEAD.finditer(text):
        length = _iban_lengths().get(head.group()[:2].upper())
        rest = _iban_rest(length).match(text, head.end()) if length else None
        if rest and _iban_checksum(head.group() + rest.group()):
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


def _iban_checksum(value: str) -> bool:
    """ISO 13616: the first four characters go to the end, letters count from 10, and the number is 1 modulo 97."""
    value = "".join(filter(str.isalnum, value))
    moved = value[4:] + value[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Spans of card numbers; what is called an order, an ISBN and the like is none."""
    for run in _CARD.finditer(text):
        before = text[max(0, run.start() - 30) : run.start()]
        if _NOT_A_CARD.search(before):
            continue
        called = _CALLED_A_CARD.search(before) is not None
        parts = [run] if len(_digits(run.group())) <= 19 else _CARD_GROUPS.finditer(text, *run.span())
        for part in parts:
            if _is_card(_digits(part.group()), called):
                yield part.span()
    for match in _DOTTED_CARD.finditer(text):
        if _is_card(_digits(match.group()), called=False):
            yield match.span()


def _is_card(digits: str, called: bool) -> bool:
    """Luhn checksum, and the length and prefix of a known scheme (ISO/IEC 7812) unless it is called a card."""
    length, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    scheme = (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)
        or (two in (34, 37) and length == 15)
        or ((300 <= three <= 305 or two in (36, 38, 39)) and 14 <= length <= 19)
        or ((four == 6011 or two == 65 or 644 <= three <= 649 or two in (62, 81)) and 16 <= length <= 19)
        or (3528 <= four <= 3589 and 16 <= length <= 19)
        or (two in (50, 56, 57, 58, 60, 63, 67) and 12 <= length <= 19)
        or ((2200 <= four <= 2205 or four in (8600, 9792, 9860) or two == 82) and length == 16)  # Mir, Troy, RuPay
    )
    return (scheme or called) and len(set(digits)) > 1 and luhn(digits)


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def find_ssns(text: str) -> Iterator[tuple[int, int]]:
    """Spans of US social security numbers that were given out."""
    from stdnum.us import ssn

    for match in _SSN.finditer(text):
        if ssn.is_valid(_digits(match.group())):
            yield match.span()
    if "ssn" in text.lower() or "ecurity" in text:
        for match in _BARE_SSN.finditer(text):
            if ssn.is_valid(match.group(1)):
                yield match.span(1)


def find_national_ids(text: str) -> Iterator[tuple[int, int]]:
    """Spans of national numbers that are unmistakable, or are called what they are."""
    for match in _NATIONAL.finditer(text):
        kind, value, start = match.lastgroup or "", match.group(), match.start()
        before = text[max(0, start - 40) : start]
        if kind == "called" or not _national_check(kind, value, before):
            value = _called_number(value, before)
        if value:
            yield start, start + len(value)


def _national_check(kind: str, value: str, before: str) -> bool:
    if kind in ("sin", "aadhaar", "pan") and not _NAMED_ID.search(before):
        return False
    return kind in ("nino", "pan") or _is_valid(_CHECKS[kind], value)


def _called_number(value: str, before: str) -> str:
    """The number of which the words before it say what it is, without the groups behind it; empty if it is none."""
    words = _WORD.findall(before)[-4:]
    checks = next((_CALLED[word] for word in map(str.lower, words) if word in _CALLED), [])
    if not checks and not before.isascii():
        checks = next((found for name, found in _CALLED_WITHIN.items() if name in before[-20:]), [])
    if "id" in map(str.lower, words) and _NOT_AN_ID.search(before):
        return ""
    while checks and value and not _is_valid(checks, value):
        value = value[: max(map(value.rfind, " ./+-"), default=0)] if _GROUPED.search(value) else ""
    return value if checks else ""


_NOT_AN_ID = re.compile(
    r"\b(?:order|user|item|ticket|session|case|invoice|tracking|customer)\W{0,2}id\b", re.IGNORECASE
)
_GROUPED = re.compile(r"[ ./+-]")


def _is_valid(checks: Sequence[str], value: str) -> bool:
    return any(_stdnum(name).is_valid(value) for name in checks)


@cache
def _stdnum(name: str) -> ModuleType:
    return import_module(f"stdnum.{name}")


_NAMED_ID = re.compile(
    r"(?:\b(?:pan|sin|aadhaar|aadhar|uid|tax|national|social|insurance|identity|id|personal)\b)", re.IGNORECASE
)
