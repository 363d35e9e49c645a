"""The Ollama client against a server that behaves, refuses and fails in the ways that servers do."""

import hashlib

import pytest

from fine_tuning.errors import UserError
from fine_tuning.integration.ollama_client import (
    OllamaClient,
    OllamaError,
    OllamaNotFound,
    OllamaUnavailable,
    full_name,
    normalise_host,
    ollama_host,
)
from tests.fake_ollama import FakeOllama, silent_host

TEMPLATE = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}\u2028{{ end }}"
GGUF = b"GGUF" + bytes(range(256)) * 8192
DIGEST = hashlib.sha256(GGUF).hexdigest()
MESSAGES = [{"role": "user", "content": "Hello?", "id": "not sent"}]


@pytest.fixture
def fake():
    with FakeOllama() as server:
        yield server


@pytest.fixture
def client(fake):
    with OllamaClient(fake.host, timeout=0.5, stream_timeout=0.5) as client:
        yield client


@pytest.fixture
def model(client, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    client.upload_blob(path, DIGEST)
    client.create("trial:1", {"files": {"model.gguf": f"sha256:{DIGEST}"}, "template": TEMPLATE})
    return "trial:1"


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


def test_a_blob_is_sent_once_with_progress(fake, client, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    seen = []
    assert client.upload_blob(path, DIGEST, lambda sent, size: seen.append((sent, size)))
    assert not client.upload_blob(path, DIGEST)
    assert seen[-1] == (len(GGUF), len(GGUF)) and len(seen) > 1
    assert fake.requests.count("POST /api/blobs") == 1


def test_a_blob_that_is_not_what_it_says_is_refused(client, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF damaged")
    with pytest.raises(OllamaError, match=r"400.*digest mismatch"):
        client.upload_blob(path, DIGEST)


def test_a_model_is_made_shown_copied_and_deleted(client, model):
    assert client.show(model)["template"] == TEMPLATE
    client.copy(model, "trial:live")
    assert client.digests()["trial:live"] == client.digests()["trial:1"]
    assert client.delete("trial:live") and not client.delete("trial:live")
    with pytest.raises(OllamaNotFound, match="not found"):
        client.copy("trial:9", "trial:live")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"adapters": {"a.gguf": "sha256:" + "0" * 64}}, "LoRA adapters are no longer supported"),
        ({"quantize": "q4_K_M"}, "no longer supported"),
        ({"files": {"model.gguf": "sha256:" + "0" * 64}}, "no such file"),
        ({"files": {"../model.gguf": "sha256:" + "0" * 64}}, "must be relative"),
        ({"files": {}}, "neither 'from' or 'files'"),
    ],
)
def test_what_the_server_refuses_to_make_is_one_line(client, request_, reason):
    with pytest.raises(OllamaError, match=f"answered 400.*{reason}"):
        client.create("trial:1", request_)


def test_a_reply_streams_and_ends_with_its_statistics(client, model):
    stream = client.chat_stream(model, MESSAGES, {"temperature": 0.0})
    assert list(stream) == ["Restart ", "it."]
    assert stream.text == "Restart it."
    assert stream.stats.prompt_tokens == len("[user]Hello?\u2028")
    assert stream.stats.done_reason == "stop"
    assert stream.stats.tokens_per_second == pytest.approx(3.0)


def test_a_rendered_prompt_is_shown_where_the_server_offers_it(fake, client, model):
    assert client.render(model, MESSAGES[:1]) == "[user]Hello?\u2028"
    fake.offers_render = False
    assert client.render(model, MESSAGES[:1]) is None


def test_a_reader_may_stop_half_way(client, model):
    stream = client.chat_stream(model, MESSAGES)
    next(iter(stream))
    stream.close()
    assert client.is_up()


def test_a_server_that_is_down_is_unavailable():
    with silent_host() as host, OllamaClient(host, timeout=0.5) as client:
        assert not client.is_up()
        with pytest.raises(OllamaUnavailable, match="no Ollama answers"):
            client.digests()


def test_a_server_that_is_no_ollama_is_told_apart(fake, client, monkeypatch):
    monkeypatch.setattr(fake, "manifests", {})
    with pytest.raises(OllamaError, match="answered 404"):
        client._json("GET", "/index.html")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "silent for too long"),
        ("500", "answered 500.*terminated"),
        ("507", "disk.*is full"),
        ("reset", "connection.*was lost"),
        ("cut", "broke off its reply"),
        ("error line", "no longer running"),
        ("reset in stream", "connection.*was lost"),
        ("hang in stream", "silent for too long"),
    ],
)
def test_a_failing_chat_is_one_clear_line(fake, client, model, fault, reason):
    fake.faults["POST /api/chat"] = fault
    with pytest.raises(OllamaError, match=reason) as failure:
        list(client.chat_stream(model, MESSAGES))
    assert "\n" not in str(failure.value) and "Hello" not in str(failure.value)


@pytest.mark.parametrize("fault", ["hang", "500", "507", "reset", "cut", "error line", "hang in stream"])
def test_a_failing_creation_leaves_no_name(fake, client, tmp_path, fault):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    client.upload_blob(path, DIGEST)
    fake.faults["POST /api/create"] = fault
    with pytest.raises(OllamaError):
        client.create("trial:1", {"files": {"model.gguf": f"sha256:{DIGEST}"}, "template": TEMPLATE})
    assert "trial:1" not in client.digests()


@pytest.mark.parametrize(("fault", "reason"), [("500", "500"), ("507", "disk"), ("reset", "lost"), ("hang", "silent")])
def test_a_failing_upload_is_one_clear_line(fake, client, tmp_path, fault, reason):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    fake.faults["POST /api/blobs"] = fault
    with pytest.raises(OllamaError, match=f"{reason}|connection"):
        client.upload_blob(path, DIGEST)


def test_names_are_compared_with_their_tags():
    assert full_name("trial") == "trial:latest"
    assert full_name("host:5000/a/trial") == "host:5000/a/trial:latest"
    assert full_name("trial:live") == "trial:live"
