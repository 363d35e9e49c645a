"""Fixtures shared by the whole suite: a tiny real base model, built once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.tiny import write_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny Hugging Face llama with a ChatML template."""
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
