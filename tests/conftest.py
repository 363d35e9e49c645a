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


@pytest.fixture(scope="session")
def promotable(tmp_path_factory, tiny_base):
    """A project whose pipeline has run, beside an MLflow store whose tables are made: both to be copied."""
    from mlflow import MlflowClient

    from tests.registered import write_project

    folder = write_project(tmp_path_factory.mktemp("promotable") / "project", tiny_base)
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@pytest.fixture
def candidate(promotable, tmp_path, monkeypatch):
    """A copy of the project with a candidate that may be promoted; the current folder."""
    import shutil

    folder = tmp_path / "project"
    shutil.copytree(promotable, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder
