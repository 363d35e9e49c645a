"""`deploy --server`: a version on vLLM or llama-server, asked before it is live, and one line where it is refused."""

from pathlib import Path

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import host_key
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json
from fine_tuning.integration import other_servers
from fine_tuning.integration.other_servers import KEY
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.model_management.model_switcher import went_live
from tests.fake_openai_servers import FakeLlamaRouter, FakeServer, FakeVllm
from tests.registered import here

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def vllm(promoted):
    with FakeVllm("models/base") as server:
        yield server


@pytest.fixture
def llama(promoted):
    with FakeLlamaRouter(Path(".whetstone/llama-server.ini").resolve()) as server:
        yield server


def deploy(server: FakeServer, *words: str) -> None:
    kind = "vllm" if isinstance(server, FakeVllm) else "llama-server"
    here("deploy", *words, "--server", kind, "--host", server.url)


def adapter_sha256(number: int) -> str:
    return open_registry("trial").version(number).tags["adapter_sha256"]


def test_a_versions_adapter_is_loaded_into_vllm_asked_and_made_live(vllm, capsys):
    deploy(vllm)
    assert vllm.asked == ["trial:2"]
    assert vllm.loaded["trial:live"] == vllm.loaded["trial:2"]
    assert sha256_file(Path(vllm.loaded["trial:live"]) / WEIGHTS) == adapter_sha256(2)
    assert capsys.readouterr().out.endswith("3/4 trial:2 answers\n4/4 trial:live is version 2\n")


def test_an_older_version_takes_its_place_in_vllm_and_the_registry_knows_when(vllm):
    deploy(vllm)
    deploy(vllm, "1")
    assert sha256_file(Path(vllm.loaded["trial:live"]) / WEIGHTS) == adapter_sha256(1)
    assert {"trial:1", "trial:2"} <= vllm.loaded.keys()
    events = went_live(open_registry("trial").versions())
    assert [(event.number, event.host) for event in events] == [(2, host_key(vllm.url)), (1, host_key(vllm.url))]


def test_a_version_that_vllm_has_is_not_loaded_again(vllm, capsys):
    deploy(vllm)
    deploy(vllm)
    assert "2/4 trial:2 is loaded\n" in capsys.readouterr().out


def test_vllm_with_a_key(promoted, monkeypatch):
    with FakeVllm("models/base", key="secret-of-the-server") as server:
        with pytest.raises(UserError, match=r"refused the list of models \(HTTP 401: Unauthorized\)"):
            deploy(server)
        monkeypatch.setenv(KEY, "secret-of-the-server")
        deploy(server)
        assert "trial:live" in server.loaded


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"updating": False}, "loads no adapters: start `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve models/base"),
        ({"max_lora_rank": 2}, r"refused the adapter trial:2 \(HTTP 500: LoRA rank 4 is greater than max_lora_rank 2"),
        ({"silent": ("trial:2",)}, "trial:2 on http://127.0.0.1:[0-9]+ answers nothing"),
    ],
)
def test_what_vllm_refuses_is_one_line_and_leaves_live_as_it_was(promoted, options, problem):
    with FakeVllm("models/base", **options) as server:
        server.loaded["trial:live"] = "/what/was/live"
        with pytest.raises(UserError, match=problem) as raised:
            deploy(server)
        assert "\n" not in str(raised.value)
        assert server.loaded["trial:live"] == "/what/was/live"
    assert went_live(open_registry("trial").versions()) == []


def test_a_server_that_is_down_is_one_line_that_says_how_to_start_it(promoted):
    for kind, words in (("vllm", "vllm serve models/base --enable-lora"), ("llama-server", "--models-preset /.*ini")):
        with pytest.raises(UserError, match=rf"does not answer \(ConnectError\): start `.*{words}`, then deploy again"):
            here("deploy", "--server", kind, "--host", "http://127.0.0.1:9")


def test_another_server_than_vllm_is_one_line(promoted):
    with FakeServer() as server:
        server.route = lambda *_: (200, "It works!")
        with pytest.raises(UserError, match="has not OpenAI's list of models: give the address"):
            here("deploy", "--server", "vllm", "--host", server.url)


@pytest.mark.parametrize("host", ["", "http://", "http://[::1", "a b", "ftp://x", "x:99999", "http://me:secret@x:1"])
def test_an_address_that_is_none_is_one_line_that_does_not_show_it(promoted, host):
    with pytest.raises(UserError, match=r"^the address is not of the form http://name:port: correct --host$"):
        here("deploy", "--server", "vllm", "--host", host)


def test_an_answer_that_cannot_be_read_or_does_not_end_is_one_line(promoted, monkeypatch):
    with FakeServer() as server:
        server.route = lambda *_: (200, "x" * 2000)
        monkeypatch.setattr(other_servers, "MOST_BYTES", 1000)
        with pytest.raises(UserError, match="does not end its answer: give the server's address with --host"):
            here("deploy", "--server", "vllm", "--host", server.url)
        server.encoding = "gzip"
        with pytest.raises(UserError, match="answers in no form that can be read"):
            here("deploy", "--server", "vllm", "--host", server.url)


def test_a_version_is_a_preset_of_llama_server_asked_and_made_live(llama, capsys):
    deploy(llama, "1")
    deploy(llama)
    assert llama.asked == ["trial:1", "trial:live", "trial:2", "trial:live"]
    tags = {number: open_registry("trial").version(number).tags["gguf_sha256"] for number in (1, 2)}
    for name, number in (("trial:1", 1), ("trial:2", 2), ("trial:live", 2)):
        assert sha256_file(Path(llama.options[name]["model"])) == tags[number]
    parameters = read_json(Path("models/champion/package/create.json")).get("parameters", {})
    assert {"jinja": "true", "ctx-size": f"{parameters['num_ctx']}"}.items() <= llama.options["trial:live"].items()
    assert "2/2 trial:live is version 2 in " in capsys.readouterr().out


def test_a_preset_that_llama_server_does_not_read_is_one_line(llama, tmp_path):
    llama.presets = tmp_path / "other.ini"
    with pytest.raises(UserError, match=r"does not read /.*llama-server\.ini: start `llama-server --models-preset /"):
        deploy(llama)


def test_a_version_that_is_silent_does_not_become_live_in_llama_server(llama):
    deploy(llama, "1")
    llama.silent = ("trial:2",)
    with pytest.raises(UserError, match=r"trial:2 on .* answers nothing"):
        deploy(llama)
    assert llama.options["trial:live"] == llama.options["trial:1"]


def test_a_prompt_has_no_adapter_for_vllm(vllm):
    open_registry("trial").set_tags(2, {"kind": "prompt"})
    with pytest.raises(UserError, match="version 2 is a prompt and has no adapter: deploy it to Ollama"):
        deploy(vllm)
