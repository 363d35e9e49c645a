"""Fixtures shared by the whole suite: a tiny real base model, built once."""

import gc
import os
import shlex
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests import forked
from tests.tiny import write_tiny_base

# Files that take minutes begin first, so that the workers end together (`make test-all` gives files to workers).
SLOWEST = (
    "test_training", "test_uses", "test_promote", "test_app_browser", "test_faults", "test_forget", "test_champion",
    "test_forget_promoted", "test_hostile_bases", "test_app_journey", "test_preference_pipeline", "test_remotes",
    "test_app_pages", "test_bad_input", "test_verify", "test_benchmarks", "test_seal_intake", "test_deployer",
    "test_app", "test_llama_engine", "test_comparison", "test_cleaner", "test_gateway", "test_preference_training",
    "test_ollama_client", "test_switcher", "test_model_package", "test_gguf_writer", "test_tokenizer",
)  # fmt: skip
NEW_MODULES = 100  # so many are worth a collection
gc.disable()  # while tests are collected, which imports everything
END_TO_END = "end_to_end: a browser, servers, kills, whole pipelines, or slow; `make test` leaves it out"


def pytest_configure(config):
    # `dvc` and what its stages call are found without an activated environment.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    config.addinivalue_line("markers", END_TO_END)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Fork the workers from the process that has imported the libraries, and share it: an import takes ten seconds."""
    os.environ[forked.SHARED] = str(forked.folder())
    for spec in specs:
        spec.python = shlex.quote(f"{os.environ[forked.SHARED]}/worker")


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOWEST)))


def pytest_terminal_summary(terminalreporter, config):
    if left_out := len(terminalreporter.stats.get("deselected", [])):
        terminalreporter.write_line(f"{left_out} end-to-end tests were left out: `make test-all` runs them")


def pytest_collection_finish():
    gc.enable()
    gc.freeze()


def pytest_runtest_logfinish():
    """Exempt what was imported from garbage collection.

    With torch and MLflow loaded a full collection walks millions of objects for 0.7 s; accelerate asks for one in each
    training, Streamlit after each run of a page.
    """
    if len(sys.modules) > pytest_runtest_logfinish.modules + NEW_MODULES:
        gc.collect()
        gc.freeze()
        pytest_runtest_logfinish.modules = len(sys.modules)


pytest_runtest_logfinish.modules = 0


@pytest.fixture(scope="session")
def once_a_run(tmp_path_factory):
    """`once_a_run(name, make)`: the folder that `make(folder)` fills, made by one worker of a run for all of them."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = shared / name, shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not whole.exists():
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_base(once_a_run):
    """Folder of a tiny Hugging Face llama with a ChatML template."""
    return once_a_run("tiny-base", write_tiny_base)


@pytest.fixture
def library(tmp_path_factory, monkeypatch):
    """A copy of the library whose code is hashed instead of the real one: to be edited."""
    import shutil

    from fine_tuning.common import project

    folder = tmp_path_factory.mktemp("library") / "fine_tuning"
    for source in (project.LIBRARY, project.LIBRARY.parent / "stages"):
        shutil.copytree(source, folder.with_name(source.name), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project.LIBRARY.parent / "dvc.yaml", folder.parent)
    monkeypatch.setattr(project, "LIBRARY", folder)
    return folder


@pytest.fixture(scope="session")
def trained_project(once_a_run, tiny_base):
    """A project whose real pipeline has run once on forty conversations: to be copied."""
    from tests.project import Project, conversations, new_project

    def make(folder: Path) -> None:
        project = new_project(folder, tiny_base)
        project.import_conversations(conversations(), "first")
        project.run("dvc", "repro")
        project.commit("First model")

    return Project(once_a_run("trained", make))


@pytest.fixture(scope="session")
def promotable(once_a_run, tiny_base):
    """A project whose pipeline has run, beside an MLflow store whose tables are made: both to be copied."""
    from mlflow import MlflowClient

    from tests.registered import write_project

    def make(folder: Path) -> None:
        write_project(folder, tiny_base)
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return once_a_run("promotable", make)


@pytest.fixture
def candidate(promotable, tmp_path, monkeypatch):
    """A copy of the project with a candidate that may be promoted; the current folder."""
    return _enter_copy(promotable, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def promoted_twice(promotable, once_a_run):
    """The project after two promotions."""
    import contextlib
    import shutil

    from tests.registered import here, repro, sh

    def make(folder: Path) -> None:
        shutil.copytree(promotable, folder, symlinks=True)
        with contextlib.chdir(folder):
            here("promote")
            sh(folder, "git add -A && git commit -qm 'Promote version 1'")
            repro(folder, seed=2)
            sh(folder, "git add -A && git commit -qm 'Train again'")
            here("promote")
            sh(folder, "git add -A && git commit -qm 'Promote version 2'")

    return once_a_run("promoted", make)


@pytest.fixture
def promoted(promoted_twice, tmp_path, monkeypatch):
    """A copy of the project with versions 1 and 2; the current folder."""
    return _enter_copy(promoted_twice, tmp_path, monkeypatch)


def _enter_copy(project, tmp_path, monkeypatch):
    import shutil

    from fine_tuning.common.protection import protect

    monkeypatch.setattr(sys, "executable", str(forked.folder() / "python"))
    folder = tmp_path / "project"
    shutil.copytree(project, folder, symlinks=True)
    protect(folder)
    monkeypatch.chdir(folder)
    for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Headless chromium."""
    from playwright.sync_api import sync_playwright

    from tests.browser import CHROMIUM

    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A phone-sized page that remembers every address it asked for."""
    from tests.browser import PHONE

    page = browser.new_page(viewport=PHONE)
    page.set_default_timeout(180_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()
