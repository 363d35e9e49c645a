"""What of a conversation is trained on: sound structure, edits in place of replies, and the policy on ratings."""

from typing import Literal

from fine_tuning.data_preparation.authorship import is_by_a_person
from fine_tuning.schema.conversation import as_conversation, is_exchange, problem_of

TrainOn = Literal["all", "not_disliked", "endorsed"]
_LEAST_RATING = {"all": -1, "not_disliked": 0, "endorsed": 1}
_UNUSED = {"all": "context_only", "not_disliked": "disliked", "endorsed": "not_endorsed"}  # where it selects nothing


def read_conversation(record: dict) -> dict:
    """A conversation as it is, or a logged exchange as one.

    An exchange stays single, with its own id and its `session`: sealing is what makes conversations of exchanges.
    An id out of a table of numpy's is a plain text again.
    """
    identity = record.get("id")
    if "messages" in record and isinstance(identity, str):
        return record if type(identity) is str else record | {"id": str.__str__(identity)}
    conversation = as_conversation(record)
    if is_exchange(record):
        return conversation | {"id": str(conversation["messages"][-1]["id"]), "session": conversation["id"]}
    return conversation


def structure_problem(conversation: dict) -> str | None:
    """Why a conversation cannot be trained on: `malformed` or `no_reply`; None for a sound one."""
    if problem_of(conversation) is not None:
        return "malformed"
    asked = answered = False
    for message in conversation["messages"]:
        role, content = message["role"], message["content"]
        if role == "user":
            asked = True
        elif role == "assistant":
            answered = answered or asked
        if (not content or content.isspace()) and role != "system":
            return "malformed"
    return None if answered else "no_reply"


def unused_because(conversation: dict, train_on: TrainOn) -> str | None:
    """Why `select` gives nothing of a conversation of sound structure, None where it gives something: its replies are
    `context_only`, or those that are not are `disliked`, or of the others none is liked or edited, `not_endorsed`."""
    if not conversation.get("feedback") and not any(
        ["incomplete" in message or "weight" in message for message in conversation["messages"]]
    ):
        return "not_endorsed" if train_on == "endorsed" else None
    policies = (policy for policy, least in _LEAST_RATING.items() if least <= _LEAST_RATING[train_on])
    return next((_UNUSED[policy] for policy in policies if select(conversation, policy) is None), None)


def texts_of(conversation: dict) -> list[str]:
    """Every text that `select` can give, system messages apart."""
    texts = [message["content"] for message in conversation["messages"] if message["role"] != "system"]
    if feedback := conversation.get("feedback"):
        texts += [entry["edited"] for entry in feedback if entry.get("edited")]
    return texts


def select(conversation: dict, train_on: TrainOn) -> tuple[list[dict], list[bool]] | None:
    """The messages to render and which of them are trained; None where nothing is.

    Edits stand in place of replies; replies that were broken off or have weight 0 are context only. Messages after the
    last trained reply are cut off: they would only be prompt. A message bears its `model`, `"edited": true`, its
    `rating`, `"incomplete": true` if it is context only, and `"person": true` where a person wrote it, so that
    evaluation knows which replies are labelled and whose they are, and `"gap": true` where cleaning took out what
    stood before it, so that no window reaches across.
    """
    edits: dict[str, str] = {}
    ratings: dict[str, int] = {}
    feedback = conversation.get("feedback")
    for entry in feedback or ():
        target = entry.get("message_id")
        if (entry.get("edited") or "").strip():
            edits[target] = entry["edited"]
        if entry.get("rating"):
            # Of several people's thumbs, one down weighs more than any up.
            ratings[target] = min(entry["rating"], ratings.get(target, 1))
        elif entry.get("over"):  # preferred to other replies
            ratings.setdefault(target, 1)
    least = _LEAST_RATING[train_on]

    messages, trained = [], []
    asked, end = False, 0
    for index, message in enumerate(conversation["messages"]):
        role = message["role"]
        kept = {"role": role, "content": message["content"]}
        messages.append(kept)
        if message.get("gap"):
            kept["gap"] = True
        wanted = False
        if role == "user":
            asked = True
        elif role == "assistant":
            rating, edited, incomplete = 0, None, message.get("incomplete") or message.get("weight") == 0
            if feedback:
                identity = message.get("id")
                rating, edited = ratings.get(identity, 0), edits.get(identity)
            if (model := message.get("model")) is not None:
                kept["model"] = model
            if edited:
                kept |= {"content": edited, "edited": True}
            if is_by_a_person(conversation, index, edited):
                kept["person"] = True
            if rating:
                kept["rating"] = rating
            if incomplete:
                kept["incomplete"] = True
            # A greeting before the first question answers nothing.
            # A reply that was stopped or broke off would teach to stop anywhere.
            wanted = asked and (edited is not None or (rating >= least and not incomplete))
            if wanted:
                end = len(messages)
        trained.append(wanted)
    return (messages[:end], trained[:end]) if end else None
