"""Personal data in text: candidates by patterns that cannot run away, decided by validators.

Order of precedence: SECRET, URL, EMAIL, IP, MAC, IBAN, CREDIT_CARD, US_SSN, NATIONAL_ID, PHONE. Where two overlap the
longer one counts, of two equal ones the earlier in this order. Every pattern starts only where its first character
can start a value and repeats with an upper bound or possessively, so a scan is linear in the text.
"""

import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from operator import itemgetter
from typing import Literal, NamedTuple, get_args

PersonalDataType = Literal[
    "SECRET", "URL", "EMAIL", "IP", "MAC", "IBAN", "CREDIT_CARD", "US_SSN", "NATIONAL_ID", "PHONE"
]
TYPES: tuple[str, ...] = get_args(PersonalDataType)
PLACEHOLDER = re.compile(r"<(" + "|".join(TYPES) + r")_(\d{1,6})>")
REGIONS = ("US", "GB", "DE", "FR")
_ROUNDS = 16


class Hit(NamedTuple):
    """Personal data at text[start:end]."""

    type: str
    start: int
    end: int


def find(text: str, types: Iterable[str] = TYPES, regions: tuple[str, ...] = REGIONS) -> list[Hit]:
    """The personal data of a text in its order, without overlaps.

    Args:
        types: which of TYPES to look for.
        regions: countries (ISO 3166) whose national phone numbers count; numbers with a + always do.
    """
    wanted = set(types)
    hits: list[Hit] = []
    for kind, finder in _finders(text):
        if kind in wanted:
            hits += [Hit(kind, start, end) for start, end in finder(text)]
    if "PHONE" in wanted and len(_DIGIT.findall(text)) >= 7:
        spans = [(start, end) for _, start, end in hits]
        hits += [Hit("PHONE", start, end) for start, end in _phones(text, regions, spans)]
    return _without_overlaps(hits) if len(hits) > 1 else hits


def may_hold(text: str) -> bool:
    """Whether `find` could find anything: false for most conversations, at a tenth of its cost."""
    if "@" in text or "://" in text or _DIGIT.search(text) or _INNER_DOT.search(text) or text.count(":") >= 5:
        return True
    return _names_a_secret(text.lower())


def _finders(text: str) -> Iterator[tuple[str, Callable[[str], Iterator[tuple[int, int]]]]]:
    """The finders that the characters of the text leave possible: most texts have neither @ nor many digits."""
    yield "SECRET", _secrets
    dots, colons = text.count("."), text.count(":")
    if dots or "://" in text:
        yield "URL", _urls
    if "@" in text:
        yield "EMAIL", _emails
    if colons >= 5 or dots >= 2 or text.count("-") >= 5:
        yield "MAC", _macs
    if not _DIGIT.search(text):
        return
    digits = len(_DIGIT.findall(text))
    if dots >= 3 or colons >= 2:
        yield "IP", _ips
    if digits >= 4:
        yield "NATIONAL_ID", _national_ids
    if digits >= 6:
        yield "IBAN", _ibans
    if digits >= 9:
        yield "US_SSN", _ssns
    if digits >= 12:
        yield "CREDIT_CARD", _cards


def _without_overlaps(hits: list[Hit]) -> list[Hit]:
    hits.sort(key=lambda hit: (hit.start - hit.end, TYPES.index(hit.type), hit.start))
    taken: list[tuple[int, Hit]] = []
    for hit in hits:
        index = bisect(taken, hit.start, key=itemgetter(0))
        free_before = index == 0 or taken[index - 1][1].end <= hit.start
        if free_before and (index == len(taken) or hit.end <= taken[index][0]):
            taken.insert(index, (hit.start, hit))
    return [hit for _, hit in taken]


class Masker:
    """Replaces personal data in the texts of one conversation by numbered placeholders, the same for the same value."""

    def __init__(self, types: Iterable[str] = TYPES, regions: tuple[str, ...] = REGIONS) -> None:
        self._types, self._regions = tuple(types), regions
        self._names: dict[tuple[str, str], str] = {}
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
            hits = find(text, self._types, self._regions)
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
        key = (kind, _same_value(kind, value))
        if key not in self._names:
            self._used[kind] = self._used.get(kind, 0) + 1
            self._names[key] = f"<{kind}_{self._used[kind]}>"
        return self._names[key]


def _same_value(kind: str, value: str) -> str:
    """The value without how it was written: 555-0100 and 555 0100 are one number."""
    if kind in ("SECRET", "URL"):
        return value
    if kind in ("EMAIL", "IP"):
        return value.lower()
    return _SEPARATOR.sub("", value).upper()


_DIGIT = re.compile(r"\d")
_SEPARATOR = re.compile(r"[\s().:/-]+")
_DIGITS = re.compile(r"\D+")


def _digits(text: str) -> str:
    return _DIGITS.sub("", text)


# -----------------------------------------------------------------------------
# secrets: formats that their issuers document, and values that are called a password or a key

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,100}"  # GitHub
    r"|glpat-[A-Za-z0-9_-]{20,64}"  # GitLab
    r"|sk-(?:proj-|ant-[a-z0-9]{1,10}-|or-v1-|svcacct-)?[A-Za-z0-9_-]{20,200}"  # OpenAI, Anthropic, OpenRouter
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,200}|xapp-[A-Za-z0-9-]{10,200}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,200}|GOCSPX-[A-Za-z0-9_-]{28}"  # Google
    r"|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,128}|whsec_[A-Za-z0-9]{24,64}"  # Stripe
    r"|SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}"  # SendGrid
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,300}|hf_[A-Za-z0-9]{30,40}|dckr_pat_[A-Za-z0-9_-]{20,40}"
    r"|do[opr]_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|sq0(?:atp|csp)-[A-Za-z0-9_-]{22,43}"
    r"|(?:AC|SK)[0-9a-f]{32}|key-[0-9a-f]{32}|[0-9]{8,10}:AA[A-Za-z0-9_-]{33}"  # Twilio, Mailgun, Telegram
    r"|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,1000}"  # JSON Web Token
    r"|AGE-SECRET-KEY-1[A-Z0-9]{58}|dapi[a-f0-9]{32}|lin_api_[A-Za-z0-9]{40}|gsk_[A-Za-z0-9]{40,64}"
    r")(?![A-Za-z0-9_])"
)
_SHORTEST_TOKEN = 15
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_NAMED = re.compile(
    r"(?<![A-Za-z0-9])(?:[a-z0-9]{1,24}[_.-]){0,4}"
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret(?:[_ -]?(?:access[_ -]?)?key)?|api[_ -]?(?:key|token|secret)|"
    r"access[_ -]?(?:key|token)|auth[_ -]?token|client[_ -]?secret|private[_ -]?key|account[_ -]?key|token)"
    r"[\"']?(?:\s{0,3}(?:=>|:=|==|=|:)\s{0,3}|\s{1,3}(?:is|was)\s{0,3}:?\s{1,3})"
    r"(?:\"([^\"\s]{4,256})\"|'([^'\s]{4,256})'|`([^`\s]{4,256})`|([^\s\"'`<>()\[\]{},;]{6,256}))",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"(?<![A-Za-z])(?:authorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?)?(?:bearer|basic)\s{1,2}([A-Za-z0-9_.~+/=-]{16,2000})",
    re.IGNORECASE,
)
_BARE_VALUE = re.compile(r"(?=.*\d)(?=.*[^\d\W_])|(?=.*[^\W_])(?=.*[!@#$%^&*?~+])|\d{6,}$")


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    if _DIGIT.search(text) and max(map(len, text.split())) >= _SHORTEST_TOKEN:
        yield from (match.span() for match in _TOKENS.finditer(text))
    if "PRIVATE KEY" in text:
        position = 0
        while start := _PRIVATE_KEY.search(text, position):
            end = _PRIVATE_KEY_END.search(text, start.end())
            position = end.end() if end else len(text)
            yield start.start(), position
    lower = text.lower()
    if _names_a_secret(lower):
        for match in _NAMED.finditer(text):
            group = match.lastindex or 4
            value, (start, end) = match.group(group), match.span(group)
            if group == 4:
                value = value.rstrip(".?:")
                end = start + len(value)
            if _is_secret_value(value, quoted=group != 4):
                yield start, end
    if "bearer" in lower or "basic" in lower:
        for match in _BEARER.finditer(text):
            if _DIGIT.search(match.group(1)):
                yield match.span(1)


def _names_a_secret(lower: str) -> bool:
    return "pass" in lower or "pwd" in lower or "secret" in lower or "key" in lower or "token" in lower


_STAND_IN = re.compile(r"(?:your|my|the|some|an?|example|placeholder|change|insert|enter|todo)[_ -]?[a-z_ -]*$", re.I)


def _is_secret_value(value: str, quoted: bool) -> bool:
    """Whether a named value looks like a secret rather than a word, a placeholder or an expression of code."""
    if "<" in value or value.startswith(("$", "%", "{", "os.", "process.", "env.", "http://", "https://", "/")):
        return False
    if set(value) <= set("*xX.-_•") or _STAND_IN.match(value):
        return False
    if quoted and len(value) >= 6:
        return True
    return len(value) >= 6 and _BARE_VALUE.match(value) is not None and not re.match(r"[A-Za-z_]\w*\.[A-Za-z_]", value)


# -----------------------------------------------------------------------------
# addresses of the net

# not in a URL: white space, quotes, brackets of markup, and the punctuation of scripts that write no spaces
_NO_URL = r"\s<>\"'`{}|\\^\u3000-\u301f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u201c\u201d\u00ab\u00bb"
_SCHEME_URL = re.compile(rf"(?<![A-Za-z0-9])(?:https?|ftps?|sftp|wss?)://[^{_NO_URL}]{{3,2000}}+", re.IGNORECASE)
_WWW_URL = re.compile(rf"(?<![A-Za-z0-9.@/-])www\.[A-Za-z0-9][^{_NO_URL}]{{2,2000}}+", re.IGNORECASE)
_INNER_DOT = re.compile(r"\.\w")
_BARE_URL = re.compile(
    r"(?<![A-Za-z0-9.@/_:\\<$-])((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,5}+)"
    rf"([A-Za-z]{{2,8}}+)(?![A-Za-z0-9_@(-])(:\d{{2,5}})?(/[^{_NO_URL}]{{0,1000}}+)?"
)
# domains that people write without a scheme; others need a path behind them
_BARE_DOMAINS = frozenset(
    ("com", "org", "net", "edu", "gov", "info", "biz", "uk", "de", "fr", "es", "it", "nl", "au", "ca", "eu", "ch", "at")
)
_PATH_DOMAINS = _BARE_DOMAINS | frozenset(
    (
        "io",
        "me",
        "ly",
        "co",
        "gl",
        "gg",
        "tv",
        "app",
        "dev",
        "ai",
        "us",
        "xyz",
        "to",
        "be",
        "gle",
        "link",
        "page",
        "site",
    )
)
_SECOND_LEVEL = frozenset(("co", "com", "org", "net", "ac", "gov", "edu"))
_NOT_DOMAINS = frozenset(("asp.net", "vb.net", "ado.net", "ml.net", "system.net", "socket.io"))
# of names: Latin, Greek and Cyrillic; scripts without spaces between words would lend an address their neighbours
_LETTERS = "A-Za-z0-9\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_EMAIL = re.compile(
    rf"(?<![{_LETTERS}._%+-])([{_LETTERS}_][{_LETTERS}._%+'-]{{0,63}}+)@"
    r"((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:xn--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}|[^\W\d_a-zA-Z]{2,10}))"
    r"(?![A-Za-z0-9-]|\.[A-Za-z0-9])"
)
_QUOTED_EMAIL = re.compile(r"\"[^\"\s@]{1,62}\"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_IPV4 = re.compile(r"(?<![\w.])((?:\d{1,3}\.){3}\d{1,3})(?:/(\d{1,2}))?(?![\w]|\.\d|/\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])((?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}+)"
    r"(?:%\w{1,15})?(?:/\d{1,3})?(?![\w:])"
)
_VERSION_BEFORE = re.compile(
    r"(?:\bv|\bver\.?|\bversions?:?|\brelease|\bbuild|\bfirmware|\bupgrade[sd]? to|\bupdate[sd]? to|/|\bsection|"
    r"\bchapter|\brev(?:ision)?\.?|==|>=|<=|~=|\bOID)\s{0,2}$",
    re.IGNORECASE,
)
_MAC = re.compile(
    r"(?<![\w:.-])(?:[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}|[0-9A-Fa-f]{2}(?:-[0-9A-Fa-f]{2}){5}|"
    r"[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4})(?![\w:-]|\.\w)"
)


def _urls(text: str) -> Iterator[tuple[int, int]]:
    for pattern, hint in ((_SCHEME_URL, "://"), (_WWW_URL, "ww.")):
        if hint in text or hint.upper() in text:
            for match in pattern.finditer(text):
                end = _url_end(text, *match.span())
                if end > match.start() + 6:
                    yield match.start(), end
    for match in _BARE_URL.finditer(text) if _INNER_DOT.search(text) else ():
        domain, path = match.group(2), match.group(4)
        name = match.group(1) + domain
        labels = match.group(1).lower().rstrip(".").split(".")
        known = domain.lower() in (_PATH_DOMAINS if path else _BARE_DOMAINS) or (
            len(domain) == 2 and len(labels) > 1 and labels[-1] in _SECOND_LEVEL
        )
        if not known or name.lower() in _NOT_DOMAINS:
            continue
        word_like = len(domain) == 2 and len(labels) == 1 and len(labels[0]) <= 3  # "it.is", "to.be"
        if path or (domain == domain.lower() and labels[0] not in ("www", "e", "i") and not word_like):
            yield match.start(), _url_end(text, *match.span())


def _url_end(text: str, start: int, end: int) -> int:
    """Where a URL ends once the sentence's own punctuation and closing brackets are taken off."""
    opened = {")": text.count("(", start, end), "]": text.count("[", start, end)}
    closed = {")": text.count(")", start, end), "]": text.count("]", start, end)}
    while end > start:
        last = text[end - 1]
        if last in ".,;:!?'*_~…。、，）»”’":
            end -= 1
        elif last in ")]" and closed[last] > opened[last]:
            closed[last] -= 1
            end -= 1
        elif last in "([":
            end -= 1
        else:
            break
    return end


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text):
        local = match.group(1)
        lead = len(local) - len(local.lstrip("'"))
        if ".." not in local and not local.endswith(".") and "_" not in match.group(2):
            yield match.start() + lead, match.end()
    if '"@' in text:
        yield from (match.span() for match in _QUOTED_EMAIL.finditer(text))


def _ips(text: str) -> Iterator[tuple[int, int]]:
    if "." in text:
        for match in _IPV4.finditer(text):
            if _is_address(match.group(1), match.group(2)) and not _VERSION_BEFORE.search(
                text, max(0, match.start() - 16), match.start()
            ):
                yield match.span()
    if text.count(":") >= 2:
        for match in _IPV6.finditer(text):
            # C++ and Ruby write names as a::b; an address without any digit would be a rare one
            if _DIGIT.search(match.group(1)) and _is_address(match.group(1), None):
                yield match.span()


def _is_address(value: str, prefix: str | None) -> bool:
    """A valid address that can be somebody's: loopback and the unspecified address are everybody's."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if prefix is not None and int(prefix) > 32:
        return False
    return not (address.is_loopback or address.is_unspecified)


def _macs(text: str) -> Iterator[tuple[int, int]]:
    for match in _MAC.finditer(text):
        digits = _SEPARATOR.sub("", match.group()).upper()
        if digits not in ("000000000000", "FFFFFFFFFFFF"):
            yield match.span()


# -----------------------------------------------------------------------------
# numbers that name a person or an account

_IBAN_HEAD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,}+(?![\w-]|[.,]\d)")
# how cards are printed; among more digits than a card has, only these count
_CARD_GROUPS = re.compile(
    r"(?<!\d)(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{15,16})(?!\d)"
)
_NOT_A_CARD = re.compile(
    r"(?:order|invoice|tracking|isbn|issn|ean|upc|gtin|sku|serial|imei|parcel|shipment|ticket|case|reference|ref|id|"
    r"timestamp|part|hash)\b[\w\s.]{0,12}[:#=]?\s{0,2}#?$",
    re.IGNORECASE,
)
_CALLED_A_CARD = re.compile(
    r"(?:\bcards?|\bvisa|\bmaster ?card|\bamex|\bdiners|\bmaestro)\b[^\d\n]{0,20}$", re.IGNORECASE
)
_SSN = re.compile(r"(?<![\w-])\d{3}([- .])\d{2}\1\d{4}(?![\w-]|\.\d)")
_BARE_SSN = re.compile(
    r"(?:\bssn|social security(?: number| no\.?| #)?)(?:\s{0,2}(?:is|:|=|#|-))?\s{0,2}(\d{9})(?!\d)", re.IGNORECASE
)
_NATIONAL = re.compile(
    r"(?<![\w.-])(?=[A-Z0-9])(?:"
    r"(?P<cpf>\d{3}\.\d{3}\.\d{3}-\d{2})"  # Brazil
    r"|(?P<nino>[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D])"  # United Kingdom
    r"|(?P<codice>[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z])"  # Italy
    r"|(?P<dni>(?:\d{8}|[XYZ]-?\d{7})-?[A-Z])"  # Spain
    r"|(?P<nir>[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2})"  # France
    r"|(?P<sin>\d{3}[ -]\d{3}[ -]\d{3})"  # Canada
    r"|(?P<aadhaar>[2-9]\d{3} \d{4} \d{4})"  # India
    r"|(?P<pan>[A-Z]{3}[PCHFATBLJG][A-Z]\d{4}[A-Z])"  # India, tax
    r"|(?P<curp>[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d)"  # Mexico
    r"|(?P<pesel>\d{11})"  # Poland
    r")(?![\w-]|\.\d)"
)


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for head in _IBAN_HEAD.finditer(text):
        length = _iban_lengths().get(head.group()[:2].upper())
        rest = _iban_rest(length).match(text, head.end()) if length else None
        if rest and _iban_checksum(head.group() + rest.group()):
            yield head.start(), rest.end()


@cache
def _iban_rest(length: int) -> re.Pattern[str]:
    return re.compile(rf"(?:[ -]?[A-Za-z0-9]){{{length - 4}}}(?![A-Za-z0-9])")


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
    value = value.replace(" ", "").replace("-", "")
    moved = value[4:] + value[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for run in _CARD.finditer(text):
        before = text[max(0, run.start() - 30) : run.start()]
        if _NOT_A_CARD.search(before):
            continue
        called = _CALLED_A_CARD.search(before) is not None
        parts = [run] if len(_digits(run.group())) <= 19 else _CARD_GROUPS.finditer(text, *run.span())
        for part in parts:
            if _is_card(_digits(part.group()), called):
                yield part.span()


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
    )
    return (scheme or called) and len(set(digits)) > 1 and luhn(digits)


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _ssns(text: str) -> Iterator[tuple[int, int]]:
    from stdnum.us import ssn

    for match in _SSN.finditer(text):
        if ssn.is_valid(_digits(match.group())):
            yield match.span()
    if "ssn" in text.lower() or "ecurity" in text:
        for match in _BARE_SSN.finditer(text):
            if ssn.is_valid(match.group(1)):
                yield match.span(1)


def _national_ids(text: str) -> Iterator[tuple[int, int]]:
    for match in _NATIONAL.finditer(text):
        if _national_check(match.lastgroup or "", match.group(), text[max(0, match.start() - 24) : match.start()]):
            yield match.span()


def _national_check(kind: str, value: str, before: str) -> bool:
    from stdnum.br import cpf
    from stdnum.ca import sin
    from stdnum.es import dni, nie
    from stdnum.fr import nir
    from stdnum.in_ import aadhaar
    from stdnum.it import codicefiscale
    from stdnum.mx import curp
    from stdnum.pl import pesel

    if kind in ("nino", "pan"):
        return kind == "nino" or _NAMED_ID.search(before) is not None
    if kind in ("pesel", "sin", "aadhaar") and not _NAMED_ID.search(before):
        return False
    if kind == "dni":
        return dni.is_valid(value) or nie.is_valid(value)
    checks = {
        "cpf": cpf,
        "sin": sin,
        "nir": nir,
        "aadhaar": aadhaar,
        "codice": codicefiscale,
        "curp": curp,
        "pesel": pesel,
    }
    return checks[kind].is_valid(value)


_NAMED_ID = re.compile(
    r"(?:\b(?:pan|sin|pesel|aadhaar|aadhar|uid|tax|national|social|insurance|identity|id|personal)\b)", re.IGNORECASE
)

# -----------------------------------------------------------------------------
# phone numbers

_BETWEEN = r"(?:\)[ -]?\(?|\(| ?[-–/\u2010\u2011] ?\(?|[ .\u00a0]\(?)"  # digits of a number
_INTERNATIONAL = re.compile(rf"(?<![\w+])(?:\(\+|\+\(?|00(?=[1-9]))\d++(?:{_BETWEEN}\d++)*+")
_NATIONAL_PHONE = re.compile(rf"(?<![\w.,/=#$€£&+-])(?=[\d() .\u00a0\u2010\u2011–/-]{{7}})\(?\d++(?:{_BETWEEN}\d++)*+")
_MOST_GROUPS = 8
_EXTENSION = re.compile(r"\s{0,2}(?:ext\.?|extension|x|#)\s{0,2}\d{1,6}(?!\w)", re.IGNORECASE)
_CALLED_A_PHONE = re.compile(
    r"(?:\b(?:phone|tel|telephone|mobile|cell|cellphone|call|text|sms|whatsapp|signal|fax|dial|ring|reach|contact|hotline|"
    r"telefon|handy|rufnummer|t[ée]l[ée]phone|tel[ée]fono|celular|telefone|"
    r"(?:my|his|her|our|their|your) (?:new )?number)\b)"
    r"[^\d\n]{0,24}$",
    re.IGNORECASE,
)
_CALLED_OTHERWISE = re.compile(
    r"\b(?:order|invoice|tracking|isbn(?:-1[03])?|issn|ean|upc|sku|serial|model|part|case|ticket|ref(?:erence)?|id|imei|version|"
    r"account|page|pages|pp|doi|rfc|iso|figure|timestamp|port|zip|code|error|bug|issue|build|date|patent|"
    r"card|social security)\b"
    r"(?:\s(?:number|no|num|id|code))?\.?[^\w\n]{0,4}$",
    re.IGNORECASE,
)
_DATE_OR_TIME = re.compile(
    r"(?:(?:19|20)\d{2}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d{2})(?:$|[ T(-])"
    r"|(?:19|20)\d{2} ?- ?(?:19|20)\d{2}$"
)
_ISBN_13 = re.compile(r"97[89][- ]?\d")


def _phones(text: str, regions: tuple[str, ...], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
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
    if groups[-1][1] - groups[0][0] < 7 or text[end : end + 1] in _NO_PHONE_BEFORE:
        return
    first = 0
    while first < len(groups):
        for last in range(min(len(groups), first + _MOST_GROUPS) - 1, first - 1, -1):
            stop = groups[last][1]
            count = sum(b - a for a, b in groups[first : last + 1])
            if 7 <= count <= 15 and _is_phone(text[start:stop], text[max(0, start - 40) : start], regions):
                yield start, stop
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
    if _CALLED_OTHERWISE.search(before):
        return False
    if value.startswith(("+", "(+")):
        return _national_groups(value, None) is not None
    if value.startswith("00"):
        return _national_groups("+" + value[2:], None) is not None
    called = _CALLED_A_PHONE.search(before) is not None
    if not called and value.isdigit():
        return False
    count = sum(map(str.isdigit, value))
    for region in regions:
        prefix, lengths = _numbering(region)
        if count not in lengths or (prefix == "0" and not called and value.lstrip("(")[0] != "0"):
            continue
        groups = _national_groups(value, region)
        if groups is None:
            continue
        written = _GROUP.findall(value)
        if written[0] in ("1", "0") and len(written) > 2:  # the trunk prefix, written apart
            written = written[1:]
        if called or (len(written) > 1 and written[0] == groups[0]):
            return True
    return False


_GROUP = re.compile(r"\d+")
_NO_PHONE_BEFORE = tuple("%°€$£_")


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


def _national_groups(value: str, region: str | None) -> tuple[str, ...] | None:
    """How the number's own country groups its digits, or None if it is no valid number."""
    import phonenumbers

    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    return tuple(_GROUP.findall(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)))
