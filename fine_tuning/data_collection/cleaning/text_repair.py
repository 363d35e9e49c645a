"""Text as people meant it: whole characters, one composition, nothing invisible, nothing that a model obeys."""

import re
import unicodedata

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

_SURROGATE = re.compile("[\ud800-\udfff]")
# ESC [ … final byte (CSI), ESC ] … BEL or ESC \ (OSC), and the two-character escapes of ECMA-48
_ANSI = re.compile("\x1b(?:\\[[0-?]{0,64}[ -/]{0,8}[@-~]|\\][^\x07\x1b]{0,2048}(?:\x07|\x1b\\\\)|[@-Z\\\\^_])")
# C0 without tab and newline, DEL, C1, soft hyphen, bidi embeddings, overrides and isolates, zero-width space, word
# joiner, invisible operators, BOM, interlinear marks, non-characters
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ufdd0-\ufdef]"
)
_NEEDS_LOOK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\U0010ffff]")
_JOINER = re.compile("[\u200c\u200d]")
# Marks that place punctuation: they are part of a text that runs from right to left, and nothing in others.
_DIRECTION_MARK = re.compile("[\u061c\u200e\u200f]")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_FENCE = re.compile(r"^[ ]{0,3}(```+|~~~+)", re.MULTILINE)
_SPACES = re.compile(r"(?<=\S)[ \t\u00a0]{2,}|[ \t\u00a0]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_CARRIAGE_RETURNS = re.compile("\r\n?")
_LINE_ENDS = re.compile("[\u0085\u2028\u2029]")
# An unseen alphabet, in which text can be hidden from people; the flags of England, Scotland and Wales are spelt in it.
_TAGS = re.compile("(\U0001f3f4[\U000e0030-\U000e007a]{1,8}\U000e007f)|[\U000e0000-\U000e007f]")
_VIRAMA = 9  # its canonical combining class


class TextRepair:
    """Repairs texts for a tokenizer with the given control tokens.

    Args:
        control_tokens: strings that the tokenizer reads as commands; each becomes a space in a text.
        fix_encoding: undo mojibake with ftfy, in non-ASCII text only.
    """

    def __init__(self, control_tokens: tuple[str, ...] = CONTROL_TOKENS, fix_encoding: bool = True) -> None:
        tokens = sorted({token for token in control_tokens if token.strip()}, key=lambda t: (-len(t), t))
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._token_starts = tuple({token[0] for token in tokens})
        self._fix_encoding = fix_encoding

    def __call__(self, text: str) -> str:
        """The repaired text. Repairing it again changes nothing."""
        if self.only_strips(text):
            return text.strip()
        for _ in range(4):
            repaired = self._once(text)
            if repaired == text:
                break
            text = repaired
        return text

    def only_strips(self, text: str) -> bool:
        """Whether a text is ASCII without control characters, control tokens and runs of white space, as most are, so
        that all that is done to it, and to each of its lines, is to strip it."""
        return (
            text.isascii()
            and "  " not in text
            and " \n" not in text
            and "\n\n\n" not in text
            and not any(start in text for start in self._token_starts)
            and text.replace("\n", "").isprintable()
        )

    def _once(self, text: str) -> str:
        if _NEEDS_LOOK.search(text):
            text = self._characters(text)
        if self._tokens is not None and any(start in text for start in self._token_starts):
            text = self._tokens.sub(" ", text)
        return white_space(text)

    def _characters(self, text: str) -> str:
        if _SURROGATE.search(text):
            # Halves of a pair become their character; a lone half becomes U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if "\r" in text:
            text = _CARRIAGE_RETURNS.sub("\n", text)
        if "\x1b" in text:
            text = _ANSI.sub("", text)
        if not text.isascii():
            if self._fix_encoding:
                import ftfy  # most texts are ASCII and do without

                # Before U+0085 is a line end: it is the second half of Å. fix_encoding alone neither uncurls quotes nor
                # touches ligatures, widths or HTML entities.
                text = "\n".join(line if line.isascii() else ftfy.fix_encoding(line) for line in text.split("\n"))
            text = _LINE_ENDS.sub("\n", text)
            text = unicodedata.normalize("NFC", text)
            if "\u200c" in text or "\u200d" in text:
                text = _JOINER.sub(_keep_joiner, text)
            if _DIRECTION_MARK.search(text) and not _RIGHT_TO_LEFT.search(text):
                text = _DIRECTION_MARK.sub("", text)
            text = _TAGS.sub(r"\1", text)
        return _INVISIBLE.sub("", text)


def _keep_joiner(match: re.Match[str]) -> str:
    """ZWJ and ZWNJ stay where scripts and emoji need them: after an emoji, a virama or a letter of a joining script."""
    text, at = match.string, match.start()
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if before and unicodedata.combining(before) == _VIRAMA:  # at the end of a word too: Malayalam's chillus
        return match.group()
    if not before or not after:
        return ""
    if after in "\u200c\u200d":
        return ""
    category = unicodedata.category(before)
    if category in ("So", "Sk") or before == "\ufe0f" or 0x1F3FB <= ord(before) <= 0x1F3FF:
        return match.group()
    joining = 0x0600 <= ord(before) <= 0x10FF or 0x1780 <= ord(before) <= 0x18AF or 0xA800 <= ord(before) <= 0xABFF
    return match.group() if joining and (category[0] in "LM") else ""


def white_space(text: str) -> str:
    """Runs of spaces become one, of empty lines one; line ends are bare. Indentation and code blocks stay."""
    if "```" not in text and "~~~" not in text:
        return _plain_white_space(text).strip()
    pieces, position, fence = [], 0, None
    for mark in _FENCE.finditer(text):
        if fence is None:
            pieces.append(_plain_white_space(text[position : mark.start()]))
            fence, position = mark.group(1), mark.start()
        elif mark.group(1).startswith(fence):
            end = text.find("\n", mark.end())
            end = len(text) if end < 0 else end
            pieces.append(text[position:end])
            fence, position = None, end
    pieces.append(text[position:] if fence else _plain_white_space(text[position:]))
    return "".join(pieces).strip()


def _plain_white_space(text: str) -> str:
    if "  " in text or "\t" in text or "\u00a0" in text or " \n" in text:
        text = _SPACES.sub(_squeeze, text)
    return _BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text


def _squeeze(match: re.Match[str]) -> str:
    text, end = match.string, match.end()
    return "" if end == len(text) or text[end] == "\n" else " "
