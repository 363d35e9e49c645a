"""Secrets in text: the formats that their issuers document, and values that are called a password or a key.

Every pattern starts only where a value can start and repeats with an upper bound, so that a scan is linear.
"""

import re
from collections.abc import Iterator

_DIGIT = re.compile(r"\d")
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


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Spans of tokens, private keys, named values and bearer tokens."""
    # Of all these only the tokens of Hugging Face are letters alone.
    if ("hf_" in text or _DIGIT.search(text)) and max(map(len, text.split())) >= _SHORTEST_TOKEN:
        yield from (match.span() for match in _TOKENS.finditer(text))
    if "PRIVATE KEY" in text:
        position = 0
        while start := _PRIVATE_KEY.search(text, position):
            end = _PRIVATE_KEY_END.search(text, start.end())
            position = end.end() if end else len(text)
            yield start.start(), position
    lower = text.lower()
    if names_a_secret(lower):
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


def names_a_secret(lower: str) -> bool:
    """Whether a lower-case text has a word that secrets are called by."""
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
