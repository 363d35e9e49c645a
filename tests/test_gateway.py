"""The gateway between real clients and a model server: what passes, what is recorded, what happens when it breaks."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import uvicorn

from benchmarks.gateway import kill_and_compare, start_gateway
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.erasure.records import Selection, collect
from fine_tuning.integration.gateway.proxy import Upstream, application
from fine_tuning.integration.gateway.recorder import Recorder
from fine_tuning.runtime.gguf_writer import write_gguf
from tests.fake_ollama import FakeOllama, Manifest, silent_host

ROOT = Path(__file__).parents[1]
REPLY = "Knead it for ten minutes, then let it rest."
TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
QUESTION = {"role": "user", "content": "How do I bake bread?"}
ANSWER = {"role": "assistant", "content": REPLY}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    with FakeOllama(reply=REPLY, count_tokens=lambda text: len(text.split())) as fake:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1", "size": 1}]
        fake.manifests["baker:latest"] = Manifest(layers, TEMPLATE, "", {})
        yield fake


class Gateway:
    """A gateway on loopback in a thread, its inbox in `folder`."""

    def __init__(self, folder: Path, upstream: str, record="everyone", hosts=(), silent=5.0, **options) -> None:
        self.folder, self.recorder = folder, Recorder(folder, record)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        target = Upstream(upstream, 2.0, silent, name="whetstone")
        names = {"127.0.0.1", "localhost", *hosts}
        options = {"token": None, "manage_models": False} | options
        app = application(target, self.recorder, names, self.port, **options)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="critical",
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=20)

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def chat(self, *messages: dict, model: str = "baker", headers: dict | None = None, **more) -> httpx.Response:
        body = {"model": model, "messages": list(messages), **more}
        return self.http.post("/api/chat", json=body, headers=headers)

    def health(self) -> dict:
        return self.http.get("/health").json()["recording"]

    def conversations(self) -> list[dict]:
        return ConversationLogger(self.folder / "inbox/conversations.jsonl").read_conversations()

    def events(self) -> list[dict]:
        return list(ConversationLogger(self.folder / "inbox/conversations.jsonl").read_events())


@contextmanager
def running(folder: Path, upstream: str, **settings) -> Iterator[Gateway]:
    gateway = Gateway(folder, upstream, **settings)
    try:
        yield gateway
    finally:
        gateway.close()


@pytest.fixture
def gateway(tmp_path: Path, ollama: FakeOllama) -> Iterator[Gateway]:
    with running(tmp_path, ollama.host) as found:
        yield found


def said(conversation: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation["messages"]]


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------------
# what passes


def test_answers_pass_unchanged_streamed_or_not(gateway, ollama):
    for path, body in (
        ("/api/chat", {"model": "baker", "messages": [QUESTION]}),
        ("/api/chat", {"model": "baker", "messages": [QUESTION], "stream": False}),
        ("/v1/chat/completions", {"model": "baker", "messages": [QUESTION], "stream": True}),
        ("/v1/messages", {"model": "baker", "messages": [QUESTION], "stream": True, "max_tokens": 99}),
        ("/v1/responses", {"model": "baker", "input": "Hello", "stream": True}),
        ("/api/embed", {"model": "baker", "input": "x"}),
        ("/api/show", {"model": "baker"}),
        ("/api/show", {"model": "nobody"}),
        ("/nothing", {}),
    ):
        direct = httpx.post(ollama.host + path, json=body, trust_env=False)
        through = gateway.http.post(path, json=body)
        stamp = lambda text: "".join(c for c in text if not c.isdigit())  # noqa: E731 (times differ)
        assert (through.status_code, stamp(through.text)) == (direct.status_code, stamp(direct.text)), path
        assert through.headers["content-type"] == direct.headers["content-type"]
    assert gateway.http.get("/api/tags").json()["models"][0]["name"] == "baker:latest"
    assert gateway.http.get("/api/version").json() == {"version": ollama.version}
    assert gateway.http.get("/v1/models").json()["data"][0]["id"] == "baker:latest"


def test_what_a_server_remembers_of_one_client_reaches_no_other_and_no_header_is_made_up(tmp_path):
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            for name, value in (("Set-Cookie", "who=ann"), ("Content-Length", "2")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with running(tmp_path, f"http://127.0.0.1:{server.server_port}") as gateway:
            for _ in range(2):
                with httpx.Client(base_url=gateway.url, trust_env=False, headers={"User-Agent": "mine"}) as http:
                    assert http.post("/api/embed", json={}).headers["set-cookie"] == "who=ann"
        server.shutdown()
    assert [("cookie" in headers, headers["user-agent"]) for headers in asked] == [(False, "mine")] * 2


def test_a_stream_passes_as_it_comes(gateway, ollama):
    ollama.pace = 0.2
    started, arrivals = time.monotonic(), []
    with gateway.http.stream("POST", "/api/chat", json={"model": "baker", "messages": [QUESTION]}) as answer:
        for _ in answer.iter_lines():
            arrivals.append(time.monotonic() - started)
    assert len(arrivals) == len(REPLY.split()) + 1
    assert arrivals[0] < 0.2 < arrivals[2] < arrivals[-1]


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/api/create"), ("POST", "/api/pull"), ("POST", "/api/push"), ("POST", "/api/copy"),
        ("DELETE", "/api/delete"), ("POST", "/api/blobs/sha256:0"), ("HEAD", "/api/blobs/sha256:0"),
        ("POST", "//api//create"), ("POST", "/api/./create"), ("POST", "/api/%63reate/"), ("POST", "/API/Create"),
        ("DELETE", "/v1/models/baker"), ("PUT", "/anything"),
    ],
)  # fmt: skip
def test_requests_that_change_models_are_refused(gateway, ollama, method, path):
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:  # httpx would tidy the path up
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Length: 2\r\n\r\n{{}}"
        connection.sendall(head.encode())
        assert b" 403 " in connection.recv(4096).partition(b"\r\n")[0]
    assert ollama.requests == []


def test_they_pass_where_models_may_be_managed(tmp_path, ollama):
    with running(tmp_path, ollama.host, manage_models=True) as gateway:
        body = {"source": "baker", "destination": "cook"}
        assert gateway.http.post("/api/copy", json=body).status_code == 200
        assert gateway.http.request("DELETE", "/api/delete", json={"model": "cook"}).status_code == 200


# ----------------------------------------------------------------------------------------------------------------------
# who is let in


def test_only_requests_to_its_own_name_and_from_no_web_page_are_answered(tmp_path, ollama):
    with running(tmp_path, ollama.host, hosts=("host.docker.internal",)) as gateway:
        port = gateway.port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"host.docker.internal:{port}"):
            assert gateway.http.get("/api/version", headers={"Host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1:1", f"localhost.:{port}", ""):
            assert gateway.http.get("/api/version", headers={"Host": host}).status_code in (400, 403)
        for origin in ("http://evil.example", "null", "http://localhost:3000", f"https://127.0.0.1:{port}"):
            answer = gateway.chat(QUESTION, headers={"Origin": origin})
            assert answer.status_code == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert gateway.events() == []


def test_a_token_is_asked_of_everyone_and_goes_no_further(tmp_path, ollama):
    token = "0123456789abcdef"
    with running(tmp_path, ollama.host, token=token) as gateway:
        for headers in ({}, {"Authorization": "Bearer 0123456789abcdeX"}, {"Authorization": "Bearer"}):
            for path in ("/health", "/api/tags", "/v1/models"):
                assert gateway.http.get(path, headers=headers).status_code == 401
        for headers in ({"Authorization": f"Bearer {token}"}, {"x-api-key": token}, {"X-Whetstone-Token": token}):
            assert gateway.http.get("/api/tags", headers=headers).status_code == 200
        assert gateway.chat(QUESTION, headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert token not in str(gateway.events()) + str(ollama.headers)


def test_other_machines_are_let_in_only_with_a_token(tmp_path):
    done = command(tmp_path, "--bind", "0.0.0.0", "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "WHETSTONE_GATEWAY_TOKEN" in done.stderr


def test_a_taken_port_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = [command(tmp_path, "--port", str(port)) for port in (taken.getsockname()[1], 70000, -1)]
    for done in refused:
        assert done.returncode == 1 and "choose another with --port" in done.stderr and done.stderr.count("\n") == 1


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    program = [sys.executable, "-m", "fine_tuning", "gateway", *words]
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(program, cwd=folder, env=given, capture_output=True, text=True, timeout=60)


# ----------------------------------------------------------------------------------------------------------------------
# what is recorded


def test_an_exchange_is_on_disk_before_the_last_event_is_passed_on(gateway):
    for path, body, last in (
        ("/api/chat", {"messages": [QUESTION]}, '"done": true'),
        ("/v1/chat/completions", {"messages": [QUESTION | {"content": "And rolls?"}], "stream": True}, "[DONE]"),
        (
            "/v1/messages",
            {"messages": [QUESTION | {"content": "A"}], "stream": True, "max_tokens": 9},
            '"message_stop"',
        ),
        ("/v1/responses", {"input": "B", "stream": True}, '"response.completed"'),
        ("/api/generate", {"prompt": "C"}, '"done": true'),
    ):
        before = len(gateway.events())
        with gateway.http.stream("POST", path, json={"model": "baker", **body}) as answer:
            for line in answer.iter_lines():
                if last in line and line.startswith(("{", "data:")):
                    assert len(gateway.events()) == before + 1, path
                    break
            else:
                pytest.fail(f"{path}: no {last}")


def test_what_is_recorded_of_an_exchange(gateway):
    answer = gateway.chat(QUESTION, options={"temperature": 0.5, "num_ctx": 512})
    [event] = gateway.events()
    assert event["id"] == answer.headers["x-whetstone-message-id"] == answer.headers["x-request-id"]
    assert event["conversation_id"] == answer.headers["x-whetstone-conversation-id"]
    assert (event["user_message"], event["assistant_response"]) == (QUESTION["content"], REPLY)
    metadata = event["metadata"]
    assert (metadata["source"], metadata["model"], metadata["settings"]) == ("gateway", "baker", {"temperature": 0.5})
    assert metadata["tokens"] == len(REPLY.split()) + 1 and "incomplete" not in metadata


def test_a_conversation_is_recognised_by_its_messages_and_only_what_is_new_is_logged(gateway):
    first = gateway.chat(QUESTION)
    again = {"role": "assistant", "content": f"\n{REPLY} "}  # clients trim what they send again
    second = gateway.chat(QUESTION, again, {"role": "user", "content": "And then?"})
    body = {"model": "baker", "messages": [QUESTION, ANSWER, {"role": "user", "content": "And then?"}, ANSWER]}
    third = gateway.http.post(
        "/v1/chat/completions", json=body | {"messages": [*body["messages"], {"role": "user", "content": "Why?"}]}
    )
    ids = {answer.headers["x-whetstone-conversation-id"] for answer in (first, second, third)}
    assert len(ids) == 1 and len(gateway.events()) == 3
    [conversation] = gateway.conversations()
    assert [text for role, text in said(conversation) if role == "user"] == [QUESTION["content"], "And then?", "Why?"]


def test_another_reply_to_the_last_question_is_an_alternative(gateway, ollama):
    gateway.chat(QUESTION)
    ollama.reply = "Buy it."
    gateway.chat(QUESTION)
    [conversation] = gateway.conversations()
    assert said(conversation) == [("user", QUESTION["content"]), ("assistant", "Buy it.")]
    assert [other["content"] for other in conversation["messages"][1]["alternatives"]] == [REPLY]
    gateway.chat(QUESTION)
    assert len(gateway.events()) == 2, "the same reply to the same question is not another exchange"


def test_an_edited_earlier_question_is_a_branch_with_its_history(gateway):
    gateway.chat(QUESTION)
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "And then?"})
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "How long?"})
    gateway.chat(
        QUESTION, ANSWER, {"role": "user", "content": "How long?"}, ANSWER, {"role": "user", "content": "Why?"}
    )
    main, branch = gateway.conversations()
    assert [text for role, text in said(main) if role == "user"] == [QUESTION["content"], "And then?"]
    assert [text for role, text in said(branch) if role == "user"] == [QUESTION["content"], "How long?", "Why?"]
    assert branch["metadata"]["branch_of"] == main["id"]
    assert [message.get("weight") for message in branch["messages"]] == [None, 0, None, None, None, None]


def test_a_conversation_is_forgotten_with_its_branches(gateway):
    gateway.chat(QUESTION)
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "And then?"})
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "How long?"})
    gateway.chat({"role": "user", "content": "Something else"})
    main, branch, _ = (conversation["id"] for conversation in gateway.conversations())
    log = gateway.folder / "inbox/conversations.jsonl"
    assert collect(Selection(conversation=main), [], [log]).ids == {main, branch}
    assert collect(Selection(conversation=branch), [], [log]).ids == {branch}


def test_a_question_after_a_reply_that_was_not_sent_again_is_a_branch(gateway):
    gateway.chat(QUESTION)
    gateway.chat(QUESTION, {"role": "user", "content": "Are you there?"})
    _, branch = gateway.conversations()
    assert [role for role, _ in said(branch)] == ["user", "user", "assistant"]


def test_history_that_nobody_recorded_is_context_and_not_trained_on(gateway):
    gateway.chat({"role": "system", "content": "Be brief."}, QUESTION, ANSWER, {"role": "user", "content": "And then?"})
    [conversation] = gateway.conversations()
    assert [role for role, _ in said(conversation)] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation["messages"][2]["weight"] == 0


def test_a_restart_forgets_no_conversation_sealed_or_not(tmp_path, ollama):
    def ask(*more: dict, reply: str = REPLY) -> str:
        ollama.reply = reply
        with running(tmp_path, ollama.host) as gateway:
            return gateway.chat(QUESTION, *more).headers["x-whetstone-conversation-id"]

    first = ask(reply="Buy it.")
    assert ask() == first, "another reply"
    seal(tmp_path)
    then = {"role": "user", "content": "And then?"}
    assert ask(ANSWER, then) == first
    branch = ask({"role": "assistant", "content": "Buy it."}, then)
    assert branch != first, "what follows an alternative that is not shown is a branch"
    seal(tmp_path)
    why = {"role": "user", "content": "Why?"}
    assert ask({"role": "assistant", "content": "Buy it."}, then, ANSWER, why) == branch
    assert ask(ANSWER, then, ANSWER, why) == first


def seal(checkout: Path) -> None:
    log, folder, manifest = (
        checkout / name for name in ("inbox/conversations.jsonl", "data/conversations", "data/manifest.json")
    )
    for closed in close_log(log, folder):
        assert seal_log(closed, folder, manifest)["unmatched"] == 0
        closed.unlink()


OPEN_WEBUI = {"X-OpenWebUI-Chat-Id": "chat-7", "X-OpenWebUI-User-Id": "u1", "X-OpenWebUI-User-Email": "ann@example.org"}


def test_a_client_s_own_id_is_the_conversation_s_whatever_the_texts_are(gateway):
    context = {"role": "user", "content": "### Task:\nRespond to the user query using the provided context\nHow?"}
    gateway.chat(context, headers=OPEN_WEBUI | {"X-OpenWebUI-Message-Id": "m1"})
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "And then?"}, headers=OPEN_WEBUI)
    gateway.chat(QUESTION, headers={"X-OpenWebUI-Chat-Id": "chat-8"})
    first, other = gateway.conversations()
    assert (first["id"], len(first["messages"]), other["id"]) == ("chat-7", 4, "chat-8")
    assert first["messages"][1]["id"] == "m1" and first["metadata"]["user_id"] == "ann@example.org"


def test_two_models_that_answer_one_question_side_by_side_are_alternatives(gateway, ollama):
    ollama.manifests["cook:latest"] = ollama.manifests["baker:latest"]
    ollama.pace = 0.05
    threads = [
        threading.Thread(target=gateway.chat, args=(QUESTION,), kwargs={"model": model, "headers": OPEN_WEBUI})
        for model in ("baker", "cook")
    ]
    ollama_replies = iter((REPLY, "Buy it."))
    for thread in threads:
        ollama.reply = next(ollama_replies)
        thread.start()
        until(lambda: gateway.http.get("/health").json()["streams"])
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    [conversation] = gateway.conversations()
    assert len(conversation["messages"]) == 2 and len(conversation["messages"][1]["alternatives"]) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n",
        "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history, along with 1-3 more",
        "### Task:\nSuggest 3-5 relevant follow-up questions or prompts that the user might naturally ask next in this",
        "### Task:\nYou are an autocompletion system. Continue the text in `<text>` based on the **completion type**",
    ],
)
def test_what_open_webui_asks_for_itself_is_left_out(gateway, prompt):
    gateway.chat({"role": "user", "content": prompt})
    gateway.chat(QUESTION, headers=OPEN_WEBUI | {"X-OpenWebUI-Task": "title_generation"})
    assert (gateway.events(), gateway.health()["left_out"]) == ([], {"task": 2})
    for number, task in enumerate(("", "None", "{{TASK}}")):
        gateway.chat({**QUESTION, "content": f"Question {number}"}, headers={"X-OpenWebUI-Task": task})
    assert len(gateway.events()) == 3


def test_a_choice_of_tools_is_left_out_and_a_question_about_tools_is_not(gateway):
    chooses = (
        "Available Tools: []\n\nYour task is to choose and return the correct tool(s) from the list of available tools "
        "based on the query. Follow these guidelines:"
    )
    gateway.chat({"role": "system", "content": chooses}, QUESTION)
    gateway.chat({"role": "user", "content": "Available Tools: which ones are there?"})
    assert [event["user_message"] for event in gateway.events()] == ["Available Tools: which ones are there?"]


def test_an_editor_s_completion_is_left_out(gateway):
    gateway.http.post("/api/generate", json={"model": "baker", "prompt": "def f(", "suffix": "return"})
    assert (gateway.events(), gateway.health()["left_out"]) == ([], {"autocompletion": 1})


def test_a_turn_with_a_tool_is_logged_when_it_ends_as_context(gateway):
    gateway.chat(QUESTION, tools=[TOOL])
    assert gateway.events() == []
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    result = {"role": "tool", "content": "noon"}
    gateway.chat(QUESTION, call, result, tools=[TOOL])
    gateway.chat(QUESTION, call, result, ANSWER, {"role": "user", "content": "Thanks"})
    [conversation] = gateway.conversations()
    assert [text for role, text in said(conversation) if role == "user"] == [QUESTION["content"], "Thanks"]
    assert conversation["messages"][1]["weight"] == 0 and conversation["messages"][1]["tool_calls"]


def test_of_an_image_its_hash_is_recorded_and_the_reply_is_context(gateway, ollama):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "What is it?"}
    body = {"model": "baker", "messages": [{"role": "user", "content": [text, picture]}]}
    gateway.http.post("/v1/chat/completions", json=body)
    [conversation] = gateway.conversations()
    assert said(conversation)[0] == ("user", "What is it?")
    assert conversation["messages"][0]["attachments"][0]["type"] == "image_url"
    assert conversation["messages"][1]["weight"] == 0
    assert "AAAA" not in json.dumps(gateway.events())


def test_thoughts_are_kept_apart_from_the_reply(gateway, ollama):
    ollama.reply = f"<think>Bread, then.</think>\n{REPLY}"
    gateway.chat(QUESTION)
    reply = gateway.conversations()[0]["messages"][1]
    assert (reply["content"], reply["reasoning"]) == (REPLY, "Bread, then.")


def test_a_reply_of_the_live_model_is_logged_under_its_version(gateway, ollama):
    for name in ("whetstone:live", "whetstone:3"):
        ollama.manifests[name] = ollama.manifests["baker:latest"]
    gateway.chat(QUESTION, model="whetstone:live")
    reply = gateway.conversations()[0]["messages"][1]
    assert (reply["model"], reply["version"]) == ("whetstone:3", 3)


# ----------------------------------------------------------------------------------------------------------------------
# who wants none of it


def test_a_conversation_that_is_kept_out_stays_out_also_as_history(tmp_path, ollama):
    off = {"X-Whetstone-Record": "off"}
    with running(tmp_path, ollama.host) as gateway:
        gateway.chat(QUESTION, headers=off)
        gateway.http.post(
            "/v1/chat/completions", json={"model": "baker", "messages": [{**QUESTION, "content": "Hm"}], "store": False}
        )
        assert gateway.health()["left_out"] == {"not wanted": 2}
    with running(tmp_path, ollama.host) as gateway:
        gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "And then?"})
        assert gateway.events() == []
        gateway.chat({"role": "user", "content": "Something else"})
        assert len(gateway.events()) == 1
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert QUESTION["content"] not in kept


def test_only_those_who_agreed_are_recorded_where_it_says_so(tmp_path, ollama):
    with running(tmp_path, ollama.host, record="those_who_agreed") as gateway:
        gateway.chat(QUESTION, headers=OPEN_WEBUI)
        gateway.chat(QUESTION)
        assert gateway.events() == []
        assert gateway.http.post("/v1/recording", json={"user": "ann@example.org", "record": True}).status_code == 200
        gateway.chat({**QUESTION, "content": "And rolls?"}, headers=OPEN_WEBUI | {"X-OpenWebUI-Chat-Id": "new"})
        gateway.chat({**QUESTION, "content": "And buns?"}, headers={"X-Whetstone-Record": "on"})
        assert len(gateway.events()) == 2
        gateway.http.post("/v1/recording", json={"user": "ann@example.org", "record": False})
    with running(tmp_path, ollama.host) as gateway:
        gateway.chat({**QUESTION, "content": "And pies?"}, headers=OPEN_WEBUI | {"X-OpenWebUI-Chat-Id": "newer"})
        assert len(gateway.events()) == 2, "who said no is not recorded where everyone else is"
    assert "ann@example.org" not in (tmp_path / "inbox/recording.json").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# feedback


def test_feedback_reaches_the_log(gateway, ollama):
    first = gateway.chat(QUESTION).headers["x-whetstone-message-id"]
    ollama.reply = "Buy it."
    second = gateway.chat(QUESTION).headers["x-request-id"]
    for body in (
        {"message_id": first, "rating": "up", "comment": "Good.", "user": "ann"},
        {"request_id": second, "correction": "Bake it.", "rating": -1},
        {"message_id": first, "preferred_over": second, "user": "ann"},
    ):
        assert gateway.http.post("/v1/feedback", json=body).json()["recorded"] is True
    [conversation] = gateway.conversations()
    shown = conversation["messages"][1]
    assert (shown["id"], shown["alternatives"][0]["id"]) == (first, second)
    by_id = {entry["message_id"]: entry for entry in conversation["feedback"]}
    assert by_id[first] == {"message_id": first, "by": "ann", "rating": 1, "comment": "Good.", "over": [second]}
    assert (by_id[second]["edited"], by_id[second]["rating"]) == ("Bake it.", -1)


@pytest.mark.parametrize(
    "body, status",
    [
        (b"no", 400), (b"[]", 400), (b'{"message_id": "nobody", "rating": 1}', 404), (b'{"rating": 1}', 404),
        ({"rating": 5}, 400), ({}, 400), ({"comment": "alone"}, 400), ({"rating": 1, "comment": 7}, 400),
        ({"correction": 7}, 400), ({"preferred_over": ["nobody"]}, 404), ({"preferred_over": 7}, 404),
        ({"rating": True}, 400), ({"rating": [1]}, 400), ({"rating": 1, "user": []}, 400),
    ],
)  # fmt: skip
def test_feedback_that_says_nothing_is_refused(gateway, body, status):
    identity = gateway.chat(QUESTION).headers["x-whetstone-message-id"]
    content = body if isinstance(body, bytes) else json.dumps({"message_id": identity, **body}).encode()
    assert gateway.http.post("/v1/feedback", content=content).status_code == status
    assert len(gateway.events()) == 1


class WebUI:
    """Open WebUI's side of its event functions, as in version 0.12.4: `utils/plugin.py` loads them, `events.py` calls
    them after `routers/evaluations.py` has stored a row of `models/feedbacks.py`."""

    def __init__(self, monkeypatch, **valves) -> None:
        self.rows: dict[str, SimpleNamespace] = {}
        names = ("open_webui", "open_webui.models", "open_webui.models.feedbacks")
        modules = {name: ModuleType(name) for name in names}
        modules["open_webui.models.feedbacks"].Feedbacks = self
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        function = ModuleType("function_whetstone")
        exec((ROOT / "docs/open_webui_feedback.py").read_text(), function.__dict__)
        self.function = function.Event()
        self.function.valves = function.Event.Valves(**valves)

    async def get_feedback_by_id(self, id: str) -> SimpleNamespace | None:
        return self.rows.get(id)

    def rate(self, message: str, rating, event="created", snapshot=None, arena=False, reason="", comment="") -> None:
        data = {"rating": rating, "model_id": "baker", "reason": reason, "comment": comment}
        meta = {"message_id": message, "chat_id": "c1", "arena": arena}
        self.rows["f1"] = SimpleNamespace(data=data, meta=meta, snapshot=snapshot)
        if event == "deleted":
            del self.rows["f1"]
        actor = {"id": "u1", "name": "Ann", "email": "ann@example.org", "role": "user", "type": "user"}
        said = {"event": f"feedback.{event}", "actor": actor, "subject": {"type": "feedback", "id": "f1"}, "data": {}}
        asyncio.run(self.function.event(event=said))


def open_webui_headers(message: str) -> dict:
    return {"X-OpenWebUI-Chat-Id": "c1", "X-OpenWebUI-Message-Id": message, "X-OpenWebUI-User-Id": "u1"}


def test_the_function_for_open_webui_forwards_thumbs(tmp_path, ollama, monkeypatch):
    token = "0123456789abcdef"
    with running(tmp_path, ollama.host, token=token) as gateway:
        gateway.chat(QUESTION, headers=open_webui_headers("m1") | {"X-Whetstone-Token": token})
        webui = WebUI(monkeypatch, gateway=gateway.url, token=token)
        webui.rate("m1", "-1", reason="too long", comment=" Shorter. ")
        webui.rate("not recorded", 1)
        (talk,) = gateway.conversations()
        assert talk["messages"][1]["id"] == "m1"
        entry = {"message_id": "m1", "rating": -1, "comment": "too long: Shorter.", "by": "u1"}
        assert talk["feedback"] == [entry]
        webui.rate("m1", 1, event="updated")
        webui.rate("m1", 1, event="deleted")
        assert [e["rating"] for e in gateway.events() if e["event"] == "feedback"] == [-1, 1, None]
    webui.rate("m1", 1)  # nobody listens any more: Open WebUI goes on


def test_the_function_for_open_webui_forwards_votes_of_the_arena(gateway, ollama, monkeypatch):
    gateway.chat(QUESTION, headers=open_webui_headers("m1"))
    ollama.reply = "Buy it."
    gateway.chat(QUESTION, headers=open_webui_headers("m2"))
    nodes = {name: {"role": "assistant", "parentId": "q"} for name in ("m1", "m2")} | {"q": {"role": "user"}}
    snapshot = {"chat": {"chat": {"history": {"messages": nodes}}}}
    WebUI(monkeypatch, gateway=gateway.url).rate("m2", -1, snapshot=snapshot, arena=True)
    (talk,) = gateway.conversations()
    entries = {entry["message_id"]: entry for entry in talk["feedback"]}
    assert entries["m1"]["over"] == ["m2"] and entries["m1"]["by"] == "u1" and entries["m2"]["rating"] == -1


# ----------------------------------------------------------------------------------------------------------------------
# what breaks


@pytest.mark.parametrize("fault", ["cut", "error line", "reset in stream", "short", "broken chunk"])
def test_a_reply_that_broke_off_is_no_whole_one_for_anybody(gateway, ollama, fault):
    ollama.faults["POST /api/chat"] = fault
    try:
        whole = '"done": true' in gateway.chat(QUESTION).text
    except httpx.RemoteProtocolError:
        whole = False
    assert not whole
    until(gateway.events)
    [conversation] = gateway.conversations()
    assert conversation["messages"][1]["incomplete"] == "failed"
    gateway.chat(QUESTION)
    [conversation] = gateway.conversations()
    assert said(conversation)[1] == ("assistant", REPLY), "what was asked again takes its place"
    assert gateway.health()["incomplete"] == 1


def test_a_client_that_leaves_stops_the_model_and_what_came_is_kept(gateway, ollama):
    ollama.pace = 0.1
    with gateway.http.stream("POST", "/api/chat", json={"model": "baker", "messages": [QUESTION]}) as answer:
        next(answer.iter_lines())
    until(gateway.events)
    [conversation] = gateway.conversations()
    assert conversation["messages"][1]["incomplete"] == "stopped"
    assert REPLY.startswith(said(conversation)[1][1])
    until(lambda: ollama.broken_off)
    assert gateway.http.get("/health").json()["streams"] == 0


def test_a_client_that_does_not_read_holds_the_server_back_and_fills_no_memory(tmp_path):
    sent, block = [0], b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    left = threading.Event()

    def write_on_and_on(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        with connection, contextlib.suppress(OSError):
            while sent[0] < 200:
                connection.sendall(block)
                sent[0] += 1
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=write_on_and_on, args=(server,), daemon=True).start()
        with running(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", silent=60) as gateway:
            with socket.create_connection(("127.0.0.1", gateway.port)) as client:
                body = b'{"model": "baker", "messages": []}'
                head = (
                    f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                client.sendall(head.encode() + body)
                until(lambda: sent[0])
                time.sleep(1.5)
                before = sent[0]
                time.sleep(0.5)
                assert sent[0] == before < 50
            assert left.wait(10)


def test_a_reply_that_was_stopped_at_its_end_is_logged_again_when_it_is_whole(gateway, ollama):
    ollama.pace = 0.3
    with gateway.http.stream("POST", "/api/chat", json={"model": "baker", "messages": [QUESTION]}) as answer:
        lines = answer.iter_lines()
        while "rest." not in next(lines):
            pass
    until(gateway.events)
    ollama.pace = 0.0
    gateway.chat(QUESTION)
    [conversation] = gateway.conversations()
    assert "incomplete" not in conversation["messages"][1]
    assert conversation["messages"][1]["alternatives"][0]["incomplete"] == "stopped"


def test_a_reply_that_a_limit_cut_is_incomplete(gateway):
    gateway.chat(QUESTION, options={"num_predict": 2})
    assert gateway.conversations()[0]["messages"][1]["incomplete"] == "length"


def test_a_silent_server_is_504_and_a_dead_one_502(tmp_path, ollama):
    with running(tmp_path, ollama.host, silent=0.3) as gateway:
        ollama.faults["POST /api/chat"] = "hang"
        assert gateway.chat(QUESTION).status_code == 504
        ollama.faults["POST /api/chat"] = "hang in stream"
        with pytest.raises(httpx.RemoteProtocolError):
            gateway.chat(QUESTION)
        until(gateway.events)
        assert gateway.conversations()[0]["messages"][1]["incomplete"] == "failed"
    with silent_host() as nobody, running(tmp_path, nobody) as gateway:
        for path, kind in (("/api/chat", str), ("/v1/chat/completions", dict), ("/v1/messages", dict)):
            answer = gateway.http.post(path, json={"model": "baker", "messages": [QUESTION]})
            assert answer.status_code == 502 and isinstance(answer.json()["error"], kind)


def test_a_kept_connection_that_the_server_closed_costs_nobody_an_answer(gateway, ollama):
    assert gateway.chat(QUESTION).status_code == 200
    ollama.faults["POST /api/chat"] = "reset"
    assert gateway.chat({"role": "user", "content": "And rolls?"}).status_code == 200
    assert ollama.requests == 3 * ["POST /api/chat"]
    assert len(gateway.events()) == 2


def test_a_server_that_always_hangs_up_is_502(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with running(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}") as gateway:
            assert gateway.chat(QUESTION).status_code == 502
        server.shutdown(socket.SHUT_RDWR)


def test_what_the_server_refuses_passes_and_is_not_recorded(gateway, ollama):
    ollama.faults["POST /api/chat"] = "500"
    answer = gateway.chat(QUESTION)
    assert answer.status_code == 500 and "llama runner" in answer.json()["error"]
    assert gateway.events() == [] and gateway.health()["errors"] == 0


def test_a_client_that_says_more_than_it_sends_reaches_no_server(gateway, ollama):
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        head = f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Length: 999\r\n\r\n"
        connection.sendall(head.encode() + b'{"model"')
    time.sleep(0.2)
    assert ollama.requests == []
    assert gateway.chat(QUESTION).status_code == 200


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"model": "baker", "messages": [1, null, {"content": 7}]}'])
def test_a_request_that_nobody_understands_passes(gateway, ollama, body):
    assert gateway.http.post("/api/chat", content=body).status_code in (400, 200, 502)
    assert set(ollama.requests) == {"POST /api/chat"}
    assert gateway.health()["errors"] == 0


def test_a_full_disk_breaks_no_chat_and_what_waits_is_written_later_in_its_order(gateway, monkeypatch):
    monkeypatch.setattr("fine_tuning.integration.gateway.recorder.RETRY_SECONDS", 0.1)
    inbox = gateway.folder / "inbox"
    inbox.mkdir()
    (inbox / "conversations.jsonl").symlink_to("/dev/full")
    identity = gateway.chat(QUESTION).headers["x-whetstone-message-id"]
    gateway.chat(QUESTION, ANSWER, {"role": "user", "content": "And then?"})
    judged = gateway.http.post("/v1/feedback", json={"message_id": identity, "rating": 1})
    assert (judged.status_code, judged.json()["recorded"]) == (202, False)
    health = gateway.health()
    assert health["waiting"] == 3 and health["writing failed"] and "could not be logged" in health["problem"]
    (inbox / "conversations.jsonl").unlink()
    gateway.chat({"role": "user", "content": "Something else"})
    assert [event["event"] for event in gateway.events()] == ["exchange", "exchange", "feedback", "exchange"]
    assert (gateway.health()["waiting"], gateway.health()["problem"]) == (0, None)


def test_what_waits_for_a_full_disk_is_bounded(gateway, monkeypatch):
    monkeypatch.setattr("fine_tuning.integration.gateway.recorder.WAITING_BYTES", 100)
    (gateway.folder / "inbox").mkdir()
    (gateway.folder / "inbox/conversations.jsonl").symlink_to("/dev/full")
    for number in range(4):
        assert gateway.chat({"role": "user", "content": f"Question {number}"}).status_code == 200
    assert (gateway.health()["waiting"], gateway.health()["lost"]) == (1, 3)


def test_a_fault_in_recording_breaks_no_chat(gateway, monkeypatch):
    for name in ("place", "add"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fine_tuning.integration.gateway.message_chain.MessageChain.{name}", None)
            assert REPLY.split()[0] in gateway.chat(QUESTION).text
    assert gateway.health()["errors"] == 2


def test_an_answer_in_no_known_form_passes_and_is_counted(gateway, ollama):
    for fault in ("not json", "compressed", "another type"):
        ollama.faults["POST /api/chat"] = fault
        assert gateway.chat({"role": "user", "content": fault}).status_code == 200
    assert (gateway.events(), gateway.health()["left_out"], gateway.health()["errors"]) == ([], {"unreadable": 3}, 0)


def test_a_slow_disk_holds_a_chat_up_for_seconds_only(gateway, monkeypatch):
    monkeypatch.setattr("fine_tuning.integration.gateway.recorder.ACKNOWLEDGED_WITHIN", 0.2)
    written = threading.Event()
    monkeypatch.setattr(ConversationLogger, "log_conversation", lambda *_, **__: written.wait(10))
    started = time.monotonic()
    gateway.chat(QUESTION)
    assert time.monotonic() - started < 5
    assert gateway.health()["not acknowledged in time"] == 1
    written.set()


@pytest.mark.end_to_end
def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice_when_it_is_killed(tmp_path, ollama):
    ollama.manifests["bench:latest"] = ollama.manifests["baker:latest"]
    found = kill_and_compare(tmp_path, ollama.host, kills=2, exchanges=240, clients=8)
    assert dict(found) == {"exchanges": 240, "logged": 240, "conversations": 48, "lost": 0, "twice": 0}


@pytest.mark.end_to_end
def test_the_champion_answers_where_there_is_no_server(tmp_path, tiny_base):
    folder = tmp_path / "models/champion/package"
    folder.mkdir(parents=True)
    write_gguf(tiny_base, folder / "model.gguf", "Q8_0")
    (tmp_path / "models/champion.json").write_text('{"name": "whetstone", "version": 3}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_gateway(tmp_path, "champion", port)
    try:
        body = {"messages": [QUESTION], "max_tokens": 8}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, trust_env=False, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    finally:
        process.terminate()
        process.wait()
    [conversation] = ConversationLogger(tmp_path / "inbox/conversations.jsonl").read_conversations()
    reply = conversation["messages"][1]
    assert (reply["model"], reply["version"]) == ("whetstone:3", 3)


# ----------------------------------------------------------------------------------------------------------------------
# real clients


def test_the_openai_package(gateway):
    import openai

    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="baker", messages=[QUESTION], user="ann")
    assert whole.choices[0].message.content == REPLY
    assert gateway.http.post("/v1/feedback", json={"request_id": whole._request_id, "rating": 1}).status_code == 200
    more = [QUESTION, ANSWER, {"role": "user", "content": "And then?"}]
    options = {"include_usage": True}
    chunks = client.chat.completions.create(
        model="baker", messages=more, user="ann", stream=True, stream_options=options
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert client.responses.create(model="baker", input="Hello").output_text == REPLY
    with client.responses.stream(model="baker", input="Good day") as stream:
        assert stream.get_final_response().output_text == REPLY
    first, second, third = gateway.conversations()
    assert len(first["messages"]) == 4 and first["metadata"]["user_id"] == "ann" and first["feedback"][0]["rating"] == 1
    assert (said(second)[0][1], said(third)[0][1]) == ("Hello", "Good day")
    called = client.chat.completions.create(model="baker", messages=[QUESTION], tools=[TOOL])
    assert called.choices[0].message.tool_calls[0].function.name == "clock"


def test_the_ollama_package(gateway):
    import ollama as package

    client = package.Client(host=gateway.url)
    assert client.list().models[0].model == "baker:latest"
    assert client.chat(model="baker", messages=[QUESTION]).message.content == REPLY
    pieces = client.chat(model="baker", messages=[QUESTION, ANSWER, {"role": "user", "content": "Why?"}], stream=True)
    assert "".join(piece.message.content for piece in pieces) == REPLY
    assert client.generate(model="baker", prompt="Hello").response == REPLY
    assert [len(conversation["messages"]) for conversation in gateway.conversations()] == [4, 2]


def test_the_llm_package(gateway):
    from llm.default_plugins.openai_models import Chat

    model = Chat("baker", model_name="baker", api_base=f"{gateway.url}/v1")
    model.key = "none"
    talk = model.conversation()
    assert talk.prompt(QUESTION["content"], stream=True).text() == REPLY
    assert talk.prompt("And then?", stream=False).text() == REPLY
    [conversation] = gateway.conversations()
    assert len(conversation["messages"]) == 4


def test_a_langchain_chat_model(gateway):
    from langchain_ollama import ChatOllama

    model = ChatOllama(model="baker", base_url=gateway.url)
    assert model.invoke([("human", QUESTION["content"])]).content == REPLY
    more = [("human", QUESTION["content"]), ("ai", REPLY), ("human", "And then?")]

    async def stream() -> str:
        return "".join([piece.content async for piece in model.astream(more)])

    assert asyncio.run(stream()) == REPLY
    [conversation] = gateway.conversations()
    assert len(conversation["messages"]) == 4
