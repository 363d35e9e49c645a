"""What people said of replies in a conversation: edits, preferences and thumbs, one judgement each."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fine_tuning.schema.conversation import Record, is_by_a_model, problem_of, short_hash, versions_of

Kind = Literal["edit", "vote", "preferred", "thumbs"]
VOTES = "compare"  # source of the conversations that a blind vote makes
PERSON = "person"  # author of a text that somebody wrote in a model's place


class Reply(NamedTuple):
    """A reply as it was said: its text, and the model that wrote it, `person`, or "" where nobody is named."""

    text: str
    author: str


@dataclass(frozen=True)
class Judgement:
    """What one person said of one or two replies to a prompt. `better` was preferred to `worse`; without `worse` it got
    a thumb, `liked` or not."""

    prompt: list[Record]
    better: Reply
    worse: Reply | None
    liked: bool
    kind: Kind
    by: str
    at: str
    conversation: str

    @property
    def key(self) -> str:
        """Equal for prompts that differ in case and white space only."""
        return short_hash([[message["role"], folded(message["content"])] for message in self.prompt])


def judgements_of(conversation: Record) -> Iterator[Judgement]:
    """Every judgement of a conversation; none of an unsound one, nor of replies that broke off or are only context."""
    said: dict[Any, list[Record]] = defaultdict(list)
    for entry in conversation.get("feedback") or ():
        said[entry.get("message_id")].append(entry)
    if not said or problem_of(conversation):
        return
    prompt: list[Record] = []
    for index, message in enumerate(conversation["messages"]):
        if message.get("gap"):
            prompt = []
        shown = message["content"]
        if message["role"] == "assistant":
            versions = [v for v in versions_of(message) if _is_whole(v)]
            by_id = {version.get("id"): version for version in versions}
            named = is_by_a_model(conversation, index)
            for version in versions:
                for entry in said[version.get("id")]:
                    yield from _judgements(conversation, list(prompt), version, by_id, entry, named)
            shown = next((e["edited"] for e in said[message.get("id")] if (e.get("edited") or "").strip()), shown)
        prompt.append({"role": message["role"], "content": shown})


def _judgements(
    conversation: Record, prompt: list[Record], version: Record, by_id: dict[Any, Record], entry: Record, by_model: bool
) -> Iterator[Judgement]:
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        return
    rest = {
        "by": str(entry.get("by") or ""),
        "at": str(version.get("at") or conversation.get("started_at") or ""),
        "conversation": conversation["id"],
    }
    reply = _reply(version, by_model)
    if (entry.get("edited") or "").strip():
        yield Judgement(prompt, Reply(entry["edited"], PERSON), reply, True, "edit", **rest)
    for other in entry.get("over") or ():
        if other in by_id:
            kind: Kind = "vote" if conversation.get("source") == VOTES else "preferred"
            yield Judgement(prompt, reply, _reply(by_id[other], by_model), True, kind, **rest)
    if entry.get("rating"):
        yield Judgement(prompt, reply, None, entry["rating"] > 0, "thumbs", **rest)


def _is_whole(version: Record) -> bool:
    return not version.get("incomplete") and version.get("weight") != 0 and bool(version["content"].strip())


def _reply(version: Record, by_a_model: bool) -> Reply:
    model = version.get("model")
    number = f"@{version['version']}" if model and version.get("version") is not None else ""
    return Reply(version["content"], f"{model}{number}" if model else "" if by_a_model else PERSON)


def folded(text: str) -> str:
    """A text without its case and with single blanks for white space."""
    return " ".join(text.casefold().split())
