"""The judge: a model on a server that says which of two replies is better. It advises, and decides nothing.

It is asked by a command and by no stage: its votes are data, as people's are, on the same replies, and a pipeline needs
no server. It speaks the chat completions of OpenAI, which Ollama, llama.cpp and vLLM have as well.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_object, write_json
from fine_tuning.evaluation.records.record_types import Item, Reply
from fine_tuning.evaluation.review import Pairs, sha256
from fine_tuning.schema.conversation import now
from fine_tuning.schema.votes import Choice, JudgeVote

MEMO = Path(".whetstone/memo/judge")
KEY = "WHETSTONE_JUDGE_KEY"  # params.yaml is in git
SECONDS = 300.0  # a large model is loaded in silence
CONNECT_SECONDS = 10.0
MOST_TOKENS = 2048  # of an answer, since some models think aloud first
QUESTION = "Which reply to the last message is better? Answer with 1, 2 or tie, and nothing else."


class Judge:
    """A model on a server, at `url` or at that of its API where it is not at /v1. The `rubric`, its system prompt, says
    what to look for. Raises UserError if the key cannot be sent."""

    def __init__(self, url: str, model: str, rubric: str) -> None:
        self.url, self.model, self.rubric = url.rstrip("/"), model, rubric
        if not urlsplit(self.url).path:
            self.url += "/v1"
        if not os.environ.get(KEY, "").isascii():
            raise UserError(f"${KEY} has characters that no key has: copy it again")
        headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        self._http = httpx.Client(
            timeout=httpx.Timeout(SECONDS, connect=CONNECT_SECONDS), headers=headers, trust_env=not local
        )

    def check(self) -> None:
        """See that a server is there, whatever it says. Raises UserError if there is none."""
        self._send("GET", "models")

    def vote(self, pairs: Pairs, cluster: str) -> JudgeVote:
        """Its vote on the pair of a cluster whose replies are made; equal replies are no question. Raises UserError if
        it does not answer."""
        item, replies = pairs.items[cluster], pairs.replies(cluster) or {}
        names = pairs.candidate.name, pairs.against.name
        left, right = (replies[name] for name in names)
        answers: tuple[Choice | None, Choice | None] = "tie", "tie"
        if left.text != right.text:
            back: dict[Choice | None, Choice] = {"left": "right", "right": "left"}
            swapped = self._answer(item, right, left)
            answers = self._answer(item, left, right), back.get(swapped, swapped)
        fields, rubric = pairs.named(item, names, (left, right)), sha256(self.rubric)
        return JudgeVote(
            id=sha256(self.url, self.model, rubric, str(fields), str(answers)), at=now(), by=self.model, rubric=rubric,
            answers=answers, choice=answers[0] if answers[0] == answers[1] and answers[0] else "tie",
            characters=(len(left.text), len(right.text)), **fields,
        )  # fmt: skip

    def _answer(self, item: Item, first: Reply, second: Reply) -> Choice | None:
        """Which one it prefers: "left" is the first. Asked until the answer is clear, then remembered."""
        talk = "\n\n".join(f"{message['role']}: {message['content']}" for message in item.history)
        text = f"{talk}\n\nReply 1:\n{first.text}\n\nReply 2:\n{second.text}\n\n{QUESTION}"
        messages = [{"role": "system", "content": self.rubric}, {"role": "user", "content": text}]
        kept = MEMO / f"{sha256(self.url, self.model, json.dumps(messages))}.json"
        answer = read_object(kept).get("answer") or understood(self._ask(messages))
        if answer is not None:
            write_json(kept, {"answer": answer})
        return answer

    def _ask(self, messages: Sequence[dict[str, str]]) -> str:
        asked = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": MOST_TOKENS}
        answer = self._send("POST", "chat/completions", json=asked)
        if answer.is_redirect:
            raise UserError(f"the judge at {self.url} redirects: set evaluate.judge.url to where `curl -I` leads")
        if answer.status_code != 200:  # what it says may quote the conversation
            mend = f"check evaluate.judge, ${KEY} and the server's log"
            raise UserError(f"the judge at {self.url} answers with status {answer.status_code}: {mend}")
        try:
            return str(answer.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._other_protocol() from None

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, f"{self.url}/{path}", **arguments)
        except (httpx.RemoteProtocolError, httpx.DecodingError):
            raise self._other_protocol() from None
        except httpx.ReadTimeout:
            raise UserError(f"the judge at {self.url} is silent: look at its log, then run this again") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = type(error).__name__
            raise UserError(f"no judge answers at {self.url} ({why}): start it, or set evaluate.judge.url") from None

    def _other_protocol(self) -> UserError:
        return UserError(f"{self.url} does not speak OpenAI's chat completions: correct evaluate.judge")


def understood(answer: str) -> Choice | None:
    """The preference in an answer's last line, thoughts left out; None where it names none, or several."""
    lines = re.sub(r"(?s)<think>.*?</think>", "", answer).strip().lower().splitlines() or [""]
    words = set(re.findall(r"\b(?:1|2|tie)\b", lines[-1]))
    named: dict[str, Choice] = {"1": "left", "2": "right", "tie": "tie"}
    return named[words.pop()] if len(words) == 1 else None
