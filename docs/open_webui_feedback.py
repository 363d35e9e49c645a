"""
title: Whetstone feedback
description: Forwards thumbs, reasons and comments on replies to Whetstone's gateway.
version: 0.1.0
required_open_webui_version: 0.10.0
"""

import inspect
import logging

import httpx
from pydantic import BaseModel, Field

log = logging.getLogger(__name__)


class Event:
    """An event function of Open WebUI: called with every event of the server."""

    class Valves(BaseModel):
        """What an administrator sets."""

        gateway: str = Field("http://127.0.0.1:11435", description="The gateway's address")
        token: str = Field("", description="WHETSTONE_GATEWAY_TOKEN, where the gateway has one")
        person: str = Field("id", description="Whom the gateway knows people by: id or email, as in the connection")

    def __init__(self) -> None:
        self.valves = self.Valves()
        self._rated: dict[str, str] = {}  # feedback → message: a feedback that was deleted cannot be read any more

    async def event(self, event: dict) -> None:
        """Forward what somebody said of a reply. A reply that the gateway did not record is none of its business."""
        name, identity = event.get("event"), (event.get("subject") or {}).get("id")
        person = (event.get("actor") or {}).get(self.valves.person)
        if name in ("feedback.created", "feedback.updated"):
            bodies = await self._read(identity)
        elif name == "feedback.deleted" and identity in self._rated:
            bodies = [{"message_id": self._rated.pop(identity), "rating": None}]
        else:
            return
        headers = {"Authorization": f"Bearer {self.valves.token}"} if self.valves.token else {}
        try:
            async with httpx.AsyncClient(base_url=self.valves.gateway, headers=headers, timeout=10) as client:
                for body in bodies:
                    answer = await client.post("/v1/feedback", json=body | {"user": person})
                    if answer.status_code not in (200, 202, 404):
                        log.warning("Whetstone's gateway refuses feedback: HTTP %s", answer.status_code)
        except httpx.HTTPError as error:
            log.warning("Whetstone's gateway at %s: %s", self.valves.gateway, type(error).__name__)

    async def _read(self, identity: str) -> list[dict]:
        """What a row of Open WebUI's table `feedback` says, as bodies for /v1/feedback."""
        from open_webui.models.feedbacks import Feedbacks

        feedback = Feedbacks.get_feedback_by_id(identity)
        feedback = await feedback if inspect.isawaitable(feedback) else feedback
        data, meta = (feedback and feedback.data) or {}, (feedback and feedback.meta) or {}
        message, rating = meta.get("message_id"), str(data.get("rating"))
        if not message or rating not in ("1", "-1"):
            return []
        self._rated[identity] = message
        words = [data[key].strip() for key in ("reason", "comment") if isinstance(data.get(key), str)]
        bodies = [{"message_id": message, "rating": int(rating), "comment": ": ".join(filter(None, words)) or None}]
        if meta.get("arena"):  # a vote between the replies to one question
            for other in _siblings((feedback.snapshot or {}).get("chat") or {}, message):
                better, worse = (message, other) if rating == "1" else (other, message)
                bodies.append({"message_id": better, "preferred_over": [worse]})
        return bodies


def _siblings(chat: dict, message: str) -> list[str]:
    nodes = ((chat.get("chat") or chat).get("history") or {}).get("messages") or {}
    parent = (nodes.get(message) or {}).get("parentId")
    replies = [name for name, node in nodes.items() if node.get("role") == "assistant" and name != message]
    return [name for name in replies if parent and nodes[name].get("parentId") == parent]
