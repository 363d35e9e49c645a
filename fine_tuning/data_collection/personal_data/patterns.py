"""Words of patterns.toml and expressions of expressions.toml as regular expressions."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fine_tuning.common import writing_systems


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


PATTERNS, _EXPRESSIONS = _read("patterns.toml"), _read("expressions.toml")
_REFERENCE = re.compile(r"\{\{(\|?)([\w.]+)\}\}")


def compiled(section: str, **given: str) -> SimpleNamespace:
    """The patterns of a section of expressions.toml, by name; `given` are further pieces."""
    return SimpleNamespace(**{name: expression(section, name, **given) for name in _EXPRESSIONS[section]["patterns"]})


def expression(section: str, name: str, **given: str) -> re.Pattern[str]:
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
