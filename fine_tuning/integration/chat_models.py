"""The models a person can talk to: what Ollama serves, the champion's and the base's GGUF, and how each is asked."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import COMPARISON, PACKAGE
from fine_tuning.common.records import read_object
from fine_tuning.common.settings import Settings
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.evaluation.records.settings import PROMPT
from fine_tuning.integration.embedded_engine import shared_engines
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError, full_name
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BASE = Path("models/base")
BASE_GGUF = BASE / "base-Q8_0.gguf"
CHAMPION = Path("models/champion.json")
CHAMPION_GGUF = Path("models/champion/package/model.gguf")
CANDIDATE_GGUF = PACKAGE / "model.gguf"
# transformers imports its parts when they are first used, and two threads that do so at once fail.
_one_at_a_time = threading.Lock()
_warm: set[tuple[Path | None, ...]] = set()
WHY_FIRST = {
    "Candidate": "the candidate: its verdict is PROMOTE, and nothing is live yet",
    "Live": "the version that is live",
    "Champion": "the champion: nothing is live on Ollama",
    "Base": "the base model: no model is live or champion, and no candidate has the verdict PROMOTE",
}
CANARY = "Canary"  # name of the model that answers a conversation instead of the live one
NO_MODEL = "there is no model to talk to yet: run `make repro`"


class SamplingSettings(Settings):
    """What the section `app` and the page's settings of a reply have in common."""

    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(ge=0.05, le=1)
    top_k: int = Field(ge=0)
    repeat_penalty: float = Field(ge=0.5, le=2)
    max_tokens: int = Field(ge=1)


class AppSettings(SamplingSettings):
    """Section `app` of params.yaml."""

    context: int = Field(ge=256)
    threads: int = Field(ge=1)
    slots: int = Field(ge=1)
    timeout: float = Field(gt=0)


class Sampling(SamplingSettings):
    """How a reply is drawn; the page starts from the `app` section."""

    seed: int | None = None


def default_sampling(settings: AppSettings) -> Sampling:
    """How a reply is drawn before anybody changed it."""
    return Sampling(**settings.model_dump(include=set(Sampling.model_fields)))


@dataclass(frozen=True)
class ChatModel:
    """One model that answers.

    `tag` is what is logged with every reply: a version's tag, the base's name, the candidate's file, or an adapter's
    name with a part of its hash. `version` is the registry's, None for the base and for a candidate that was not
    promoted. `adapters` are loaded beside `gguf`, `adapter` is the one of them that answers. `problem`: why it cannot.
    """

    name: str
    engine: Literal["ollama", "embedded"]
    tag: str
    version: int | None = None
    gguf: Path | None = None
    adapters: tuple[Path, ...] = ()
    adapter: Path | None = None
    problem: str | None = None

    @property
    def key(self) -> str:
        """What tells it from the other models. An adapter keeps it when its file is replaced."""
        return f"{self.engine} {self.address if self.adapter else self.tag}"

    @property
    def address(self) -> str:
        """What clients call it: its tag without the hash."""
        return self.tag.partition("@")[0]

    @property
    def lora(self) -> dict[str, Any]:
        """The field of a request by which the engine applies its adapter and no other; {} where none is loaded."""
        scales = [{"id": at, "scale": float(path == self.adapter)} for at, path in enumerate(self.adapters)]
        return {"lora": scales} if scales else {}

    @property
    def label(self) -> str:
        """What the page shows."""
        version = f" · version {self.version}" if self.version is not None else ""
        server = "Ollama" if self.engine == "ollama" else "built-in engine"
        return f"{self.name}{version} · {self.tag} · {server}"


def find_models(checkout: Path, client: OllamaClient, name: str) -> list[ChatModel]:
    """All models that can answer now, the user's other ones on Ollama too.

    The one at the head is the candidate where its verdict is PROMOTE and nothing is live yet, otherwise the live
    version, the champion or the base: `WHY_FIRST` says so.

    Args:
        name: the deployed model's name there; `name:live` is the switch, `name:<version>` what it points at.
    """
    models = [*served_models(client, name), *local_models(checkout)]
    names = {model.name: model for model in reversed(models)}
    good = "Live" not in names and read_object(checkout / COMPARISON).get("verdict") == "PROMOTE"
    first = next(
        (names[n] for n in (("Candidate",) if good else ()) + ("Live", "Champion", "Base") if n in names), None
    )
    return sorted(models, key=lambda model: model is not first)


def served_models(client: OllamaClient, name: str) -> list[ChatModel]:
    """The live model and the versions that a server has."""
    try:
        digests = client.digests()
    except OllamaError:
        return []
    version = re.compile(rf"{re.escape(name)}:([1-9][0-9]{{0,8}})")
    numbers = {digest: int(match[1]) for tag, digest in digests.items() if (match := version.fullmatch(tag))}
    live = full_name(f"{name}:live")
    models = [ChatModel("Live", "ollama", live, numbers.get(digests[live]))] if live in digests else []
    for number in sorted(numbers.values(), reverse=True):
        models.append(ChatModel("Version", "ollama", f"{name}:{number}", number))
    others = sorted(tag for tag in digests if not tag.startswith(f"{full_name(name).rpartition(':')[0]}:"))
    return models + [ChatModel("Other", "ollama", tag) for tag in others if "embed" not in tag]


def local_models(checkout: Path) -> list[ChatModel]:
    """The models whose files the checkout has: champion, base, candidate."""
    models = []
    version = champion_version(checkout)
    if version is not None and (checkout / CHAMPION_GGUF).is_file():
        tag = f"{read_object(checkout / CHAMPION)['name']}:{version}"
        models.append(ChatModel("Champion", "embedded", tag, version, checkout / CHAMPION_GGUF))
    if (checkout / BASE_GGUF).is_file():
        tag = read_object(checkout / BASE / "base.json").get("model") or str(BASE_GGUF)
        models.append(ChatModel("Base", "embedded", tag, None, checkout / BASE_GGUF))
    comparison = read_object(checkout / COMPARISON)
    compared, kind = comparison.get("adapter_sha256"), comparison.get("kind", {}).get("name")
    promoted = version is not None and compared == read_object(checkout / CHAMPION).get("adapter_sha256")
    if (checkout / CANDIDATE_GGUF).is_file() and not promoted:
        # The next candidate has the same path and is another model: part of the adapter's hash tells them apart.
        tag = f"{CANDIDATE_GGUF}@{compared[:8]}" if compared else str(CANDIDATE_GGUF)
        models.append(
            ChatModel("Candidate", "embedded", tag, None, checkout / (BASE_GGUF if kind == PROMPT else CANDIDATE_GGUF))
        )
    return models


def champion_version(checkout: Path) -> int | None:
    """The registry version that models/champion.json names, None before the first promotion."""
    return read_object(checkout / CHAMPION).get("version")


def stream_reply(
    model: ChatModel,
    messages: Sequence[dict],
    sampling: Sampling,
    *,
    checkout: Path,
    system_prompt: str | None,
    settings: AppSettings,
    client: OllamaClient,
) -> Iterator[str]:
    """Yield the model's reply to `messages` piece by piece, its prompt rendered as in training.

    Args:
        system_prompt: put in front, the same one as in training; None leaves it to the model's chat template.

    Raises:
        UserError: the server is gone, hangs or refuses; the model's file is missing.
    """
    if model.engine == "ollama":
        neutral = [{**turn, "content": neutralised(turn["content"], checkout / BASE)} for turn in messages]
        yield from _from_ollama(model, neutral, sampling, system_prompt, client)
        return
    assert model.gguf is not None
    if model.problem:
        raise UserError(model.problem)
    room = settings.context - min(sampling.max_tokens, settings.context // 2)
    with _one_at_a_time:
        tokenizer = tokenizer_of(_tokenizer_folder(model.gguf, checkout))
        prompt = fitting_prompt(tokenizer, messages, system_prompt, room)
    with _engine(model, settings) as engine:
        longest = min(sampling.max_tokens, settings.context - len(prompt))
        yield from engine.complete_stream(prompt, **sampling.model_dump() | {"max_tokens": longest} | model.lora)


def neutralised(text: str, base: Path) -> str:
    """`text` with a space after the first character of each control token. Ollama reads `<|im_end|>` in a message as
    the end of the turn; training and the built-in engine read its letters."""
    tokens = _control_tokens(base / "tokenizer.json")
    return re.sub("|".join(map(re.escape, tokens)), lambda match: f"{match[0][0]} {match[0][1:]}", text)


@lru_cache(maxsize=4)
def _control_tokens(path: Path) -> list[str]:
    added = read_object(path).get("added_tokens", [])
    special = {token["content"] for token in added if token["special"] and len(token["content"]) > 1}
    return sorted({*special, *CONTROL_TOKENS}, key=len, reverse=True)


def warm_up(model: ChatModel, checkout: Path, settings: AppSettings) -> None:
    """Load tokenizer and engine in the background while somebody is still typing. A failure shows with the reply."""
    files = (model.gguf, *model.adapters)
    if model.gguf is None or files in _warm:
        return
    _warm.add(files)

    def load(gguf: Path) -> None:
        with suppress(UserError), _one_at_a_time:
            encode_prompt(tokenizer_of(_tokenizer_folder(gguf, checkout)), [{"role": "user", "content": "Hello"}])
        with suppress(UserError), _engine(model, settings):
            pass

    threading.Thread(target=load, args=(model.gguf,), daemon=True, name="warm-up").start()


def _engine(model: ChatModel, settings: AppSettings) -> AbstractContextManager[LlamaEngine]:
    assert model.gguf is not None
    limits = settings.model_dump(include={"context", "threads", "slots", "timeout"})
    return shared_engines.use(model.gguf, adapters=model.adapters, **limits)


def _from_ollama(
    model: ChatModel,
    messages: Sequence[dict],
    sampling: Sampling,
    system_prompt: str | None,
    client: OllamaClient,
) -> Iterator[str]:
    turns = list(messages)
    if system_prompt is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system_prompt})
    options = sampling.model_dump(exclude={"max_tokens"}, exclude_none=True) | {"num_predict": sampling.max_tokens}
    yield from client.chat_stream(model.tag, turns, options)


def fitting_prompt(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[dict], system_prompt: str | None, room: int
) -> list[int]:
    """Token ids of the prompt, whole oldest turns left out until it has at most `room` tokens, as in training. Raises
    UserError if the last message alone is too long."""
    head = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(head) :])
    while True:
        prompt = encode_prompt(tokenizer, head + turns, system_prompt)
        if len(prompt) <= room:
            return prompt
        following = next((at for at, turn in enumerate(turns) if at and turn["role"] == "user"), None)
        if following is None:
            raise UserError(f"the message has {len(prompt)} tokens and {room} fit: shorten it, or raise app.context")
        turns = turns[following:]


def _tokenizer_folder(gguf: Path, checkout: Path) -> Path:
    """The folder whose tokenizer made the model's training data: beside the package where it is kept, else the base."""
    beside = (gguf.parent, gguf.parent.parent / "merged")
    return next((folder for folder in beside if (folder / "tokenizer.json").is_file()), checkout / BASE)


@lru_cache(maxsize=4)
def tokenizer_of(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder, loaded once."""
    return load_tokenizer(folder)
