"""A Markdown page for people: the same prompts, answered by every contender."""

import re
from collections.abc import Mapping, Sequence

from fine_tuning.evaluation.records.record_types import Reply

INTRODUCTION = (
    "Replies of the GGUF files: the likeliest token each time (temperature 0), without penalties (repeat_penalty 1). "
    "Ollama runs a model with the options in its Modelfile, models/package/Modelfile for the candidate."
)


def side_by_side(prompts: Sequence[str], answers: Mapping[str, Sequence[Reply]]) -> str:
    """The page; `answers` has, for each contender, one reply for each prompt."""
    lines = ["# Side by side", "", INTRODUCTION, ""]
    for index, prompt in enumerate(prompts):
        lines += [f"## {index + 1}. {' '.join(prompt.split())}", ""]
        for contender, replies in answers.items():
            reply = replies[index]
            cut = "" if reply.finished else " (cut off)"
            lines += [f"**{contender}**{cut}", "", quote(reply.text), ""]
    return "\n".join(lines)


def quote(text: str) -> str:
    """The text as a Markdown block quote that shows it as it is: markup in it stays text."""
    if not text:
        return "> *(nothing)*"
    # A fence one longer than any in the text cannot be closed by it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(f"> {line}".rstrip() for line in [f"{fence}text", *text.split("\n"), fence])
