"""Deployment: nothing goes live that has not proved itself. Against a fake server, and a real one where one answers."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gguf import GGUFReader

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError
from fine_tuning.model_management.model_deployer import Bundle, ModelDeployer, Probe, shown_parameters
from fine_tuning.model_management.packaging.chat_template import derive_template
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.schema.chat_format import encode_prompt, load_tokenizer, render
from tests.fake_ollama import PROFILES, FakeOllama, real_host, silent_host
from tests.tiny import write_tiny_base

NAME = "whetstone-trial"
CONVERSATIONS = (
    [{"role": "user", "content": "How do I restart it?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "2024" {{ twice }}'}],
)
REAL = real_host()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose replies depend on the whole prompt."""
    return write_tiny_base(tmp_path_factory.mktemp("sharp") / "base", spread=1.0)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def bundle(base, tokenizer, tmp_path_factory):
    """Version 1 of a model that really runs."""
    gguf = tmp_path_factory.mktemp("bundle") / "model.gguf"
    write_gguf(base, gguf, "F16")

    def prompt(messages):
        return render(tokenizer, messages, None, add_generation_prompt=True).text

    probes = [
        Probe(messages, prompt(messages), len(encode_prompt(tokenizer, messages, None))) for messages in CONVERSATIONS
    ]
    request = {
        "template": derive_template(prompt),
        "parameters": {
            "stop": ["<|im_end|>", "<|im_start|>"],
            "num_ctx": 512,
            "temperature": 0.0,
            "top_p": 0.95,
            "repeat_penalty": 1.0,
        },
    }
    return Bundle(1, gguf, sha256_file(gguf), request, probes)


@pytest.fixture
def other(bundle, base, tmp_path):
    """Version 2: the same weights in another number type."""
    gguf = tmp_path / "model.gguf"
    write_gguf(base, gguf, "BF16")
    return replace(bundle, version=2, gguf=gguf, gguf_sha256=sha256_file(gguf))


@pytest.fixture
def make_fake(tokenizer):
    """Starts fake servers."""

    def count_tokens(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False).input_ids)

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(FakeOllama(count_tokens=count_tokens, **options))


@pytest.fixture
def fake(make_fake):
    return make_fake()


@pytest.fixture
def client(fake):
    with OllamaClient(fake.host, timeout=1.0, stream_timeout=1.0) as client:
        yield client


@pytest.fixture(params=["fake", "real"] if REAL else ["fake"])
def any_client(request) -> Iterator[OllamaClient]:
    """The fake server's client, and a real server's where OLLAMA_HOST names one that answers."""
    if request.param == "fake":
        yield request.getfixturevalue("client")
        return
    with OllamaClient(REAL, timeout=10.0, stream_timeout=120.0) as client:
        yield client
        for tag in ("1", "2", "live", "1-trial"):
            client.delete(f"{NAME}:{tag}")


def deploy(client, bundle, **options) -> SimpleNamespace:
    said, digests = [], []
    deployer = ModelDeployer(client, NAME, said.append, **options)
    done = deployer.deploy(bundle, digests.append)
    return SimpleNamespace(done=done, said="\n".join(said), recorded=digests)


def test_nine_steps_end_with_the_version_live(any_client, bundle):
    seen = []
    result = deploy(any_client, bundle, progress=lambda sent, size: seen.append((sent, size)))
    digests = any_client.digests()
    assert digests[f"{NAME}:live"] == digests[f"{NAME}:1"] == result.done.digest
    assert result.recorded == [result.done.digest]
    assert [line[:3] for line in result.said.split("\n")] == [f"{step}/9" for step in range(1, 10)]
    assert result.done.created
    assert result.done.prompt_tokens == bundle.probes[0].tokens
    assert not result.done.uploaded or seen[-1] == (bundle.gguf.stat().st_size,) * 2


def test_the_next_version_replaces_it_and_the_old_one_stays(any_client, bundle, other):
    first = deploy(any_client, bundle).done
    second = deploy(any_client, other).done
    digests = any_client.digests()
    assert first.digest != second.digest
    assert digests[f"{NAME}:live"] == second.digest and digests[f"{NAME}:1"] == first.digest


def test_deploying_again_sends_and_makes_nothing(any_client, bundle):
    first = deploy(any_client, bundle).done
    again = deploy(any_client, replace(bundle, recorded_digest=first.digest)).done
    assert again.digest == first.digest
    assert not again.uploaded and not again.created


def test_a_run_that_was_killed_before_it_recorded_is_taken_up(any_client, bundle):
    first = deploy(any_client, bundle).done
    any_client.delete(f"{NAME}:live")
    again = deploy(any_client, bundle).done
    assert again.digest == first.digest and not again.created


def test_after_an_update_of_the_server_the_same_bundle_is_the_same_model(fake, client, bundle):
    first = deploy(client, bundle).done
    fake.rewrites_gguf = True
    again = deploy(client, bundle).done
    assert again.digest == first.digest and not again.created
    client.delete(f"{NAME}:1")  # a clone elsewhere makes it anew: what is recorded here is the old manifest
    anew = deploy(client, bundle)
    assert anew.done.created and anew.done.digest != first.digest
    here = deploy(client, replace(bundle, recorded_digest=first.digest))
    assert here.recorded == [anew.done.digest] and not here.done.created


def test_another_request_for_the_same_file_is_another_model(client, bundle):
    deploy(client, bundle)
    other = {**bundle.request, "parameters": {**bundle.request["parameters"], "num_ctx": 256}}
    with pytest.raises(UserError, match="has another model"):
        deploy(client, replace(bundle, request=other))


def test_the_licence_of_the_model_is_kept_beside_what_it_was_made_of(fake, client, bundle):
    deploy(client, replace(bundle, request={**bundle.request, "license": "Apache-2.0"}))
    assert fake.manifests[f"{NAME}:1"].licenses[0] == "Apache-2.0"


@pytest.mark.parametrize(("version", "times"), [("0.32.15", 3), ("0.5.5", 1)])
def test_room_is_looked_for_before_anything_is_sent(fake, client, bundle, monkeypatch, tmp_path, version, times):
    monkeypatch.setattr(client, "version", lambda: version)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    huge = tmp_path / "model.gguf"
    huge.touch()
    free = shutil.disk_usage(tmp_path).free
    os.truncate(huge, free // times + (64 << 20))  # a file with nothing in it takes no room
    with pytest.raises(UserError, match=rf"Ollama {version} needs .* GB .* left in {tmp_path}"):
        deploy(client, replace(bundle, gguf=huge))
    assert not fake.received_bytes and "POST /api/blobs" not in fake.requests


def test_a_version_of_somebody_else_is_left_alone(any_client, bundle, other):
    first = deploy(any_client, replace(other, version=1)).done
    with pytest.raises(UserError, match="has another model as whetstone-trial:1"):
        deploy(any_client, bundle)
    assert any_client.digests()[f"{NAME}:1"] == any_client.digests()[f"{NAME}:live"] == first.digest


def test_a_version_that_changed_after_it_was_recorded_is_refused(any_client, bundle):
    deploy(any_client, bundle)
    any_client.create(f"{NAME}:1", {"files": {"model.gguf": f"sha256:{bundle.gguf_sha256}"}})
    with pytest.raises(UserError, match="has another model as whetstone-trial:1"):
        deploy(any_client, replace(bundle, recorded_digest="0" * 64))


def test_a_bundle_whose_template_is_not_the_tokenizers_does_not_go_live(any_client, bundle):
    changed = bundle.request["template"].replace("<|im_end|>\n", "<|im_end|>")
    with pytest.raises(UserError, match="gets another prompt than in training: at character"):
        deploy(any_client, replace(bundle, request={**bundle.request, "template": changed}))
    assert not {f"{NAME}:1", f"{NAME}:live"} & set(any_client.digests())


@pytest.mark.parametrize("value", [0.0, 1, 1.0, 0.1, 1e-05, 4096, 131072, 1048576])
def test_parameters_are_recognised_as_go_prints_them(client, bundle, value):
    parameters = {**bundle.request["parameters"], "repeat_penalty": value}
    assert deploy(client, replace(bundle, request={**bundle.request, "parameters": parameters})).done.digest


def test_a_parameter_that_the_server_changed_is_found(fake, client, bundle, monkeypatch):
    show = client.show
    changed = {"parameters": "num_ctx 2048"}
    monkeypatch.setattr(client, "show", lambda model: show(model) | changed)
    with pytest.raises(UserError, match="changed stop of whetstone-trial:1"):
        deploy(client, bundle)


def test_a_server_that_takes_the_ggufs_own_template_is_judged_by_what_it_writes(fake, client, bundle, tokenizer):
    def jinja(messages):
        return render(tokenizer, messages, None, add_generation_prompt=True).text

    fake.own_template = (tokenizer.chat_template, jinja)
    result = deploy(client, bundle)
    assert result.done.rendered == 2 and "GGUF's own chat template" in result.done.notes[0]
    client.delete(f"{NAME}:1")
    fake.own_template = (tokenizer.chat_template, lambda messages: jinja(messages) + " ")
    with pytest.raises(UserError, match="gets another prompt than in training"):
        deploy(client, bundle)
    fake.own_template = ("{{ .Prompt }}", jinja)
    with pytest.raises(UserError, match="changed the template"):
        deploy(client, bundle)


def test_a_server_that_ignores_the_template_is_found_out(fake, client, bundle):
    fake.ignores_template = True
    with pytest.raises(UserError, match="gets another prompt than in training"):
        deploy(client, bundle)
    assert not client.digests()


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("version", PROFILES)
def test_every_version_is_deployed_to_and_says_how_it_was_proved(
    make_fake, bundle, tmp_path, monkeypatch, version, readable
):
    server = make_fake(profile=PROFILES[version], store=tmp_path / "models")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models" if readable else tmp_path / "elsewhere"))
    with OllamaClient(server.host, timeout=2.0, stream_timeout=20.0) as client:
        first = deploy(client, bundle)
        assert first.done.digest == server.digest(f"{NAME}:live") and first.done.server_version == version
        proved = (
            "its files have the hashes" if readable and server.offers_render else "of its answers are those of the GGUF"
        )
        assert proved in first.said and (first.done.compared > 0) == ("answers" in proved)
        assert ("were compared instead" in str(first.done.notes)) == (first.done.compared > 0)
        again = deploy(client, replace(bundle, recorded_digest=first.done.digest)).done
        assert not again.created and again.digest == first.done.digest


def shorter_template(bundle: Bundle) -> Bundle:
    """A template that makes fewer tokens than training saw: the newline before replies is missing."""
    template = bundle.request["template"].replace("<|im_start|>assistant\n", "<|im_start|>assistant")
    assert template != bundle.request["template"]
    return replace(bundle, request={**bundle.request, "template": template})


def test_a_server_that_does_not_show_prompts_is_judged_by_its_answers(make_fake, bundle):
    old = make_fake(profile=PROFILES["0.5.5"])
    with OllamaClient(old.host, timeout=2.0, stream_timeout=20.0) as client:
        with pytest.raises(UserError, match=r"answers probe \d otherwise than its GGUF.*fine_tuning deploy --unproven"):
            deploy(client, shorter_template(bundle))
        assert not client.digests()
        told = deploy(client, shorter_template(bundle), unproven=True).done
    assert told.digest == old.digest(f"{NAME}:live") and "answers are not proved" in " ".join(told.notes)


def test_answers_that_cannot_be_compared_are_no_proof_of_prompts(fake, client, bundle, tmp_path):
    unreadable = tmp_path / "model.gguf"
    unreadable.write_bytes(bundle.gguf.read_bytes()[:-64])  # llama.cpp refuses it here
    with FakeOllama(reply="Restart it.", count_tokens=fake.count_tokens, profile=PROFILES["0.5.5"]) as old:
        client.host, client._http.base_url = old.host, old.host
        cut = replace(bundle, gguf=unreadable, gguf_sha256=sha256_file(unreadable))
        with pytest.raises(UserError, match="deploy --unproven"):
            deploy(client, cut)
        assert not client.digests() and deploy(client, cut, unproven=True).done.notes
    with FakeOllama(reply="Restart it.", count_tokens=fake.count_tokens) as new:
        client.host, client._http.base_url = new.host, new.host
        assert "answers are not proved" in deploy(client, cut).done.notes[0], "its prompts were shown"


def flip_weights(gguf: bytes) -> bytes:
    """Eight bytes changed: of the numbers that scale the last layer's output, every eighth is a quarter."""
    data = bytearray(gguf)
    with tempfile.NamedTemporaryFile() as file:
        file.write(gguf)
        file.flush()
        (tensor,) = (tensor for tensor in GGUFReader(file.name).tensors if tensor.name == "output_norm.weight")
    for index in range(0, 64, 8):
        data[int(tensor.data_offset) + 4 * index + 3] ^= 1
    return bytes(data)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("version", PROFILES)
def test_flipped_bytes_in_the_store_do_not_go_live_and_the_remedy_heals(
    make_fake, bundle, tmp_path, monkeypatch, version, readable
):
    store = tmp_path / "models"
    server = make_fake(profile=PROFILES[version], store=store)
    monkeypatch.setenv("OLLAMA_MODELS", str(store if readable else tmp_path / "elsewhere"))
    with OllamaClient(server.host, timeout=2.0, stream_timeout=20.0) as client:
        first = deploy(client, bundle).done
        weights = server.manifests[f"{NAME}:1"].layers[0]["digest"]
        server.blobs[weights] = flip_weights(server.blobs[weights])
        client.delete(f"{NAME}:1")  # `ollama rm` and deploying anew do not help: the file is still there
        with pytest.raises(
            UserError, match=r"is damaged: `rm -f " if readable else r"its file may be damaged, `rm -f \$\(ollama"
        ):
            deploy(client, bundle)
        del server.blobs[weights]
        assert deploy(client, bundle).done.digest == first.digest


def test_a_damaged_upload_is_not_made_into_a_sound_looking_model(make_fake, bundle, tmp_path, monkeypatch):
    store = tmp_path / "models"
    server = make_fake(profile=PROFILES["0.32.15"], store=store)
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with OllamaClient(server.host, timeout=2.0, stream_timeout=20.0) as client:
        client.upload_blob(bundle.gguf, bundle.gguf_sha256)
        kept = f"sha256:{bundle.gguf_sha256}"
        server.blobs[kept] = flip_weights(server.blobs[kept])
        with pytest.raises(UserError, match=rf"sha256-{bundle.gguf_sha256} is damaged: `rm -f"):
            deploy(client, bundle)
        assert not client.digests()


def test_a_disk_that_is_full_while_copying_is_thought_of(make_fake, bundle):
    size = bundle.gguf.stat().st_size
    server = make_fake(profile=PROFILES["0.32.15"], disk=2 * size)
    with OllamaClient(server.host, timeout=2.0, stream_timeout=20.0) as client:
        with pytest.raises(UserError, match=r"exit status 1; if its disk is full, make room there: it needs .* GB"):
            deploy(client, bundle)
        assert not client.digests()
        server.disk = 3 * size + (1 << 16)
        assert deploy(client, bundle).done.created


def test_a_disk_that_is_full_while_sending_is_said_as_such(make_fake, bundle):
    server = make_fake(profile=PROFILES["0.24.0"], disk=bundle.gguf.stat().st_size // 2)
    with (
        OllamaClient(server.host, timeout=2.0, stream_timeout=20.0) as client,
        pytest.raises(UserError, match="is full"),
    ):
        deploy(client, bundle)


def test_a_doubled_bos_is_found_by_the_token_count(fake, client, bundle):
    fake.extra_tokens = 1
    with pytest.raises(UserError, match="a doubled BOS"):
        deploy(client, bundle)
    assert not client.digests()


def test_a_count_that_a_cache_made_smaller_is_noted(fake, client, bundle):
    fake.extra_tokens = -5
    assert "cached" in deploy(client, bundle).done.notes[0]


def test_a_model_that_answers_nothing_does_not_go_live(fake, client, bundle, monkeypatch):
    monkeypatch.setattr(client, "chat", lambda *_: ("", SimpleNamespace(reply_tokens=0, prompt_tokens=1)))
    with pytest.raises(UserError, match="answers nothing"):
        deploy(client, bundle)
    assert not client.digests()


def test_a_model_that_writes_its_stop_does_not_go_live(fake, client, bundle):
    fake.reply = "Sure.<|im_end|> And then"
    with pytest.raises(UserError, match="writes its own stop"):
        deploy(client, bundle)


def test_a_server_that_rewrites_the_file_is_known_by_its_digest(fake, client, bundle):
    fake.rewrites_gguf = True
    result = deploy(client, bundle)
    layers = [layer["digest"] for layer in fake.manifests[f"{NAME}:1"].layers]
    assert f"sha256:{bundle.gguf_sha256}" not in layers
    assert result.recorded == [fake.digest(f"{NAME}:live")]


def test_a_server_that_is_too_old_is_told_so(client, bundle, monkeypatch):
    monkeypatch.setattr(client, "version", lambda: "0.5.4")
    with pytest.raises(UserError, match=r"0\.5\.4 .* too old: update it to 0\.5\.5"):
        deploy(client, bundle)


@pytest.mark.parametrize("version", ["0.5.5", "0.10.0", "1.0.0", "0.0.0", "unknown"])
def test_a_server_that_is_new_enough_or_does_not_say_is_taken(client, bundle, monkeypatch, version):
    monkeypatch.setattr(client, "version", lambda: version)  # 0.0.0: one that somebody built
    assert deploy(client, bundle).done.server_version == version


def test_a_server_that_is_down_is_one_clear_line(bundle):
    with silent_host() as host, OllamaClient(host, timeout=0.5) as client, pytest.raises(OllamaError) as failure:
        deploy(client, bundle)
    assert "start it" in str(failure.value)


STEPS = (
    "GET /api/version",
    "GET /api/tags",
    "HEAD /api/blobs",
    "POST /api/blobs",
    "POST /api/create",
    "POST /api/show",
    "POST /api/chat",
    "POST /api/copy",
)


@pytest.mark.parametrize("fault", ["500", "507", "reset", "hang"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_live_where_it_was(fake, client, bundle, other, step, fault):
    before, patience = deploy(client, bundle).done, (client._short, client._long)
    client._short = client._long = 0.3
    fake.faults[step] = fault
    with pytest.raises(UserError) as failure:
        deploy(client, other)
    assert "\n" not in str(failure.value)
    assert fake.digest(f"{NAME}:live") == before.digest
    client._short, client._long = patience
    assert deploy(client, other).done.digest == fake.digest(f"{NAME}:live") != before.digest


@pytest.mark.parametrize("fault", ["cut", "error line", "full disk", "reset in stream", "hang in stream"])
@pytest.mark.parametrize("step", ["POST /api/create", "POST /api/chat"])
def test_a_stream_that_fails_after_http_200_leaves_live_where_it_was(fake, client, bundle, other, step, fault):
    before = deploy(client, bundle).done
    client._long = 0.3
    fake.faults[step] = fault
    with pytest.raises(UserError) as failure:
        deploy(client, other)
    assert ("disk of" in str(failure.value)) == (fault == "full disk") and "\n" not in str(failure.value)
    assert fake.digest(f"{NAME}:live") == before.digest


def test_a_copy_that_came_out_different_is_put_back(fake, client, bundle, other, monkeypatch):
    before = deploy(client, bundle).done
    copy = client.copy

    def wrong(source: str, destination: str) -> None:
        copy(source, destination)
        if source == f"{NAME}:2":
            fake.manifests[destination] = replace(fake.manifests[destination], layers=[])

    monkeypatch.setattr(client, "copy", wrong)
    with pytest.raises(UserError, match="they differ"):
        deploy(client, other)
    assert fake.digest(f"{NAME}:live") == before.digest


def test_parameters_are_read_back_as_the_server_prints_them():
    text = 'num_ctx                        512\nstop    "<|im_end|>"\nstop    "a b"\ntemperature 0.7'
    assert shown_parameters(text) == {"num_ctx": [512], "stop": ["<|im_end|>", "a b"], "temperature": [0.7]}
