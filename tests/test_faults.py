"""Faults, injected for real: processes are killed, disks are full, shards come and go; nothing acknowledged is lost.

Where each fault is tested:

| fault                                   | where                                                                     |
|-----------------------------------------|---------------------------------------------------------------------------|
| SIGKILL while logging                   | here                                                                      |
| SIGKILL while sealing                   | here at any write; test_seal_intake at its three steps                    |
| SIGKILL in intake, clean, export,       | here at any write                                                         |
| prepare, package                        |                                                                           |
| SIGKILL while training                  | here at any write of the stage; test_training (resumed: the same bytes)   |
| SIGKILL while registering and promoting | here at any write; test_promote at every effect                           |
| SIGKILL while deploying                 | here at any request                                                       |
| SIGKILL of the tree of `dvc repro`      | test_protection                                                           |
| full disk                               | here in each stage, seal, import, promote, in DVC's cache; test_logger    |
| torn last line                          | test_logger; here as what a kill leaves                                   |
| eight concurrent writers                | test_logger (threads and processes), test_seal_intake (with a seal)       |
| two pipeline runs at once               | here                                                                      |
| a shard that arrives or vanishes        | here during `dvc repro`; test_seal_intake                                 |
| a flipped byte in cache or remote, GGUF | test_verify, test_promote (what was compared is what is registered)       |
| a flipped byte in the adapter           | here (package), test_verify                                               |
| remote missing or unauthorised          | here; test_verify                                                         |
| registry locked                         | test_registry                                                             |
| clock going backwards                   | here, test_seal_intake                                                    |
| duplicate ids with other content        | here, test_logger, test_cleaner (the newest version wins)                 |
| Ollama down, hanging, 500, cut streams  | test_ollama_client, test_deployer (each at every step), test_app          |
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from fine_tuning.common.records import read_json, read_jsonl, write_jsonl
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.schema.chat_format import load_tokenizer
from tests.fake_ollama import FakeOllama
from tests.project import ROOT, Project, conversations, new_project, outputs
from tests.registered import environment, here, sh
from tests.strike import acknowledged_before_a_kill

pytestmark = pytest.mark.end_to_end

INBOX = Path("inbox/conversations.jsonl")
DATA = ("intake", "clean", "export", "prepare")
ALL = (*DATA, "train", "package", "evaluate", "compare")


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_base):
    """A checkout on the tiny base whose stages have run, each in this process."""
    import importlib

    folder = tmp_path_factory.mktemp("template") / "checkout"
    folder.mkdir()
    project = new_project(folder, tiny_base)
    project.set_params(clean={"processes": 1}, evaluate={"forgetting": False, "quantised_items": 2})
    project.set_params(train={"checkpoint_steps": 2})
    if not (folder / ".dvc").exists():
        project.run("dvc", "init", "-q")
    project.import_conversations(conversations(), "first")
    with contextlib.chdir(folder):
        for stage in ("base", *ALL):
            importlib.import_module(f"stages.{stage}").main()
    return folder


@pytest.fixture
def checkout(template, tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    shutil.copytree(template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def strike(mode: str, target: str, number: int, **more: str) -> tuple[int, int, str]:
    """(how often it was killed, status of the last child, what it wrote on standard error)."""
    done = subprocess.run(
        ["python", "-m", "tests.strike", mode, target, str(number)],
        env=environment(OMP_NUM_THREADS="1", **more), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return told["kills"], told["status"], done.stderr


def one_line(said: str) -> str:
    """The one error line among what progress bars and libraries write."""
    (line,) = (line for line in said.splitlines() if "error: " in line)
    assert "Traceback" not in said
    return line


# -----------------------------------------------------------------------------
# killed


def test_a_killed_logger_loses_nothing_that_it_acknowledged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    acknowledged, draw = [], random.Random(0)
    for _ in range(6):
        acknowledged += acknowledged_before_a_kill(draw.random() / 5)
    last = ConversationLogger(INBOX).log_conversation("after", "all")
    logged = [event["id"] for event in ConversationLogger(INBOX).read_events()]
    assert len(acknowledged) > 50
    assert set(acknowledged) <= set(logged) and logged[-1] == last
    assert len(logged) == len(set(logged)) <= len(acknowledged) + 7


STRIDES = {"intake": 1, "clean": 2, "export": 5, "prepare": 7, "train": 9, "package": 9}


@pytest.mark.parametrize(("stage", "stride"), STRIDES.items())
def test_a_stage_that_is_killed_at_any_write_ends_in_the_same_bytes(checkout, stage, stride):
    wanted = outputs(stage)
    if stage == "clean":
        shutil.rmtree(".whetstone/memo", ignore_errors=True)
    kills, status, _ = strike("kill", f"stages.{stage}:main", stride)
    assert kills >= 2 and status == 0
    assert outputs(stage) == wanted


def test_a_seal_that_is_killed_at_any_write_loses_nothing(checkout):
    logger = ConversationLogger(INBOX)
    known = {path.name for path in shard_paths("data/conversations")}
    for number in range(5):
        logger.log_conversation(f"q{number}", f"a{number}", id=f"e{number}")
    kills, status, _ = strike("kill", "tests.test_faults:type_seal", 3)
    assert kills > 3 and status == 0
    new = [path for path in shard_paths("data/conversations") if path.name not in known]
    assert sorted(record["id"] for path in new for record in read_jsonl(path)) == [f"e{n}" for n in range(5)]
    assert "up to date" in Project(checkout).run("dvc", "status", "data/conversations.dvc")


def test_an_import_that_is_killed_at_any_write_is_finished_by_the_next(checkout):
    questions = [f"What is number {number}?" for number in range(5)]
    write_jsonl("../more.jsonl", [{"prompt": question, "completion": "A number."} for question in questions])
    kills, status, _ = strike("kill", "tests.test_faults:type_import", 3)
    assert kills > 3 and status == 0
    asked = [record["messages"][0]["content"] for p in shard_paths("data/conversations") for record in read_jsonl(p)]
    assert [question for question in asked if question in questions] == questions
    assert "up to date" in Project(checkout).run("dvc", "status", "data/conversations.dvc")


def type_import() -> None:
    """`python -m fine_tuning import ../more.jsonl`, which first repairs what a kill tore."""
    from fine_tuning.commands.conversations import import_files
    from fine_tuning.common.protection import protect

    protect()
    import_files(SimpleNamespace(files=[Path("../more.jsonl")], model=None, follow=False))


def type_seal() -> None:
    """`python -m fine_tuning seal`."""
    from fine_tuning.commands.conversations import seal

    seal(None)


def test_a_promotion_that_is_killed_at_any_write_ends_in_one_version(candidate):
    kills, status, _ = strike("kill", "tests.registered:here:promote", 40)
    assert kills > 3 and status == 0
    assert read_json("models/champion.json")["version"] == 1
    from fine_tuning.model_management.model_registry import open_registry

    assert [version.number for version in open_registry("trial").versions()] == [1]
    assert sh(candidate, "dvc status -q models/champion.dvc") == ""


def test_a_deployment_that_is_killed_at_any_request_ends_live(promoted):
    tokenizer = load_tokenizer(promoted / "models/base")
    with FakeOllama(count_tokens=lambda prompt: len(tokenizer(prompt, add_special_tokens=False).input_ids)) as server:
        here("deploy", "1", "--host", server.host)
        before, kills = server.digest("trial:live"), 0
        server.requests.clear()
        for request in range(1, 40):
            script = KILLED_CLIENT.format(request=request, host=server.host)
            done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills += 1
            assert server.digest("trial:live") in (before, server.manifests.get("trial:2") and server.digest("trial:2"))
        assert kills > 5
        assert server.digest("trial:live") == server.digest("trial:2") != before
    assert read_json("models/champion.json")["version"] == 2


KILLED_CLIENT = """
import os, signal
import httpx
real, count = httpx.Client.send, 0
def send(self, *given, **options):
    global count
    count += 1
    if count == {request}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *given, **options)
httpx.Client.send = send
from tests.registered import here
here("deploy", "2", "--host", "{host}")
"""


# -----------------------------------------------------------------------------
# full disks


@pytest.mark.parametrize("stage", ALL)
def test_a_full_disk_is_one_line_and_space_mends_it(checkout, stage):
    wanted = outputs(stage)
    shutil.rmtree(".whetstone/memo", ignore_errors=True)
    _, status, said = strike("full", f"stages.{stage}:main", 150)
    assert status == 1
    assert "the disk is full" in one_line(said)
    _, status, said = strike("full", f"stages.{stage}:main", 1 << 40)
    assert status == 0, said
    assert outputs(stage) == wanted


def test_a_full_disk_costs_a_seal_nothing(checkout):
    logger = ConversationLogger(INBOX)
    for number in range(40):
        logger.log_conversation(f"q{number}", f"a{number}", id=f"e{number}")
    before = shard_paths("data/conversations")
    _, status, said = strike("full", "tests.test_faults:type_seal", 1000)
    assert status == 1 and "the disk is full" in one_line(said)
    assert shard_paths("data/conversations") == before
    type_seal()
    assert len(ShardIndex.read(shard_paths("data/conversations")).newest({f"e{n}" for n in range(40)})) == 40


def test_a_log_is_kept_until_the_cache_of_dvc_has_its_shard(checkout, tmp_path):
    """DVC logs a copy that failed and goes on, and the next `dvc add` takes the listing of the folder for all of it."""
    ConversationLogger(INBOX).log_conversation("question", "reply " * 50_000, id="large")
    script = "from tests.test_faults import seal_up_to_the_shard as seal; seal()"
    assert subprocess.run([sys.executable, "-c", script], env=environment()).returncode == -signal.SIGKILL
    (shard,) = Path("data/conversations").glob("*-chat-*")
    for _ in range(2):
        _, status, said = strike("full", "tests.test_faults:type_seal", 200_000)
        assert status == 1 and "the disk is full" in one_line(said)
        assert len(list(Path("inbox/closed").iterdir())) == 1
    type_seal()
    assert list(Path("inbox/closed").iterdir()) == []
    project = Project(checkout)
    project.run("dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    project.run("dvc", "push", "-q", "data/conversations.dvc")
    shutil.rmtree(".dvc/cache")
    shard.unlink()
    project.run("dvc", "pull", "-q", "data/conversations.dvc")
    assert [record["id"] for record in read_jsonl(shard)] == ["large"]


def seal_up_to_the_shard() -> None:
    """A seal that is killed when the shard is written and DVC does not know it."""
    from fine_tuning.commands import conversations

    conversations.track = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    type_seal()


def test_a_full_disk_promotes_nothing(candidate):
    _, status, said = strike("full", "tests.registered:here:promote", 3000)
    assert status == 1 and "the disk is full" in one_line(said)
    assert read_json("models/champion.json")["version"] is None
    here("promote")
    assert read_json("models/champion.json")["version"] == 1


# -----------------------------------------------------------------------------
# at the same time


def dvc(*words: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["dvc", *words], env=environment(PATH=path, PYTHONPATH=""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_two_pipeline_runs_at_once_end_in_the_bytes_of_one(checkout):
    wanted = outputs("clean")
    shutil.rmtree("data/clean")
    both = [dvc("repro", "-s", "intake", "clean", "export") for _ in range(2)]
    said = [run.communicate()[0] for run in both]
    assert 0 in [run.returncode for run in both], said
    for text in said:
        assert "Traceback" not in text
    assert outputs("clean") == wanted
    assert "up to date" in dvc("repro", "-s", "intake", "clean", "export").communicate()[0]


SLOW = """
import pathlib, time
pathlib.Path("running").touch()
while pathlib.Path("running").exists():
    time.sleep(0.02)
"""


def run_with_a_pause(stage: str, meanwhile) -> str:
    """`dvc repro` of the stages of data, with something done right before `stage` looks at anything."""
    script = Path(f"stages/{stage}.py")
    script.write_text(script.read_text().replace("def main() -> None:", f"{SLOW}\n\ndef main() -> None:"))
    run = dvc("repro", "-s", "intake", "clean", "export")
    while not Path("running").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    meanwhile()
    Path("running").unlink()
    return run.communicate()[0]


def arrive() -> None:
    shard = Path("data/conversations/20990101T000000000-import-late.jsonl")
    record = {"id": "late", "source": "import", "started_at": None, "feedback": [], "metadata": {}}
    messages = [("user", "Who comes late?"), ("assistant", "The one who was not there before.")]
    record["messages"] = [{"id": role, "role": role, "content": text} for role, text in messages]
    shard.write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize("stage", ["intake", "clean", "export"])
def test_a_shard_that_arrives_during_a_run_is_taken_in_by_this_or_the_next(checkout, stage):
    dvc("repro", "-s", "intake", "clean", "export").communicate()
    said = run_with_a_pause(stage, arrive)
    assert "Traceback" not in said
    shutil.copy(ROOT / f"stages/{stage}.py", "stages")
    dvc("repro", "-s", "intake", "clean", "export").communicate()
    dvc("repro", "-s", "intake", "clean", "export").communicate()
    assert any(record["id"] == "late" for p in Path("data/clean").glob("2099*") for record in read_jsonl(p))


@pytest.mark.parametrize("stage", ["intake", "clean"])
def test_a_shard_that_vanishes_during_a_run_is_one_line_and_comes_back(checkout, stage):
    wanted = outputs("clean")
    shutil.rmtree(".whetstone/memo", ignore_errors=True)
    (shard,) = shard_paths("data/conversations")
    said = run_with_a_pause(stage, shard.unlink)
    assert "Traceback" not in said
    assert "is gone" in one_line(said) and "dvc checkout data/conversations.dvc" in said
    shutil.copy(ROOT / f"stages/{stage}.py", "stages")
    Project(checkout).run("dvc", "checkout", "-q", "data/conversations.dvc")
    assert dvc("repro", "-s", "intake", "clean", "export").wait() == 0
    assert outputs("clean") == wanted


def test_names_that_are_given_at_once_are_all_kept(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from fine_tuning.integration.chat_history import read_titles, rename

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: rename(tmp_path, f"c{number}", f"name {number}"), range(200)))
    assert read_titles(tmp_path) == {f"c{number}": f"name {number}" for number in range(200)}


def test_of_files_that_are_written_at_once_each_is_whole(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from fine_tuning.common.records import write_json

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: write_json(tmp_path / "file.json", [number] * 50_000), range(40)))
    assert len(set(read_json(tmp_path / "file.json"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


# -----------------------------------------------------------------------------
# damage


@pytest.mark.parametrize("cut", [100, -1], ids=["lost its end", "lost its start"])
def test_a_damaged_adapter_is_one_line(checkout, cut, monkeypatch):
    from fine_tuning.common.errors import UserError
    from stages import package

    weights = Path("models/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-cut] if cut > 0 else weights.read_bytes()[8:])
    with pytest.raises(UserError, match="dvc repro") as told:
        package.main()
    assert "\n" not in str(told.value)


# -----------------------------------------------------------------------------
# remotes


@contextlib.contextmanager
def refusing_server(status: int):
    """A web server that answers everything with a status."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/store"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("remote", ["missing", "unauthorised", "forbidden", "down"])
def test_a_remote_that_is_not_there_or_refuses_costs_nothing_here(promoted, remote):
    with contextlib.ExitStack() as stack:
        url = str(promoted.parent / "nowhere")
        if remote in ("unauthorised", "forbidden"):
            url = stack.enter_context(refusing_server(401 if remote == "unauthorised" else 403))
        elif remote == "down":
            url = "http://127.0.0.1:9/store"
        sh(promoted, f"dvc remote add -q -d store {url}")
        done = subprocess.run(
            [sys.executable, "-c", VERIFY], cwd=promoted, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        told = "models/champion is not in the remote" if remote == "missing" else "the remote cannot be read"
        assert told in done.stdout, done.stdout
    assert sh(promoted, "dvc status -q models/champion.dvc") == ""


VERIFY = """
from fine_tuning.common.errors import run
from fine_tuning.commands import command_line
run(lambda: command_line.run(command_line.parse(["verify", "--host", "http://127.0.0.1:9"])))
"""


# -----------------------------------------------------------------------------
# clocks and names


def test_with_a_clock_that_goes_back_the_later_word_still_wins(checkout, monkeypatch):
    from fine_tuning.data_collection.storage import shards
    from fine_tuning.schema import conversation

    for year, text in ((2030, "first"), (2020, "second")):
        moment = shards.datetime(year, 1, 1, tzinfo=shards.UTC)
        clock = type("Clock", (shards.datetime,), {"now": classmethod(lambda cls, tz=None, at=moment: at)})
        monkeypatch.setattr(shards, "datetime", clock)
        monkeypatch.setattr(conversation, "datetime", clock)
        logger = ConversationLogger(INBOX)
        logger.log_conversation(f"question {text}", f"reply {text}", {"session_id": "s"}, id=text)
        logger.log_edit("first", f"better {text}")
        type_seal()
    newest = ShardIndex.read(shard_paths("data/conversations", "data/manifest.json")).newest({"s"})["s"]
    assert [m["content"] for m in newest["messages"]][::2] == ["question first", "question second"]
    assert newest["feedback"][0]["edited"] == "better second"


def test_an_id_that_is_given_twice_with_other_content_is_kept_apart(checkout, capsys):
    logger = ConversationLogger(INBOX)
    for reply in ("the first reply", "the first reply", "another reply"):
        logger.log_conversation("question", reply, id="same")
    type_seal()
    assert "1 unmatched" in capsys.readouterr().out
    newest = ShardIndex.read(shard_paths("data/conversations")).newest({"same"})["same"]
    assert [message["content"] for message in newest["messages"]] == ["question", "the first reply"]
    (aside,) = Path("inbox").glob("*.unmatched")
    assert [event["assistant_response"] for event in read_jsonl(aside)] == ["another reply"]
