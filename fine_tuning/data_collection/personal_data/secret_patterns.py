"""Secrets in text: the formats that their issuers document, and values that are called a password or a key.

Every pattern starts only where a value can start and repeats with an upper bound, so that a scan is linear.
"""

import base64
import re
from collections.abc import Iterator

from fine_tuning.data_collection.personal_data.patterns import PATTERNS, Expressions

_DIGIT = re.compile(r"\d")
_SHORTEST_TOKEN, _SHORTEST_BESIDE = 15, 24
_WORDS = PATTERNS["secret"]["words"]
_RE = Expressions("secret", names="{{common_names}}|{{other_names}}")
_COMMON = Expressions("secret", names="{{common_names}}")
_PIN_HINT = re.compile("ПИН|暗証|핀번|密码")


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Spans of tokens, private keys, named values and bearer tokens."""
    # Of all these only the tokens of Hugging Face can be letters alone.
    may_hold = "hf_" in text or "api_org_" in text or _DIGIT.search(text)
    longest = max(map(len, text.split()), default=0) if may_hold else 0
    if longest >= _SHORTEST_TOKEN:
        for match in _RE.tokens.finditer(text):
            if not match.group().lower().endswith("xxxxxx"):
                yield match.span()
    if "PRIVATE KEY" in text:
        yield from _private_keys(text)
    if "PIN" in text or "CV" in text or "in code" in text or (not text.isascii() and _PIN_HINT.search(text)):
        yield from (match.span(match.lastindex or 0) for match in _RE.pin.finditer(text))
    lower = text.lower()
    if not names_a_secret(lower):
        return
    yield from _named_secrets(text, (_RE if _has_other_name(lower) else _COMMON).named)
    if longest >= _SHORTEST_BESIDE:
        yield from (match.span(1) for match in _RE.beside.finditer(text))
        yield from (match.span(1) for match in _RE.beside_hex.finditer(text))
    yield from _commands_secrets(text)
    if "bearer" in lower or "basic" in lower or "authorization" in lower:
        for match in _RE.bearer.finditer(text):
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
    while start := _RE.private_key.search(text, position):
        end = _RE.private_key_end.search(text, start.end()) if ends else None
        ends = end is not None
        end = end or _RE.key_without_end.match(text, start.end())
        position = end.end() if end else start.end()
        if end:
            yield start.start(), position


def _named_secrets(text: str, named: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Values behind a name and a word or sign that assigns, or right beside it, and those of a command's options."""
    for pattern in (named, _RE.option) if "--" in text else (named,):
        for match in pattern.finditer(text):
            quoted = match.lastindex != pattern.groups  # the last group is the bare value
            start, end = match.span(match.lastindex or 0)
            if not quoted:
                start, end = _without_marks(text, start, end)
            name, sign, beside = match.group(1), match.group(2), pattern is named and match.group("beside") is not None
            value, called = text[start:end], name.lower()
            if beside and (called.endswith(("token", "key", "secret")) or not _RE.bare_value.match(value)):
                continue
            if called.endswith(("token", "key")) and value.isdigit() and _RE.counted.match(text, end):
                continue
            said = sign is None or (sign in ":：" and _RE.in_prose.match(name) is not None)
            setting = name.isupper() and sign == "=" and text[match.end(2)] != " "
            if _is_secret_value(value, name, quoted and not beside, setting, said):
                yield start, end


def _commands_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Passwords on the command line of an HTTP client or sshpass, and in a .netrc."""
    hints = {"user_option": " -", "netrc": "login", "sshpass": "sshpass", "pass_of_user": "pass"}
    for name, hint in hints.items():
        if hint in text:
            pattern = getattr(_RE, name)
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
    if call is None or _RE.interleaved.search(call.group()):
        return after[:1] in ('"', "'") and value[-1] in "([{"
    return not _RE.goes_on.match(value, call.end())


_BRACKET = re.compile(r"[()\[\]{}]")
_CLOSED = re.compile(r"[)\]}]")
_CALL = re.compile(r"[A-Za-z_$][\w$.:>?-]*+[(\[{]")
_NEXT_FIELD = re.compile(r"&[\w.]{1,40}=")
_REFERENCE = ("#{", "os.", "process.", "env.", "\\x", "arn:", "op://", "http://", "https://", "/")
_NAME_OF_CODE = re.compile(r"[$%][A-Za-z_]\w*$")
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
    if _RE.variable.match(value) and not (
        _NAME_OF_CODE.match(value) and (_RE.interleaved.search(value) or (said and _DIGIT.search(value)))
    ):
        return False
    if set(value) <= set("*xX.-_•") or _RE.stand_in.match(value):
        return False
    is_token = name.lower().endswith(("token", "key"))
    if is_token and len(value) < 16 and not _DIGIT.search(value):  # a lexer's token: "@brackets", "|NEWLINE|"
        return False
    can_be_word = (quoted or setting) and (len(value) >= 24 or not is_token)
    if _WORD.match(value):
        return can_be_word
    if _RE.code.match(value):
        return quoted and can_be_word
    return quoted or (_RE.bare_value.match(value) is not None and not _TAG.match(value))


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
