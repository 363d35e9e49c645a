"""Text of people and models made safe to show: Markdown for reading, but nothing that loads, runs or decorates.

Streamlit leaves HTML as text by itself. What is left: images (`![](http://…)` would tell a stranger that the chat is
being read), Mermaid drawings, which load images too, Streamlit's own directives (`:red[…]`, `:material/…:`) and `$…$`,
which would turn prices into formulas. Code blocks are cut out first and shown as code, so that nothing inside them is
changed; those in quotes and lists stay in the prose, as plain text.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

# CommonMark 0.31, "Fenced code blocks": up to three spaces, three or more of one character, an info string.
FENCE = re.compile(r"^ {0,3}(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[ \t]*(?P<language>[\w+#.-]*)")
BACKTICKS = re.compile(r"(?<!\\)(?P<backslashes>\\*)(?P<ticks>`+)")
# A code block with a language inside a quote or a list. An info string of backticks has none in it.
NESTED_FENCE = re.compile(r"^[ \t>*+.)\d-]*(?:`{3,}(?=[ \t]*[^\s`][^`\n]*$)|~{3,}(?=[ \t]*[^\s~]))", re.MULTILINE)
# A line that begins with a tag would be a block of HTML, in which nothing is escaped: backslashes would show.
DECORATION = re.compile(r"<(?=[A-Za-z/!?])|\$|:(?=[a-z][\w-]*\[|[a-z]+/[\w.-]+:|[a-z_]+:)")


class Piece(NamedTuple):
    """A stretch of a text: Markdown prose made safe, or the inside of a code block as it is."""

    kind: Literal["prose", "code"]
    text: str
    language: str = ""


def pieces(text: str) -> Iterator[Piece]:
    """Split `text` at its code blocks. A block that is still open (the reply is being written) counts as code."""
    prose: list[str] = []
    code: list[str] = []
    fence, language = "", ""
    for line in printable(text).split("\n"):
        if fence:
            bare = line.strip()
            if len(bare) >= len(fence) and set(bare) == {fence[0]} and len(line) - len(line.lstrip(" ")) <= 3:
                yield Piece("code", "\n".join(code), language)
                code, fence = [], ""
            else:
                code.append(line)
        elif match := FENCE.match(line):
            if "\n".join(prose).strip():
                yield Piece("prose", safe_prose("\n".join(prose)))
            prose, fence, language = [], match["fence"], match["language"].lower()
        else:
            prose.append(line)
    if fence:
        yield Piece("code", "\n".join(code), language)
    elif "\n".join(prose).strip():
        yield Piece("prose", safe_prose("\n".join(prose)))


def safe_prose(text: str) -> str:
    """Markdown without images, Streamlit directives and formulas; inline code keeps its characters."""
    # Every Markdown image starts with these two characters, in whatever way a parser reads the rest: with a zero-width
    # space between them it is a link with an exclamation mark.
    text = text.replace("![", "!\u200b[")
    # "mermaid" has many spellings, such as entities: another word in front is the language, whatever follows. A
    # footnote may hold a code block too, behind a label of any characters: none are made.
    text = NESTED_FENCE.sub(r"\g<0>text ", text.replace("[^", "[\u200b^"))
    kept, position = [], 0
    for start, end in _code_spans(text):
        kept += [_undecorated(text[position:start]), text[start:end]]
        position = end
    return "".join([*kept, _undecorated(text[position:])])


def _code_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where inline code begins and ends, backticks included, in one pass over the runs of backticks. CommonMark 0.31,
    "Code spans": a run, without its first backtick where that is escaped, up to the next run as long."""
    runs = [(*match.span("ticks"), len(match["backslashes"]) % 2) for match in BACKTICKS.finditer(text)]
    spans, following = [], {}
    for start, end, escaped in reversed(runs):
        spans.append((start, start + escaped, following.get(end - start - escaped)))
        following[end - start] = end
    position = 0
    for start, opened, closed in reversed(spans):
        if closed is not None and start >= position:
            yield opened, closed
            position = closed


def printable(text: str) -> str:
    """`text` without lone surrogates and control characters, which browsers and Streamlit refuse."""
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return "".join(character for character in text if character >= " " or character in "\n\t")


def _undecorated(text: str) -> str:
    return DECORATION.sub(r"\\\g<0>", text)
