"""Phone numbers in text: groups of digits as candidates, libphonenumber as the judge."""

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from zoneinfo import available_timezones

import phonenumbers
from phonenumbers import PhoneMetadata, PhoneNumber, PhoneNumberFormat, PhoneNumberType

from fine_tuning.data_collection.personal_data.patterns import PATTERNS, Expressions

_WORDS = PATTERNS["phone"]
_RE = Expressions("phone")
_MOST_GROUPS = 8
_WORD_BEFORE = re.compile(r"[^\W\d_][\s:：\"'*(-]{0,4}$")
_NO_PERSONS = frozenset(_WORDS["no_person"].split())
_FICTION = {int(country): re.compile(form) for country, form in _WORDS["fiction"].items()}


def find_phones(text: str, regions: tuple[str, ...], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Phone numbers; digits inside what is `taken` already (a card, an IBAN) are not asked again."""
    for pattern, possible in ((_RE.international, ()), (_RE.national_phone, regions)):
        if pattern is _RE.international and "+" not in text and "00" not in text:
            continue
        for run in pattern.finditer(text):
            first, last = run.span()
            if any(start <= first and last <= end for start, end in taken):
                continue
            for start, end in _phones_of_run(text, first, last, possible):
                extension = _RE.extension.match(text, end)
                yield start, extension.end() if extension else end


def _phones_of_run(text: str, start: int, end: int, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Phone numbers that follow each other from the start of a run of groups of digits.

    The longest sequence of groups that is a number counts, else the longest that can be one by what stands before it.
    What follows no number is none: figures in a table.
    """
    groups = [group.span() for group in _GROUP.finditer(text, start, end)]
    if _WORD_GOES_ON.match(text, end) and not _RE.extension.match(text, end):  # 0544 056B
        groups.pop()
    if len(groups) > 1 and text[groups[0][1]] == ")" and text[start] not in "(+":  # 1) 650-253-0000
        del groups[0]
        start = groups[0][0] - (text[groups[0][0] - 1] == "(")
    if groups and text.startswith(("978", "979"), groups[0][0]) and sum(b - a for a, b in groups) == 13:  # an ISBN
        return
    if not groups or groups[-1][1] - groups[0][0] < 7 or _NO_PHONE_BEFORE.match(text, end):
        return
    first = 0
    while first < len(groups):
        sequences = list(_sequences(text, start, groups[first : first + _MOST_GROUPS]))
        sequences.sort(key=lambda item: _RE.american.fullmatch(item[0][0]) is None)  # it is whole, whatever follows
        found = next((item for item in sequences if _is_phone(*item[0], regions)), None)
        if found and found[3] < len(groups) - first == sequences[0][3]:  # a part, where the whole may be of elsewhere
            context, *_ = sequences[0]
            value = context[0]
            usual = sum(map(str.isdigit, value)) <= 11 and not value.startswith(("+", "(+"))
            found = sequences[0] if usual and _can_be_phone(*context) else found
        found = found or next((item for item in sequences if _can_be_phone(*item[0])), None)
        if found is None:
            return
        _, begin, stop, count = found
        yield begin, stop
        first += count
        start = groups[first][0] if first < len(groups) else end
        start -= start > 0 and text[start - 1] == "("


def _sequences(text: str, start: int, groups: list[tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], int, int, int]]:
    """((value, before, after), begin, end, count of groups) of those of a number's length, longest first."""
    for count in range(len(groups), 0, -1):
        stop = groups[count - 1][1]
        # An opening parenthesis that closes after the number is the sentence's.
        begin = start + (text[start] == "(" and text.count("(", start, stop) > text.count(")", start, stop))
        if 7 <= sum(b - a for a, b in groups[:count]) <= 15:
            yield (text[begin:stop], text[max(0, begin - 60) : begin], text[stop : stop + 24]), begin, stop, count


def _is_phone(value: str, before: str, after: str, regions: tuple[str, ...]) -> bool:
    """Valid for its country, and either international, or written the way the country writes it, or called a phone."""
    if _is_no_phone(value):
        return False
    if value.startswith(("+", "(+")):
        return _parse(value, None) is not None
    called = _called(before, after)
    if called == "other":
        return False
    if value.startswith(("00", "(00")):
        return _parse("+" + value.lstrip("(")[2:], None) is not None
    if not called and (value.isdigit() or before.endswith("=")):
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
        if prefix == "1":
            groups = [str(number.national_number)[:3]]
        else:
            groups = _GROUP.findall(phonenumbers.format_number(number, PhoneNumberFormat.NATIONAL))
        written = _GROUP.findall(value)
        if prefix == "0" and len(groups) == 2 and groups[1][0] == "0":
            continue  # no number after the area code starts with the prefix of long-distance calls
        if written[0] in ("1", "0") and len(written) > 2:  # the trunk prefix, written apart
            written = written[1:]
        if len(written) > 1 and (written[0] == groups[0] or _is_mobile_code(written[0], groups[0], number)):
            return True
    return False


def _can_be_phone(value: str, before: str, after: str) -> bool:
    """Valid in any country behind a word that says phone, or with a country's code in its groups and of its length. The
    numbers that people make up for an example are seldom given out: +1 555 123 4567, +49 123 456789."""
    called = _called(before, after)
    if called == "other" or _is_no_phone(value):
        return False
    labelled = called in ("label", "said")
    if value.startswith(("+", "(+")):
        grouped = len(_GROUP.findall(value)) >= 3
        return (labelled or grouped) and _is_possible(value)
    count = sum(map(str.isdigit, value))
    if value.isdigit() and count < 9 and called != "said" and not _RE.mark_before.search(before):  # cell 12345678
        return False
    return labelled and any(count in _numbering(region)[1] and _parse(value, region) for region in _WORDS["countries"])


@lru_cache(maxsize=4)  # the sequences of a run stand behind the same
def _called(before: str, after: str) -> str:
    """What it is called: by a "label" of phones, "said" in a sentence, a "word" for calling, an "other", or nothing."""
    if _RE.called_otherwise.search(before):
        return "other"
    if _RE.labelled_a_phone.search(before):
        return "label"
    if _WORD_BEFORE.search(before) and (_RE.said_to_be_a_phone.search(before) or _is_persons(before)):
        return "said"
    if _RE.said_after.match(after):
        return "said"
    return "word" if _RE.called_a_phone.search(before) else ""


def _is_persons(before: str) -> bool:
    """Whether a name of a person and a colon stand before a number."""
    name = _RE.person.search(before)
    if name is None:
        return False
    word = name.group(1)
    if word[0] in _WORDS["surnames"]:
        return len(word) <= 3
    return word.istitle() and word.lower() not in _NO_PERSONS and word not in _places()


@cache
def _places() -> frozenset[str]:
    """Countries, in many languages, and cities that name a time zone, without those that are names of people."""
    from phonenumbers.geodata.locale import LOCALE_DATA  # brings 100 MB: few texts need it

    cities = {zone.rpartition("/")[2] for zone in available_timezones() if "/" in zone}
    countries = {name for names in LOCALE_DATA.values() for name in names.values()}
    return frozenset(cities | countries) - {*_WORDS["also_people"]}


def _is_no_phone(value: str) -> bool:
    """Unbalanced parentheses, a date, years, an ISBN, or a sum."""
    return value.count("(") != value.count(")") or _RE.date_isbn_or_sum.match(value) is not None


def _is_mobile_code(written: str, area: str, number: PhoneNumber) -> bool:
    """Whether people write the code of a mobile network shorter than it is formatted: 0151 for the German 01512."""
    return len(written) >= 4 and area.startswith(written) and phonenumbers.number_type(number) == PhoneNumberType.MOBILE


_GROUP = re.compile(r"\d+")
_WORD_GOES_ON = re.compile(r"[A-Za-z]")
_NO_PHONE_BEFORE = re.compile(r"[%°€$£_]|-[A-Za-z]")


@cache
def _numbering(region: str) -> tuple[str, frozenset[int]]:
    """(trunk prefix, how many digits a number dialled within the region can have) by libphonenumber's metadata."""
    metadata = PhoneMetadata.metadata_for_region(region, None)
    if metadata is None:
        return "", frozenset()
    prefix = metadata.national_prefix or ""
    lengths = metadata.general_desc.possible_length
    return prefix, frozenset(lengths) | frozenset(length + len(prefix) for length in lengths)


def _parse(value: str, region: str | None) -> PhoneNumber | None:
    """The number, if it is a valid one, or one for fiction."""
    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    fiction = _FICTION.get(number.country_code)
    if phonenumbers.is_valid_number(number) or (fiction and fiction.fullmatch(str(number.national_number))):
        return number
    return None


def _is_possible(value: str) -> bool:
    """Whether a number has a country's code, a length that is usual there, and no row of zeros like a sum."""
    try:
        number = phonenumbers.parse(value)
    except phonenumbers.NumberParseException:
        return False
    digits = str(number.national_number)
    usual = 8 <= len(digits) <= 11 and not number.italian_leading_zero and (number.country_code != 1 or digits[0] > "1")
    return usual and len(set(digits)) > 2 and phonenumbers.is_possible_number(number)
