"""What of a conversation is trained on: sound structure, edits in place of replies, and the policy on ratings."""

from typing import Literal

from fine_tuning.data_collection.conversation import as_conversation, is_exchange, is_feedback
from fine_tuning.data_preparation.tokenizer import ROLES

TrainOn = Literal["all", "not_disliked", "endorsed"]


def read_conversation(record: dict) -> dict:
    """A conversation as it is, or a logged exchange as one.

    An exchange stays single, with its own id and its `session`: sealing is what makes conversations of exchanges.
    """
    if "messages" in record and isinstance(record.get("id"), str):
        return record
    conversation = as_conversation(record)
    if is_exchange(record):
        return conversation | {"id": str(conversation["messages"][-1]["id"]), "session": conversation["id"]}
    return conversation


def structure_problem(conversation: dict) -> str | None:
    """Why a conversation cannot be trained on: `malformed` or `no_reply`; None for a sound one."""
    messages = conversation["messages"]
    if not isinstance(messages, list):
        return "malformed"
    asked = answered = False
    for message in messages:
        if not isinstance(message, dict):
            return "malformed"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str) or isinstance(message.get("id"), (list, dict)):
            return "malformed"
        if role == "user":
            asked = True
        elif role == "assistant":
            answered = answered or asked
        if role != "system" and (not content or content.isspace()):
            return "malformed"
    feedback = conversation.get("feedback") or []
    if not isinstance(feedback, list) or not all(isinstance(e, dict) and is_feedback(e) for e in feedback):
        return "malformed"
    return None if answered else "no_reply"


def selects(conversation: dict, train_on: TrainOn) -> bool:
    """Whether `select` gives anything of a conversation of sound structure."""
    if conversation.get("feedback") or any("incomplete" in message for message in conversation["messages"]):
        return select(conversation, train_on) is not None
    return train_on != "endorsed"


def select(conversation: dict, train_on: TrainOn) -> tuple[list[dict], list[bool]] | None:
    """The messages to render and which of them are trained; None where nothing is.

    Edits stand in place of replies; replies that were broken off are context only. Messages after the last trained
    reply are cut off: they would only be prompt. A message bears its `model`, `"edited": true` for a person's words,
    its `rating` and `"incomplete": true`, so that evaluation knows which replies are labelled and whose they are.
    """
    edits: dict[str, str] = {}
    ratings: dict[str, int] = {}
    for entry in conversation.get("feedback") or ():
        target = entry.get("message_id")
        if (entry.get("edited") or "").strip():
            edits[target] = entry["edited"]
        if entry.get("rating"):
            # Of several people's thumbs, one down weighs more than any up.
            ratings[target] = min(entry["rating"], ratings.get(target, 1))
        elif entry.get("over"):  # preferred to other replies
            ratings.setdefault(target, 1)
    least = {"all": -1, "not_disliked": 0, "endorsed": 1}[train_on]

    messages, trained = [], []
    asked, end = False, 0
    for message in conversation["messages"]:
        role = message["role"]
        kept = {"role": role, "content": message["content"]}
        wanted = False
        if role == "assistant":
            identity = message.get("id")
            rating, edited = ratings.get(identity, 0), identity in edits
            if message.get("model") is not None:
                kept["model"] = message["model"]
            if edited:
                kept |= {"content": edits[identity], "edited": True}
            if rating:
                kept["rating"] = rating
            if message.get("incomplete"):
                kept["incomplete"] = True
            # A greeting before the first question answers nothing.
            # A reply that was stopped or broke off would teach to stop anywhere.
            wanted = asked and (edited or (rating >= least and not message.get("incomplete")))
        elif role == "user":
            asked = True
        messages.append(kept)
        trained.append(wanted)
        if wanted:
            end = len(messages)
    return (messages[:end], trained[:end]) if end else None
