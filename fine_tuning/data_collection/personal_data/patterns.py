"""Words and formats of patterns.toml as parts of regular expressions."""

import tomllib
from pathlib import Path
from typing import Any

PATTERNS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("patterns.toml").read_text(encoding="utf-8"))


def any_of(section: str, name: str) -> str:
    """A group of the alternatives in a list."""
    return f"(?:{'|'.join(PATTERNS[section][name])})"
