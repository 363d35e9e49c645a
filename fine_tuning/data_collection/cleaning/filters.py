"""Which conversations are worth training on. Each rule names its reason and the value that it measured."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Literal

from pydantic import Field

from fine_tuning.common.languages import CODE_BLOCK, SHORT_TEXT, detect_language
from fine_tuning.common.settings import Settings
from fine_tuning.common.writing_systems import NO_SPACES
from fine_tuning.schema.conversation import Problem


class FilterSettings(Settings):
    """The section `clean.filters` of params.yaml: thresholds, each measured on one conversation."""

    min_length: int = Field(ge=0)
    max_length: int = Field(ge=1)
    min_turns: int = Field(ge=0)
    max_turns: int | None = Field(ge=2)
    max_repetition: float = Field(gt=0)
    max_special_characters: float = Field(ge=0, le=1)
    languages: list[str]
    min_language_confidence: float = Field(ge=0, le=1)
    inappropriate: Literal["off", "flag", "drop"]
    inappropriate_words: list[str]
    max_echo: float = Field(ge=0, le=1)


# -----------------------------------------------------------------------------
# structure


_MISPLACED = {("user", "user"), ("assistant", "assistant"), ("tool", "user"), ("user", "tool")}


def check_roles(messages: list[dict]) -> Problem | None:
    """Apart from system and tool messages, user and assistant take turns and the user begins."""
    return _problem_of_roles(tuple([message["role"] for message in messages]))


@lru_cache(maxsize=1024)
def _problem_of_roles(roles: tuple[str, ...]) -> Problem | None:
    turns = []
    for index, role in enumerate(roles):
        if role == "system" and index > 0:
            return Problem("late_system_message", index)
        if role in ("user", "assistant"):
            turns.append(role)
        elif role == "tool" and "assistant" not in turns:
            return Problem("tool_before_assistant", index)
    if "user" not in turns:
        return Problem("no_user_message", 0)
    if "assistant" not in turns:
        return Problem("no_assistant_message", 0)
    if turns[0] != "user":
        return Problem("assistant_begins", 0)
    spoken = [role for role in roles if role != "system"]
    for index, pair in enumerate(pairwise(spoken), start=1):
        if pair in _MISPLACED:
            return Problem("roles_do_not_alternate", index)
    return None


def trim_end(messages: list[dict]) -> list[dict]:
    """The messages up to the last reply of the assistant: what comes after it has no answer to learn."""
    last = len(messages)
    while last and messages[last - 1].get("role") != "assistant":
        last -= 1
    return messages[:last] or messages


def without_unusable(messages: list[dict], shortest: int, longest: float) -> tuple[list[dict], Problem | None, int]:
    """The conversation without exchanges in which a message of user or assistant is empty, too short or too long.

    An exchange is a user message with all up to the next one. Of the messages that stay, one that followed an exchange
    that went bears "gap": true. Lengths are characters. Returns (messages, why the first exchange went or None, how
    many went).
    """
    if _length_problem(messages, shortest, longest) is None:
        return messages, None, 0
    kept, drop, gone, gap = [], None, 0, False
    head = int(messages[0]["role"] == "system")
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for start, end in pairwise([*starts, len(messages)]):
        exchange = messages[start:end]
        if problem := _length_problem(exchange, shortest, longest):
            drop, gone, gap = drop or problem, gone + 1, True
        else:
            kept += [exchange[0] | {"gap": True}, *exchange[1:]] if gap else exchange
            gap = False
    return messages[:head] + kept, drop, gone


def _length_problem(messages: list[dict], shortest: int, longest: float) -> Problem | None:
    for length in [len(m["content"]) for m in messages if m["role"] in ("user", "assistant")]:
        if length == 0:
            return Problem("empty_message", 0)
        if length < shortest:
            return Problem("too_short", length)
        if length > longest:
            return Problem("too_long", length)
    return None


def check_turns(messages: list[dict], settings: FilterSettings) -> Problem | None:
    """The number of messages of user and assistant."""
    turns = sum(message["role"] in ("user", "assistant") for message in messages)
    if turns < settings.min_turns:
        return Problem("too_few_turns", turns)
    if settings.max_turns is not None and turns > settings.max_turns:
        return Problem("too_many_turns", turns)
    return None


# -----------------------------------------------------------------------------
# content

_TEMPLATE = re.compile(
    r"\{\{\s{0,4}[\w. |]{1,64}\s{0,4}\}\}|\{%-?\s{0,4}\w{1,32}[^%\n]{0,128}%\}|<%=?[^%\n]{1,128}%>"
    r"|(?<!\w)\[(?:(?:insert|your)[ _][\w '’/&-]{2,40}|(?:[a-z]{2,16} )?name)\](?!\()"  # but no link of Markdown
    r"|\blorem ipsum dolor\b",
    re.IGNORECASE,
)
# Formulas of LaTeX are as little prose as code is.
_FORMULA = re.compile(
    r"\$\$(?=[^$]{0,200}\w)[^$]{1,2000}\$\$|\$(?=[^$\n]{0,200}\w)[^$\n]{1,200}\$"
    r"|\\\((?:(?!\\\()[^\n]){1,400}?\\\)|\\\[(?:(?!\\\[).){1,2000}?\\\]",
    re.DOTALL,
)
# Gopher, appendix A.1 (Rae et al. 2021), table A1: share of characters in the most frequent 2-, 3- and 4-gram, and in
# all duplicate 5- to 10-grams, that marks a web page as repetitive. `max_repetition` scales them: 1 is the paper's.
TOP_GRAM_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_GRAM_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
DUPLICATE_LINE_SHARE = 0.30
CHARACTERS_A_WORD = 15  # more on average: the script puts no spaces between words, and a word is counted as two


def check_content(messages: list[dict], settings: FilterSettings) -> Problem | None:
    """Template fields, echo, special characters, repetition and language, the quick rules first."""
    spoken = [(m["role"], m["content"]) for m in messages if m["role"] in ("user", "assistant")]
    whole = "\n".join([text for _, text in spoken])
    plain = not any(map(whole.__contains__, _MARKS)) and _specials(whole) < settings.max_special_characters * SHORT_TEXT
    previous = ""
    for role, text in spoken:
        prose = text
        if not plain:
            prose = CODE_BLOCK.sub(" ", text) if "`" in text else text
            if "$" in prose or "\\" in prose:
                prose = _FORMULA.sub(" ", prose)
            if any(map(prose.__contains__, _TEMPLATE_MARKS)) and (found := _TEMPLATE.search(prose)):
                return Problem("template_field", found.start())
            share = round(_specials(prose) / max(len(prose), 1), 4)
            if share > settings.max_special_characters and len(prose) >= SHORT_TEXT:
                return Problem("special_characters", share)
        if role == "assistant":
            if (share := _echo(previous, text)) > settings.max_echo:
                return Problem("echo", share)
            if (share := repetition(prose)) > settings.max_repetition:
                return Problem("repetition", share)
        previous = text
    if settings.inappropriate == "drop" and (found := inappropriate(messages, settings.inappropriate_words)):
        return Problem("inappropriate", found)
    if settings.languages:
        language, confidence = detect_language(messages)
        if language not in settings.languages and confidence >= settings.min_language_confidence:
            return Problem("language", language)
    return None


_TEMPLATE_MARKS = ("{", "<%", "[", "orem", "OREM")
_MARKS = ("`", "$", "\\", *_TEMPLATE_MARKS)  # of code, formulas and template fields


def _specials(text: str) -> int:
    """How many characters are no letter, digit, white space or usual punctuation of any script."""
    if text.isascii():
        return len(text.encode().translate(None, _ORDINARY_ASCII))
    return sum(map(_is_special, text))


_USUAL = frozenset(".,;:!?'\"()-")
_ORDINARY_ASCII = bytes(i for i in range(128) if chr(i).isalnum() or chr(i).isspace() or chr(i) in _USUAL)


def _is_special(character: str) -> bool:
    if character.isalnum() or character.isspace() or character in _USUAL:
        return False
    return character.isascii() or unicodedata.category(character)[0] not in "MP"


def _echo(question: str, answer: str) -> float:
    """Share of the answer that is the question again, whatever its case and end; less than half of it is none."""
    if 2 * len(question) < len(answer) or 2 * len(answer) < len(question):
        return 0.0
    first, second = (" ".join(text.lower().split()).rstrip(_ENDS) for text in (question, answer))
    if len(second.encode()) < SHORTEST_ECHO or not first or first not in second:
        return 0.0
    return round(len(first) / len(second), 4)


_ENDS = " .!?…。！？؟।"
SHORTEST_ECHO = 24  # bytes of UTF-8: five words of English, eight characters of Chinese


def repetition(text: str) -> float:
    """How repetitive a text is, relative to Gopher's thresholds: above 1 the paper would drop it."""
    words = text.split()
    if len(text) > CHARACTERS_A_WORD * max(len(words), 1):
        return _repetition_of_characters("".join(words))
    if len(words) < SHORT_TEXT:
        return 0.0
    worst = 0.0
    pairs = len(words) - 1 - len(set(pairwise(words)))
    total = sum(map(len, words)) if pairs else 1
    if pairs > 1:  # otherwise no pair stands there three times
        worst = _top_share(words, 2, total) / TOP_GRAM_SHARES[2]
    if pairs and len(set(zip(words, words[1:], words[2:], strict=False))) < len(words) - 2:
        worst = max(worst, *(_top_share(words, size, total) / TOP_GRAM_SHARES[size] for size in (3, 4)))
        worst = _worst_duplicate_share(words, 1, total, worst)
    # Of shorter lines, such as a brace, a bracket or `else:`, code has many alike.
    lines = [line for line in text.split("\n") if line.strip().count(" ") > 1] if "\n" in text else []
    if len(lines) > 3:
        worst = max(worst, (1 - len(set(lines)) / len(lines)) / DUPLICATE_LINE_SHARE)
    return round(worst, 4)


def _repetition_of_characters(text: str) -> float:
    text = text[-8192:]  # a loop goes on to the end
    total = len(text)
    if total < 2 * SHORT_TEXT or len(set(_grams(text, 4))) > total - 4:  # no four characters stand there twice
        return 0.0
    worst = max(_top_share(text, 2 * size, total) / limit for size, limit in TOP_GRAM_SHARES.items())
    return round(_worst_duplicate_share(text, 2, total, worst), 4)


def _worst_duplicate_share(units: Sequence[str], scale: int, total: int, worst: float) -> float:
    """`worst`, or the largest share of duplicate grams in multiples of its threshold, if that is more."""
    for size, limit in DUPLICATE_GRAM_SHARES.items():
        share = _duplicate_share(units, size * scale, total)
        worst = max(worst, share / limit)
        if share / DUPLICATE_GRAM_SHARES[10] <= worst:  # what longer grams repeat is part of what this one does
            break
    return worst


def _top_share(words: Sequence[str], size: int, total: int) -> float:
    """Share of the characters that stand in the most frequent run of `size` words, if it is there three times."""
    gram, count = Counter(_grams(words, size)).most_common(1)[0]
    return count * sum(map(len, gram)) / total if count > 2 else 0.0


def _duplicate_share(words: Sequence[str], size: int, total: int) -> float:
    """Share of the characters that stand in a run of `size` words which was there before; each counts once."""
    seen: set[tuple[str, ...] | str] = set()
    covered, inside = 0, 0
    for index, gram in enumerate(_grams(words, size)):
        if gram in seen:
            start = max(index, inside)
            covered += len("".join(words[start : index + size]))
            inside = index + size
        else:
            seen.add(gram)
    return covered / total


def _grams(words: Sequence[str], size: int) -> Iterable[tuple[str, ...] | str]:
    if isinstance(words, str):
        return [words[start : start + size] for start in range(len(words) - size + 1)]
    return zip(*(words[i:] for i in range(size)), strict=False)


@cache
def _word_pattern(words: tuple[str, ...]) -> re.Pattern[str] | None:
    listed = [word.strip() for word in words if word.strip()]
    whole = [rf"{_edge(word[0])}{re.escape(word)}{_edge(word[-1])}" for word in sorted(listed, key=len, reverse=True)]
    return re.compile("|".join(whole), re.IGNORECASE) if whole else None


def _edge(character: str) -> str:
    """Where a listed word may begin or end: scripts without spaces and signs have no word boundaries."""
    return "" if _UNSPACED.match(character) else r"\b"


_UNSPACED = re.compile(rf"\W|[{NO_SPACES}]")


def inappropriate(messages: list[dict], words: list[str]) -> int:
    """How many of the listed words the user and the assistant say."""
    pattern = _word_pattern(tuple(words))
    return sum(len(pattern.findall(m["content"])) for m in messages if m["role"] != "system") if pattern else 0
