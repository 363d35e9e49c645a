"""Bases made to do harm: each is one line that names no file outside, and nothing is written."""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fine_tuning.common.errors import UserError, no_memory
from fine_tuning.data_preparation.tokenizer import TokenizerUtils
from fine_tuning.runtime.base_model import write_base
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.schema import template_trial
from tests.tiny import base_settings

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base, to be made hostile."""
    shutil.copytree(tiny_base, tmp_path / "bases" / "model")
    return tmp_path / "bases" / "model"


def refused(base, tmp_path) -> str:
    """The one line with which a base is refused, none of it being written."""
    with pytest.raises(UserError) as told:
        write_base(base_settings(str(base)), tmp_path / "written")
    assert not (tmp_path / "written").exists()
    assert "\n" not in str(told.value)
    return str(told.value)


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WEIGHTS = {
    "none": (lambda weights: weights.clear(), r"has 0 tensors .* for 2 layers"),
    "one less": (
        lambda weights: weights.pop("model.norm.weight"),
        r"lacks 1 of its weights, such as model\.norm\.weight",
    ),
    "another shape": (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), "does not load"),
    "NaN": (lambda weights: weights["model.norm.weight"][3:4].fill_(float("nan")), r"model\.norm\.weight holds NaN"),
    "infinite": (lambda weights: weights["model.norm.weight"][3:4].fill_(float("inf")), r"model\.norm\.weight holds"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_base_whose_weights_are_missing_or_no_numbers_is_refused(folder, tmp_path, what):
    change, words = WEIGHTS[what]
    change_weights(folder, change)
    assert re.search(words, refused(folder, tmp_path))


def test_an_index_that_names_a_file_outside_the_folder_is_refused_and_the_file_not_read(folder, tmp_path):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(folder.parent / "outside.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "outside its folder" in refused(folder, tmp_path)


def test_an_adapter_that_names_a_base_elsewhere_is_refused_and_the_base_not_read(folder, tiny_base, tmp_path):
    named = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_base)}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    assert "is an adapter" in refused(folder, tmp_path)


CONFIGS = {
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "4 bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "no quantisation": {"quantization_config": "none of yours"},
    "fewer than no layers": {"num_hidden_layers": -4},
    "endlessly many layers": {"num_hidden_layers": 2**31},
    "layers in words": {"num_hidden_layers": "many"},
    "a width in words": {"hidden_size": "wide"},
    "no heads": {"num_attention_heads": 0},
    "unknown": {"model_type": "nothing"},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_hostile_configuration_is_one_line(folder, tmp_path, what):
    change_json(folder / "config.json", **CONFIGS[what])
    assert ("is quantised" in refused(folder, tmp_path)) == (what in ("GPTQ", "AWQ", "4 bits"))


def test_a_vocabulary_beyond_all_memory_is_said_to_be_one(folder, tmp_path):
    change_json(folder / "config.json", vocab_size=10**15)
    with pytest.raises(RuntimeError) as told:
        write_base(base_settings(str(folder)), tmp_path / "written")
    assert no_memory(told.value)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [DEEP, "[1]", b"\xff\xfe{}"], ids=["nested deeply", "a list", "no UTF-8"])
def test_a_hostile_json_file_is_one_line(folder, tmp_path, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, tmp_path)


def test_a_generation_config_that_is_nested_deeply_is_one_line(folder, tmp_path):
    (folder / "generation_config.json").write_text(DEEP)
    refused(folder, tmp_path)


def test_a_hostile_pattern_in_a_tokenizer_is_one_line(folder, tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}
    change_json(folder / "tokenizer.json", pre_tokenizer=pattern)
    refused(folder, tmp_path)


# -----------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    """The bytes of a sound GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_base, path, "F16")
    return path.read_bytes()


def with_bytes(whole: bytes, at: int, new: bytes) -> bytes:
    return whole[:at] + new + whole[at + len(new) :]


def after(whole: bytes, key: bytes) -> int:
    return whole.index(key) + len(key)


def value(whole: bytes, key: bytes, number: int) -> bytes:
    """With another number for a key: its type is 4 bytes."""
    return with_bytes(whole, after(whole, key) + 4, struct.pack("<I", number))


def tensor(whole: bytes, name: bytes, at: int, new: bytes) -> bytes:
    """With a changed description of a tensor of two dimensions: their number, they, the type, the place."""
    return with_bytes(whole, after(whole, name) + 4 * (at > 0) + 8 * at, new)


GGUFS = {
    "nothing": lambda whole: b"",
    "other bytes": lambda whole: b"hello",
    "a header alone": lambda whole: whole[:8],
    "cut in the keys": lambda whole: whole[:500],
    "cut in the weights": lambda whole: whole[: len(whole) // 2],
    "a version to come": lambda whole: with_bytes(whole, 4, struct.pack("<I", 99)),
    "no end of tensors": lambda whole: with_bytes(whole, 8, struct.pack("<Q", 2**60)),
    "fewer than no tensors": lambda whole: with_bytes(whole, 8, struct.pack("<q", -1)),
    "no tensors": lambda whole: with_bytes(whole, 8, struct.pack("<Q", 0)),
    "no end of keys": lambda whole: with_bytes(whole, 16, struct.pack("<Q", 2**60)),
    "a name beyond all memory": lambda whole: with_bytes(whole, 24, struct.pack("<Q", 2**62)),
    "no UTF-8": lambda whole: with_bytes(whole, 32, b"\xff\xfe"),
    "an unknown type of value": lambda whole: with_bytes(whole, after(whole, b"architecture"), struct.pack("<I", 77)),
    "an unknown architecture": lambda whole: with_bytes(whole, after(whole, b"architecture") + 12, b"zzzzz"),
    "endlessly many layers": lambda whole: value(whole, b"llama.block_count", 2**31),
    "no heads": lambda whole: value(whole, b"llama.attention.head_count", 0),
    "no tokens": lambda whole: whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"),
    "no kind of tokenizer": lambda whole: whole.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modez"),
    "a tensor twice": lambda whole: whole.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
    "a tensor of another name": lambda whole: whole.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"),
    "a tensor beyond all memory": lambda whole: tensor(whole, b"token_embd.weight", 0, struct.pack("<IQ", 2, 2**40)),
    "an unknown kind of weights": lambda whole: tensor(whole, b"token_embd.weight", 2, struct.pack("<I", 250)),
    "weights behind the end": lambda whole: whole.replace(
        whole[(at := after(whole, b"token_embd.weight") + 24) : at + 8], struct.pack("<Q", 2**50), 1
    ),
    "weights that are no numbers": lambda whole: with_bytes(whole, len(whole) - 64, b"\xff\x7f" * 32),
}


@pytest.mark.parametrize("what", GGUFS)
def test_a_hostile_gguf_is_one_line(whole, tmp_path, what):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(GGUFS[what](whole))
    assert path.read_bytes() != whole
    refused(path, tmp_path)


# -----------------------------------------------------------------------------
# chat templates

MESSAGE = "{{ messages[0]['role'] + messages[0]['content'] }}"
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + MESSAGE,
    "from the fourth message on": "{% if messages | length > 3 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}" + MESSAGE,
    "where a tool is on offer": "{% if tools %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}" + MESSAGE,
    "a power": "{{ 10 ** (10 ** 9) }}" + MESSAGE,
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_that_does_not_end_is_one_line(folder, tmp_path, monkeypatch, what):
    monkeypatch.setattr(template_trial, "SECONDS", 0)
    (folder / "chat_template.jinja").write_text(ENDLESS[what])
    assert "needs over 0 s" in refused(folder, tmp_path)
    with pytest.raises(UserError, match="needs over 0 s"):
        TokenizerUtils(folder)


def test_a_template_that_fills_the_memory_is_one_line(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ 'x' * 10 ** 11 }}" + MESSAGE)
    assert "4 GiB" in refused(folder, tmp_path)


def test_a_template_that_writes_no_conversation_is_one_line(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    assert "refuses every conversation" in refused(folder, tmp_path)


def test_several_templates_are_one_line(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    several = [{"name": name, "template": MESSAGE} for name in ("default", "other")]
    change_json(folder / "tokenizer_config.json", chat_template=several)
    assert "several chat templates" in refused(folder, tmp_path)
