"""Section `serve` of params.yaml, and the training exchanges that stand before a question in chat app and gateway.

They are found as those of the prompting baseline are. Only the prepared split `train` is read, so that nothing held out
is shown; and of it no conversation that is forgotten, deleted or disliked by now.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import COMPARISON, FORGOTTEN, PREPARED
from fine_tuning.common.records import read_object, stamp
from fine_tuning.common.settings import Settings, read_params
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.evaluation.records.settings import ADAPTER
from fine_tuning.evaluation.suite.examples import Exchange, Exchanges
from fine_tuning.integration.chat_models import BASE, CANDIDATE_GGUF, CHAMPION, AppSettings
from fine_tuning.integration.conversation_index import conversation_index
from fine_tuning.integration.served_adapters import adapter_name
from fine_tuning.model_management.packaging.model_package import PackageSettings

TRAIN = PREPARED / "train"
TOKENIZER = BASE / "tokenizer.json"
SERVED = Path(".whetstone/served.json")  # tag → what stands before questions to a version that was deployed from here
TURN_TOKENS = 8  # of a turn beside its text, at most, in the chat templates of common models
Message = dict[str, str]


class ServeSettings(Settings):
    """Section `serve`."""

    examples: int = Field(ge=0, le=50)
    system_prompt: str | None
    adapters: dict[Annotated[str, AfterValidator(adapter_name)], str]


def kind_served(checkout: Path, tag: str) -> dict[str, Any]:
    """{"kind", "system_prompt", "examples"} of a version that was judged with something before the question: the
    champion, the candidate of the last run, or one that was deployed from here; {} of any other model."""
    champion, compared = read_object(checkout / CHAMPION), read_object(checkout / COMPARISON).get("kind", {})
    if tag.startswith(str(CANDIDATE_GGUF)) and compared.get("name", ADAPTER) != ADAPTER:
        return {"kind": compared["name"]} | compared
    if "kind" in champion and tag == f"{champion.get('name')}:{champion.get('version')}":
        return champion
    return dict(read_object(checkout / SERVED).get(tag) or {})


def has_kinds(checkout: Path) -> bool:
    """Whether `kind_served` knows any version that a server has."""
    return _has_kinds(checkout, *(stamp(checkout / path) for path in (SERVED, CHAMPION)))


@lru_cache(maxsize=8)
def _has_kinds(checkout: Path, *_: object) -> bool:
    return bool(read_object(checkout / SERVED)) or "kind" in read_object(checkout / CHAMPION)


class ServedExamples:
    """Finds examples.

    Args:
        checkout: where the prepared data and the inbox are.
        count: how many at most.
        context: tokens of prompt and reply together.

    Attributes:
        problem: why there are none to choose from, one line; None where there are.
    """

    def __init__(self, checkout: Path, count: int, context: int) -> None:
        self.checkout, self.count, self.context = checkout, count, context
        self.problem: str | None = None
        self._lock = threading.Lock()
        self._exchanges, self._stamps = Exchanges([]), ()
        self._tombstones: Tombstones | None = None

    def before(self, messages: Sequence[Message], reply_tokens: int) -> list[Exchange]:
        """The exchanges with questions most similar to the last one in `messages`, the nearest last.

        Fewer where the context does not hold them beside `messages` and a reply of `reply_tokens`, and none where the
        data cannot be read: see `problem`.
        """
        said = [message["content"] for message in messages]
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        chosen: list[Exchange] = []
        try:
            with self._lock:
                self._refresh()
                room = self.context - min(reply_tokens, self.context // 2) - sum(map(self._tokens, said))
                for exchange in self._exchanges.ranked(question) if self.count else ():
                    if exchange.question in said or self._is_barred(exchange.source):
                        continue
                    room -= self._tokens(exchange.question) + self._tokens(exchange.answer)
                    if room < 0 or len(chosen) == self.count:
                        break
                    chosen.append(exchange)
        except (UserError, OSError) as error:
            self.problem = str(error)
        return chosen[::-1]

    def _is_barred(self, identity: str) -> bool:
        """Whether a conversation was forgotten or deleted, is not here to be asked, or has a dislike."""
        now = conversation_index(self.checkout).conversation(identity)
        disliked = now is None or any((entry.get("rating") or 0) < 0 for entry in now.get("feedback") or ())
        return disliked or (self._tombstones is not None and self._tombstones.names(identity))

    def _refresh(self) -> None:
        """Read the data again where they changed."""
        paths = [self.checkout / path for path in (TRAIN, FORGOTTEN)]
        stamps = tuple(map(stamp, paths))
        if stamps != self._stamps:
            self._exchanges, self._tombstones = Exchanges.read(paths[0]), Tombstones(paths[1])
            conversation_index(self.checkout).conversation("")  # the first question after a start takes long
            self._stamps, self.problem = stamps, None

    def _tokens(self, text: str) -> int:
        return len(_tokenizer(self.checkout / TOKENIZER).encode(text, add_special_tokens=False)) + TURN_TOKENS


@lru_cache(maxsize=1)
def _tokenizer(path: Path):
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro base`")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return tokenizer


def context_of(app: AppSettings) -> int:
    """Tokens of prompt and reply together, whichever of the two engines answers."""
    return min(app.context, read_params("package", PackageSettings).parameters.num_ctx)


@lru_cache(maxsize=8)
def served_examples(checkout: Path, count: int, context: int) -> ServedExamples:
    """The examples of a checkout, read once a process."""
    return ServedExamples(checkout, count, context)


def after_examples(messages: Sequence[Message], examples: Sequence[Exchange]) -> list[Message]:
    """The messages with examples before them, behind a system message that they begin with."""
    head = 1 if messages and messages[0].get("role") in ("system", "developer") else 0
    shown = [message for exchange in examples for message in exchange.messages]
    return [*messages[:head], *shown, *messages[head:]]


def sources(examples: Sequence[Exchange]) -> list[str]:
    """The ids of the conversations that examples come from, each once."""
    return list(dict.fromkeys(exchange.source for exchange in examples))
