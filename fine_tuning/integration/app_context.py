"""What every page of the app needs: the checkout, its parameters, the log, the models that answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import streamlit as st

from fine_tuning.common.project import LOG, main_checkout, root
from fine_tuning.common.protection import protect
from fine_tuning.common.records import stamp
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.evaluation.suite.examples import Exchange
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.chat_models import AppSettings, ChatModel, find_models
from fine_tuning.integration.ollama_client import OllamaClient, ollama_host
from fine_tuning.integration.registered_models import registered_models
from fine_tuning.integration.served_adapters import with_adapters
from fine_tuning.integration.served_examples import (
    ServedExamples,
    ServeSettings,
    context_of,
    kind_served,
    served_examples,
)
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.schema.chat_format import ChatSettings

PROBE_SECONDS = 1.5  # a server that does not say what it has within this time is left out of the list
CONNECT_SECONDS = 5.0
SERVED = ("models/champion.json", "models/base/base-Q8_0.gguf", "models/package/model.gguf")  # what can answer here
MODELS_SECONDS = 10  # how long a list of models is believed
_protect = cache(protect)  # once a process: a page runs again with every click


@dataclass(frozen=True)
class App:
    """One checkout, as the pages see it. `person` is who is signed in, None where nobody needs to; `owner` whether
    commands may be started and conversations deleted."""

    checkout: Path
    settings: AppSettings
    chat: ChatSettings
    serve: ServeSettings
    host: str
    name: str
    logger: ConversationLogger
    person: str | None
    owner: bool

    def models(self) -> list[ChatModel]:
        """What can answer now, the one that should answer first at the head, earlier versions at the end."""
        stamps = tuple(stamp(self.checkout / file) for file in SERVED)
        found = _models(str(self.checkout), self.host, self.name, stamps)
        first = with_adapters(found, self.checkout, self.name, self.serve.adapters)
        return [*first, *registered_models(self.checkout, self.name, stamps)]

    def examples(self, count: int) -> ServedExamples:
        """What may stand before a question, `count` at most."""
        return served_examples(self.checkout, count, context_of(self.settings))

    def before(
        self, model: ChatModel, messages: Sequence[dict], reply_tokens: int, system_prompt: str | None = None
    ) -> tuple[list[Exchange], str | None]:
        """(examples, system prompt) that stand before messages to a model: what a version was judged with, else what
        section `serve` says. A system prompt that somebody chose instead of the usual one stays."""
        kind = kind_served(self.checkout, model.tag if model.version is None else f"{self.name}:{model.version}")
        count = kind.get("examples", self.serve.examples)
        examples = self.examples(count).before(messages, reply_tokens) if count else []
        usual = kind.get("system_prompt") or self.chat.system_prompt
        return examples, usual if system_prompt in (None, self.chat.system_prompt) else system_prompt

    def probe(self) -> OllamaClient:
        """The Ollama server, with little patience: for questions whose answer may be that it is not there."""
        return _client(self.host, PROBE_SECONDS)

    def client(self) -> OllamaClient:
        return _client(self.host, self.settings.timeout)


def app() -> App:
    """The app of the current folder. Raises UserError if this is not a checkout, or a parameter is wrong; one line
    names it."""
    checkout = main_checkout(root())
    _protect(checkout)
    deploy, serve = read_params("deploy", DeploySettings), read_params("serve", ServeSettings)
    chat = read_params("chat", ChatSettings)
    return App(
        checkout=checkout,
        settings=read_params("app", AppSettings),
        chat=chat.model_copy(update={"system_prompt": serve.system_prompt or chat.system_prompt}),
        serve=serve,
        host=ollama_host(deploy.host),
        name=deploy.name,
        logger=ConversationLogger(checkout / LOG, on_event=Canary(checkout).observe),
        person=signed_in(),
        owner=is_owner(),
    )


@st.cache_data(ttl=MODELS_SECONDS, show_spinner=False)
def _models(checkout: str, host: str, name: str, stamps: object) -> list[ChatModel]:
    with OllamaClient(host, timeout=PROBE_SECONDS) as client:
        return find_models(Path(checkout), client, name)


@st.cache_resource(show_spinner=False)
def _client(host: str, timeout: float) -> OllamaClient:
    return OllamaClient(host, timeout=min(timeout, CONNECT_SECONDS), stream_timeout=timeout)


def sign_in_providers() -> list[str | None]:
    """Whom Streamlit's OIDC is configured with in .streamlit/secrets.toml: names, None for the unnamed one."""
    try:
        auth = st.secrets.get("auth") or {}
    except FileNotFoundError:
        return []
    named: list[str | None] = [name for name, section in auth.items() if isinstance(section, Mapping)]
    return named or ([None] if auth else [])


def signed_in() -> str | None:
    """The name of whoever is signed in, None of nobody or where no sign-in is configured."""
    if not sign_in_providers() or not st.user.is_logged_in:
        return None
    return str(st.user.get("email") or st.user.get("name") or st.user.get("sub") or "unnamed")


def is_owner() -> bool:
    """Whether somebody may train, promote and delete, on the pages that start commands."""
    return _has_role("owners")


def is_allowed() -> bool:
    """Whether somebody may come in at all: `people` may chat and compare, owners may do everything."""
    return _has_role("people") or is_owner()


def _has_role(role: str) -> bool:
    """True of everybody where no sign-in is configured, else of those whose verified e-mail address or subject
    identifier a list of section [roles] in .streamlit/secrets.toml names; `*@example.org` is everybody there."""
    if not sign_in_providers():
        return True
    listed = (st.secrets.get("roles") or {}).get(role) or []
    email = st.user.get("email") if st.user.get("email_verified") is not False else None
    names = {email, st.user.get("sub"), email and f"*@{email.rpartition('@')[2]}"} - {None, ""}
    return signed_in() is not None and any(name in names for name in listed)
