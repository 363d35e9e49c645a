"""Addresses of the net in text: URLs, e-mail, IP and MAC addresses.

Every pattern starts only where a value can start and repeats possessively or with an upper bound.
"""

import ipaddress
import re
from collections.abc import Iterator

from fine_tuning.data_collection.personal_data.patterns import PATTERNS, Expressions

_DIGIT = re.compile(r"\d")
_SEPARATOR = re.compile(r"[.:-]")
INNER_DOT = re.compile(r"\.\w")
_NET, _RE = PATTERNS["net"], Expressions("net")
_BARE_DOMAINS = frozenset(_NET["bare_domains"])
_PATH_DOMAINS = _BARE_DOMAINS | frozenset(_NET["path_domains"])
# of home networks (RFC 1918) and of documentation (RFC 5737): no version looks like them
_SURE_ADDRESSES = ("192.168.", "192.0.2.", "198.51.100.", "203.0.113.")
MAC_NAME = re.compile(r"[Mm][Aa][Cc]")


def find_urls(text: str) -> Iterator[tuple[int, int]]:
    """Spans of URLs with a scheme, with www, and of bare domains that people write."""
    for pattern, hint in ((_RE.scheme_url, "://"), (_RE.www_url, "ww.")):
        if hint in text or hint.upper() in text:
            for match in pattern.finditer(text):
                end = _url_end(text, *match.span())
                if pattern.fullmatch(text, match.start(), end):
                    yield match.start(), end
    for match in _RE.bare_url.finditer(text) if INNER_DOT.search(text) else ():
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


_ANY_QUOTE = re.compile(r"'|&(?:lt|gt|quot|apos|#39);")


def _url_end(text: str, start: int, end: int) -> int:
    """Where a URL ends once the sentence's own punctuation, quotes and closing brackets are taken off."""
    quote = (_ANY_QUOTE if text[start - 1 : start] == "'" else _RE.quote).search(text, start, end)
    end = quote.start() if quote else end
    if not text.isascii() and (word := _RE.goes_on_unspaced.search(text, start, end)):
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
    for match in _RE.email.finditer(text):
        local = match.group(1)
        lead = len(local) - len(local.lstrip("'"))
        if ".." not in local and not local.endswith(".") and "_" not in match.group(2):
            yield match.start() + lead, match.end()
    if not text.isascii():
        for match in _RE.email_alone.finditer(text):
            local, _, domain = match.group(1).partition("@")
            if not (domain.isascii() and local[-1].isascii()):  # those are found without what stands before them
                yield match.span(1)
    if '"@' in text:
        yield from (match.span() for match in _RE.quoted_email.finditer(text))
    if "@[" in text:
        yield from (match.span() for match in _RE.email_at_ip.finditer(text) if _is_address(match.group(1), None))


def find_ips(text: str) -> Iterator[tuple[int, int]]:
    """Spans of IPv4 and IPv6 addresses and networks; versions and loopback are none."""
    if "." in text:
        yield from _ipv4s(text)
    if text.count(":") >= 2:
        for match in _RE.ipv6.finditer(text):
            # C++ and Ruby write names as a::b; an address without any digit would be a rare one
            value = match.group(1)
            if _DIGIT.search(value) and _is_address(value, None) and not _is_code(value):
                yield match.span()


def _ipv4s(text: str) -> Iterator[tuple[int, int]]:
    """IPv4 addresses. What is called a version once is none in the whole text, nor is what stands in a row with it."""
    spans: list[tuple[int, int]] = []
    versions: set[str] = set()
    version_end = -1
    for match in _RE.ipv4.finditer(text):
        if not _is_address(match.group(1), match.group(2)):
            continue
        start, end = match.span()
        if match.group(1).startswith(_SURE_ADDRESSES):
            spans.append((start, end))
        elif (
            _RE.version_before.search(text[max(0, start - 30) : start])
            or _RE.version_after.match(text, end)
            or (start - 8 < version_end and _RE.between_versions.fullmatch(text, version_end, start))
        ):
            versions.add(match.group(1))
            version_end = end
        else:
            spans.append((start, end))
    return (span for span in spans if text[slice(*span)] not in versions)


def _is_code(value: str) -> bool:
    """A slice ([1::2]) or a name rather than an address: short, in a range that nobody is given; or an EUI-64."""
    short = "::" in value and "." not in value and sum(map(bool, value.split(":"))) < 4
    return (short and ipaddress.IPv6Address(value).is_reserved) or _RE.pairs.fullmatch(value) is not None


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
    for match in _RE.mac.finditer(text):
        digits = _SEPARATOR.sub("", match.group()).upper()
        if len(set(digits)) == 1:
            continue
        before = text[max(0, match.start() - 24) : match.start()]
        # figures alone in groups are other numbers, unless they are called an address
        if ":" in match.group() or not digits.isdigit() or _RE.called_a_mac.search(before):
            yield match.span()
    for match in _RE.bare_mac.finditer(text) if MAC_NAME.search(text) else ():
        if _DIGIT.search(match.group(1)) and len(set(match.group(1))) > 1:
            yield match.span(1)
