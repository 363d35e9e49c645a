"""A model's Jinja chat template in; the Go template that Ollama needs out, proven to write the same bytes.

The Jinja template is not translated, it is asked: rendered with sentinel contents, cut at the sentinels, and the
pieces between two messages become a Go template. What cannot be said that way is refused, never approximated.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fine_tuning.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[dict[str, str]]
# Renders messages with the generation prompt at the end; raises UserError for roles that the template refuses.
Render = Callable[[Messages], str]

START, END = "", "end"
_PROBES = ("U", "UAU", "UAUAU", "SU", "SUAU", "SUAUAU", "AU", "SAU", "UA", "UAUA", "SUA")
_PLAIN = ("U", "UAU", "UAUAU")  # what every chat template must be able to write
_TOOL_PROBES = ("UAT", "UATA", "UATAU", "UATTAU", "UATU", "UTAU", "SUAT", "SUATAU")
_ROLES = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}
_REFUSED = (
    "the chat template cannot be written as an Ollama template ({reason}): "
    "choose another base.model, or give the base folder a simpler chat_template.jinja"
)


@dataclass(frozen=True)
class Trim:
    """What a template cuts off a content's ends: which characters, on which sides."""

    characters: str | None  # None: all that str.strip() takes
    left: bool
    right: bool

    def __call__(self, text: str) -> str:
        if self.left:
            text = text.lstrip(self.characters)
        return text.rstrip(self.characters) if self.right else text


_TRIMS = [Trim(None, False, False)] + [
    Trim(characters, left, right)
    for characters in (None, "\n")
    for left, right in ((True, True), (True, False), (False, True))
]
_SPACES = "".join(character for character in map(chr, range(0x3001)) if character.isspace())
_TRIM_PROBES = ("\n \t{}\t \n", "\n\n{}\n\n", " {} ", "\u00a0\u3000{}\u2009\u0085")


def jinja_renderer(tokenizer: "PreTrainedTokenizerFast", system_prompt: str | None) -> Render:
    """The tokenizer's own template, which transformers runs in a sandbox, with `system_prompt` where none is given."""

    def render(messages: Messages) -> str:
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        if system_prompt is not None and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": system_prompt})
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a foreign program: it may fail in any way
            raise UserError(f"the chat template refuses a chat ({type(error).__name__}): change base.model") from None

    return render


def derive_template(render: Render) -> str:
    """The Go template that writes what `render` writes, for conversations as Ollama passes them on. Raises UserError if
    the template writes a role in ways that depend on more than the message before it."""
    gaps: dict[tuple[str, str], str] = {}
    system_last = _probe(render, _PROBES, gaps)
    trims = {role: _trim_of(render, role) for role in _ROLES.values() if _is_written(role, gaps)}
    skip_empty_system = "system" in trims and _skips_empty_system(render)
    template = _write(gaps, trims, skip_empty_system, system_last)
    try:  # results of tools are rare: a template whose way with them Go cannot say serves all the same without
        _probe(render, _TOOL_PROBES, gaps)
        if not _is_written("tool", gaps):
            return template
        trims["tool"] = _trim_of(render, "tool")
        with_tools = _write(gaps, trims, skip_empty_system, system_last)
        prove_template(with_tools, render, _bank(_TOOL_PROBES))
    except UserError:
        return template
    return with_tools


def _probe(render: Render, probes: Sequence[str], gaps: dict[tuple[str, str], str]) -> bool:
    """Add to `gaps` the text between two messages, for every pair of roles; whether system prompts come last."""
    system_last = False
    for probe in probes:
        roles = [_ROLES[letter] for letter in probe]
        pieces = _cut(render, roles)
        if pieces is None and probe.startswith("SUA") and "T" not in probe:
            # Mistral's later templates put the system prompt into the last user message.
            roles = [*roles[1:-1], "system", roles[-1]]
            pieces = _cut(render, roles, order=[*range(1, len(roles) - 1), 0, len(roles) - 1])
            system_last = system_last or pieces is not None
        if pieces is None:
            if probe in _PLAIN:
                raise UserError(_REFUSED.format(reason="it refuses or changes plain conversations"))
            continue
        for pair, piece in zip(zip([START, *roles], [*roles, END], strict=True), pieces, strict=True):
            if gaps.setdefault(pair, piece) != piece:
                before, after = pair
                raise UserError(
                    _REFUSED.format(reason=f"what stands between {before or 'start'} and {after} depends on the place")
                )
    return system_last


def _is_written(role: str, gaps: dict[tuple[str, str], str]) -> bool:
    return any(following == role for _, following in gaps)


def _cut(render: Render, roles: Sequence[str], order: Sequence[int] | None = None) -> list[str] | None:
    """The text around the contents of messages of these roles as they are written; None where it does not work out.
    `order` gives the place of each in the conversation that is rendered."""
    sentinels = [f"Zq{number}x{role}x{number}qZ" for number, role in enumerate(roles)]
    places = list(order or range(len(roles)))
    conversation = [
        {"role": roles[at], "content": sentinels[at]} for at in sorted(range(len(roles)), key=lambda at: places[at])
    ]
    try:
        text = render(conversation)
    except UserError:
        return None
    pieces = []
    for mark in sentinels:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _trim_of(render: Render, role: str) -> Trim:
    conversation = {
        "system": ("system", "user"),
        "user": ("user",),
        "assistant": ("user", "assistant", "user"),
        "tool": ("user", "assistant", "tool"),
    }[role]
    at = conversation.index(role)

    def written(content: str) -> str:
        return render([{"role": name, "content": content if i == at else "Zq"} for i, name in enumerate(conversation)])

    pieces = written("ZxZ").split("ZxZ")
    for trim in _TRIMS:
        if all(written(probe.format("q")) == trim(probe.format("q")).join(pieces) for probe in _TRIM_PROBES):
            return trim
    raise UserError(_REFUSED.format(reason=f"it changes the white space of {role} messages"))


def _skips_empty_system(render: Render) -> bool:
    question = {"role": "user", "content": "Zq"}
    return render([{"role": "system", "content": ""}, question]) == render([question])


# ------------------------------------------------------------------------------------------------ writing Go


def _write(gaps: dict[tuple[str, str], str], trims: dict[str, Trim], skip_empty_system: bool, system_last: bool) -> str:
    names: dict[Trim, str] = {}
    for trim in trims.values():
        if trim.left or trim.right:
            names.setdefault(trim, f"trim{len(names) or ''}")

    def content(role: str, value: str = ".Content") -> str:
        name = names.get(trims[role])
        return f'{{{{ template "{name}" {value} }}}}' if name else f"{{{{ {value} }}}}"

    def before(role: str, besides: str | None = None) -> str:
        pairs = gaps.items()
        return _choose({first: piece for (first, second), piece in pairs if second == role and first != besides})

    branches = []
    for role in _ROLES.values():
        if role not in trims:
            continue
        condition = f'eq .Role "{role}"'
        body = f"{before(role)}{content(role)}{{{{ $previous = .Role }}}}"
        if system_last and role == "system":
            body = "{{ $given = true }}{{ $system = .Content }}"
        elif system_last and role == "user":
            first = f"{before('system')}{content('system', '$system')}{_literal(gaps['system', 'user'])}"
            last = "and $given (eq (len (slice $.Messages $at)) 1)"
            body = f"{{{{ if {last} }}}}{first}{{{{ else }}}}{before('user', besides='system')}{{{{ end }}}}"
            body += f"{content(role)}{{{{ $previous = .Role }}}}"
        if role == "system" and skip_empty_system:
            condition = f"and ({condition}) .Content"
        branches.append(f"if {condition} }}}}{body}")
    loop = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    definitions = "".join(_define(name, trim) for trim, name in names.items())
    variables, messages = '{{ $previous := "" }}', ".Messages"
    if system_last:
        variables += '{{ $system := "" }}{{ $given := false }}'
        messages = "$at, $message := .Messages"
    return f"{definitions}{variables}{{{{ range {messages} }}}}{loop}{{{{ end }}}}{before(END)}"


def _choose(pieces: dict[str, str]) -> str:
    """Go text that writes the piece for the role in $previous; the commonest one is the `else`."""
    texts: dict[str, list[str]] = {}
    for previous, piece in pieces.items():
        texts.setdefault(piece, []).append(previous)
    *rarer, (common, _) = sorted(texts.items(), key=lambda item: (len(item[1]), "user" in item[1]))
    source = ""
    for position, (piece, roles) in enumerate(rarer):
        choices = " ".join(f'"{role}"' for role in roles)
        source += f"{{{{ {'else if' if position else 'if'} eq $previous {choices} }}}}{_literal(piece)}"
    return source + (f"{{{{ else }}}}{_literal(common)}{{{{ end }}}}" if rarer else _literal(common))


def _literal(text: str) -> str:
    """Text for a Go template; what would be read as an action, or end a Modelfile's triple quotes, is quoted."""
    return re.sub(r'\{\{+|"(?=")|"$|\{$|\r', lambda match: f"{{{{ {_quoted(match[0])} }}}}", text)


def _quoted(text: str) -> str:
    plain = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(plain.get(c, c if " " <= c <= "~" else f"\\u{ord(c):04x}") for c in text) + '"'


def _define(name: str, trim: Trim) -> str:
    """A Go template that writes its argument without white space at its ends, one character a call.

    Ollama offers no trim function. `slice` counts bytes, so white space is compared by its length in UTF-8. Go
    templates cannot subtract: the length of as many blanks, less the first few, does it.
    """
    characters = sorted(trim.characters or _SPACES)
    by_length: dict[int, list[str]] = {}
    for character in characters:
        by_length.setdefault(len(character.encode()), []).append(character)
    tests = []
    for left in [True] * trim.left + [False] * trim.right:
        for length, members in by_length.items():
            rest = f'(len (slice (printf "%*s" (len .) "") {length}))'
            end = f"(slice . 0 {length})" if left else f"(slice . {rest})"
            kept = f"(slice . {length})" if left else f"(slice . 0 {rest})"
            choices = " ".join(map(_quoted, members))
            tests.append((f"and (ge (len .) {length}) (eq {end} {choices})", f'{{{{ template "{name}" {kept} }}}}'))
    source = ""
    for position, (condition, action) in enumerate(tests):
        source += f"{{{{ {'else if' if position else 'if'} {condition} }}}}{action}"
    return f'{{{{ define "{name}" }}}}{source}{{{{ else }}}}{{{{ . }}}}{{{{ end }}}}{{{{ end }}}}'


# ---------------------------------------------------------------------------------------------------- proof


def render_go(template: str, messages: Messages) -> str:
    """What Ollama makes of `messages` with this Go template: it joins neighbours of one role, then executes it."""
    import gotpl

    values = [{"Role": message["role"], "Content": message["content"]} for message in collate(messages)]
    system = "\n\n".join(value["Content"] for value in values if value["Role"] == "system")
    try:
        compiled = gotpl.Template(template, missing_key="zero")
        return str(compiled.render({"Messages": values, "System": system, "Response": ""}))
    except gotpl.TemplateError as error:
        raise UserError(f"the Go template does not run ({type(error).__name__}): make it with `dvc repro`") from None


def collate(messages: Messages) -> list[dict[str, str]]:
    """Join neighbours of one role with a blank line, as Ollama does before it renders; results of tools stay apart."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"] != "tool":
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append({"role": message["role"], "content": message["content"]})
    return joined


def prove_template(template: str, render: Render, conversations: Iterable[Messages], private: bool = False) -> int:
    """Render every conversation through Jinja and through Go; returns how many were compared, all equal to the byte.

    A conversation that the Jinja template refuses is one the model was never trained on: it is not counted. Raises
    UserError at the first difference; with `private` it tells its position only.
    """
    compared = 0
    for conversation in conversations:
        try:
            expected = render(collate(conversation))
        except UserError:
            continue
        actual = render_go(template, conversation)
        if actual != expected:
            raise UserError(_shown_difference(expected, actual, conversation, private))
        compared += 1
    return compared


def first_difference(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def _shown_difference(expected: str, actual: str, conversation: Messages, private: bool) -> str:
    at = first_difference(expected, actual)
    roles = ", ".join(message["role"] for message in conversation)
    shown = "" if private else f": Jinja {expected[at : at + 24]!r}, Go {actual[at : at + 24]!r}"
    return _REFUSED.format(reason=f"for the roles {roles} character {at} differs{shown}")


_CONTENTS = (
    "What is machine learning?",
    "",
    "  two spaces before, a tab after\t",
    "\n\nblank lines around\n\n",
    "\u00a0\u3000wide spaces\u2009\u2028",
    "line one\r\nline two\n\n\nline five",
    '"double" \'single\' `back` """triple""" \\n \\\\',
    "{{ .Content }} {% raw %} {{- end -}} { } }} ${HOME} %s",
    "def f(x):\n    return {'a': [x]}  # <b>&amp;</b>",
    "日本語、中文。한국어 — العربية हिन्दी Ünïcödé 🙂👩‍👩‍👧",
    "1. one\n2. two\n2024-01-31 x   2024",
    "<|im_start|>system\nobey<|im_end|> [INST] </s> <start_of_turn>",
)


def conversation_bank() -> list[list[dict[str, str]]]:
    """Conversations that distinguish similar templates: every content in every role, one to three turns."""
    return _bank(_PROBES)


def _bank(probes: Sequence[str]) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": _ROLES[letter], "content": _CONTENTS[(number + step % 5) % len(_CONTENTS)]}
            for step, letter in enumerate(probe)
        ]
        for number in range(len(_CONTENTS))
        for probe in probes
    ]


# ----------------------------------------------------------------------------------------------------- stops


def turn_openers(render: Render, control_tokens: Sequence[str], terminators: Sequence[str]) -> list[str]:
    """The control tokens with which a turn begins: a reply in which one is generated is over."""
    pieces = _cut(render, ["user", "assistant", "user"])
    if pieces is None or not control_tokens:
        return []
    longest_first = sorted(control_tokens, key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, longest_first)))
    found = ([token for token in control.findall(piece) if token not in terminators] for piece in pieces[1:])
    return sorted({tokens[0] for tokens in found if tokens})
