"""Secrets in text: the formats that their issuers document, and values that are called a password or a key.

Every pattern starts only where a value can start and repeats with an upper bound, so that a scan is linear.
"""

import base64
import re
from collections.abc import Iterator
from functools import cache

from fine_tuning.common.writing_systems import ENDS_VALUE, WORDLIKE
from fine_tuning.data_collection.personal_data.patterns import PATTERNS, any_of

_DIGIT = re.compile(r"\d")
_SHORTEST_TOKEN, _SHORTEST_BESIDE = 15, 24
_SECRET = PATTERNS["secret"]
# Most words are too short for any of the formats.
_TOKENS = re.compile(rf"(?<![A-Za-z0-9_])(?=[A-Za-z0-9_.:~+/-]{{15}}){any_of('secret', 'tokens')}(?![A-Za-z0-9_])")
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_WITHOUT_END = re.compile(r"(?:(?:\s|\\[rn]){1,4}[A-Za-z0-9+/=]{16,2000}+)++")
_WORDS = _SECRET["words"]
_COMMON_NAMES = "|".join(_SECRET["names"])
_OTHER_NAMES = rf"(?:{'|'.join(_WORDS)})[^\W\d_{ENDS_VALUE}]{{0,6}}"
_BARE = rf"([^\s\"'`<>,;“”„«»{ENDS_VALUE}]{{6,256}})"
_QUOTED = r"\"([^\"\s]{4,256})\"|'([^'\s]{4,256})'|`([^`\s]{4,256})`|[“„«「『]([^\s“”„«»」』]{4,256})[“”»」』]"
_VALUE = f"(?:{_QUOTED}|{_BARE})"
# what assigns: a sign, a word of the language, or a particle without spaces
_ASSIGNS = (
    r"(?:\s{0,3}(=>|:=|==|=|:|：)\*{0,2}\s{0,3}(?:b(?=[\"']))?"
    rf"|\s{{1,3}}{any_of('secret', 'is')}\s{{0,3}}:?\s{{1,3}}|\s?(?:是|为|為|は|が|은|는|이|คือ)[:：]?\s{{0,2}})"
)
# right behind the name, without a sign: in quotes with a digit, or digits and letters with a sign or in turns; behind a
# name in a script without spaces also with four digits, which the names of ciphers do not have
_BESIDE_NAME = (
    r"(?P<beside>\s?(?=[\"“„«「『]\S{0,64}?\d)|\s(?=\S{0,64}?\d)(?=\S{0,64}?[A-Za-z])(?=\S{8})"
    r"(?=\S{0,64}?(?:[!@#$%^&*(){}\[\]~]|(?:[A-Za-z]+\d+){2}))"
    rf"|(?<=[{WORDLIKE}])(?=[!-~]{{8}})(?=(?:[!-~]{{0,16}}?\d){{4}}))"
)


@cache
def _named(names: str) -> re.Pattern[str]:
    """Groups: the name, the sign, the value in one of several quotes, and last the bare value."""
    names = f"(?:{names})"
    return re.compile(
        rf"({names})\d?[\"'*`]{{0,2}}"
        r"(?:\s(?:for|to|of|on|für|zum|vom|von|pour|du|de|del|della|do|da|para|per|voor|dla|k|ke|na|til|för|till|"
        r"за|от|для|до|від|к)(?:\s[\w'-]{1,20}){1,4}|\s(?:saya|của tôi|μου|שלי|mea|πρόσβασης)){0,2}"
        rf"(?:{_ASSIGNS}|{_BESIDE_NAME})(?!{names}\s?[=:]){_VALUE}",
        re.IGNORECASE,
    )


_PIN_HINT = re.compile("ПИН|暗証|핀번|密码")
# ISO 9564-1: 4 to 12 digits; people choose at most 8. Verification codes of cards have 3 or 4.
_PIN = re.compile(
    r"(?:(?<![A-Za-z])(?:PIN|ПИН)(?:[ -]?(?:[Cc]ode|kod|[Nn]ummer|number|код|码|碼))?|(?<![A-Za-z])[Pp]in[ -]?code|"
    r"暗証番号|핀번호|(?:取款|支付|银行卡)密码)(?:\s(?:for|of|to|de|della|del|von|zu)(?:\s[\w'-]{1,20}){1,4})?"
    rf"{_ASSIGNS}(\d{{4,8}})(?![\d.-]?\d)"
    rf"|(?<![A-Za-z])(?:CVV|CVC)2?(?:[ -]?[Cc]ode)?{_ASSIGNS}(\d{{3,4}})(?![\d.-]?\d|\s[a-z])"
)
# without a word between name and value, only what is long and mixed counts, and the hexadecimal digits of a key
_BESIDE = re.compile(
    rf"(?i:{_COMMON_NAMES})\s(?=[^a-z\s]{{0,99}}[a-z])(?=[^A-Z\s]{{0,99}}[A-Z])(?=[^\d\s]{{0,99}}\d)"
    r"([A-Za-z0-9+/=_-]{24,256})(?![^\s.,;:!?)\"'`])"
)
_BESIDE_HEX = re.compile(
    r"(?:api|access|secret|auth)[ _-]?(?:key|token)s?\s(?=[a-f]{0,31}\d)([0-9a-f]{32,64})(?![\w/-])", re.IGNORECASE
)
_OPTION = re.compile(r"--(?:[a-z0-9]{1,24}-){0,4}(password|passwd|pass|secret|token|api-key)( )" + _VALUE)
# user:password of an HTTP client, the password of a file .netrc, and of sshpass
_USER_OPTION = re.compile(r"(?<=\s)(?:-u|--user|--proxy-user)[ =]?([\"']?)[\w.@+-]{1,64}:" + _BARE)
_NETRC = re.compile(r"\b(?:machine\s{1,4}\S{1,253}|default)\s{1,4}login\s{1,4}\S{1,64}\s{1,4}password\s{1,4}" + _BARE)
_PASS_OF_USER = re.compile(
    r"\b(?:user(?:name)?|login|account|e-?mail)\s?[:=]\s?\S{1,64}[\s,;/|]{1,4}pass\s?[:=]\s?" + _BARE, re.IGNORECASE
)
_SSHPASS = re.compile(r"\bsshpass -p ?([\"']?)" + _BARE)
_BEARER = re.compile(
    r"(?<![A-Za-z])(authorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?)?(bearer|basic|token)\s{1,2}"
    r"([A-Za-z0-9_.~+/=-]{8,2000})",
    re.IGNORECASE,
)
_IN_PROSE = re.compile(rf"[A-Z][a-z]|passwort|{'|'.join(_WORDS)}")  # such a name is hardly one of code
# what is counted by a number, such as 128000 tokens
_COUNTED = re.compile(r"\s(?!(?:and|or|und|oder|is|was|for|to|in|from|by|with|please|works|expires)\b)[^\W\d_]{2}")
_BARE_VALUE = re.compile(r"(?=.*\d)(?=.*[^\d\W_])|(?=.*[^\W_])(?=.*[!@#$%^&*~+])|\d{6,}$")


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Spans of tokens, private keys, named values and bearer tokens."""
    # Of all these only the tokens of Hugging Face can be letters alone.
    may_hold = "hf_" in text or "api_org_" in text or _DIGIT.search(text)
    longest = max(map(len, text.split()), default=0) if may_hold else 0
    if longest >= _SHORTEST_TOKEN:
        for match in _TOKENS.finditer(text):
            if not match.group().lower().endswith("xxxxxx"):
                yield match.span()
    if "PRIVATE KEY" in text:
        yield from _private_keys(text)
    if "PIN" in text or "CV" in text or "in code" in text or (not text.isascii() and _PIN_HINT.search(text)):
        yield from (match.span(match.lastindex or 0) for match in _PIN.finditer(text))
    lower = text.lower()
    if not names_a_secret(lower):
        return
    names = f"{_COMMON_NAMES}|{_OTHER_NAMES}" if _has_other_name(lower) else _COMMON_NAMES
    yield from _named_secrets(text, _named(names))
    if longest >= _SHORTEST_BESIDE:
        yield from (match.span(1) for match in _BESIDE.finditer(text))
        yield from (match.span(1) for match in _BESIDE_HEX.finditer(text))
    yield from _commands_secrets(text)
    if "bearer" in lower or "basic" in lower or "authorization" in lower:
        for match in _BEARER.finditer(text):
            if _is_credential(match.group(3), match.group(2).lower(), header=match.group(1) is not None):
                yield match.span(3)


# without one of these no value is read as a secret: it keeps the names' pattern from prose
_VALUE_MARK = re.compile(r"[\d\"'`=@#$%^&*~+!]")
_VALUE_MARKS = bytes(code for code in range(128) if _VALUE_MARK.match(chr(code)))
_HINTS = ("pwd", "basic ", "bearer", "authoriz", "curl ", "pw:", "pw=", "mdp ")
_STEMS = tuple(word for word in _WORDS if not any(other in word for other in _WORDS if other != word))
_ASCII_STEMS = tuple(filter(str.isascii, _STEMS))


def names_a_secret(lower: str) -> bool:
    """Whether a lower-case text has a word that secrets are called by, and what could be a value of it."""
    if not _has_value_mark(lower):
        return False
    if "pass" in lower or "key" in lower or "token" in lower or "secret" in lower:
        return True
    return any(map(lower.__contains__, _HINTS)) or _has_other_name(lower)


def _has_other_name(lower: str) -> bool:
    return any(map(lower.__contains__, _ASCII_STEMS if lower.isascii() else _STEMS))


def _has_value_mark(text: str) -> bool:
    if not text.isascii():
        return _VALUE_MARK.search(text) is not None
    characters = text.encode()  # an eighth of the pattern's time
    return len(characters.translate(None, _VALUE_MARKS)) < len(characters)


def _private_keys(text: str) -> Iterator[tuple[int, int]]:
    """Whole blocks (RFC 7468); of a block that is cut off what is left of it; the bare first line is no key."""
    position, ends = 0, True
    while start := _PRIVATE_KEY.search(text, position):
        end = _PRIVATE_KEY_END.search(text, start.end()) if ends else None
        ends = end is not None
        end = end or _KEY_WITHOUT_END.match(text, start.end())
        position = end.end() if end else start.end()
        if end:
            yield start.start(), position


def _named_secrets(text: str, named: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Values behind a name and a word or sign that assigns, or right beside it, and those of a command's options."""
    for pattern in (named, _OPTION) if "--" in text else (named,):
        for match in pattern.finditer(text):
            quoted = match.lastindex != pattern.groups  # the last group is the bare value
            start, end = match.span(match.lastindex or 0)
            if not quoted:
                start, end = _without_marks(text, start, end)
            name, sign, beside = match.group(1), match.group(2), pattern is named and match.group("beside") is not None
            if beside and (name.lower().endswith(("token", "key", "secret")) or not _BARE_VALUE.match(text[start:end])):
                continue
            if name.lower().endswith(("token", "key")) and text[start:end].isdigit() and _COUNTED.match(text, end):
                continue
            said = sign is None or (sign in ":：" and _IN_PROSE.match(name) is not None)
            setting = name.isupper() and sign == "=" and text[match.end(2)] != " "
            if _is_secret_value(text[start:end], name, quoted and not beside, setting, said):
                yield start, end


def _commands_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Passwords on the command line of an HTTP client or sshpass, and in a .netrc."""
    for pattern, hint in ((_USER_OPTION, " -"), (_NETRC, "login"), (_SSHPASS, "sshpass"), (_PASS_OF_USER, "pass")):
        if hint in text:
            for match in pattern.finditer(text):
                start, end = _without_marks(text, *match.span(pattern.groups))
                if _is_secret_value(text[start:end], "password", quoted=False, setting=False):
                    yield start, end


def _without_marks(text: str, start: int, end: int) -> tuple[int, int]:
    """A bare value without the sentence's end, the rest of a query, and Markdown's bold; nothing of a call or an item.
    What closes a bracket that was opened before the value on its line ends it."""
    value = _NEXT_FIELD.split(text[start:end], maxsplit=1)[0].rstrip(".?:")
    if _BRACKET.search(value):
        if _is_call(value, text[start + len(value) : end + 1]):
            return start, start
        line = text[max(0, text.rfind("\n", 0, start) + 1, start - 200) : start]
        for opening, closing in ("()", "[]", "{}"):
            depth = line.count(opening) - line.count(closing)
            for index, character in enumerate(value):
                depth += (character == opening) - (character == closing)
                if (
                    character == closing
                    and depth >= 0
                    and value.count(opening, 0, index) < value.count(closing, 0, index + 1)
                ):
                    value = value[:index].rstrip(".?:")
                    break
    end = start + len(value)
    if value.startswith("**") and value.endswith("**"):
        return start + 2, end - 2
    return start, end


def _is_call(value: str, after: str) -> bool:
    """Whether a value with a bracket is an expression of code: f(x), row[1], (a), f( before a quote. A name of code has
    no digits between its letters twice, and nothing but an operator stands behind its bracket."""
    if value[0] in "([{":
        return value[-1] in ")]}" or not _CLOSED.search(value) or after[:1] in ('"', "'")
    call = _CALL.match(value)
    if call is None or _INTERLEAVED.search(call.group()):
        return after[:1] in ('"', "'") and value[-1] in "([{"
    return not _GOES_ON.match(value, call.end())


_BRACKET = re.compile(r"[()\[\]{}]")
_CLOSED = re.compile(r"[)\]}]")
_CALL = re.compile(r"[A-Za-z_$][\w$.:>?-]*+[(\[{]")
_GOES_ON = re.compile(r"[^()\[\]{}]*+[)\]}][A-Za-z0-9]")
_INTERLEAVED = re.compile(r"(?:[A-Za-z]+\d+){2}|(?:\d+[A-Za-z]+){2}")
_NEXT_FIELD = re.compile(r"&[\w.]{1,40}=")
_STAND_IN = re.compile(any_of("secret", "stand_ins"), re.IGNORECASE)
_REFERENCE = ("#{", "os.", "process.", "env.", "\\x", "arn:", "op://", "http://", "https://", "/")
# a variable of a shell, a template or PHP; other values that begin with the sign are passwords
_VARIABLE = re.compile(
    r"\$(?:[({$]|\d*$|[A-Za-z_]\w*(?:$|-$|->|::|[.?:/\[({})\]]))|%(?:[({]|[A-Za-z_]\w*%?$)|%[sd]\W|[{\[]\W|"
    r"\[[^\[\]]*\]$|\{[^{}]*\}$|\{(?:[A-Za-z_][\w.]*|\d*)\}"
)
_NAME_OF_CODE = re.compile(r"[$%][A-Za-z_]\w*$")
_CODE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w{0,30}(?:\.[A-Za-z_]\w{0,30}){0,6}$")
_TAG = re.compile(r"!\w+$")  # of YAML
_WORD = re.compile(r"[^\W\d_]+(?:[_-][^\W\d_]+)*$")


def _is_secret_value(value: str, name: str, quoted: bool, setting: bool, said: bool = False) -> bool:
    """Whether a named value looks like a secret rather than a word, a placeholder or an expression of code.

    Args:
        name: what it is called. A password can be a word, a token or a key is none.
        quoted: it stands in quotes.
        setting: it is assigned without spaces to a name in capitals, the way of environment files.
        said: it is assigned as in a sentence and not as in code.
    """
    if len(value) < 6 or "<" in value or value.startswith(_REFERENCE):
        return False
    if _VARIABLE.match(value) and not (
        _NAME_OF_CODE.match(value) and (_INTERLEAVED.search(value) or (said and _DIGIT.search(value)))
    ):
        return False
    if set(value) <= set("*xX.-_•") or _STAND_IN.match(value):
        return False
    is_token = name.lower().endswith(("token", "key"))
    if is_token and len(value) < 16 and not _DIGIT.search(value):  # a lexer's token: "@brackets", "|NEWLINE|"
        return False
    can_be_word = (quoted or setting) and (len(value) >= 24 or not is_token)
    if _WORD.match(value):
        return can_be_word
    if _CODE.match(value):
        return quoted and can_be_word
    return quoted or (_BARE_VALUE.match(value) is not None and not _TAG.match(value))


def _is_credential(value: str, scheme: str, header: bool) -> bool:
    """Whether what follows a scheme of authorization (RFC 6750, RFC 7617) is a token rather than a word."""
    if scheme == "basic":  # user:password in base 64
        try:
            pair = base64.b64decode(value, validate=True).decode()
        except ValueError:
            return False
        return ":" in pair and pair.isprintable()
    if scheme == "token" and not header:
        return False
    return _DIGIT.search(value) is not None and (header or len(value) >= 16)
