"""One question on its way: asked, answered in the background, logged however the page fares.

The log is the truth; a page shows what is logged plus what is on its way. What is on its way lives in the process, by
conversation, so that a page that was closed or reloaded in mid-reply finds it again.
"""

import atexit
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_object, updating
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.chat_models import CANARY, ChatModel, Sampling
from fine_tuning.integration.ollama_client import OllamaUnreachable
from fine_tuning.integration.reply import Reply

QUESTIONS = Path(
    ".whetstone/questions.json"
)  # what was asked and has no logged reply: an app that is killed loses none
ASKED = ("replaces", "history", "branch_of")  # of a question, as the log has them too
KEPT = 200  # questions without an answer that are remembered; the oldest is forgotten first


@dataclass
class Question:
    """A message that waits for its reply, or that got none.

    `replaces` is the id of the exchange whose reply is asked for once more. `history` is what was said before the first
    question of a branch, {"role", "content"} each, and `branch_of` the conversation that it comes from. `exchange_id`
    is set when the reply, whole or in part, is in the log; `problem` is the one line that says why there is none and
    what to do.
    """

    conversation_id: str
    text: str
    model: ChatModel
    replaces: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)
    branch_of: str | None = None
    exchange_id: str | None = None
    problem: str | None = None
    reply: Reply | None = field(default=None, repr=False)

    @property
    def waiting(self) -> bool:
        return self.reply is not None and self.reply.writing

    @property
    def settled(self) -> bool:
        """Whether the log has it, so that the page need not show it from here."""
        return self.exchange_id is not None and not self.waiting and self.problem is None


class PendingReplies:
    """The questions on their way, at most one a conversation, shared by all pages of the process."""

    def __init__(self) -> None:
        self._questions: OrderedDict[str, Question] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, conversation_id: str) -> Question | None:
        """The question of a conversation that is not settled."""
        with self._lock:
            question = self._questions.get(conversation_id)
            if question is not None and question.settled:
                del self._questions[conversation_id]
                return None
            return question

    def add(self, question: Question, begin: Callable[[], Reply]) -> bool:
        """Take a question in and begin its reply; refused (False) while the conversation waits for another one."""
        with self._lock:
            other = self._questions.get(question.conversation_id)
            if other is not None and other.waiting:
                return False
            question.reply = begin()
            self._questions[question.conversation_id] = question
            self._questions.move_to_end(question.conversation_id)
            for identity in list(self._questions)[:-KEPT]:
                if not self._questions[identity].waiting:
                    del self._questions[identity]
            return True

    def close(self) -> None:
        with self._lock:
            replies = [question.reply for question in self._questions.values() if question.reply is not None]
        for reply in replies:
            reply.stop()

    def discard(self, conversation_id: str) -> None:
        """Forget the question of a conversation, stopping its reply."""
        with self._lock:
            question = self._questions.pop(conversation_id, None)
        if question is not None and question.reply is not None:
            question.reply.stop()


pending_replies = PendingReplies()
# The app that is ended in mid-reply keeps what came, as a stopped one.
atexit.register(pending_replies.close)


def new_conversation_id() -> str:
    return uuid.uuid4().hex


def unanswered(checkout: Path) -> dict[str, dict[str, Any]]:
    """{"text", and what ASKED names} of the questions without a logged reply, by conversation; some may yet come."""
    kept = read_object(checkout / QUESTIONS)
    return {key: asked for key, asked in kept.items() if isinstance(asked, dict) and isinstance(asked.get("text"), str)}


def discard(checkout: Path, conversation_id: str) -> None:
    """Forget the question of a conversation, stopping its reply."""
    pending_replies.discard(conversation_id)
    if conversation_id in read_object(checkout / QUESTIONS):
        with updating(checkout / QUESTIONS) as kept:
            kept.pop(conversation_id, None)


def ask(
    checkout: Path,
    question: Question,
    stream: Callable[[], Iterator[str]],
    logger: ConversationLogger,
    sampling: Sampling,
    system_prompt: str | None,
    person: str | None = None,
    examples: int = 0,
) -> bool:
    """Send a question and log what comes back. Returns False, asking nothing, while another reply is on its way.

    A reply that was stopped or broke off is logged with `"incomplete": "stopped"` or `"failed"`, which keeps it out of
    training. Where no text came, nothing is logged and the question stays pending with its problem. Under the name
    of `person`, who asks, `forget --user` finds the exchange. `examples` is how many conversations stood before it.
    """

    def log(reply: Reply) -> None:
        text = reply.text
        question.problem = reply.error
        # As in the gateway, a server that is not there is no version's fault.
        if reply.outcome == "failed" and not isinstance(reply.failure, OllamaUnreachable):
            Canary(checkout).failed(question.conversation_id)
        if not text.strip():
            question.problem = reply.error or "no reply came: send it again, or choose another model"
            return
        metadata: dict[str, Any] = {
            "session_id": question.conversation_id,
            "model": question.model.tag,
            "version": question.model.version,
            "engine": question.model.engine,
            "settings": sampling.model_dump()
            | {"system_prompt": system_prompt}
            | ({"examples": examples} if examples else {})
            | ({"canary": True} if question.model.name == CANARY else {}),
            "seconds": round(reply.seconds, 2),
            "tokens": reply.pieces,
        }
        if person is not None:
            metadata["user_id"] = person
        if reply.tokens_per_second is not None:
            metadata["tokens_per_second"] = round(reply.tokens_per_second, 1)
        if reply.outcome != "complete":
            metadata["incomplete"] = reply.outcome
        metadata |= {name: value for name in ASKED if (value := getattr(question, name))}
        try:
            question.exchange_id = logger.log_conversation(question.text, text, metadata)
        except UserError as error:
            question.problem = str(error)
            return
        with updating(checkout / QUESTIONS) as kept:
            kept.pop(question.conversation_id, None)

    def begin() -> Reply:
        with updating(checkout / QUESTIONS) as kept:
            kept[question.conversation_id] = {name: getattr(question, name) for name in ("text", *ASKED)}
        return Reply(stream, log)

    return pending_replies.add(question, begin)
