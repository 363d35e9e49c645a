"""Words of patterns.toml and expressions of expressions.toml as regular expressions."""

import re
import tomllib
from pathlib import Path
from typing import Any

from fine_tuning.common import writing_systems


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


PATTERNS, _EXPRESSIONS = _read("patterns.toml"), _read("expressions.toml")
_REFERENCE = re.compile(r"\{\{(\|?)([\w.]+)\}\}")


class Expressions:
    """The patterns of a section of expressions.toml, by name; `given` are further pieces. Each is compiled when it is
    asked for: all of them take a third of a second, and most texts need few."""

    def __init__(self, section: str, **given: str) -> None:
        self._section, self._given = section, given

    def __getattr__(self, name: str) -> re.Pattern[str]:
        if name not in _EXPRESSIONS[self._section]["patterns"]:
            raise AttributeError(name)
        setattr(self, name, found := _expression(self._section, name, **self._given))
        return found


def _expression(section: str, name: str, **given: str) -> re.Pattern[str]:
    """One pattern of a section."""
    pieces = _EXPRESSIONS[section].get("pieces", {}) | given

    def expanded(text: str) -> str:
        return _REFERENCE.sub(referred, re.sub(r"\n\s*", "", text))

    def referred(match: re.Match[str]) -> str:
        bare, name = match.groups()
        place, _, words = name.partition(".")
        if words:
            alternatives = "|".join(PATTERNS[place][words])
            return alternatives if bare else f"(?:{alternatives})"
        return getattr(writing_systems, name) if name.isupper() else expanded(pieces[name])

    return re.compile(expanded(_EXPRESSIONS[section]["patterns"][name]))
