"""Forgetting after a promotion: it ends, and every version that stays can be pushed and promoted again, or is named."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fine_tuning.commands import forget as forgetting
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, read_jsonl, write_json
from fine_tuning.data_collection.storage.shards import describe_shard
from fine_tuning.erasure.records import Selection
from fine_tuning.integration.ollama_client import OllamaClient
from fine_tuning.model_management.model_registry import open_registry
from tests.fake_ollama import FakeOllama
from tests.registered import here, sh

pytestmark = pytest.mark.end_to_end

ID = "zoe-7"
SECRET = "Is Tom gay? Ann (his ex) says so! PIN 4921?"
SPLITS = '{"train": ["c1", "c2"], "validation": ["c3"], "test": ["c4"]}'
FROM_SHARDS = """
shards = sorted(pathlib.Path("data/conversations").glob("*.jsonl"))
chats = [json.loads(line) for shard in shards for line in open(shard)]
train = [chat["id"] for chat in chats if chat["id"] not in ("c3", "c4")]
seed += len(train) - 2
pathlib.Path("data/clean").mkdir(parents=True)
pathlib.Path("data/clean/first.jsonl").write_text("".join(json.dumps(chat) + "\\n" for chat in chats))
"""


@pytest.fixture(scope="module")
def promoted_with_it(promotable, tmp_path_factory) -> Path:
    """A project whose champion, version 1, learned from the conversation; everything is committed and pushed."""
    import contextlib

    folder = tmp_path_factory.mktemp("with-it") / "project"
    shutil.copytree(promotable, folder, symlinks=True)
    make = (folder / "make.py").read_text().replace(SPLITS, '{"train": train, "validation": ["c3"], "test": ["c4"]}')
    head, line, rest = make.partition('for name in ("adapter", "merged", "package"):')
    (folder / "make.py").write_text(head + FROM_SHARDS + line + rest)
    pipeline = (folder / "dvc.yaml").read_text()
    (folder / "dvc.yaml").write_text(pipeline.replace("data/prepared]", "data/prepared, data/clean]"))
    shard = folder / "data/conversations/first.jsonl"
    shard.chmod(0o644)
    messages = [
        {"id": "m1", "role": "user", "content": SECRET},
        {"id": "m2", "role": "assistant", "content": "I can't say."},
    ]
    with shard.open("a") as file:
        file.write(json.dumps({"id": ID, "messages": messages, "metadata": {"user_id": "zoe"}}) + "\n")
    write_json(folder / "data/manifest.json", {"shards": [describe_shard(shard)]})
    (folder / "data/forgotten.jsonl").touch()
    with contextlib.chdir(folder):
        for command in (
            f"dvc remote add -q -d store {folder.parent / 'remote'}",
            "dvc add -q data/conversations",
            "dvc repro -q",
            "git add -A && git commit -qm 'With it'",
        ):
            sh(folder, command)
        here("promote")
        sh(folder, "git add -A && git commit -qm 'Promote version 1'")
        sh(folder, "dvc push -q")
    return folder


@pytest.fixture
def project(promoted_with_it, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(promoted_with_it, folder, symlinks=True)
    shutil.copytree(promoted_with_it.parent / "remote", tmp_path / "remote")
    monkeypatch.chdir(folder)
    for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    sh(folder, f"dvc remote modify -q store url {tmp_path / 'remote'}")
    with closing(sqlite3.connect("mlflow.db")) as database:  # where the copy's artifacts are
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("model_versions", "source"),
            ("model_versions", "storage_location"),
        ):
            moved = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            database.execute(moved, (str(promoted_with_it), str(folder)))
        database.commit()
    return folder


def forget(**options) -> tuple[int, str]:
    said: list[str] = []
    status = forgetting.forget(forgetting.find(Selection(conversation=ID)), say=said.append, **options)
    return status, "\n".join(said)


def test_it_ends_and_the_champion_can_be_pushed_and_promoted_again(project):
    status, said = forget()
    assert status == 0, said
    assert [line["id"] for line in read_jsonl("models/champion/training.jsonl")] == ["c1", "c2"]
    sh(project, "git add -A && git commit -qm Forget")
    sh(project, "dvc push -q")
    here("promote", "1")
    assert read_json("models/champion.json")["version"] == 1


def test_a_version_that_was_champion_before_is_promoted_again_without_what_was_forgotten_and_that_is_said(project):
    shutil.rmtree("models/champion")  # as another champion would have replaced it
    Path("models/champion.dvc").unlink()
    write_json("models/champion.json", {"version": None})
    status, said = forget()
    assert status == 0, said
    assert "from now on models are promoted again as: trial:1 without training.jsonl" in said
    sh(project, "dvc push -q")
    here("promote", "1")
    assert Path("models/champion/package/model.gguf").is_file() and not Path("models/champion/training.jsonl").exists()


def test_without_ollama_models_are_withdrawn_and_the_server_is_asked_when_it_is_back(project):
    with FakeOllama() as server:
        client, gguf = OllamaClient(server.host), Path("learned.gguf")
        shutil.copy("models/package/model.gguf", gguf)
        client.upload_blob(gguf, sha256_file(gguf))
        client.create("trial:1", {"files": {"model.gguf": f"sha256:{sha256_file(gguf)}"}})
        status, said = forget()  # not withdrawn yet
        assert status == 0 and "trial:1, which learned from it and is marked: --withdraw" in said
        down = "http://127.0.0.1:9"
        status, said = forget(withdraw=True, hosts=[down])
        assert status == 1, said
        assert f"not done yet: start Ollama at {down}" in said.splitlines()[-1]
        assert sha256_file(gguf) not in [sha256_file(path) for path in Path(".dvc/cache").rglob("*") if path.is_file()]
        assert open_registry("trial").versions() == [] and read_json("models/champion.json") == {"version": None}
        sh(project, "dvc push -q")
        lines: list[str] = []
        assert forgetting.resume(hosts=[server.host], say=lines.append) == 0, lines
        assert client.digests() == {}


def test_going_on_takes_models_out_of_use_if_that_is_asked_for_then(project):
    Path("notes.txt").write_text(SECRET)
    status, said = forget()
    assert status == 1 and "STILL THERE: notes.txt" in said
    Path("notes.txt").unlink()
    lines: list[str] = []
    assert forgetting.resume(withdraw=True, say=lines.append) == 0, lines
    assert open_registry("trial").versions() == []
