"""How a chat becomes text, token ids and labels: the template of the tokenizer that the base came with."""

import copy
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from pydantic import Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fine_tuning.schema.light_tokenizer import LightTokenizer

    ChatTokenizer: TypeAlias = PreTrainedTokenizerFast | LightTokenizer
NOT_TRAINED = -100  # the label that the loss skips, by the convention of torch.nn.CrossEntropyLoss
_MARK = "\ue000\ue001"  # private-use characters: they stand where the template puts a content


class ChatSettings(Settings):
    """Section `chat` of params.yaml: shared by preparation, evaluation, package and the app."""

    system_prompt: str | None
    max_length: int = Field(ge=16)


class RenderError(UserError):
    """One conversation that the chat template or the tokenizer cannot carry without changing it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it. `spans[i]` is the range of `messages[i]`'s content in `text`.
    `messages` starts with the configured system prompt where one was put in front."""

    text: str
    messages: list[dict[str, Any]]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """Token ids with labels aligned to them: `labels[i]` is `input_ids[i]` where it is trained, else -100."""

    input_ids: list[int]
    labels: list[int]
    messages: list[dict[str, Any]]  # those of which a token is left after truncation
    dropped_messages: int  # earlier messages left out, so that the rest fits
    cut_tokens: int  # tokens cut off the end, because the last turn alone was too long
    control_ids: int  # ids that the template wrote, such as <|im_start|>
    begins: tuple[int, ...] = ()  # for each of `messages`, where in `input_ids` its content begins

    @property
    def trained_tokens(self) -> int:
        return sum(label != NOT_TRAINED for label in self.labels)


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """Load `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model folder, exactly as they are.
    Raises UserError if the folder holds no fast tokenizer or no chat template."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: make the base model with `dvc repro base`")
    # Not AutoTokenizer: it needs config.json, and rebuilds the pre-tokenizer of some architectures.
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template: choose an instruct model as base.model in params.yaml")
    return tokenizer


def render(
    tokenizer: "ChatTokenizer",
    messages: Sequence[dict[str, Any]],
    system_prompt: str | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Write `messages` with the tokenizer's own Jinja template and find each content in the result.

    `system_prompt` goes in front unless the conversation brings its own; None leaves it to the template. Templates
    that trim contents are followed; any other change to a content is refused.

    Raises:
        RenderError: the template refuses these roles, or drops, repeats or rewrites a content.
    """
    messages = list(messages)
    if system_prompt is not None and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    marks = [f"{_MARK[0]}{index}{_MARK[1]}" for index in range(len(messages))]
    marked = _apply_template(tokenizer, messages, marks, add_generation_prompt)
    text = _apply_template(tokenizer, messages, [message["content"] for message in messages], add_generation_prompt)
    # What the template writes around the contents, and whose content stands after each piece but the last.
    first, *rest = marked.split(_MARK[0])
    order, pieces = [], [first]
    for part in rest:
        index, _, piece = part.partition(_MARK[1])
        order.append(int(index))
        pieces.append(piece)
    if sorted(order) != list(range(len(marks))):
        raise RenderError("the chat template drops or repeats a message: choose another base.model in params.yaml")

    spans = [(0, 0)] * len(marks)
    position = len(first)
    faithful = text.startswith(first)
    for at, piece in zip(order, pieces[1:], strict=True):
        content = messages[at]["content"]
        for written in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(written + piece, position):
                break
        else:
            faithful = False
        spans[at] = (position, position + len(written))
        position += len(written) + len(piece)
    if not faithful or position != len(text):
        raise RenderError("the chat template rewrites a message: choose another base.model in params.yaml")
    return Rendered(text, messages, spans)


def encode_conversation(
    tokenizer: "ChatTokenizer",
    messages: Sequence[dict[str, Any]],
    system_prompt: str | None,
    max_length: int,
    trained: Sequence[bool] | None = None,
) -> Encoded:
    """Token ids and labels of a conversation: replies and the tokens that end them are trained, prompts are not.

    Args:
        trained: which of `messages` may be trained; None for all. Only assistant messages ever are.
        max_length: tokens. Too long a conversation loses whole turns, oldest first, but keeps its system message. Too
            long a last turn loses its end, and with it the end-of-turn token: a cut reply must not teach to stop.

    Raises:
        RenderError: see `render`.
        UserError: the template ends replies with no token of its own, so the model would never learn to stop.
    """
    turns = _Turns(tokenizer, messages, system_prompt, trained)
    if len(turns.whole.input_ids) <= max_length:
        return turns.whole
    last = len(turns.starts) - 1
    begin = turns.farthest(last, 0, max_length)
    return _cut(turns.encode(begin, begin, last), max_length)


class Windows(NamedTuple):
    """A conversation in pieces that fit: see `encode_windows`."""

    encoded: list[Encoded]
    lost_turns: int  # turns whose prompt alone leaves no room for a reply
    lost_tokens: int  # tokens of replies that no window has room for, those of lost turns included


def encode_windows(
    tokenizer: "ChatTokenizer",
    messages: Sequence[dict[str, Any]],
    system_prompt: str | None,
    max_length: int,
    trained: Sequence[bool] | None = None,
) -> Windows:
    """Token ids and labels of a conversation of any length, in windows of at most `max_length` tokens.

    Each reply is trained in one window. A conversation that fits is one window, as `encode_conversation` writes it. Of
    a longer one the first window holds the turns from its beginning that fit. Each further window trains the turns that
    come next and fill half of it (at least one), and then takes in front, untrained, as many of the turns before them
    as fit: so a reply has half a window before it, and a token is computed two to three times, not once for every reply
    that comes soon after it (strides: huggingface.co/docs/transformers/perplexity). The system message is in each.

    Where a message has "gap": true, something was taken out before it, and no window reaches across: the model never
    sees as whole what is not. A turn that is too long alone loses its end, as in `encode_conversation`.

    Args and errors are those of `encode_conversation`.
    """
    turns = _Turns(tokenizer, messages, system_prompt, trained)
    gaps = [turn for turn, start in enumerate(turns.starts) if turn and turns.messages[start].get("gap")]
    if not gaps and len(turns.whole.input_ids) <= max_length:
        return Windows([turns.whole], 0, 0) if turns.whole.trained_tokens else Windows([], sum(turns.wanted), 0)
    found, lost_turns, lost_tokens = [], 0, 0
    for start, stop in pairwise([0, *gaps, len(turns.starts)]):
        turn = start
        while (first := next((other for other in range(turn, stop) if turns.wanted[other]), None)) is not None:
            last = turns.farthest(start, stop - 1, max_length) if turn == start else -1
            if last < first:
                last = turns.farthest(first, stop - 1, max_length // 2)
            while not turns.wanted[last]:
                last -= 1
            uncut = turns.encode(min(first, turns.farthest(last, start, max_length)), first, last)
            encoded = _cut(uncut, max_length)
            lost_tokens += uncut.trained_tokens - encoded.trained_tokens
            if encoded.trained_tokens:
                found.append(encoded)
            else:
                lost_turns += 1
            turn = last + 1
    return Windows(found, lost_turns, lost_tokens)


class _Turns:
    """A conversation by turns: a user message and all up to the next one, what stands before the first one included."""

    def __init__(
        self,
        tokenizer: "ChatTokenizer",
        messages: Sequence[dict[str, Any]],
        system_prompt: str | None,
        trained: Sequence[bool] | None,
    ) -> None:
        self.messages, self._tokenizer, self._system_prompt = list(messages), tokenizer, system_prompt
        self._allowed = list(trained) if trained is not None else [True] * len(self.messages)
        self._head = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        self.starts = [self._head, *users[1:]]
        self._ends = [*users[1:], len(self.messages)]
        self.wanted = [
            any(self._allowed[at] and self.messages[at]["role"] == "assistant" for at in range(start, end))
            for start, end in zip(self.starts, self._ends, strict=True)
        ]

    @cached_property
    def whole(self) -> Encoded:
        return self.encode(0, 0, len(self.starts) - 1)

    def encode(self, begin: int, first: int, last: int) -> Encoded:
        """Turns `begin` to `last` after the system message, trained from turn `first` on."""
        chat = _chat_format(self._tokenizer)
        if not chat.closing:
            raise UserError("the chat template writes no end-of-turn token: choose another base.model in params.yaml")
        at, end, allowed = self.starts[begin], self._ends[last], self._allowed[self.starts[first] : self._ends[last]]
        rendered = render(self._tokenizer, self.messages[: self._head] + self.messages[at:end], self._system_prompt)
        before = [False] * (len(rendered.messages) - len(allowed))
        regions = [
            chat.trained_region(rendered.text, span)
            for span, message, may in zip(rendered.spans, rendered.messages, before + allowed, strict=True)
            if may and message["role"] == "assistant"
        ]
        tokens = _tokens(self._tokenizer, rendered)
        labels, region = [], 0
        for token, start in tokens:
            while region < len(regions) and start >= regions[region][1]:
                region += 1
            inside = region < len(regions) and start >= regions[region][0]
            labels.append(token if inside else NOT_TRAINED)
        ids = [token for token, _ in tokens]
        control = sum(token in chat.control_ids for token in ids)
        places = [start for _, start in tokens]
        begins = tuple(bisect_left(places, start) for start, _ in rendered.spans)
        return Encoded(ids, labels, rendered.messages, at - self._head, 0, control, begins)

    @cached_property
    def _sums(self) -> tuple[list[int], int] | None:
        """Sums of the turns' lengths, and what each window has beside them; None where lengths do not add up. They do
        with most templates: then every turn is measured alone and only once."""
        alone = [len(self.encode(turn, turn, turn).input_ids) for turn in range(len(self.starts))]
        once = sum(alone[:2]) - len(self.encode(0, 0, 1).input_ids) if len(alone) > 1 else 0
        sums = [0, *accumulate(length - once for length in alone)]
        return (sums, once) if sums[-1] + once == len(self.whole.input_ids) else None

    def farthest(self, turn: int, stop: int, budget: int) -> int:
        """The turn nearest to `stop`, forwards or backwards, up to which all from `turn` have `budget` tokens at most.
        `turn` itself, where even that is longer."""
        far, step = turn, 1 if stop > turn else -1
        while far != stop:
            begin, last = sorted((turn, far + step))
            if self._sums:
                sums, once = self._sums
                length = sums[last + 1] - sums[begin] + once
            else:
                length = len(self.encode(begin, begin, last).input_ids)
            if length > budget:
                break
            far += step
        return far


def encode_prompt(
    tokenizer: "ChatTokenizer", messages: Sequence[dict[str, Any]], system_prompt: str | None = None
) -> list[int]:
    """Token ids of a conversation that waits for a reply, with the template's generation prompt at the end."""
    rendered = render(tokenizer, messages, system_prompt, add_generation_prompt=True)
    return [token for token, _ in _tokens(tokenizer, rendered)]


def end_of_turn_ids(tokenizer: "ChatTokenizer") -> list[int]:
    """The token ids that close a reply, as the template writes them: what generation stops at."""
    chat = _chat_format(tokenizer)
    return [chat.id_of(token) for token in chat.closing_tokens]


def _apply_template(
    tokenizer: "ChatTokenizer", messages: Sequence[dict[str, Any]], contents: Sequence[str], prompt: bool
) -> str:
    turns = [{"role": message["role"], "content": text} for message, text in zip(messages, contents, strict=True)]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template is a program of somebody else's: it may fail in any way
        # Only what the template says word for word: it may quote the conversation.
        reason = str(error) if str(error) in (tokenizer.chat_template or "") else type(error).__name__
        roles = ", ".join(message["role"] for message in messages[:6])
        raise RenderError(f"the chat template refuses messages of the roles {roles}: {reason}") from None


def _cut(encoded: Encoded, max_length: int) -> Encoded:
    """Cut to `max_length` tokens; messages without a token left are removed."""
    if len(encoded.input_ids) <= max_length:
        return encoded
    ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
    messages = [m for m, begin in zip(encoded.messages, encoded.begins, strict=True) if begin < max_length]
    cut = len(encoded.input_ids) - max_length
    return replace(encoded, input_ids=ids, labels=labels, messages=messages, cut_tokens=cut)


def _tokens(tokenizer: "ChatTokenizer", rendered: Rendered) -> list[tuple[int, int]]:
    """(id, first character) of every token; control tokens are parsed outside contents and only there."""
    chat = _chat_format(tokenizer)
    text = rendered.text
    written: list[tuple[int, int]] = []
    typed: list[tuple[int, int]] = []
    contents = sorted(span for span in rendered.spans if span[0] < span[1])
    for match in chat.control.finditer(text):
        before = bisect_left(contents, (match.end(), 0)) - 1  # the last content that starts before the match ends
        in_content = before >= 0 and match.start() < contents[before][1]
        (typed if in_content else written).append(match.span())
    if not typed:
        tokens = chat.encode(text)
    else:
        # Encoding the stretches between the template's control tokens one by one is right only if the tokenizer
        # does not look across them (one with a dummy prefix space does): try it on the same text, made harmless.
        harmless = text
        for start, end in typed:
            harmless = harmless[:start] + "x" * (end - start) + harmless[end:]
        if chat.encode(harmless) != chat.encode_between(harmless, written):
            raise RenderError("a message holds control tokens and this tokenizer cannot keep them plain text")
        tokens = chat.encode_between(text, written)

    expected = [chat.id_of(text[start:end]) for start, end in written]
    found = [token for token, _ in tokens if token in chat.control_ids]
    if [token for token in expected if token in chat.control_ids] != found:
        raise RenderError("the tokens of a conversation hold other control ids than the chat template wrote")
    return tokens


class _ChatFormat:
    """A tokenizer and its template: how replies open and close, and two encoders."""

    def __init__(self, tokenizer: "ChatTokenizer") -> None:
        self.template = tokenizer.chat_template
        backend: Tokenizer = tokenizer.backend_tokenizer
        # A copy: the post-processor of some byte-level tokenizers trims white space off the offsets.
        self.parsing = copy.deepcopy(backend)
        self.parsing.post_processor = None
        self.parsing.no_truncation()
        self.parsing.no_padding()

        own = backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in own.items() if token.special and token.content}
        self.control = _any_of(special.values())
        # Gemma's tokenizer holds line breaks and runs of blanks among its added tokens: they end no reply.
        added = _any_of(token.content for token in own.values() if token.content.strip())
        # Tokenizers without byte fallback write the unknown token for characters that users type.
        self.control_ids = set(special) - {tokenizer.unk_token_id}

        # How replies open and close, from a probe of two messages.
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        prompt = render(tokenizer, [question], add_generation_prompt=True).text
        whole = render(tokenizer, [question, answer])
        start, end = whole.spans[-1]
        # What stands before a reply and is not part of the prompt has to be generated, so it is trained.
        before = whole.text[:start]
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        match = re.match(rf"(\s*)((?:{added.pattern})+)", whole.text[end:])
        self.closing = match.group() if match else ""
        self.closing_tokens = added.findall(match.group(2)) if match else []

    @cached_property
    def plain(self) -> "Tokenizer":
        """Like `parsing`, but control tokens are ordinary text."""
        plain = copy.deepcopy(self.parsing)
        plain.encode_special_tokens = True
        return plain

    def trained_region(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Character range of a reply with what the model has to write before it and the tokens that end it."""
        start, end = span
        if self.lead and text.endswith(self.lead, 0, start):
            start -= len(self.lead)
        space = self.closing[: len(self.closing) - len("".join(self.closing_tokens))]
        for count in range(len(self.closing_tokens), 0, -1):
            closing = space + "".join(self.closing_tokens[:count])
            if text.startswith(closing, end):
                return start, end + len(closing)
        return start, end

    def id_of(self, token: str) -> int:
        number = self.parsing.token_to_id(token)
        assert number is not None
        return number

    def encode(self, text: str) -> list[tuple[int, int]]:
        """(id, first character) of every token of `text`, control tokens parsed."""
        encoding = self.parsing.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def encode_between(self, text: str, control: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The same, with only the stretches `control` parsed as control tokens."""
        tokens, position = [], 0
        for start, end in [*control, (len(text), len(text))]:
            encoding = self.plain.encode(text[position:start], add_special_tokens=False)
            tokens += [(token, position + at) for token, (at, _) in zip(encoding.ids, encoding.offsets, strict=True)]
            if end > start:
                tokens.append((self.id_of(text[start:end]), start))
            position = end
        return tokens


_formats: "WeakKeyDictionary[Any, _ChatFormat]" = WeakKeyDictionary()


def _chat_format(tokenizer: "ChatTokenizer") -> _ChatFormat:
    """The format of a tokenizer, cached as long as its template is the same."""
    known = _formats.get(tokenizer)
    if known is None or known.template != tokenizer.chat_template:
        known = _formats[tokenizer] = _ChatFormat(tokenizer)
    return known


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Pattern of any of `strings`, the longest first; of nothing where there are none."""
    ordered = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
