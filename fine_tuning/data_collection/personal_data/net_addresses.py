"""Addresses of the net in text: URLs, e-mail, IP and MAC addresses.

Every pattern starts only where a value can start and repeats possessively or with an upper bound.
"""

import ipaddress
import re
from collections.abc import Iterator

from fine_tuning.common.writing_systems import UNSPACED, WORD
from fine_tuning.data_collection.personal_data.patterns import PATTERNS, any_of

_DIGIT = re.compile(r"\d")
_SEPARATOR = re.compile(r"[.:-]")
# not in a URL: white space, quotes, brackets of markup, and the punctuation of scripts that write no spaces
_NO_URL = r"\s<>\"`{}|\\^\u3000-\u301f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u201c\u201d\u00ab\u00bb"
# of names: Latin, Greek and Cyrillic; scripts without spaces between words would lend an address their neighbours
_LETTERS = "A-Za-z0-9\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_SCHEME_URL = re.compile(rf"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{{1,15}}://[^{_NO_URL}]{{3,2000}}+")
_WWW_URL = re.compile(rf"(?<![A-Za-z0-9.@/-])www\.[^\W_][^{_NO_URL}]{{2,2000}}+", re.IGNORECASE)
INNER_DOT = re.compile(r"\.\w")
_BARE_URL = re.compile(
    rf"(?<![{_LETTERS}.@/_:=\\<$-])((?:[{_LETTERS}](?:[{_LETTERS}-]{{0,61}}[{_LETTERS}])?\.){{1,5}}+)"
    rf"([A-Za-z]{{2,8}}+)(?![A-Za-z0-9_@(-])(:\d{{2,5}})?(/[^{_NO_URL}]{{0,1000}}+)?"
)
_NET = PATTERNS["net"]
_BARE_DOMAINS = frozenset(_NET["bare_domains"])
_PATH_DOMAINS = _BARE_DOMAINS | frozenset(_NET["path_domains"])
_EMAIL = re.compile(
    rf"(?<![{_LETTERS}._%+@-])([{_LETTERS}_][{_LETTERS}._%+'-]{{0,63}}+)@"
    r"((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:xn--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}|"
    rf"[^\W\d_a-zA-Z{UNSPACED}]{{2,24}}|[^\W\d_a-zA-Z]{{2,10}}))"
    r"(?![A-Za-z0-9-]|\.[A-Za-z0-9])"
)
# In scripts without spaces between words only where nothing but the address stands between marks, or the word for an
# e-mail address and its particle. Vowels of Indic scripts and Thai are marks, no letters to `re`.
_MARKED = r"[^\W_]|[\u0300-\u036f\u064b-\u0652\u0900-\u0963\u0966-\u0eff]"
_EMAIL_ALONE = re.compile(
    r"(?<![^\s<>(:,;\"'：，；（])(?:[^\W\d_]{0,6}?(?:邮箱|郵箱|信箱|メール|アドレス|메일|"
    r"邮件)[^\W\d_]{0,4}?[是为為は는은])?"
    rf"((?:{_MARKED})(?:{_MARKED}|[.+_-]){{0,63}}+@(?:(?:(?:{_MARKED}|-){{1,30}}+\.){{1,8}})"
    rf"(?:[A-Za-z]{{2,24}}+(?![0-9_@-]|\.\w)|{'|'.join(_NET['unspaced_domains'])}|"
    rf"(?:(?![A-Za-z0-9{UNSPACED}])(?:{_MARKED})){{2,24}}+(?!{WORD}|[.@-])))"
)
_QUOTED_EMAIL = re.compile(r"\"(?:[^\"\\\n]|\\.){1,62}\"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_EMAIL_AT_IP = re.compile(
    rf"(?<![{_LETTERS}._%+-])[{_LETTERS}_][{_LETTERS}._%+'-]{{0,63}}+@\[(?:IPv6:)?([0-9A-Fa-f:.]{{2,45}})\]"
)
_IPV4 = re.compile(
    rf"((?<!{WORD})(?<!\.)(?:\d{{1,3}}\.){{3}}\d{{1,3}})(?:/(\d{{1,2}})(?!{WORD}|/|\.\d))?(?!{WORD}|\.\d)"
)
_IPV6 = re.compile(
    r"(?<![:.])"
    + rf"(?<!{WORD})"
    + r"((?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}+)"
    rf"(?:%[a-zA-Z0-9_]{{1,15}})?(?:/\d{{1,3}})?(?!{WORD}|:)"
)
_VERSION_BEFORE = re.compile(
    rf"{any_of('net', 'version_before')}(?:\s(?:number|no\.?|is))?[\"']?\s{{0,2}}[:=(>]?\s{{0,2}}[\"']?$", re.IGNORECASE
)
# of home networks (RFC 1918) and of documentation (RFC 5737): no version looks like them
_SURE_ADDRESSES = ("192.168.", "192.0.2.", "198.51.100.", "203.0.113.")
# what stands between two versions of which the first is known as one
_BETWEEN_VERSIONS = re.compile(r"\s{0,2}(?:,|to|and|or|und|oder|et|ou|y|->|→|–|vs\.?|bis)\s{0,2}", re.IGNORECASE)
_VERSION_AFTER = re.compile(rf"[-+~]{any_of('net', 'version_after')}|\s(?:releases?d?|version)\b", re.IGNORECASE)
# EUI-48, and EUI-64 with two groups more
_MAC = re.compile(
    rf"(?<!{WORD})(?<![:.-])" + r"(?:[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}(?:(?::[0-9A-Fa-f]{2}){2})?|"
    r"[0-9A-Fa-f]{2}(?:-[0-9A-Fa-f]{2}){5}(?:(?:-[0-9A-Fa-f]{2}){2})?|"
    r"[0-9A-Fa-f]{4}(?:\.[0-9A-Fa-f]{4}){2,3})" + rf"(?!{WORD}|[:-]|\.\w)"
)
MAC_NAME = re.compile(r"[Mm][Aa][Cc]")
_BARE_MAC = re.compile(
    r"(?<![A-Za-z0-9_])mac(?:[ _-]?(?:address|addr|adresse))?[\"']?(?:\s?[:=]\s?|\s(?:is\s)?)[\"']?"
    rf"([0-9A-Fa-f]{{12}})(?!{WORD})",
    re.IGNORECASE,
)
_CALLED_A_MAC = re.compile(r"\b(?:mac|ether|lladdr|hwaddr|address)\b", re.IGNORECASE)
_PAIRS = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){7}")


def find_urls(text: str) -> Iterator[tuple[int, int]]:
    """Spans of URLs with a scheme, with www, and of bare domains that people write."""
    for pattern, hint in ((_SCHEME_URL, "://"), (_WWW_URL, "ww.")):
        if hint in text or hint.upper() in text:
            for match in pattern.finditer(text):
                end = _url_end(text, *match.span())
                if pattern.fullmatch(text, match.start(), end):
                    yield match.start(), end
    for match in _BARE_URL.finditer(text) if INNER_DOT.search(text) else ():
        domain, path = match.group(2), match.group(4)
        name = match.group(1) + domain
        labels = match.group(1).lower().rstrip(".").split(".")
        known = domain.lower() in (_PATH_DOMAINS if path else _BARE_DOMAINS) or (
            len(domain) == 2 and len(labels) > 1 and labels[-1] in _NET["second_level"]
        )
        if not known or name.lower() in _NET["no_domains"]:
            continue
        word_like = len(domain) == 2 and len(labels) == 1 and len(labels[0]) <= 3  # "it.is", "to.be"
        if path or (domain == domain.lower() and labels[0] not in ("www", "e", "i") and not word_like):
            yield match.start(), _url_end(text, *match.span())


# Scripts without spaces go on right behind an address; in a path they begin a segment: /wiki/日本
_GOES_ON_UNSPACED = re.compile(r"(?<=[A-Za-z0-9/=_-])を|(?<=[A-Za-z0-9])[" + UNSPACED + "]")
# an apostrophe within a word can be the URL's, but not a genitive's at its end; a quote of HTML ends it
_QUOTE = re.compile(r"'(?!\w)|'s\W*$|&(?:lt|gt|quot|apos|#39);")
_ANY_QUOTE = re.compile(r"'|&(?:lt|gt|quot|apos|#39);")


def _url_end(text: str, start: int, end: int) -> int:
    """Where a URL ends once the sentence's own punctuation, quotes and closing brackets are taken off."""
    quote = (_ANY_QUOTE if text[start - 1 : start] == "'" else _QUOTE).search(text, start, end)
    end = quote.start() if quote else end
    if not text.isascii() and (word := _GOES_ON_UNSPACED.search(text, start, end)):
        end = word.start()
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


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Spans of e-mail addresses (RFC 5322 dot-atoms, RFC 6531 letters, quoted local parts, RFC 5321 literals)."""
    for match in _EMAIL.finditer(text):
        local = match.group(1)
        lead = len(local) - len(local.lstrip("'"))
        if ".." not in local and not local.endswith(".") and "_" not in match.group(2):
            yield match.start() + lead, match.end()
    if not text.isascii():
        for match in _EMAIL_ALONE.finditer(text):
            local, _, domain = match.group(1).partition("@")
            if not (domain.isascii() and local[-1].isascii()):  # those are found without what stands before them
                yield match.span(1)
    if '"@' in text:
        yield from (match.span() for match in _QUOTED_EMAIL.finditer(text))
    if "@[" in text:
        yield from (match.span() for match in _EMAIL_AT_IP.finditer(text) if _is_address(match.group(1), None))


def find_ips(text: str) -> Iterator[tuple[int, int]]:
    """Spans of IPv4 and IPv6 addresses and networks; versions and loopback are none."""
    if "." in text:
        yield from _ipv4s(text)
    if text.count(":") >= 2:
        for match in _IPV6.finditer(text):
            # C++ and Ruby write names as a::b; an address without any digit would be a rare one
            value = match.group(1)
            if _DIGIT.search(value) and _is_address(value, None) and not _is_code(value):
                yield match.span()


def _ipv4s(text: str) -> Iterator[tuple[int, int]]:
    """IPv4 addresses. What is called a version once is none in the whole text, nor is what stands in a row with it."""
    spans: list[tuple[int, int]] = []
    versions: set[str] = set()
    version_end = -1
    for match in _IPV4.finditer(text):
        if not _is_address(match.group(1), match.group(2)):
            continue
        start, end = match.span()
        if match.group(1).startswith(_SURE_ADDRESSES):
            spans.append((start, end))
        elif (
            _VERSION_BEFORE.search(text[max(0, start - 30) : start])
            or _VERSION_AFTER.match(text, end)
            or (start - 8 < version_end and _BETWEEN_VERSIONS.fullmatch(text, version_end, start))
        ):
            versions.add(match.group(1))
            version_end = end
        else:
            spans.append((start, end))
    return (span for span in spans if text[slice(*span)] not in versions)


def _is_code(value: str) -> bool:
    """A slice ([1::2]) or a name rather than an address: short, in a range that nobody is given; or an EUI-64."""
    short = "::" in value and "." not in value and sum(map(bool, value.split(":"))) < 4
    return (short and ipaddress.IPv6Address(value).is_reserved) or _PAIRS.fullmatch(value) is not None


def _is_address(value: str, prefix: str | None) -> bool:
    """A valid address that can be somebody's: loopback and the unspecified address are everybody's."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if prefix is not None and int(prefix) > 32:
        return False
    return not (address.is_loopback or address.is_unspecified)


def find_macs(text: str) -> Iterator[tuple[int, int]]:
    """Spans of MAC addresses, but not the broadcast and the null address."""
    for match in _MAC.finditer(text):
        digits = _SEPARATOR.sub("", match.group()).upper()
        if len(set(digits)) == 1:
            continue
        before = text[max(0, match.start() - 24) : match.start()]
        # figures alone in groups are other numbers, unless they are called an address
        if ":" in match.group() or not digits.isdigit() or _CALLED_A_MAC.search(before):
            yield match.span()
    for match in _BARE_MAC.finditer(text) if MAC_NAME.search(text) else ():
        if _DIGIT.search(match.group(1)) and len(set(match.group(1))) > 1:
            yield match.span(1)
