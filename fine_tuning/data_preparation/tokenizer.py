"""Chat template and tokens: conversations in; rendered text, token ids and training labels out.

The ids are those that llama.cpp and Ollama compute from the rendered text, with one difference that is wanted: a
control token typed by a user, such as `<|im_start|>`, stays ordinary text.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.base_model import gguf_field, restore_pre_tokenizer
from fine_tuning.schema.chat_format import _chat_format, _tokens, end_of_turn_ids, render
from fine_tuning.schema.conversation import as_conversation, problem_of
from fine_tuning.schema.template_trial import try_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # of a hub's repository: neither weights nor code


@dataclass(frozen=True)
class TokenizerReport:
    """How one tokenizer fares on conversations. Shares are between 0 and 1; contents are counted without template."""

    name: str
    vocabulary: int
    conversations: int
    turns: int
    tokens_per_turn: float
    tokens_per_character: float
    template_share: float | None  # of all tokens of rendered conversations, those that the template writes
    truncated_share: float | None  # of rendered conversations, those longer than max_length; None where none was
    refused_share: float  # of conversations, those that the template cannot carry
    unknown_share: float  # of the contents' tokens
    lossy_share: float  # of turns, those that decode to another text
    problems: tuple[str, ...]  # with special tokens


class TokenizerUtils:
    """Any fast Hugging Face tokenizer (a folder, a tokenizer.json, a .gguf file or a hub id) on conversations.

    Raises:
        UserError: there is no such tokenizer, it has no fast form, or its chat template does not end.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)
        self.tokenizer = _load_any(self.name)
        if isinstance(self.tokenizer.chat_template, str):
            try_template(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text: no token is added, and control tokens in it are parsed."""
        if not isinstance(text, str):
            raise UserError(f"a {type(text).__name__} is no text: give a str")
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids, keeping special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def count(self, text: str) -> int:
        """Number of tokens of a plain text."""
        return len(self.encode(text))

    def measure(
        self, conversations: Iterable[dict], max_length: int = 512, system_prompt: str | None = None
    ) -> TokenizerReport:
        """Count tokens of logged exchanges or conversations, turn by turn and as the template renders them.

        Raises:
            UserError: one is neither.
        """
        counts: Counter[str] = Counter()
        unknown = self.tokenizer.unk_token_id
        for record in conversations:
            conversation = as_conversation(record) if isinstance(record, dict) else {}
            if problem_of(conversation) is not None:
                raise UserError("a conversation has no messages with role and content: give exchanges or conversations")
            messages = conversation["messages"]
            contents = [message["content"] for message in messages]
            encoded = [self._encode_plain(content) for content in contents]
            tokens = sum(map(len, encoded))
            counts.update(conversations=1, turns=len(contents), characters=sum(map(len, contents)), tokens=tokens)
            counts["unknown"] += sum(ids.count(unknown) for ids in encoded)
            counts["lossy"] += sum(self.decode(ids) != content for ids, content in zip(encoded, contents, strict=True))
            try:
                length = len(_tokens(self.tokenizer, render(self.tokenizer, messages, system_prompt)))
            except UserError:
                counts["refused"] += 1
                continue
            counts.update(rendered=1, written=length, carried=tokens, truncated=int(length > max_length))
        return TokenizerReport(
            name=self.name,
            vocabulary=len(self.tokenizer),
            conversations=counts["conversations"],
            turns=counts["turns"],
            tokens_per_turn=counts["tokens"] / max(counts["turns"], 1),
            tokens_per_character=counts["tokens"] / max(counts["characters"], 1),
            template_share=max(0.0, 1 - counts["carried"] / counts["written"]) if counts["written"] else None,
            truncated_share=counts["truncated"] / counts["rendered"] if counts["rendered"] else None,
            refused_share=counts["refused"] / max(counts["conversations"], 1),
            unknown_share=counts["unknown"] / max(counts["tokens"], 1),
            lossy_share=counts["lossy"] / max(counts["turns"], 1),
            problems=tuple(self.special_token_problems()),
        )

    def special_token_problems(self) -> list[str]:
        """What would go wrong with control tokens in training or serving, each in a few words."""
        tokenizer = self.tokenizer
        found = [
            f"{token.content} is not one token"
            for index, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
            if token.special and self.encode(token.content) != [index]
        ]
        if tokenizer.eos_token_id is None:
            found.append("no end-of-sequence token")
        if tokenizer.pad_token_id is None:
            found.append("no padding token")
        if not tokenizer.chat_template:
            return [*found, "no chat template"]
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        try:
            stops = end_of_turn_ids(tokenizer)
            text = render(tokenizer, [question, answer]).text
        except UserError as error:
            return [*found, str(error).partition(":")[0]]
        if not stops:
            found.append("the template writes no end-of-turn token")
        elif tokenizer.eos_token_id not in stops:
            found.append(f"replies end with {self.decode(stops[:1])}, not with the end-of-sequence token")
        if tokenizer.pad_token_id in stops:
            found.append("padding is the end-of-turn token: a mask by id would untrain it")
        if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            start = tokenizer.encode(text)[:2]
            if start == [tokenizer.bos_token_id] * 2:
                found.append("encoding a rendered text doubles the beginning-of-sequence token")
        typed = next(iter(tokenizer.all_special_tokens), None)
        try:
            if typed is not None:
                _tokens(tokenizer, render(tokenizer, [question | {"content": f"q {typed} q"}, answer]))
        except UserError:
            found.append("control tokens that users type cannot be kept apart")
        return found

    def _encode_plain(self, content: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.encode(content)
        return _chat_format(self.tokenizer).plain.encode(content, add_special_tokens=False).ids


def compare_tokenizers(
    names: Iterable[str | Path],
    conversations: Iterable[dict],
    max_length: int = 512,
    system_prompt: str | None = None,
) -> list[TokenizerReport]:
    """Reports of several tokenizers on the same conversations, in the order of `names`."""
    conversations = list(conversations)
    return [TokenizerUtils(name).measure(conversations, max_length, system_prompt) for name in names]


def comparison_table(reports: Sequence[TokenizerReport]) -> str:
    """The reports side by side as a Markdown table, a column a tokenizer."""
    header = ["", *(report.name for report in reports)]
    rows = [header, ["---", *("---:" for _ in reports)]]
    for name in [field.name for field in fields(TokenizerReport)][1:-1]:
        form = ".2%" if name.endswith("_share") else ".3f" if name.startswith("tokens_per") else ","
        numbers = [getattr(report, name) for report in reports]
        rows.append([name.replace("_", " "), *("unknown" if n is None else format(n, form) for n in numbers)])
    rows.append(["special tokens", *("; ".join(report.problems).replace("|", r"\|") or "sound" for report in reports)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _load_any(name: str) -> "PreTrainedTokenizerFast":
    path = Path(name).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    try:
        if (path / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        from transformers import AutoTokenizer

        if path.suffix == ".gguf" and path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            restore_pre_tokenizer(tokenizer, gguf_field(path, "tokenizer.ggml.pre"))
        elif path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise FileNotFoundError("it holds no tokenizer" if path.exists() else "it does not exist")
        else:  # in one request: transformers itself asks for file after file, each time with retries
            from huggingface_hub import snapshot_download

            files = snapshot_download(name, allow_patterns=_TOKENIZER_FILES)
            tokenizer = AutoTokenizer.from_pretrained(files, use_fast=True, trust_remote_code=False)
    except Exception as error:  # files of somebody else's: a damaged one may fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"no tokenizer {name!r}: give a folder, a .gguf file or a hub id ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no fast tokenizer: save one with `save_pretrained` from a fast class first")
    return tokenizer
