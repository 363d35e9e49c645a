"""How a conversation is answered: model, sampling and system prompt, each conversation's own, with a person's defaults.

`.whetstone/chat_settings.json` has what somebody chose and has not sent anything with yet, by conversation id, and
everybody's defaults. The log has the rest: every reply says how it was made, so a conversation goes on as it was held.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fine_tuning.common.records import read_object, updating
from fine_tuning.integration.chat_models import ChatModel, Sampling

CHOICES = Path(".whetstone/chat_settings.json")


class Choice(Sampling):
    """What somebody chose. `model` is a model's key, tag, name or version; None: whichever answers first.
    `system_prompt` None: the one of training."""

    model: str | None = None
    system_prompt: str | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))


def read_choice(
    checkout: Path, identity: str, conversation: dict | None, person: str | None, usual: Choice, asked: str | None
) -> Choice:
    """The choice for a conversation: what was chosen for it, else how its newest reply was made, else the model `asked`
    for with the command, else the person's default, else `usual`. A stored value that is damaged is passed over."""
    stored = read_object(checkout / CHOICES)
    of_command = {"model": asked} if asked else {}
    choice = usual
    for layer in (stored.get(_default_of(person)), of_command, _of_newest_reply(conversation), stored.get(identity)):
        with suppress(ValidationError, TypeError):
            choice = Choice(**(choice.model_dump() | (layer or {})))
    return choice


def keep_choice(checkout: Path, choice: Choice, *, identity: str | None = None, person: str | None = None) -> None:
    """Keep a choice for one conversation, or as a person's default for new ones."""
    with updating(checkout / CHOICES) as stored:
        stored[identity or _default_of(person)] = choice.model_dump()


def find_model(models: Sequence[ChatModel], wanted: str | None) -> ChatModel | None:
    """The first model whose key, tag, name or version is `wanted`, or an adapter of which another file was; None where
    there is none."""
    names = ((model, {model.key, model.tag, model.name.lower(), str(model.version)}) for model in models)
    found = next((model for model, known in names if wanted and {wanted, wanted.lower()} & known), None)
    asked = (wanted or "").partition("@")[0]
    return found or next((model for model in models if model.adapter and model.address == asked), None)


def _default_of(person: str | None) -> str:
    return f"default of {person}" if person else "default"


def _of_newest_reply(conversation: dict | None) -> dict[str, Any]:
    replies = [m for m in (conversation or {}).get("messages", ()) if m["role"] == "assistant" and m.get("settings")]
    if not replies:
        return {}
    settings = replies[-1]["settings"]
    # A conversation of the canary stays one of the live model, whichever version answers it next.
    model = None if settings.get("canary") else replies[-1].get("model")
    return {name: value for name, value in settings.items() if name in Choice.model_fields} | {"model": model}
