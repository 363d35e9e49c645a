"""The Ollama client against a server that behaves, refuses and fails as servers do; and a real one if it answers."""

import gzip
import itertools
import json
import resource
import shutil
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.integration.ollama_client import (
    STREAM_FACTOR,
    OllamaClient,
    OllamaError,
    OllamaUnreachable,
    full_name,
    normalise_host,
    ollama_host,
)
from fine_tuning.runtime.gguf_writer import write_gguf
from tests.fake_ollama import FakeOllama, Manifest, real_host, silent_host

NAME = "whetstone-client-trial"
TEMPLATE = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}\u2028{{ end }}"
MESSAGES = [{"role": "user", "content": "Hello?", "id": "not sent"}]
REAL = real_host()


@pytest.fixture
def gguf(tiny_base, tmp_path):
    """A model that runs, in a file that no server has seen: its name is new each time."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "base.json").write_text(json.dumps({"model": uuid.uuid4().hex}))
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    return tmp_path / "model.gguf"


@pytest.fixture
def fake():
    with FakeOllama(reply="Restart it.") as server:
        yield server


@pytest.fixture
def client(fake):
    with OllamaClient(fake.host, timeout=0.5, stream_timeout=0.5) as client:
        yield client


@pytest.fixture(params=["fake", "real"] if REAL else ["fake"])
def any_client(request):
    """The fake server's client, and a real server's where OLLAMA_HOST names one that answers."""
    if request.param == "fake":
        yield request.getfixturevalue("client")
        return
    with OllamaClient(REAL, timeout=10.0, stream_timeout=120.0) as client:
        yield client
        for tag in ("1", "live"):
            client.delete(f"{NAME}:{tag}")


def make(client, gguf, **fields) -> str:
    """Create the model on a server; its name."""
    digest = sha256_file(gguf)
    client.upload_blob(gguf, digest)
    request = {"files": {"model.gguf": f"sha256:{digest}"}, "template": TEMPLATE, **fields}
    client.create(f"{NAME}:1", request)
    return f"{NAME}:1"


@pytest.fixture
def model(client, gguf):
    return make(client, gguf)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("box:1234", "http://box:1234"),
        ("http://box/", "http://box:11434"),
        ("https://box", "https://box:443"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:99", "http://[::1]:99"),
        ("https://gate/ollama", "https://gate:443/ollama"),
    ],
)
def test_an_address_is_read_as_ollama_itself_reads_it(given, address):
    assert normalise_host(given) == address


@pytest.mark.parametrize("given", ["", "ftp://box", "http://", "box:port", "http://user:secret@box"])
def test_what_is_no_address_is_refused_without_repeating_it(given):
    with pytest.raises(UserError, match="not of the form") as refusal:
        normalise_host(given)
    assert "secret" not in str(refusal.value)


def test_the_environment_wins_over_the_parameter(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0:7777")
    assert ollama_host("http://elsewhere:1") == "http://127.0.0.1:7777"
    monkeypatch.delenv("OLLAMA_HOST")
    assert ollama_host("http://elsewhere:1") == "http://elsewhere:1"


def test_a_blob_is_sent_once_with_progress(any_client, gguf):
    seen, size = [], gguf.stat().st_size
    digest = sha256_file(gguf)
    assert any_client.upload_blob(gguf, digest, lambda sent, size: seen.append((sent, size)))
    assert not any_client.upload_blob(gguf, digest)
    assert seen[-1] == (size, size)


def test_a_blob_that_is_not_what_it_says_is_refused(any_client, gguf):
    digest = sha256_file(gguf)
    gguf.write_bytes(b"GGUF damaged")
    with pytest.raises(OllamaError, match=r"400.*digest mismatch"):
        any_client.upload_blob(gguf, digest)


def test_a_model_is_made_shown_copied_and_deleted(any_client, gguf):
    model = make(any_client, gguf)
    assert any_client.show(model)["template"] == TEMPLATE
    any_client.copy(model, f"{NAME}:live")
    assert any_client.digests()[f"{NAME}:live"] == any_client.digests()[model]
    assert any_client.delete(f"{NAME}:live") and not any_client.delete(f"{NAME}:live")
    with pytest.raises(OllamaError, match="not found"):
        any_client.copy(f"{NAME}:9", f"{NAME}:live")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"adapters": {"a.gguf": "sha256:" + "0" * 64}}, "LoRA adapters are no longer supported"),
        ({"quantize": "q4_K_M"}, "support"),
        ({"files": {"model.gguf": "sha256:" + "0" * 64}}, "no such file"),
        ({"files": {"../model.gguf": "sha256:" + "0" * 64}}, "must be relative"),
        ({"files": None}, "neither 'from' or 'files'"),
        ({"template": "{{ range .Messages }}"}, "template"),
    ],
)
def test_what_the_server_refuses_to_make_is_one_line(any_client, gguf, changed, reason):
    with pytest.raises(OllamaError, match=reason) as refusal:
        make(any_client, gguf, **changed)
    assert "\n" not in str(refusal.value) and f"{NAME}:1" not in any_client.digests()


def test_a_reply_streams_and_ends_with_its_statistics(any_client, gguf):
    asked = make(any_client, gguf), MESSAGES, {"temperature": 0.0, "num_predict": 2, "seed": 1}
    text, stats = any_client.chat(*asked)
    assert "".join(any_client.chat_stream(*asked)) == text
    assert stats.prompt_tokens and stats.reply_tokens
    assert stats.done_reason in ("stop", "length")


def test_the_pieces_and_the_counts_of_a_reply(client, model):
    assert list(client.chat_stream(model, MESSAGES, {"temperature": 0.0})) == ["Restart ", "it."]
    _, stats = client.chat(model, MESSAGES, {"temperature": 0.0})
    assert (stats.prompt_tokens, stats.reply_tokens) == (len("[user]Hello?\u2028"), 3)


def test_a_rendered_prompt_is_shown_where_the_server_offers_it(any_client, gguf):
    assert any_client.render(make(any_client, gguf), MESSAGES[:1]) in ("[user]Hello?\u2028", None)


def test_a_server_that_does_not_show_prompts_chats_instead(fake, client, model):
    assert client.render(model, MESSAGES[:1]) == "[user]Hello?\u2028"
    fake.offers_render = False
    assert client.render(model, MESSAGES[:1]) is None


def test_a_reader_may_stop_half_way(any_client, gguf):
    stream = any_client.chat_stream(make(any_client, gguf), MESSAGES)
    next(iter(stream))
    stream.close()
    assert any_client.version()


def test_a_server_that_is_down_is_unavailable():
    with (
        silent_host() as host,
        OllamaClient(host, timeout=0.5) as client,
        pytest.raises(OllamaUnreachable, match="no Ollama answers"),
    ):
        client.digests()


def test_a_server_that_is_no_ollama_is_told_apart(fake, client, monkeypatch):
    monkeypatch.setattr(fake, "manifests", {})
    with pytest.raises(OllamaError, match="answered 404"):
        client._json("GET", "/index.html")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "took too long"),
        ("500", "answered 500.*terminated"),
        ("507", "disk.*is full"),
        ("reset", "connection.*was lost"),
        ("cut", "broke off its reply"),
        ("error line", "no longer running"),
        ("full disk", "disk.*is full"),
        ("reset in stream", "connection.*was lost"),
        ("hang in stream", "took too long"),
    ],
)
def test_a_failing_chat_is_one_clear_line(fake, client, model, fault, reason):
    fake.faults["POST /api/chat"] = fault
    with pytest.raises(OllamaError, match=reason) as failure:
        list(client.chat_stream(model, MESSAGES))
    assert "\n" not in str(failure.value) and "Hello" not in str(failure.value)


@pytest.mark.parametrize("fault", ["hang", "500", "507", "reset", "cut", "error line", "hang in stream"])
def test_a_failing_creation_leaves_no_name(fake, client, gguf, fault):
    fake.faults["POST /api/create"] = fault
    with pytest.raises(OllamaError):
        make(client, gguf)
    assert f"{NAME}:1" not in client.digests()


@pytest.mark.parametrize(("fault", "reason"), [("500", "500"), ("507", "disk"), ("reset", "lost"), ("hang", "took")])
def test_a_failing_upload_is_one_clear_line(fake, client, gguf, fault, reason):
    fake.faults["POST /api/blobs"] = fault
    with pytest.raises(OllamaError, match=f"{reason}|connection"):
        client.upload_blob(gguf, sha256_file(gguf))


# ------------------------------------------------------------------------------------------------------ hostile servers

JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DEEP = b"[" * 100_000
ZEROS = gzip.compress(b'{"version": "' + b"0" * (200 << 20), 1)
PATIENCE = 0.5  # of the client below, in seconds


def dripping(head: bytes, drip: bytes) -> Callable[[], Iterator[bytes]]:
    """An answer that never ends and never falls silent either."""

    def answer() -> Iterator[bytes]:
        yield head
        while True:
            time.sleep(PATIENCE / 10)
            yield drip

    return answer


@contextmanager
def hostile(answer: Callable[[], Iterator[bytes]]) -> Iterator[OllamaClient]:
    """A client of a server that answers everything with the same bytes, written as they come."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(1 << 16)
                for piece in answer():
                    self.request.sendall(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            with OllamaClient(f"127.0.0.1:{server.server_address[1]}", timeout=PATIENCE, stream_timeout=PATIENCE) as it:
                yield it
        finally:
            server.shutdown()


CALLS = {
    "version": lambda client: client.version(),
    "digests": lambda client: client.digests(),
    "has_blob": lambda client: client.has_blob("0" * 64),
    "render": lambda client: client.render("a", MESSAGES[:1]),
    "create": lambda client: client.create("a", {}),
    "chat": lambda client: client.chat("a", MESSAGES[:1]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "answer",
    [
        dripping(b"", b"H"),
        dripping(JSON_HEAD, b"X-A: b\r\n"),
        dripping(JSON_HEAD + b"Content-Length: 1000000\r\n\r\n", b" "),
        dripping(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        dripping(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n\n\r\n"),
    ],
    ids=["status", "headers", "body", "chunk size", "empty lines"],
)
def test_a_dripping_server_holds_nobody_up(call, answer):
    started = time.monotonic()
    with hostile(answer) as client:
        if call == "has_blob":
            with suppress(OllamaError):  # it asks for no body
                CALLS[call](client)
        else:
            with pytest.raises(OllamaError):
                CALLS[call](client)
        assert time.monotonic() - started < 6 * PATIENCE


@pytest.mark.end_to_end
def test_a_stream_that_goes_on_and_on_is_ended():
    line = b'{"message": {"content": "a"}}\n'
    with hostile(dripping(JSON_HEAD + b"Connection: close\r\n\r\n", line)) as client:
        started, arrived = time.monotonic(), []
        with pytest.raises(OllamaError, match="took too long"):
            arrived.extend(client.chat_stream("a", MESSAGES[:1]))
        assert PATIENCE * 2 < time.monotonic() - started < PATIENCE * (STREAM_FACTOR + 6)
        assert arrived[:2] == ["a", "a"]


@pytest.mark.parametrize("call", ["version", "digests", "render", "create", "chat"])
@pytest.mark.parametrize("start", [b'{"version": "', b"[", b'{"error": "'])
def test_endless_json_fills_no_memory(call, start):
    head = JSON_HEAD + b"Connection: close\r\n\r\n" + start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endless = hostile(lambda: itertools.chain([head], itertools.repeat(b"0" * (1 << 20))))
    with endless as client, pytest.raises(OllamaError, match="more than"):
        CALLS[call](client)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("call", ["version", "chat"])
def test_a_compressed_answer_was_not_asked_for(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = hostile(lambda: iter([JSON_HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n", ZEROS]))
    with bomb as client, pytest.raises(OllamaError, match="compressed"):
        CALLS[call](client)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    "body",
    [
        DEEP, b'{"error": ' + DEEP, b'{"version": NaN}', b'{"message": {"content": "\xff"}}', b"\xff\xfe{\0}\0",
        b'{"message": {"content": "\\ud800"}}', b'{"message": "text"}', b'{"message": {"content": 1}}', b"7",
        b'{"message": {"content": "a"}, "done": "yes"}',
    ],
)  # fmt: skip
def test_what_is_not_an_answer_of_ollama_is_one_line(body):
    with hostile(lambda: iter([JSON_HEAD + b"Connection: close\r\n\r\n", body])) as client:
        for call in ("version", "chat", "create"):
            if call != "chat" and b"message" in body:
                continue
            with pytest.raises(OllamaError) as refusal:
                CALLS[call](client)
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("number", [b"true", b"-1", b"1" + b"0" * 400])
def test_numbers_that_cannot_be_are_left_out(number):
    line = b'{"done": true, "eval_count": %b, "prompt_eval_count": 7}' % number
    with hostile(lambda: iter([JSON_HEAD + b"Connection: close\r\n\r\n", line])) as client:
        _, stats = client.chat("a", MESSAGES[:1])
    assert (stats.reply_tokens, stats.prompt_tokens) == (None, 7)


def test_no_escape_sequence_reaches_the_terminal():
    evil = r"\u001b]0;owned\u0007\u001b[2J\u009b2Jhi\u202e"
    tags = f'{{"version": "{evil}", "error": "{evil}", "models": [{{"name": "{evil}", "digest": "{evil}"}}]}}'.encode()
    for status in (b"200 OK", b"500 \x1b[2Jno"):
        whole = [b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n", tags]
        with hostile(partial(iter, whole)) as client:
            for call in ("version", "digests", "chat", "create"):
                try:
                    said = str(CALLS[call](client))
                except OllamaError as error:
                    said = str(error)
                assert said.isprintable(), (call, said)


def test_a_tag_that_only_looks_like_a_number_is_no_version(fake, client):
    layers = [{"mediaType": "m", "digest": "d", "size": 1}]
    for tag in ("²", "٣", "0", "01", "3"):
        fake.manifests[f"whetstone:{tag}"] = Manifest(layers, "", "", {})
    from fine_tuning.integration.chat_models import find_models

    assert [model.tag for model in find_models(Path("/nowhere"), client, "whetstone")] == ["whetstone:3"]


def test_names_are_compared_with_their_tags():
    assert full_name("trial") == "trial:latest"
    assert full_name("host:5000/a/trial") == "host:5000/a/trial:latest"
    assert full_name("trial:live") == "trial:live"
