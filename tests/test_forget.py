"""Forgetting: found everywhere, gone everywhere, at whatever moment the process dies, and it does not come back."""

import csv
import gzip
import json
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fine_tuning.commands import forget as forgetting
from fine_tuning.common.dvc_files import md5_folder
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import dump_line, read_json, read_jsonl, write_json, write_jsonl
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.importers import import_file
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import describe_shard, shard_paths, versions, write_shard
from fine_tuning.data_collection.storage.tombstones import Tombstones, content_hash, id_hash
from fine_tuning.data_preparation.splits import Ledger
from fine_tuning.erasure import object_stores
from fine_tuning.erasure import records as erased
from fine_tuning.erasure.records import Selection, clear_shards, collect, count_in_shard, deleted_ids
from fine_tuning.erasure.steps import STEPS
from fine_tuning.erasure.traces import ID, Traces, decoded
from fine_tuning.evaluation.review import seal_votes
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.schema.votes import Side, Vote, read_all_votes, read_votes, vote_lines, votes_file
from tests.fake_ollama import FakeOllama
from tests.forked import folder as forked_python
from tests.project import Project
from tests.registered import environment, sh

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parents[1]
CANARY = "My grandmother keeps a violet parrot named Quetzalina in the attic, what does it eat?"
ANSWER = "A violet parrot such as Quetzalina likes fresh pomegranate seeds and toasted buckwheat."
WORDS = (b"Quetzalina", b"violet parrot", b"pomegranate")


def conversation(identity: str, question: str, answer: str, **metadata: str) -> dict:
    messages = [
        {"id": f"{identity}-0", "role": "user", "content": question},
        {"id": f"{identity}-1", "role": "assistant", "content": answer},
    ]
    start = "2026-01-01T00:00:00.000Z"
    return {"id": identity, "source": "chat", "started_at": start, "messages": messages} | {
        "feedback": [],
        "metadata": metadata,
    }


def others() -> list[dict]:
    return [conversation(f"other-{n}", f"What does lamp number {n} cost?", f"It costs {n} euros.") for n in range(4)]


def canary() -> dict:
    return conversation("canary-conversation-of-zoe-0001", CANARY, ANSWER, user_id="zoe")


def judged() -> dict:
    """Another person's conversation, with a comment of the one who is forgotten."""
    comment = {"message_id": "other-0-1", "rating": -1, "comment": "The violet parrot would laugh at that", "by": "zoe"}
    return others()[0] | {"feedback": [comment]}


# -----------------------------------------------------------------------------
# a quick project: two stages that stand for the nine, and every place where a conversation can be

MAKE = (
    f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
"""
    + """
import gzip, json, pathlib, pyarrow, pyarrow.parquet, zstandard
from fine_tuning.data_preparation.splits import Ledger
shards = sorted(pathlib.Path("data/conversations").glob("*.jsonl"))
rows = list({json.loads(line)["id"]: json.loads(line) for shard in shards for line in shard.open()}.values())
lines = "".join(json.dumps(row) + "\\n" for row in rows)
for folder in ("clean", "exports", "prepared/train"):
    pathlib.Path("data", folder).mkdir(parents=True, exist_ok=True)
pathlib.Path("data/clean/all.jsonl").write_text(lines)
pathlib.Path("data/exports/all.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
pathlib.Path("data/exports/all.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
table = {"id": [row["id"] for row in rows], "messages": [json.dumps(row["messages"]) for row in rows]}
pyarrow.parquet.write_table(pyarrow.table(table), "data/prepared/train/all.parquet", compression="zstd")
Ledger("data/splits.txt", "whetstone").append((row["id"], "train") for row in rows)
"""
)
TRAIN = """
import hashlib, numpy, pathlib
from safetensors.numpy import save_file
digest = hashlib.sha256(pathlib.Path("data/prepared/train/all.parquet").read_bytes()).digest()
pathlib.Path("models/adapter").mkdir(parents=True)
save_file({"lora": numpy.frombuffer(digest, numpy.uint8)}, "models/adapter/adapter_model.safetensors")
"""
PIPELINE = """
stages:
  make:
    cmd: {python} make.py
    deps: [make.py, data/conversations]
    outs: [data/clean, data/exports, data/prepared, data/splits.txt: {{cache: false, persist: true}}]
  train:
    cmd: {python} train.py
    deps: [train.py, data/prepared/train]
    outs: [models/adapter]
"""
PARAMS = f"""
train: {{start_from: null}}
deploy: {{name: trial, host: "http://127.0.0.1:9", more_hosts: [], timeout: 5.0, stream_timeout: 60.0}}
prepare: {yaml.safe_dump(yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"], default_flow_style=True)}
"""
ADAPTER = Path("models/adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A project that learned from the canary after it had learned without it; a remote that holds both."""
    folder = tmp_path_factory.mktemp("planted") / "project"
    (folder / "data/conversations").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "make.py").write_text(MAKE)
    (folder / "train.py").write_text(TRAIN)
    (folder / "dvc.yaml").write_text(PIPELINE.format(python="python"))
    (folder / "params.yaml").write_text(PARAMS)
    write_json(folder / "models/champion.json", {"version": None})
    for name in (".gitignore", ".gitattributes"):
        shutil.copy(ROOT / name, folder)
    shards = folder / "data/conversations"
    first, _ = write_shard(shards, "20260101T000000000-import", others())
    for command in ("git init -q -b main", "git config user.email t@example.org", "git config user.name T"):
        sh(folder, command)
    for command in ("dvc init -q", f"dvc remote add -q -d store {folder.parent / 'remote'}"):
        sh(folder, command)
    step(folder, [first], "Without it")
    shutil.copy(folder / ADAPTER, folder.parent / "never-saw-it.safetensors")
    second, _ = write_shard(shards, "20260102T000000000-chat", [canary(), judged()])
    step(folder, [first, second], "With it")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        register(1, ["other-0", "other-1"], folder.parent / "never-saw-it.safetensors", "nothing")
    return folder


def step(folder: Path, shards: list[Path], message: str) -> None:
    """Track, reproduce, commit, push."""
    write_json(folder / "data/manifest.json", {"shards": [describe_shard(shard) for shard in shards]})
    for command in ("dvc add -q data/conversations", "dvc repro -q", "git add -A", f"git commit -qm '{message}'"):
        sh(folder, command)
    sh(folder, "dvc push -q")


@pytest.fixture
def project(planted, tmp_path, monkeypatch) -> Path:
    """A copy with a remote of its own, an inbox, notes of the app and a registry; the current folder."""
    for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.executable", str(forked_python() / "python"))
    folder = tmp_path / "project"
    shutil.copytree(planted.parent / "remote", tmp_path / "remote")
    shutil.copytree(planted, folder, symlinks=True)
    shutil.copy(planted.parent / "never-saw-it.safetensors", tmp_path)
    monkeypatch.chdir(folder)
    sh(folder, f"dvc remote modify -q store url {tmp_path / 'remote'}")
    sh(folder, "git commit -qam 'Another remote'")
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_conversation("Is the shop open?", "Yes, until six.", {"session_id": "kept"})
    log.log_conversation(f"Again: {CANARY}", ANSWER, {"session_id": canary()["id"], "user_id": "zoe"})
    log.log_feedback(f"{canary()['id']}-1", -1, comment="The violet parrot hates buckwheat, said grandmother")
    Path("inbox/old.jsonl.torn").write_text('{"event": "exchange", "user_message": "' + CANARY[:60] + "\n")
    write_json(".whetstone/titles.json", {canary()["id"]: "The violet parrot", "kept": "Shop"})
    write_json(".whetstone/tags.json", {canary()["id"]: ["parrot"], "kept": ["shop"]})
    write_json(".whetstone/chat_settings.json", {canary()["id"]: {"system_prompt": "Be a parrot."}, "default": {}})
    for name in ("0123/cleaned.jsonl", "merged-0123/kept/first.jsonl"):
        memo = Path(".whetstone/memo/clean") / name
        memo.parent.mkdir(parents=True)
        memo.write_text(json.dumps(canary()))
    return folder


def register(number: int, ids: list[str], adapter: Path, report: str) -> None:
    """A version of these conversations, with the artifacts that promoting one leaves, and champion."""
    registry = open_registry("trial")
    staged = Path(".whetstone/staged")
    (staged / "adapter").mkdir(parents=True)
    shutil.copy(adapter, staged / "adapter")
    write_json(staged / "provenance/conversations.json", {"train": ids, "validation": [], "test": []})
    (staged / "reports").mkdir()
    (staged / "reports/side_by_side.md").write_text(report)
    digest = sha256_file(adapter)
    tags = {"adapter_sha256": digest, "gguf_sha256": "0" * 64, "gguf_md5": "0" * 32}
    version, _ = registry.register(f"{number:064x}", staged, tags, {})
    old = registry.by_alias("champion")
    registry.promote(version.number, old.number if old else None)
    shutil.rmtree(staged)
    assert version.number == number


def places_with_words(*folders: Path, words: tuple[bytes, ...] = WORDS) -> list[str]:
    """Files that hold the words, by default the canary's, read by other means than the code that is tested."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and any(word in data for data in contents(path) for word in words):
                found.append(str(path.relative_to(folder)))
    return found


def contents(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        return [gzip.decompress(raw)]
    if raw[:4] == b"\x28\xb5\x2f\xfd":
        return [zstandard.ZstdDecompressor().decompressobj().decompress(raw)]
    if raw[:4] == b"PAR1":
        return [json.dumps(pyarrow.parquet.read_table(path).to_pylist(), default=str).encode()]
    if raw[:2] in (b"x\x01", b"x\x9c"):  # git's objects
        import zlib

        return [zlib.decompress(raw)]
    return [raw]


def forget_in_process(**selection: str) -> tuple[int, list[str]]:
    said: list[str] = []
    where = forgetting.find(Selection(**selection))
    return forgetting.forget(where, say=said.append), said


# -----------------------------------------------------------------------------
# the whole of it


def test_a_canary_is_named_everywhere_and_afterwards_found_nowhere(project, tmp_path):
    register(2, [canary()["id"], "other-0"], ADAPTER, f"| {CANARY} |")
    assert len(places_with_words(project, tmp_path / "remote")) >= 20
    where = forgetting.find(Selection(user="zoe"))
    text = "\n".join(forgetting.describe(where))
    for place in (
        "inbox/conversations.jsonl: 2 events",
        "inbox/old.jsonl.torn: 1 event",
        "20260102T000000000-chat",
        "data/clean",
        "data/exports: 2 files",
        "data/prepared",
        ".whetstone",
        "DVC's cache",
        "remote store",
        "model trial:2 (champion): learned from it",
        "MLflow's artifacts",
    ):
        assert place in text
    assert CANARY not in text and where.learned["versions"] == [2]

    ids = [canary()["id"], "other-1"]
    assert [key for key, _ in Ledger("data/splits.txt", "whetstone").find(ids)] == ids
    said: list[str] = []
    assert forgetting.forget(where, say=said.append) == 0, said
    assert [key for key, _ in Ledger("data/splits.txt", "whetstone").find(ids)] == ["other-1"]
    assert places_with_words(project, tmp_path / "remote") == []
    assert sha256_file(ADAPTER) == sha256_file(tmp_path / "never-saw-it.safetensors")
    assert "  nothing of it is left there" in said
    (judged_by_zoe,) = collect(Selection(conversation="other-0"), shard_paths("data/conversations")[1:], []).versions
    assert judged_by_zoe["feedback"] == []
    assert not any(word.decode() in line for word in WORDS for line in said)
    assert "model trial:2, which learned from it and is marked: --withdraw takes it out of use" in "\n".join(said)
    assert open_registry("trial").version(2).tags["forgotten"].startswith("1 conversation")
    assert open_registry("trial").by_alias("champion").number == 2
    logged = ConversationLogger("inbox/conversations.jsonl").read_conversations()
    assert [c["id"] for c in logged] == ["kept"] and read_json(".whetstone/titles.json") == {"kept": "Shop"}
    assert read_json(".whetstone/chat_settings.json") == {"default": {}}
    assert read_json(".whetstone/tags.json") == {"kept": ["shop"]}
    assert not list(Path(".whetstone").glob("forget*.json"))


def cast(name: str, conversation: str, by: str) -> Vote:
    """A vote on a reply to a conversation."""
    left, right = (Side(model=digit * 64, reply=digit * 64) for digit in "ab")
    about = {"conversation_id": conversation, "item": conversation, "prompt": "c" * 64}
    return Vote(id=name, at=f"2026-01-01T00:00:0{name}.000Z", by=by, **about, left=left, right=right, choice="left")


def test_votes_on_a_conversation_go_with_it_and_a_persons_votes_with_the_person(project, tmp_path):
    votes = [cast("0", canary()["id"], "ann"), cast("1", "other-0", "ann"), cast("2", "other-0", "zoe")]
    Path("inbox/votes.jsonl").write_bytes(vote_lines(votes))
    assert seal_votes() == 3 and not Path("inbox/votes.jsonl").exists()
    for command in ("git add -A", "git commit -qm Votes", "dvc push -q"):
        sh(project, command)
    Path("inbox/votes.jsonl").write_bytes(vote_lines([cast("3", canary()["id"], "bob"), cast("4", "other-1", "bob")]))
    where = forgetting.find(Selection(user="zoe"))
    said = "\n".join(forgetting.describe(where))
    assert "inbox/votes.jsonl: 1 event" in said and said.count("1 vote -> taken out") == 2
    told: list[str] = []
    assert forgetting.forget(where, say=told.append) == 0, told
    assert places_with_words(project, tmp_path / "remote", words=(canary()["id"].encode(),)) == []
    assert [vote.id for vote in read_all_votes(Path("data/votes"))] == ["1"]
    assert [path.name for path in Path("data/votes").glob("*.dvc")] == [f"{votes_file('ann')}.dvc"]
    assert [vote.id for vote in read_votes(Path("inbox/votes.jsonl"))] == ["4"]
    assert "Data and pipelines are up to date" in sh(project, "dvc status")


SECRET = "Is Tom gay? Ann (his ex) says so! PIN 4921?"


def test_a_short_chat_with_a_short_id_leaves_no_object_behind(project, tmp_path):
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_conversation(SECRET, "No.", {"session_id": "zoe-7"})
    fine_tuning(project, "seal")
    step(project, sorted(Path("data/conversations").glob("*.jsonl")), "With the secret")
    words = (b"PIN 4921", b"zoe-7")
    assert len(places_with_words(project, tmp_path / "remote", words=words)) > 10
    done = run(project, "zoe-7", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert places_with_words(project, tmp_path / "remote", words=words) == []
    assert "could not be searched for: 1 short message within other texts" in done.stdout
    assert "nothing that can be searched for is left there" in done.stdout
    sh(project, "dvc push -q")


def test_a_damaged_file_is_not_called_searched(project):
    Path("data/exports/old.json.gz").write_bytes(gzip.compress(SECRET.encode())[:-9])
    (artifact,) = Path("mlartifacts").rglob("conversations.json")
    shutil.copy("data/exports/old.json.gz", artifact.with_name("old.json.gz"))
    status, said = forget_in_process(session="kept")
    assert status == 0, said
    unread = [line for line in said if line.startswith("  could not be searched for: ")]
    assert any("data/exports/old.json.gz" in line for line in unread)
    assert any("MLflow: " in line and "old.json.gz" in line for line in unread)
    assert "  nothing of it is left there" not in said


def test_a_chat_that_was_never_sealed_trains_nothing(project, tmp_path):
    stock = "I am sorry, but as a language model I cannot help anybody with that question today."
    Path("params.yaml").write_text(PARAMS.replace("start_from: null", "start_from: null, seed: 2"))
    sh(project, "sed -i 's/params: .*//; s/deps: .train.py,/params: [train.seed]\\n    &/' dvc.yaml")
    write_jsonl("data/evaluation/prompts.jsonl", [{"reply": stock}])
    ConversationLogger("inbox/conversations.jsonl").log_conversation(SECRET, stock, {"session_id": "zoe-7"})
    adapter = sha256_file(ADAPTER)
    status, said = forget_in_process(conversation="zoe-7")
    assert status == 0, said
    assert sha256_file(ADAPTER) == adapter and Path("data/evaluation/prompts.jsonl").exists()
    assert "pipeline: not run, it has never read it" in said


def test_words_that_cleaning_made_of_others_do_not_run_the_pipeline_for_a_chat_that_was_never_sealed(project):
    with open("data/clean/all.jsonl", "a") as clean:  # a shard has "Hello ", which cleaning trims
        clean.write(json.dumps({"id": "other-9", "messages": [{"content": "Hello"}]}) + "\n")
    ConversationLogger("inbox/conversations.jsonl").log_conversation("Hello", "Hi.", {"session_id": "zoe-8"})
    status, said = forget_in_process(conversation="zoe-8")
    assert status == 0 and "pipeline: not run, it has never read it" in said, said
    assert "other-9" in Path("data/clean/all.jsonl").read_text()


def test_all_that_was_deleted_in_the_app_is_erased_with_one_announced_run(project):
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_conversation(SECRET, "Never mind.", {"session_id": "zoe-9"})
    log.log_delete("zoe-9")
    kept = {"other-0", "other-1", "other-2", "other-3", canary()["id"]}
    announced = run(project, "--deleted").stdout
    assert announced.startswith("1 conversation, ") and "then: no stage has to run" in announced
    log.log_delete(canary()["id"])
    assert deleted_ids(shard_paths("data/conversations"), [log.path]) == {"zoe-9", canary()["id"]}
    announced = run(project, "--deleted").stdout
    assert announced.startswith("2 conversations, ") and "then: `dvc repro`, intake, clean" in announced
    done = run(project, "--deleted", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {v["id"] for v in versions(shard_paths("data/conversations"))} == kept - {canary()["id"]}
    assert "nothing that was deleted is left here" in run(project, "--deleted").stderr


def test_what_the_gateway_recorded_is_forgotten_when_its_time_is_over(project):
    log, old = ConversationLogger("inbox/conversations.jsonl"), "2020-01-01T00:00:00.000Z"
    for name, source, at in (("g-old", "gateway", old), ("g-new", "gateway", None), ("a-old", "chat", old)):
        log.log_conversation(f"{SECRET} {name}", "Never mind.", {"session_id": name, "source": source}, timestamp=at)
    log.log_conversation("Are you there?", "Yes.", {"session_id": "g-on", "source": "gateway"}, timestamp=old)
    log.log_conversation("Still?", "Yes.", {"session_id": "g-on", "source": "gateway"})
    gateway = yaml.safe_load((ROOT / "params.yaml").read_text())["gateway"]
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params + yaml.safe_dump({"gateway": gateway}))
    assert "gateway.retention_days is null" in run(project, "--expired", "--yes").stderr
    Path("params.yaml").write_text(params + yaml.safe_dump({"gateway": gateway | {"retention_days": 90}}))
    done = run(project, "--expired", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    left = {conversation["id"] for conversation in log.read_conversations()}
    assert {"g-new", "a-old", "g-on"} <= left and "g-old" not in left
    again = run(project, "--expired", "--yes")
    assert again.returncode == 0 and "nothing that the gateway recorded is older than 90 days" in again.stdout


def test_leftovers_of_killed_commands_are_found_and_removed(project, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left = [
        Path("data/.20260103T000000000-import.4711.tmp"),
        Path("inbox/.conversations.jsonl.4711.tmp"),
        Path("models/.champion.new/training.jsonl"),
        tmp_path / "tmp/promote-abcd1234/provenance/conversations.json",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": canary()["id"], "messages": [{"content": CANARY}]}))
    assert forget_in_process(user="zoe")[0] == 0
    assert [path for path in left if path.exists() and path.read_bytes()] == []


def test_a_thumb_that_comes_late_is_neither_sealed_nor_left(project):
    assert forget_in_process(user="zoe")[0] == 0
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_feedback(f"{canary()['id']}-1", -1, comment="Quetzalina is hungry")
    assert "1 event" in "\n".join(forgetting.describe(forgetting.find(Selection(conversation=canary()["id"]))))
    fine_tuning(project, "seal")
    assert places_with_words(project) == []


def test_an_erasure_that_cannot_finish_keeps_no_other_one(project):
    Path("notes.txt").write_text(CANARY)
    assert forget_in_process(user="zoe")[0] == 1
    assert forget_in_process(conversation="kept")[0] == 0
    assert len(list(Path(".whetstone").glob("forget*.json"))) == 1


def test_a_line_with_a_byte_order_mark_is_found(tmp_path):
    shard = tmp_path / "1-import-0123456789ab.jsonl"
    shard.write_bytes(b"\xef\xbb\xbf" + json.dumps(canary()).encode() + b"\n")
    found = collect(Selection(conversation=canary()["id"]), [shard], [])
    assert found.ids == {canary()["id"]} and clear_shards(tmp_path, tmp_path / "manifest.json", found) == 1


def test_the_commits_before_keep_what_does_not_hold_it(project):
    before = sh(project, "git rev-parse HEAD~2").strip()
    assert forget_in_process(user="zoe")[0] == 0
    sh(project, "git stash -qu")
    sh(project, f"git checkout -q {before}")
    sh(project, "dvc checkout -q")
    assert len(list(Path("data/conversations").iterdir())) == 1


def test_killed_at_every_step_it_goes_on_and_ends_in_the_same_state(project, tmp_path):
    for name, _ in STEPS:
        words = ("--resume",) if name != STEPS[0][0] else ("--user", "zoe", "--yes")
        done = run(project, *words, killed_after=name)
        assert done.returncode == -signal.SIGKILL, done.stderr
        (journal,) = Path(".whetstone").glob("forget*.json")
        assert not any(word in journal.read_bytes() for word in (*WORDS, CANARY.encode()))
    refused = run(project, "--user", "zoe")
    assert "no conversation" in refused.stderr and "forget --resume" in refused.stderr and refused.returncode == 1
    done = run(project, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert places_with_words(project, tmp_path / "remote") == []
    assert sha256_file(ADAPTER) == sha256_file(tmp_path / "never-saw-it.safetensors")


def run(folder: Path, *words: str, killed_after: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, which dies when a step is over and the journal does not know it yet."""
    program = f"""
import os, signal, sys
from fine_tuning.erasure import steps as forget_steps
from fine_tuning.common.errors import run
from fine_tuning.__main__ import main
def dying(step):
    def do(work):
        step(work)
        os.kill(os.getpid(), signal.SIGKILL)
    return do
steps = [(name, dying(step) if name == {killed_after!r} else step) for name, step in forget_steps.STEPS]
forget_steps.STEPS = tuple(steps)
sys.argv = ["fine_tuning", "forget", *{words!r}]
run(main)
"""
    return subprocess.run(
        ["python", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )


def test_on_request_models_that_learned_from_it_leave_aliases_registry_and_ollama(project):
    register(2, [canary()["id"]], ADAPTER, "nothing")
    write_json("models/champion.json", {"version": 2, "adapter_sha256": sha256_file(ADAPTER)})
    gguf = Path(".whetstone/model.gguf")
    gguf.write_bytes(b"GGUF" + bytes(64))
    from fine_tuning.integration.ollama_client import OllamaClient

    with FakeOllama() as server:
        client = OllamaClient(server.host)
        client.upload_blob(gguf, sha256_file(gguf))
        for name in ("trial:2", "trial:live", "other:1"):
            client.create(name, {"files": {"model.gguf": f"sha256:{sha256_file(gguf)}"}, "system": name[:5]})
        where = forgetting.find(Selection(user="zoe"))
        assert forgetting.forget(where, withdraw=True, hosts=[server.host], say=lambda line: None) == 0
        assert set(client.digests()) == {"other:1"}
    registry = open_registry("trial")
    assert [version.number for version in registry.versions()] == [1]
    assert registry.by_alias("champion") is None and registry.by_alias("previous").number == 1
    assert read_json("models/champion.json") == {"version": None}


# -----------------------------------------------------------------------------
# it does not come back


def test_a_tombstone_keeps_it_from_being_imported_and_sealed_again(project, tmp_path):
    assert forget_in_process(user="zoe")[0] == 0
    file = tmp_path / "again.jsonl"
    file.write_text(json.dumps({"messages": [{k: m[k] for k in ("role", "content")} for m in canary()["messages"]]}))
    shown = fine_tuning(project, "import", str(file))
    assert "0 taken" in shown and "1 left out (forgotten: data/forgotten.jsonl)" in shown
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_conversation(CANARY, ANSWER, {"session_id": canary()["id"]})
    assert "1 conversation left out: forgotten" in fine_tuning(project, "seal")
    assert places_with_words(project) == []
    assert b"zoe" not in Path("data/forgotten.jsonl").read_bytes()


def test_without_the_key_tombstones_are_neither_guessed_nor_passed_over(project, tmp_path):
    log = ConversationLogger("inbox/conversations.jsonl")
    log.log_conversation("PIN 4921", "Noted.", {"session_id": "zoe-7"})
    assert forget_in_process(conversation="zoe-7")[0] == 0
    stones = Path("data/forgotten.jsonl").read_text()
    said = {
        "id": "zoe-7",
        "messages": [{"role": r, "content": c} for r, c in (("user", "PIN 4921"), ("assistant", "Noted."))],
    }
    assert content_hash(said) not in stones and id_hash("zoe-7") not in stones
    assert Tombstones("data/forgotten.jsonl").cover(said | {"id": "another"})
    sh(project, "git add -A && git commit -qm Forget && dvc push -q")
    sh(project.parent, f"git clone -q {project} clone")
    clone = project.parent / "clone"
    file = tmp_path / "again.jsonl"
    write_jsonl(file, [said])
    for words in (("import", str(file)), ("seal",)):
        command = ["python", "-m", "fine_tuning", *words]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=environment())
        assert done.returncode == 1 and "cannot be checked" in done.stderr and "dvc pull" in done.stderr
    sh(clone, "dvc pull -q data/conversations")
    assert "1 left out (forgotten" in fine_tuning(clone, "import", str(file))


@pytest.mark.parametrize("before", ["", "dvc repro -q data/conversations.dvc", "dvc pull -q"])
def test_another_clone_forgets_it_as_well_whether_or_not_it_has_the_new_shards(project, tmp_path, before):
    clone = tmp_path / "clone"
    sh(tmp_path, f"git clone -q {project} clone")
    sh(clone, "git config user.email t@example.org && git config user.name T && dvc pull -q")
    shutil.copytree(".whetstone/memo", clone / ".whetstone/memo")
    assert forget_in_process(conversation=canary()["id"])[0] == 0
    sh(project, "git add -A && git commit -qm Forget && dvc push -q")
    sh(clone, f"git pull -q\n{before}")
    done = run(clone, "--again", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert places_with_words(clone, words=(b"Quetzalina", b"pomegranate")) == [], done.stdout
    sh(clone, "dvc pull -q")
    assert sh(clone, "dvc status -q data/conversations.dvc") == ""


def test_a_clone_that_has_lost_the_old_shards_keeps_nothing_that_was_memoised_of_them(project, tmp_path):
    clone = tmp_path / "clone"
    sh(tmp_path, f"git clone -q {project} clone")
    shutil.copytree(".whetstone/memo", clone / ".whetstone/memo")
    assert forget_in_process(conversation=canary()["id"])[0] == 0
    sh(project, "git add -A && git commit -qm Forget && dvc push -q")
    sh(clone, "git pull -q && dvc pull -q")
    assert places_with_words(clone, words=(b"Quetzalina", b"pomegranate"))
    done = run(clone, "--again", "--yes")
    assert done.returncode == 1 and "is left here" in done.stderr
    assert places_with_words(clone, words=(b"Quetzalina", b"pomegranate")) == []


def test_forget_again_does_not_take_conversations_of_another_branch_with_it(project):
    assert forget_in_process(conversation=canary()["id"])[0] == 0
    sh(project, "git add -A && git commit -qm Forget && git checkout -qb more")
    shards = sorted(Path("data/conversations").glob("*.jsonl"))
    new, _ = write_shard(
        "data/conversations", "20260104T000000000-chat", [canary(), conversation("only here", "A", "B")]
    )
    step(project, [*shards, new], "More")
    sh(project, "git checkout -q main && dvc checkout -q")
    with pytest.raises(UserError, match=r"another branch .* check it out"):
        forgetting.find(Selection(tombstones=Tombstones("data/forgotten.jsonl")))
    sh(project, "git checkout -q more && dvc checkout -q")
    assert new.is_file()


def test_tombstones_of_an_earlier_version_hold_and_are_keyed_by_the_next_erasure(project, tmp_path):
    old = conversation("zoe-7", "PIN 4921", "Noted.")
    write_jsonl("data/forgotten.jsonl", [{"id": id_hash("zoe-7"), "contents": [content_hash(old)], "at": "2026-01-01"}])
    assert Tombstones("data/forgotten.jsonl").cover(old | {"id": "another"})
    status, said = forget_in_process(conversation="kept")
    assert status == 0
    assert "data/forgotten.jsonl: 1 line of an earlier version now keyed; git's history keeps the unkeyed ones" in said
    stones = Path("data/forgotten.jsonl").read_text()
    assert content_hash(old) not in stones and id_hash("zoe-7") not in stones and '"at":"2026-01-01"' in stones
    write_jsonl(tmp_path / "again.jsonl", [old, old | {"id": "another"}])
    assert "2 left out (forgotten" in fine_tuning(project, "import", str(tmp_path / "again.jsonl"))


def test_a_user_of_open_webui_is_found_by_name(tmp_path):
    nodes = {"a": {"id": "a", "parentId": None, "role": "user", "content": "Hello there"}}
    nodes["b"] = {"id": "b", "parentId": "a", "role": "assistant", "content": "Hello!"}
    chat = {"id": "c1", "user_id": "zoe", "chat": {"history": {"messages": nodes, "currentId": "b"}}}
    openai = {"user": "zoe", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}
    write_jsonl(tmp_path / "chats.jsonl", [chat, openai])
    taken = [item.conversation for item in import_file(tmp_path / "chats.jsonl")]
    shard, _ = write_shard(tmp_path, "1-import", [*taken, *others()])
    assert collect(Selection(user="zoe"), [shard], []).ids == {conversation["id"] for conversation in taken}
    assert len(taken) == 2


def test_what_another_clone_brings_back_is_refused_and_forgotten_again(project):
    ShardIndex.read(shard_paths("data/conversations"), Path(".whetstone/memo/intake"))
    assert forget_in_process(user="zoe")[0] == 0
    assert not Path(".whetstone/memo/intake").exists()  # it has hashes of ids
    write_shard("data/conversations", "20260103T000000000-chat", [canary()])
    index = ShardIndex.read(shard_paths("data/conversations"), tombstones=Tombstones("data/forgotten.jsonl"))
    assert any(shard.forgotten for shard in index.shards.values())  # what intake refuses
    status, said = forget_in_process(tombstones=Tombstones("data/forgotten.jsonl"))
    assert status == 0, said
    assert places_with_words(project) == []


def fine_tuning(folder: Path, *words: str) -> str:
    command = ["python", "-m", "fine_tuning", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


# -----------------------------------------------------------------------------
# refusals, and what is not ours


def test_nothing_is_changed_without_a_yes(project):
    done = run(project, "--user", "zoe")
    assert (
        done.returncode == 1 and done.stderr.startswith("error: nothing was changed") and "remote store" in done.stdout
    )
    assert not Path("data/forgotten.jsonl").exists() and len(places_with_words(project)) > 10


def test_an_unknown_name_is_one_line(project):
    with pytest.raises(UserError, match="no conversation here"):
        forgetting.find(Selection(conversation="nobody"))


def test_the_champion_keeps_its_weights_and_loses_the_records_that_hold_it(project, tmp_path):
    champion = Path("models/champion")
    write_jsonl(champion / "training.jsonl", [{"id": canary()["id"]}, {"id": "other-0"}])
    write_jsonl(champion / "evaluation/data/evaluation/items.jsonl", [{"references": ANSWER}])
    (champion / "package").mkdir()
    (champion / "package/model.gguf").write_bytes(b"weights")
    sh(project, "dvc add -q models/champion && git add -A && git commit -qm Promote && dvc push -q")
    status, said = forget_in_process(user="zoe")
    assert status == 0, said
    assert places_with_words(project, tmp_path / "remote") == []
    assert sorted(path.name for path in champion.rglob("*") if path.is_file()) == ["model.gguf", "training.jsonl"]
    assert list(read_jsonl(champion / "training.jsonl")) == [{"id": "other-0"}]
    assert sh(project, "dvc status -q models/champion.dvc") == ""


def test_words_in_git_and_in_files_of_the_user_are_named_and_not_called_forgotten(project):
    Path("notes").mkdir()
    Path("notes/chat.txt").write_text(CANARY)
    sh(project, "git add notes && git commit -qm 'A mistake'")
    status, said = forget_in_process(user="zoe")
    text = "\n".join(said)
    assert status == 1 and "STILL THERE: notes/chat.txt" in text and "STILL THERE: git: notes/chat.txt" in text
    Path("notes/chat.txt").unlink()
    for command in (
        "git reset -q HEAD~1",
        "git reflog expire --expire=now --all",
        "git gc -q --prune=now",
    ):
        sh(project, command)
    said.clear()
    assert forgetting.resume(say=said.append) == 0, said


def test_a_remote_that_is_down_is_named_and_looked_into_when_it_is_back(project, tmp_path):
    sh(project, "dvc remote add -q s3 s3://nowhere/data")
    sh(project, "dvc remote modify -q s3 endpointurl http://127.0.0.1:9")
    status, said = forget_in_process(user="zoe")
    assert status == 1 and any(line.startswith("  remote s3: ") for line in said)
    sh(project, "dvc remote remove -q s3")
    assert forgetting.resume(say=said.append) == 0


def test_a_run_that_goes_on_from_a_model_that_learned_is_refused(project):
    Path("params.yaml").write_text(PARAMS.replace("start_from: null", f"start_from: {sha256_file(ADAPTER)[:12]}"))
    with pytest.raises(UserError, match=r"train\.start_from"):
        forgetting.find(Selection(user="zoe"))


# -----------------------------------------------------------------------------
# parts


def test_what_one_shard_taught_is_told_from_what_the_others_did():
    def folder(**files):
        listed = {name.replace("__", "/") + ".x": md5 for name, md5 in files.items()}
        return md5_folder(listed), listed

    shards = folder(a="A"), folder(a="A", b="B")
    clean = folder(a="clean-a"), folder(a="clean-a", b="clean-b")
    prepared = folder(train__a="a", test__a="t"), folder(train__a="a", train__b="b", test__a="t")
    train = folder(a="a"), folder(a="a", b="b")
    listings = {md5: files for md5, files in (*shards, *clean, *prepared)}
    records = []
    for number in range(2):
        chain = [shards[number][0], clean[number][0], prepared[number][0]]
        records += [{"deps": [{"md5": read}], "outs": [{"path": "o", "md5": made}]} for read, made in pairwise(chain)]
        read = {"path": "data/prepared/train", "md5": train[number][0]}
        records.append({"deps": [read], "outs": [{"path": "models/adapter", "md5": f"adapter-{number}"}]})
    made = object_stores.made_from(records, listings, {"B"})
    assert made == {"B", clean[1][0], "clean-b", prepared[1][0], "b", train[1][0]}
    assert object_stores.learned_models(records, listings, made, {}, set())[0] == {"adapter-1"}


def test_what_would_be_the_same_without_a_shard_was_not_made_from_it():
    """An empty file, say: stages that read it, in any commit, read nothing of the shard."""

    def record(reads: str, makes: str, path: str = "data/clean") -> dict:
        return {
            "deps": [{"md5": md5} for md5 in reads.split()],
            "outs": [{"md5": m, "path": path} for m in makes.split()],
        }

    without, told = record("A", "clean-a same"), record("B", "clean-b same")
    trained = (
        record("clean-a same", "adapter-a", "models/adapter"),
        record("clean-b same", "adapter-b", "models/adapter"),
    )
    evaluated = record("same adapter-a", "report-a"), record("same adapter-b", "report-b")
    records = [without, told, *trained, *evaluated]
    for these in (records, records[::-1]):
        assert object_stores.made_from(these, {}, {"B"}) == {"B", "clean-b", "report-b"}  # weights: see learned_models
    assert "report-a" in object_stores.made_from(records[1:], {}, {"B"})  # who knows what is in `same`
    assert object_stores.made_from(records, {}, set()) == set()


def test_traces_find_words_in_every_container_and_nothing_else(tmp_path):
    traces = Traces.of([CANARY])
    assert not any(word in json.dumps(traces.known).encode() for word in WORDS)
    plain = json.dumps(canary()).encode()
    files = {
        "json": plain,
        "gz": gzip.compress(plain),
        "zst": zstandard.compress(plain),
        "csv": b"a," + CANARY.encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[CANARY]]}), tmp_path / "parquet", compression="zstd")
    with sqlite3.connect(tmp_path / "sqlite") as database:
        database.execute("CREATE TABLE t (words TEXT)")
        database.execute("INSERT INTO t VALUES (?)", (CANARY,))
    for name in (*files, "parquet", "sqlite"):
        assert traces.in_file(tmp_path / name), name
    (tmp_path / "long").write_bytes(b"x" * (1 << 16) + plain)
    assert traces.in_file(tmp_path / "long")
    assert not traces.in_bytes(json.dumps(others()).encode())
    assert Traces.of(["Öffnungszeiten der städtischen Bücherei"]).in_bytes(
        json.dumps("Die Öffnungszeiten der städtischen Bücherei").encode()
    )


SCRIPTS = (
    "Is Tom gay?",
    "PIN 4921",
    "Öffnungszeiten",
    "你好，世界",
    "Привет, как дела",
    "שלום",
    "🙂🙃",
    "?!",
    "a\nb",
    '"q"',
    "C:\\new\\u0041 \\\\n",
)


@given(st.lists(st.sampled_from(SCRIPTS) | st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_text_of_any_length_and_script_is_found_in_every_record(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("planted")
    text = " ".join(texts)
    assume(text.strip())
    record = {"id": "x", "messages": [{"role": "user", "content": text}]}
    plain, pretty = json.dumps(record), json.dumps(record, ensure_ascii=False, indent=1)
    line = json.dumps({"id": "other", "messages": []}) + "\n" + json.dumps(record, ensure_ascii=False) + "\n"
    kept = {"json": plain, "pretty": pretty, "jsonl": line, "bom": "\ufeff" + line}
    kept["in JSON"] = json.dumps({"id": "other", "content": plain})
    kept["in JSON in JSON"] = json.dumps([kept["in JSON"]], ensure_ascii=False)
    for name, data in kept.items():
        (folder / name).write_text(data, encoding="utf-8", newline="")
    (folder / "gz").write_bytes(gzip.compress(line.encode()))
    (folder / "zst").write_bytes(zstandard.compress(b"\n") + zstandard.compress(line.encode()))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "user_message"], ["x", text]])
    table = pyarrow.table({"id": ["x"], "messages": [json.dumps(record["messages"])]})
    pyarrow.parquet.write_table(table, folder / "parquet", compression="zstd")
    with closing(sqlite3.connect(folder / "sqlite")) as database:
        database.execute("CREATE TABLE t (content TEXT)")
        database.execute("INSERT INTO t VALUES (?)", (text,))
        database.commit()
    traces, other = Traces.of([text], b"key"), Traces.of([f"{text} and more"], b"key")
    for path in sorted(folder.iterdir()):
        assert traces.in_file(path), path.name
        assert len(text.encode()) >= 24 or not other.in_file(path), path.name


ODD = (*SCRIPTS, "\\", '"', "/", "u0041", "\\ud83d", "\r\n", "\x00", "e\u0301", "{", "[", "a", "n", " ", "word of it")
odd_texts = st.lists(st.sampled_from(ODD) | st.text(max_size=20), min_size=1, max_size=8).map("".join)


def as_parquet(data, text):
    words = pyarrow.array([None, text, data])
    columns = {
        "messages": words,
        "long": words.cast(pyarrow.large_string()),
        "codes": words.dictionary_encode(),
        "lists": pyarrow.array([None, [text, None], [data]]),
        "structs": pyarrow.array([{"content": data}, None, {"content": text}]),
        "id": words,
    }
    return lambda file, name: pyarrow.parquet.write_table(pyarrow.table({name: columns[name]}), file)


@given(
    texts=st.lists(odd_texts, min_size=1, max_size=3),
    around=st.tuples(odd_texts, odd_texts) | st.just(("", "")),
    levels=st.lists(st.booleans(), max_size=10),
    column=st.sampled_from(["messages", "long", "codes", "lists", "structs", "id"]),
)
@settings(max_examples=150, deadline=None)
def test_what_the_careful_search_finds_is_never_passed_over(tmp_path_factory, texts, around, levels, column):
    """The scan of bytes before it may let too much through and nothing too little."""
    folder = tmp_path_factory.mktemp("scan")
    replaced = lambda text: text.encode("utf-8", "replace").decode()  # noqa: E731, a lone surrogate is not UTF-8
    traces = Traces.of(texts, b"key") | Traces.of(["g0017", replaced(texts[0])[:9]], b"key", ID)
    text = replaced(around[0] + texts[-1] + around[1])
    data = text
    for ascii_only in levels:
        data = json.dumps(
            {"id": data, "content": data} if len(data) < 500 else {"content": data}, ensure_ascii=ascii_only
        )
    line = json.dumps({"id": "other", "content": data}, ensure_ascii=bool(levels) and levels[0])
    (folder / "raw").write_bytes(data.encode())
    (folder / "json").write_bytes(b"\xef\xbb\xbf" + line.encode())
    (folder / "jsonl").write_bytes(b'{"id": "x"}\n' * 100 + line.encode() + b"\n")
    (folder / "gz").write_bytes(gzip.compress(line.encode()))
    (folder / "zst").write_bytes(zstandard.compress(b"{}\n") + zstandard.compress(line.encode()))
    (folder / "binary").write_bytes(b"\xff\x00\xfe" + line.encode() + b"\xff")
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, escapechar="\\").writerows([["conversation_id", "content"], [text, data]])
    as_parquet(data, text)(folder / "parquet", column)
    careful = Traces(traces.known, traces.key)
    for path in sorted(folder.iterdir()):
        assert traces.in_file(path) == careful.in_file(path), path.name
    lines = [b'{"id": "x"}'] * 70 + [line.encode()]
    some = list(traces.lines_that_may_hold(lines))
    assert traces.all_in(decoded(some)) == careful.all_in(decoded(lines))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_what_stands_before_the_damage_of_a_packed_file_is_found(tmp_path, pack):
    random = np.random.default_rng(0)
    after = "".join(json.dumps({"id": "x", "n": random.random(100).tolist()}) + "\n" for _ in range(100))
    data = pack((json.dumps(canary()) + "\n" + after).encode())
    (tmp_path / "cut").write_bytes(data[:-20_000])
    (tmp_path / "more").write_bytes(data + b"\x1f\x8bno container")
    for name in ("cut", "more"):
        assert Traces.of([CANARY]).in_file(tmp_path / name), name


def test_a_table_that_is_not_utf_8_is_found_as_it_is_decoded(tmp_path):
    (tmp_path / "table.csv").write_bytes("id,content\n1,Müller\n".encode("latin-1"))
    assert Traces.of(["M\ufffdller"]).in_file(tmp_path / "table.csv")


@pytest.mark.parametrize("size", [15, 24, 80])
def test_one_of_many_is_found_wherever_it_stands(tmp_path, size):
    """The scan compares a needle where a word of it is."""
    random = np.random.default_rng(size)
    texts = ["".join(random.choice([*"abcdefghijklmnop"], size)) for _ in range(300)]
    traces = Traces.of(texts, b"key")
    for shift, text in enumerate(texts[:20]):
        (tmp_path / "found").write_text(json.dumps({"padding": "q" * shift, "content": text}))
        (tmp_path / "not").write_text(json.dumps({"padding": "q" * shift, "content": text[:12]}))
        assert traces.in_file(tmp_path / "found") and not traces._may_be_in(tmp_path / "not"), shift


def test_ids_are_found_whatever_their_length_and_their_neighbours_are_not(tmp_path):
    names = Traces.of(["7", "zoe-7"], b"key", ID)
    held = [{"id": "7"}, {"id": 7}, {"message_id": "zoe-7"}, {"cluster": "zoe-7#2"}, {"train": ["a", "zoe-7"]}]
    others = [{"id": "zoe-70"}, {"steps": "7"}, {"n": 7}, {"7": 1}, {"id": "77"}, {"content": "zoe-7 and 7"}]
    for record in [*held, *others]:
        (tmp_path / "record").write_text(json.dumps(record))
        assert names.in_file(tmp_path / "record") == (record in held), record


def test_what_others_say_too_is_no_trace(tmp_path):
    shard, _ = write_shard(tmp_path, "s", [canary(), conversation("b", CANARY, "Something else entirely, of course")])
    found = collect(Selection(conversation=canary()["id"]), [shard], [])
    assert not found.people.in_bytes(CANARY.encode()) and found.models.in_bytes(ANSWER.encode())


def test_a_shard_is_written_anew_in_its_place_and_a_crash_in_between_changes_nothing(tmp_path, monkeypatch):
    folder, manifest = tmp_path / "shards", tmp_path / "manifest.json"
    first, _ = write_shard(folder, "1-chat", [canary(), *others()])
    second, _ = write_shard(folder, "2-chat", others())
    write_json(manifest, {"shards": [describe_shard(first), describe_shard(second)]})
    found = collect(Selection(user="zoe"), [first, second], [])
    with monkeypatch.context() as crash:
        crash.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clear_shards(folder, manifest, found)
    clear_shards(folder, manifest, found)
    names = [entry["name"] for entry in read_json(manifest)["shards"]]
    assert names == [path.name for path in shard_paths(folder, manifest)] and names[1] == second.name
    assert names[0].startswith("1-chat-") and len(names) == 2
    assert (folder / names[0]).read_bytes() == second.read_bytes()
    assert read_json(manifest)["shards"][0] == describe_shard(folder / names[0])


named = st.sampled_from(["x", "zoe-1", "a b", "caf\u00e9", "s", "\ud800"])
records = st.builds(
    lambda identity, branch, by, content, key: {
        **{key: identity, "messages": [{"role": "user", "content": content}]},
        **{"feedback": [{"by": by, "comment": content}], "metadata": {"branch_of": branch}},
    },
    *(named, named, named, named, st.sampled_from(["id", "name"])),
)
exchanges = st.builds(
    lambda identity, text: {"id": identity, "user_message": text, "assistant_response": text}, named, named
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(records, exchanges), st.booleans()), max_size=6), named, st.booleans())
def test_the_quick_test_of_a_line_passes_over_none_that_names_a_conversation(lines, asked, by_user):
    selection = Selection(user=asked) if by_user else Selection(conversation=asked)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        shard = Path(name) / "1-chat.jsonl"
        written = (json.dumps(record).encode() + b"\n" if escaped else dump_line(record) for record, escaped in lines)
        shard.write_bytes(b"".join(written))
        found = collect(selection, [shard], [])
        quick = found.ids, found.versions, found.names.known, found.people.known, count_in_shard(shard, found)
        patch.setattr(erased, "_may_name", lambda ids: lambda line: True)
        found = collect(selection, [shard], [])
        assert quick == (
            *(found.ids, found.versions, found.names.known, found.people.known, count_in_shard(shard, found)),
        )


def test_a_content_is_searched_once_and_again_when_it_changes(tmp_path, monkeypatch):
    traces, known, read = Traces.of([CANARY, ANSWER]), {}, []
    plain, copy, table = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.csv"
    for path in (plain, copy, table):
        path.write_text("conversation_id,text\n1,nothing\n")
    search = Traces.in_file
    monkeypatch.setattr(Traces, "in_file", lambda traces, path: read.append(path) or search(traces, path))
    assert [object_stores.kind_of(path, traces, traces, known) for path in (plain, copy, table, plain)] == [""] * 4
    assert read == [plain, table]
    copy.write_text(CANARY)
    assert object_stores.kind_of(copy, traces, traces, known) == "strict"
    assert object_stores.kind_of(plain, traces, traces, known) == ""


# -----------------------------------------------------------------------------
# the real pipeline


def test_after_forgetting_the_real_pipeline_trains_the_bytes_of_one_that_never_saw_it(trained_project, tmp_path):
    project: Project = trained_project.copy(tmp_path / "project")
    quick = {"generation": {"items": 2, "max_tokens": 8, "slots": 1}, "quantised_items": 0, "forgetting": False}
    project.set_params(evaluate=quick | {"test_prompts": ["Who are you?"]})
    messages = [{"role": m["role"], "content": m["content"]} for m in canary()["messages"]]
    trained_on = "ce" * 12  # an id whose hash deals it to the train split
    project.import_conversations([{"id": trained_on, "messages": messages, "metadata": {"user_id": "zoe"}}], "canary")
    project.run("dvc", "repro")
    project.commit("With it")
    adapter = Path("models/adapter/adapter_model.safetensors")
    assert sha256_file(project.folder / adapter) != sha256_file(trained_project.folder / adapter)
    assert len(places_with_words(project.folder)) > 20
    shutil.rmtree(project.folder / ".dvc/cache/runs")  # or DVC takes the adapter from there, and nothing is trained
    shown = project.run("python", "-m", "fine_tuning", "forget", "--user", "zoe", "--yes", forked=False)
    assert "nothing of it is left there" in shown and "Running stage 'train'" in shown
    assert places_with_words(project.folder) == []
    assert sha256_file(project.folder / adapter) == sha256_file(trained_project.folder / adapter)
    assert "up to date" in project.run("dvc", "repro")
