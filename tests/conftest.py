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
    return _enter_copy(promotable, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def promoted_twice(promotable, tmp_path_factory):
    """The project after two promotions. Copies share its artifacts, whose addresses are absolute, and write none."""
    import contextlib
    import shutil

    from tests.registered import here, repro, sh

    folder = tmp_path_factory.mktemp("promoted") / "project"
    shutil.copytree(promotable, folder, symlinks=True)
    with contextlib.chdir(folder):
        here("promote")
        sh(folder, "git add -A && git commit -qm 'Promote version 1'")
        repro(folder, seed=2)
        sh(folder, "git add -A && git commit -qm 'Train again'")
        here("promote")
        sh(folder, "git add -A && git commit -qm 'Promote version 2'")
    return folder


@pytest.fixture
def promoted(promoted_twice, tmp_path, monkeypatch):
    """A copy of the project with versions 1 and 2; the current folder."""
    return _enter_copy(promoted_twice, tmp_path, monkeypatch)


def _enter_copy(project, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "project"
    shutil.copytree(project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder
