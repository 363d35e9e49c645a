"""Phone numbers in text: groups of digits as candidates, libphonenumber as the judge."""

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phonenumbers import PhoneNumber

_BETWEEN = r"(?:\)[ -]?\(?|\(| ?[-–/\u2010\u2011] ?\(?|[ .\u00a0]\(?)"  # digits of a number
_INTERNATIONAL = re.compile(rf"(?<![\w+])(?:\(\+|\+\(?|\(?00(?=[1-9]))\d++(?:{_BETWEEN}\d++)*+")
_NATIONAL_PHONE = re.compile(rf"(?<![\w.,/=#$€£&+-])(?=[\d() .\u00a0\u2010\u2011–/-]{{7}})\(?\d++(?:{_BETWEEN}\d++)*+")
_MOST_GROUPS = 8
_EXTENSION = re.compile(
    r"(?:\s{0,2}|, |;)(?:ext(?:ension|n)?\.?|x|#|durchwahl|poste)(?:\s{0,2}|: |=)\d{1,6}(?!\w)", re.IGNORECASE
)
_CALLED_A_PHONE = re.compile(
    r"(?:\b(?:phone|tel|telephone|mobile|cell|cellphone|call|text|sms|whatsapp|signal|fax|dial|ring|reach|contact|hotline|"
    r"telefon\w{0,9}|handy\w{0,8}|mobilnummer|rufnummer|ruf|rufen|anrufen|durchwahl|t[ée]l[ée]phone|portable|"
    r"appele[zr]|appelle|joindre|tel[ée]fono|m[óo]vil|ll[áa]mame|celular|telem[óo]vel|telefone|ligue|cellulare|chiama(?:mi)?|"
    r"telefoon\w{0,7}|bel|zadzwo[ńn]|kom[óo]rk[aię]|(?:my|his|her|our|their|your) (?:new )?number|"
    r"(?:meine|deine|seine|ihre|unsere) (?:neue )?nummer|(?:mon|ton|son|notre|votre) num[ée]ro|mi n[úu]mero)\b)"
    r"[^\d\n]{0,24}$",
    re.IGNORECASE,
)
_CALLED_OTHERWISE = re.compile(
    r"\b(?:order|invoice|tracking|isbn(?:-1[03])?|issn|ean|upc|sku|serial|model|part|case|ticket|ref(?:erence)?|id|imei|version|"
    r"account|page|pages|pp|doi|rfc|iso|figure|timestamp|port|zip|code|error|bug|issue|build|date|patent|"
    r"card|social security|bestell\w{0,8}|auftrag\w{0,8}|rechnung\w{0,8}|sendung\w{0,8}|kunden\w{0,8}|konto\w{0,8}|"
    r"aktenzeichen|vorgang\w{0,8}|artikel\w{0,8}|serien\w{0,8}|commande|facture|dossier|siret|siren|pedido|factura|ordine|"
    r"fattura|zam[oó]wieni\w{0,3}|bestelling|factuur)"
    r"(?:\s(?:number|no|num|nr|id|code|n[º°]))?(?:\s(?:is|was|ist|est|lautet))?\.?[^\w\n]{0,4}$",
    re.IGNORECASE,
)
_DATE_OR_TIME = re.compile(
    r"(?:(?:19|20)\d{2}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d{2})(?:$|[ T(-])"
    r"|(?:19|20)\d{2} ?- ?(?:19|20)\d{2}$"
)
_ISBN_13 = re.compile(r"97[89][- ]?\d")


def find_phones(text: str, regions: tuple[str, ...], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Phone numbers; digits inside what is `taken` already (a card, an IBAN) are not asked again."""
    for pattern, possible in ((_INTERNATIONAL, ()), (_NATIONAL_PHONE, regions)):
        if pattern is _INTERNATIONAL and "+" not in text and "00" not in text:
            continue
        for run in pattern.finditer(text):
            first, last = run.span()
            if any(start <= first and last <= end for start, end in taken):
                continue
            for start, end in _phones_of_run(text, first, last, possible):
                extension = _EXTENSION.match(text, end)
                yield start, extension.end() if extension else end


def _phones_of_run(text: str, start: int, end: int, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Phone numbers that follow each other from the start of a run of groups of digits.

    The longest sequence of groups that is a number counts. What follows no number is none: figures in a table.
    """
    groups = [group.span() for group in _GROUP.finditer(text, start, end)]
    if _WORD_GOES_ON.match(text, end) and not _EXTENSION.match(text, end):  # 0544 056B
        groups.pop()
    if len(groups) > 1 and text[groups[0][1]] == ")" and text[start] not in "(+":  # 1) 650-253-0000
        del groups[0]
        start = groups[0][0] - (text[groups[0][0] - 1] == "(")
    if not groups or groups[-1][1] - groups[0][0] < 7 or _NO_PHONE_BEFORE.match(text, end):
        return
    first = 0
    while first < len(groups):
        for last in range(min(len(groups), first + _MOST_GROUPS) - 1, first - 1, -1):
            stop = groups[last][1]
            count = sum(b - a for a, b in groups[first : last + 1])
            # An opening parenthesis that closes after the number is the sentence's.
            begin = start + (text[start] == "(" and text.count("(", start, stop) > text.count(")", start, stop))
            if 7 <= count <= 15 and _is_phone(text[begin:stop], text[max(0, begin - 40) : begin], regions):
                yield begin, stop
                break
        else:
            return
        first = last + 1
        start = groups[first][0] if first < len(groups) else end
        start -= start > 0 and text[start - 1] == "("


def _is_phone(value: str, before: str, regions: tuple[str, ...]) -> bool:
    """Valid for its country, and either international, or written the way the country writes it, or called a phone."""
    if value.count("(") != value.count(")") or _DATE_OR_TIME.match(value) or _ISBN_13.match(value):
        return False
    if value.startswith(("+", "(+")):
        return _parse(value, None) is not None
    if _CALLED_OTHERWISE.search(before):
        return False
    if value.startswith(("00", "(00")):
        return _parse("+" + value.lstrip("(")[2:], None) is not None
    called = _CALLED_A_PHONE.search(before) is not None
    if not called and value.isdigit():
        return False
    count = sum(map(str.isdigit, value))
    for region in regions:
        prefix, lengths = _numbering(region)
        if count not in lengths or (prefix == "0" and not called and value.lstrip("(")[0] != "0"):
            continue
        number = _parse(value, region)
        if number is None:
            continue
        if called:
            return True
        written, groups = _GROUP.findall(value), _GROUP.findall(_national_format(number))
        if prefix == "0" and len(groups) == 2 and groups[1][0] == "0":
            continue  # no number after the area code starts with the prefix of long-distance calls
        if written[0] in ("1", "0") and len(written) > 2:  # the trunk prefix, written apart
            written = written[1:]
        if len(written) > 1 and (written[0] == groups[0] or _is_mobile_code(written[0], groups[0], number)):
            return True
    return False


def _is_mobile_code(written: str, area: str, number: "PhoneNumber") -> bool:
    """Whether people write the code of a mobile network shorter than it is formatted: 0151 for the German 01512."""
    from phonenumbers import PhoneNumberType, number_type

    return len(written) >= 4 and area.startswith(written) and number_type(number) == PhoneNumberType.MOBILE


_GROUP = re.compile(r"\d+")
_WORD_GOES_ON = re.compile(r"[A-Za-z]")
_NO_PHONE_BEFORE = re.compile(r"[%°€$£_]|-[A-Za-z]")


@cache
def _numbering(region: str) -> tuple[str, frozenset[int]]:
    """(trunk prefix, how many digits a number dialled within the region can have) by libphonenumber's metadata."""
    from phonenumbers import PhoneMetadata

    metadata = PhoneMetadata.metadata_for_region(region, None)
    if metadata is None:
        return "", frozenset()
    prefix = metadata.national_prefix or ""
    lengths = metadata.general_desc.possible_length
    return prefix, frozenset(lengths) | frozenset(length + len(prefix) for length in lengths)


def _parse(value: str, region: str | None) -> "PhoneNumber | None":
    """The number, if it is a valid one."""
    import phonenumbers

    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    return number if phonenumbers.is_valid_number(number) else None


def _national_format(number: "PhoneNumber") -> str:
    """How its own country writes the number."""
    from phonenumbers import PhoneNumberFormat, format_number

    return format_number(number, PhoneNumberFormat.NATIONAL)
