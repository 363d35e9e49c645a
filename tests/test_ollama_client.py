"""The Ollama client against a server that behaves, refuses and fails as servers do; and a real one if it answers."""

import json
import shutil
import uuid

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
from fine_tuning.model_management.gguf_writer import write_gguf
from fine_tuning.project import sha256_file
from tests.fake_ollama import FakeOllama, real_host, silent_host

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
    with FakeOllama() as server:
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
    with pytest.raises(OllamaNotFound, match="not found"):
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
    stream = any_client.chat_stream(make(any_client, gguf), MESSAGES, {"temperature": 0.0, "num_predict": 2, "seed": 1})
    assert "".join(stream) == stream.text
    assert stream.stats.prompt_tokens and stream.stats.total_seconds
    assert stream.stats.done_reason in ("stop", "length")


def test_the_pieces_and_the_speed_of_a_reply(client, model):
    stream = client.chat_stream(model, MESSAGES, {"temperature": 0.0})
    assert list(stream) == ["Restart ", "it."]
    assert stream.stats.prompt_tokens == len("[user]Hello?\u2028")
    assert stream.stats.tokens_per_second == pytest.approx(3.0)


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
        pytest.raises(OllamaUnavailable, match="no Ollama answers"),
    ):
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
        ("full disk", "disk.*is full"),
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
def test_a_failing_creation_leaves_no_name(fake, client, gguf, fault):
    fake.faults["POST /api/create"] = fault
    with pytest.raises(OllamaError):
        make(client, gguf)
    assert f"{NAME}:1" not in client.digests()


@pytest.mark.parametrize(("fault", "reason"), [("500", "500"), ("507", "disk"), ("reset", "lost"), ("hang", "silent")])
def test_a_failing_upload_is_one_clear_line(fake, client, gguf, fault, reason):
    fake.faults["POST /api/blobs"] = fault
    with pytest.raises(OllamaError, match=f"{reason}|connection"):
        client.upload_blob(gguf, sha256_file(gguf))


def test_names_are_compared_with_their_tags():
    assert full_name("trial") == "trial:latest"
    assert full_name("host:5000/a/trial") == "host:5000/a/trial:latest"
    assert full_name("trial:live") == "trial:live"
