"""What the gateway logs, for whom, and how: nothing in here may break or hold up a chat.

A finished exchange goes to the inbox through one thread, in order. What the disk refuses waits in memory, within
bounds, and is tried again; what is lost is counted.
"""

import asyncio
import hashlib
import os
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import LOG
from fine_tuning.common.records import read_object, updating
from fine_tuning.common.settings import Settings
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.gateway.message_chain import SOURCE, MessageChain, Place, node_after, nodes_of
from fine_tuning.integration.gateway.wire_formats import Asked, ReplyReader, read_request

ACKNOWLEDGED_WITHIN = 30.0  # seconds that the end of a stream waits for a slow disk
RETRY_SECONDS = 5.0
WAITING_BYTES = 64 << 20  # of exchanges in memory that the disk did not take
REMEMBERED = 100_000  # ids of requests, and of replies that were logged before, for feedback
AGREED = Path("inbox/recording.json")  # hash of a person → whether they may be recorded
NOT_RECORDED = Path("inbox/not-recorded")  # nodes of questions that their senders kept out, one a line
# How Open WebUI's own requests begin, where no header names their task. The first line alone also begins the template
# that puts retrieved text into a person's question.
TASKS = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.",
    "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history,",
    "### Task:\nSuggest 3-5 relevant follow-up questions or prompts that the user might naturally ask next",
    "### Task:\nAnalyze the chat history to determine the necessity of generating search queries,",
    "### Task:\nGenerate a detailed prompt for am image generation task based on the given language and context.",
    "### Task:\nYou are an autocompletion system. Continue the text in `<text>`",
    "Your task is to reflect the speaker's likely facial expression through a fitting emoji.",
    "You have been provided with a set of responses from various models to the latest user query:",
)
CHOOSES_TOOLS = "\n\nYour task is to choose and return the correct tool(s) from the list of available tools"
RATINGS = {"up": 1, "1": 1, "down": -1, "-1": -1, "None": None}
NAMES = ("conversation_id", "chat_id", "session_id", "thread_id", "conversation")

Outcome = Literal["complete", "stopped", "failed"]
Headers = Mapping[str, str]
ModelOf = Callable[[str], Awaitable[dict[str, Any]]]


class GatewaySettings(Settings):
    """Section `gateway` of params.yaml."""

    port: int = Field(ge=0, lt=65536)
    allowed_hosts: list[str]
    token: str | None = Field(min_length=16)
    record: Literal["everyone", "those_who_agreed"]
    manage_models: bool
    retention_days: int | None = Field(ge=1)


@dataclass
class Ticket:
    """A request that is recorded when its reply has ended. `id` is the exchange's, in the reply's headers too."""

    asked: Asked
    person: str | None
    name: str | None
    place: Place
    id: str
    started: float = field(default_factory=time.monotonic)
    request_id: str | None = None
    served: dict[str, Any] = field(default_factory=dict)  # what the gateway put before the question, for `settings`


class Recorder:
    """Recognises, logs and counts exchanges, of everyone or of those who agreed. For one event loop."""

    def __init__(self, checkout: Path, record: str = "everyone") -> None:
        self.checkout, self._record = checkout, record
        self.canary = Canary(checkout)
        # `_write_waiting` syncs for all at once.
        self.logger = ConversationLogger(checkout / LOG, durable=False, on_event=self.canary.observe)
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.problem: str | None = None
        self._chain = MessageChain()
        self._chain.load(checkout)
        self._names: OrderedDict[str, str] = OrderedDict()
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()
        self._writer = ThreadPoolExecutor(1, "recorder")
        self._agreed = read_object(checkout / AGREED)
        marks = checkout / NOT_RECORDED
        self._not_recorded = set(marks.read_text().split()) if marks.exists() else set()

    # -----------------------------------------------------------------------------------------------------------------

    def read(self, path: str, body: bytes, headers: Headers) -> Asked | None:
        """What a request of a person asks; None where it is none, which is counted."""
        try:
            asked = read_request(path, body)
            if asked is None:
                return self._leave_out("no JSON")
            system = asked.history[0]["content"] if asked.history else ""
            task = _known(headers).get("x-openwebui-task", "").strip().lower() not in ("", "none")
            if task or asked.question.startswith(TASKS) or CHOOSES_TOOLS in system:
                return self._leave_out("task")
            return self._leave_out(asked.problem) if asked.problem else asked
        except Exception as error:
            return self.failed(error)

    def begin(self, asked: Asked, headers: Headers) -> Ticket | None:
        """Where a question belongs; None where it is not recorded, which is counted."""
        try:
            return self._placed(asked, _known(headers))
        except Exception as error:
            return self.failed(error)

    def _placed(self, asked: Asked, headers: Headers) -> Ticket | None:
        said = asked.names
        person = headers.get("x-openwebui-user-email") or headers.get("x-openwebui-user-id")
        person = person or next((str(said[key]) for key in ("user", "user_id") if said.get(key)), None)
        name = headers.get("x-whetstone-conversation-id") or headers.get("x-openwebui-chat-id")
        for key in NAMES:
            value = said.get(key)
            name = name or str(value.get("id") if isinstance(value, dict) else value or "") or None
        nodes = nodes_of(person, asked.history)
        if not self._may_record(person, name, nodes, headers, said.get("store") is not False):
            self._keep_out([_digest(name)] if name else [node_after(nodes[-1], "user", asked.question).hex()])
            return self._leave_out("not wanted")
        identity = uuid.uuid4().hex
        place = self._chain.place(nodes, asked.history, asked.question, name, identity)
        given = headers.get("x-openwebui-message-id", "")
        if given and self._chain.conversation_of(given) is None:
            identity = given
        return Ticket(asked, person, name, place, identity)

    def _may_record(
        self, person: str | None, name: str | None, nodes: list[bytes], headers: Headers, stored: bool
    ) -> bool:
        wanted, agreed = headers.get("x-whetstone-record", "").lower(), self._agreed.get(_digest(person))
        if wanted == "off" or not stored or (person and agreed is False):
            return False
        if self._not_recorded and not self._not_recorded.isdisjoint([_digest(name), *(node.hex() for node in nodes)]):
            return False  # a part of it was kept out
        return self._record == "everyone" or wanted == "on" or bool(person and agreed)

    def _keep_out(self, marks: list[str]) -> None:
        """Remember, without its words, what may not be recorded as the history of a later request either."""
        new = [mark for mark in marks if mark not in self._not_recorded]
        self._not_recorded.update(new)
        path = self.checkout / NOT_RECORDED
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(f"{mark}\n" for mark in new)

    def agree(self, person: str, record: bool) -> None:
        """Remember whether a person may be recorded. Raises OSError if it cannot be written."""
        with updating(self.checkout / AGREED) as agreed:
            agreed[_digest(person)] = record
        self._agreed = agreed

    def candidate_for(self, ticket: Ticket) -> str | None:
        """The tag of the canary's candidate where it answers instead of the live version."""
        place, asked = ticket.place, ticket.asked
        first = next((said["content"] for said in asked.history if said["role"] == "user"), asked.question)
        unit = f"id {place.root}" if ticket.name else f"opening {ticket.person}\0{first}"
        state = self.canary.candidate_for(place.conversation, unit, place.turns == 1 and not place.replaces)
        return state and state.tag

    # -----------------------------------------------------------------------------------------------------------------

    async def finish(self, ticket: Ticket, reply: ReplyReader, outcome: Outcome, model_of: ModelOf) -> None:
        """Log the exchange, and wait until the disk has it; no longer than a chat may be held up.

        `model_of` says what is known of the model that a reply names: `model`, `version`, `engine`.
        """
        try:
            reply.end()
            model = await model_of(reply.model or ticket.asked.model)
            write = self._exchange(ticket, reply, outcome, model)
            if write is not None:
                await self._acknowledged(write, len(reply.text) + len(ticket.asked.question))
        except Exception as error:
            self.failed(error)

    def _exchange(
        self, ticket: Ticket, reply: ReplyReader, outcome: Outcome, model: dict[str, Any]
    ) -> Callable[[], object] | None:
        asked, text = ticket.asked, reply.text
        if outcome == "failed" or (outcome == "complete" and reply.readable and not reply.finished):
            self.canary.failed(ticket.place.conversation)
        if not reply.readable or reply.calls or not text.strip():
            return self._leave_out("tool call" if reply.calls else "no reply" if reply.readable else "unreadable")
        if outcome == "complete":
            outcome = "complete" if reply.finished else "failed"
        # Again: another request may have asked the same meanwhile.
        nodes = nodes_of(ticket.person, asked.history)
        place = self._chain.place(nodes, asked.history, asked.question, ticket.name, ticket.place.conversation)
        if outcome == "complete" and (known := self._chain.same(place, text)):
            self._remember(ticket, known)
            return self._leave_out("logged before")
        metadata: dict[str, Any] = {
            "session_id": place.conversation,
            "source": SOURCE,
            "model": reply.model or asked.model,
            "settings": asked.sampling | ticket.served,
            "seconds": round(time.monotonic() - ticket.started, 2),
            "tokens": reply.tokens,
            "user_id": ticket.person,
            "replaces": place.replaces,
            "branch_of": place.root if place.root != place.conversation else None,
            "history": list(place.history),
            "incomplete": outcome if outcome != "complete" else "length" if reply.cut else None,
            "reasoning": reply.reasoning,
            # The text does not say what these replies rest on: context only.
            "weight": 0 if asked.attachments or asked.tool_calls else None,
            "attachments": asked.attachments,
            "tool_calls": asked.tool_calls,
        }
        metadata = {key: value for key, value in (metadata | model).items() if value not in (None, "", [], {})}
        self._chain.add(ticket.id, place, text, "incomplete" not in metadata)
        self._remember(ticket, ticket.id)
        self.counts["recorded"] += 1
        self.counts["incomplete"] += "incomplete" in metadata
        return partial(self.logger.log_conversation, asked.question, text, metadata, id=ticket.id)

    def _remember(self, ticket: Ticket, exchange: str) -> None:
        for name in {ticket.id, ticket.request_id} - {exchange, None}:
            self._names[str(name)] = exchange
        while len(self._names) > REMEMBERED:
            self._names.popitem(last=False)

    async def _acknowledged(self, write: Callable[[], object], size: int) -> bool:
        """Whether the disk has it now."""
        if (
            sum(waiting for waiting, _ in list(self._waiting)) + size > WAITING_BYTES
        ):  # a copy: the writer takes from it
            self.counts["lost"] += 1
            return False
        self._waiting.append((size, write))
        written = asyncio.get_running_loop().run_in_executor(self._writer, self._write_waiting)
        try:
            return await asyncio.wait_for(asyncio.shield(written), ACKNOWLEDGED_WITHIN)
        except TimeoutError:
            self.counts["not acknowledged in time"] += 1
            return False

    def _write_waiting(self) -> bool:
        """Write what waits now, in its order, and sync once for all of it; whether the disk took it.

        What could not be synced is written again: an id counts once.
        """
        if not (batch := list(self._waiting)):
            return True  # written with another one
        written, full = self._written(batch)
        try:
            with suppress(FileNotFoundError), open(self.logger.path, "rb") as log:  # a seal syncs what it renames
                os.fdatasync(log.fileno())
        except OSError as error:
            written, full = 0, full or f"the inbox could not be written ({error.strerror}): free some space"
        for _ in range(written):
            self._waiting.popleft()
        self.counts["writing failed"] += bool(full)
        self.problem = full or None
        return not full

    def _written(self, batch: list[tuple[int, Callable[[], object]]]) -> tuple[int, str]:
        """(how many of a batch the file has or never will have, why the disk took no more)."""
        for number, (_, write) in enumerate(batch):
            try:
                write()
            except Exception as error:
                if isinstance(error, UserError) and isinstance(error.__context__, OSError):
                    return number, str(error)
                self.failed(error)
        return len(batch), ""

    async def retry(self) -> None:
        """Write what waits, again and again, until cancelled; and see whether the canary is over."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            await asyncio.to_thread(self.canary.check)
            if self._waiting:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._write_waiting)

    def close(self) -> None:
        """Write what waits a last time."""
        self._writer.submit(self._write_waiting)
        self._writer.shutdown()

    # -----------------------------------------------------------------------------------------------------------------

    async def judge(self, body: bytes, headers: Headers) -> tuple[int, dict[str, Any]]:
        """(status, answer) to feedback: {"message_id" or "request_id", "rating"?, "comment"?, "correction"?,
        "preferred_over"?, "user"?}."""
        try:
            said = orjson.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            return 400, {"error": "send a JSON object with message_id and rating, correction or preferred_over"}
        person = said.get("user") or headers.get("x-openwebui-user-email") or headers.get("x-openwebui-user-id")
        exchange = self._named(said.get("message_id") or said.get("request_id"))
        over = said.get("preferred_over") or []
        others = [self._named(name) for name in (over if isinstance(over, list) else [over])]
        if exchange is None or None in others:
            return 404, {"error": "no reply with this id was recorded: take it from the header x-whetstone-message-id"}
        given = str(said.get("rating"))
        about = {"by": person, "conversation_id": self._chain.conversation_of(exchange)}
        writes = []
        if "rating" in said:
            writes.append(partial(self.logger.log_feedback, exchange, RATINGS.get(given), said.get("comment"), **about))
        if said.get("correction"):
            writes.append(partial(self.logger.log_edit, exchange, said["correction"], **about))
        if others:
            writes.append(partial(self.logger.log_preference, exchange, others, **about))
        texts = [said[key] for key in ("comment", "correction", "user") if said.get(key) is not None]
        if given not in RATINGS or not writes or not all(isinstance(text, str) for text in texts):
            return 400, {
                "error": "feedback is a rating (1, -1, up, down or null), alone or with a comment, a correction or "
                "preferred_over; comment, correction and user are texts"
            }
        written = [await self._acknowledged(write, len(body)) for write in writes]
        self.counts["feedback"] += 1
        return (200 if all(written) else 202), {"message_id": exchange, "recorded": all(written)}

    def _named(self, name: Any) -> str | None:
        exchange = self._names.get(name, name) if isinstance(name, str) else None
        return exchange if exchange and self._chain.conversation_of(exchange) else None

    def statistics(self) -> dict[str, Any]:
        """Counts without content."""
        return {
            **{name: self.counts[name] for name in ("recorded", "incomplete", "feedback", "errors", "lost")},
            **self.counts,
            "left_out": dict(self.left_out),
            "waiting": len(self._waiting),
            "problem": self.problem,
        }

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1

    def failed(self, error: Exception) -> None:
        self.counts["errors"] += 1
        self.problem = f"{type(error).__name__} in recording"


def _known(headers: Headers) -> Headers:
    """Without placeholders that Open WebUI does not know, which it leaves as they are."""
    return {name: value for name, value in headers.items() if "{{" not in value}


def _digest(name: str | None) -> str:
    """What stands for a name in a file that is to hold none."""
    return hashlib.sha256((name or "").encode("utf-8", "surrogatepass")).hexdigest()[:32]
