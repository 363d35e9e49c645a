"""Rounds that need nobody: when one begins, what it does with the candidate, how it fails, and its service."""

import json
import os
import plistlib
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from fine_tuning.commands import rounds
from fine_tuning.common.records import read_json, write_json, write_jsonl
from fine_tuning.common.settings import parse_settings
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import write_shard
from fine_tuning.integration import canary as canary_module
from fine_tuning.integration import round_policy
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.conversation_index import counts
from fine_tuning.integration.ollama_client import OllamaClient
from fine_tuning.integration.round_policy import ROUNDS, RoundsSettings, waits_for
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.schema.chat_format import load_tokenizer
from tests.fake_ollama import FakeOllama
from tests.forked import INTERPRETER
from tests.registered import environment, sh, type_command
from tests.test_round import change_params, results, say

pytestmark = pytest.mark.end_to_end

USUAL = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())["rounds"]


def settings(**values: object) -> RoundsSettings:
    return parse_settings("rounds", USUAL | values, RoundsSettings, "params.yaml")


@pytest.fixture
def project(candidate) -> Path:
    """A project with a candidate whose verdict is PROMOTE, that rounds may follow at any hour."""
    change_params(candidate, intake={"sample": False}, rounds={"hours": "0-0"})
    (candidate / "data/clean").mkdir()
    (candidate / "data/clean/rejected.jsonl").touch()  # what is sealed was cleaned
    return candidate


def test_it_says_what_the_next_round_waits_for(project, monkeypatch):
    idle = settings(hours=None, min_conversations=2, min_pairs=2)
    monkeypatch.setattr(round_policy, "BUSY_LOAD", 1e9)
    assert waits_for(project, idle) == ["0 of 2 new conversations, 0 of 2 edited or preferred replies"]
    logger = ConversationLogger(project / "inbox/conversations.jsonl")
    reply = logger.log_conversation("How do I restart my lamp?", "Press the button.")
    assert waits_for(project, idle)[0].startswith("1 of 2 new conversations")
    assert waits_for(project, idle)[1] == "somebody chats: nothing may be said for about 10 min"
    logger.log_edit(reply, "Pull the plug.")
    logger.log_preference(reply, ["another"])
    os.utime(project / "inbox/conversations.jsonl", (0, time.time() - 700))
    assert waits_for(project, idle) == []
    monkeypatch.setattr(round_policy, "BUSY_LOAD", -1.0)
    assert "the machine is busy" in waits_for(project, idle)[0]
    assert waits_for(project, idle.model_copy(update={"hours": "0-0"})) == [], "the hours are inside"
    with FileLock(project / ".whetstone/round.lock"):
        assert waits_for(project, idle) == ["another round is running"]
    Canary(project).begin("trial", 2, 1, 0.5)
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "# mine\n")
    assert waits_for(project, settings(hours="0-0", min_pairs=2)) == [
        "1 file changed and not committed (params.yaml)", "the canary of trial:2 runs",
    ]  # fmt: skip


def test_a_round_that_was_killed_goes_on_without_anything_new(project, monkeypatch):
    monkeypatch.chdir(project)
    say(project)
    usual = (project / "measure.py").read_text()
    (project / "measure.py").write_text("import time\nopen('.whetstone/measuring', 'w').close()\ntime.sleep(600)\n")
    sh(project, "git commit -qam 'A stage that takes long'")
    round_ = subprocess.Popen([INTERPRETER, "-c", RUN, "round"], env=environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not (project / ".whetstone/measuring").exists():
        assert round_.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(round_.pid).children(recursive=True)
    os.killpg(round_.pid, signal.SIGKILL)
    assert round_.wait(60) == -signal.SIGKILL
    psutil.wait_procs(started, 60)
    (project / "data/clean/rejected.jsonl").touch()  # as after the stage `clean`: what was sealed is no longer new
    assert waits_for(project, settings(hours="0-0")) == []
    (project / "measure.py").write_text(usual)
    sh(project, "git commit -qm Mended measure.py")
    assert type_command(project, "round").returncode == 0
    assert waits_for(project, settings(hours="0-0"))[0].startswith("0 of 20 new")


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [("22-6", (22, 23, 0, 5), (6, 12, 21)), ("9-17", (9, 16), (8, 17)), (None, (), (3,))],
)
def test_hours_may_go_over_midnight(hours, inside, outside):
    assert all(round_policy._within(hours, hour) for hour in inside)
    assert not any(round_policy._within(hours, hour) for hour in outside)


def test_what_is_new_is_counted_from_the_logs_and_from_the_shards_that_were_not_cleaned(tmp_path):
    shards, log = tmp_path / "data/conversations", ConversationLogger(tmp_path / "inbox/conversations.jsonl")
    messages = [{"id": "q", "role": "user", "content": "Why?"}, {"id": "a", "role": "assistant", "content": "So."}]
    talks = [{"id": f"c{number}", "messages": messages, "feedback": [], "metadata": {}} for number in range(6)]
    cleaned, _ = write_shard(shards, "20260101T000000000-import", talks[:3])
    write_json(tmp_path / "data/manifest.json", {"shards": [{"name": cleaned.name}]})
    write_jsonl(tmp_path / "data/clean/rejected.jsonl", [])
    assert round_policy._new(tmp_path) == 0
    write_shard(shards, "20260102T000000000-import", [*talks[2:5], talks[5] | {"messages": [], "deleted": True}])
    said = log.log_conversation("New?", "Yes.", {"session_id": "s1"})
    log.log_conversation("Newer?", "Yes.", {"session_id": "s1"})
    log.log_feedback(said, 1)
    log.log_edit(said, "No.", conversation_id="c0")
    log.log_delete("c3")
    assert round_policy._new(tmp_path) == len({"c2", "c4", "s1", "c0"}) == sum(counts(tmp_path)[1:])


def test_a_failure_is_tried_again_after_a_pause_that_doubles_and_no_clock_makes_it_endless(tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(round_policy.time, "time", lambda: now[0])
    pauses = []
    for _ in range(9):
        round_policy.note_failure(tmp_path, "the disk is full")
        pauses.append(round_policy.pause_left(tmp_path))
    assert pauses[:3] == [900.0, 1800.0, 3600.0] and pauses[-1] == round_policy.LONGEST_PAUSE
    assert read_json(tmp_path / ROUNDS) == {"failures": 9, "at": 1e9, "why": "the disk is full"}
    now[0] -= 3e8
    assert round_policy.pause_left(tmp_path) == 0.0, "the clock was set back"
    now[0] += 3e8 + round_policy.LONGEST_PAUSE
    assert round_policy.pause_left(tmp_path) == 0.0


def test_a_round_that_fails_or_takes_too_long_is_undone_and_told(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "measure.py").write_text("import time\nopen('measuring', 'w').close()\ntime.sleep(600)\n")
    change_params(project, train={"seed": 5})
    say(project)
    before = results(project)
    told = settings(hours="0-0", min_conversations=1, notify="echo >> heard")
    told = told.model_copy(update={"max_minutes": 0.4})
    monkeypatch.setattr(rounds, "own_command", lambda *words: [INTERPRETER, "-c", RUN, *words])
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script that ends with `&`
    try:
        (why,) = rounds.step(project, told)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert why == "it failed: it took longer than rounds.max_minutes (0.4): results are as they were"
    assert results(project) == before
    assert "took longer" in (project / "heard").read_text()
    (waits,) = [line for line in rounds.step(project, told) if "failed" in line]
    assert waits.startswith("the last round failed (it took longer") and waits.endswith(
        "the next try is in about 15 min"
    )


RUN = "from tests.registered import run_words; run_words()"


@pytest.fixture
def ollama(project, tiny_base, monkeypatch):
    """A server that deploy.host names; the current folder is the project."""
    tokenizer = load_tokenizer(tiny_base)
    with FakeOllama(count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)) as server:
        change_params(project, deploy={"host": server.host})
        monkeypatch.chdir(project)
        for name in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        yield server


def test_auto_promotes_and_deploys_and_canary_waits_until_it_did_no_harm(project, ollama, monkeypatch):
    change_params(project, rounds={"promote": "canary"})
    say(project)
    first = type_command(project, "round")
    assert first.returncode == 0, first.stderr
    assert ollama.digest("trial:live") == ollama.digest("trial:1"), "nothing was live: there is nothing to compare with"
    assert read_json(project / "models/champion.json")["version"] == 1
    assert sh(project, "git log -1 --format=%s").strip() == "Promote version 1"
    assert sh(project, "git status --porcelain") == ""

    change_params(project, train={"seed": 5})
    second = type_command(project, "round")
    assert second.returncode == 0, second.stderr
    here = Canary(project)
    assert (here.state().candidate, here.state().live, here.state().share) == (2, 1, 0.5)
    assert ollama.digest("trial:live") == ollama.digest("trial:1") and ollama.digest("trial:2")
    assert read_json(project / "models/champion.json")["version"] == 1
    now = settings(promote="canary")
    assert "the canary of trial:2 runs" in rounds.step(project, now)

    for number in range(40):
        here.candidate_for(f"c{number}", f"c{number}", new=True)
    monkeypatch.setattr(canary_module, "SIGNAL_SECONDS", -1.0)
    monkeypatch.setattr(canary_module, "ENOUGH", 5)
    rounds.step(project, now)
    assert here.state().outcome == canary_module.FINISHED
    assert ollama.digest("trial:live") == ollama.digest("trial:2")
    assert read_json(project / "models/champion.json")["version"] == 2
    assert sh(project, "git log -1 --format=%s").strip() == "Promote version 2"
    tags = open_registry("trial").version(2).tags
    assert sum(name.startswith("canary.") for name in tags) == 2


def test_a_round_first_does_what_a_canary_that_has_ended_leads_to_and_waits_for_one_that_runs(
    project, ollama, monkeypatch
):
    change_params(project, rounds={"promote": "canary"})
    assert type_command(project, "round").returncode == 0
    change_params(project, train={"seed": 5})
    assert type_command(project, "round").returncode == 0
    change_params(project, train={"seed": 6})
    refused = type_command(project, "round")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: the canary of trial:2 runs: wait for its end, or `python -m fine_tuning canary --stop`\n"
    )
    here = Canary(project)
    for number in range(40):
        here.candidate_for(f"c{number}", f"c{number}", new=True)
    monkeypatch.setattr(canary_module, "SIGNAL_SECONDS", -1.0)
    monkeypatch.setattr(canary_module, "ENOUGH", 5)
    here.check()
    done = type_command(project, "round")
    assert done.returncode == 0, done.stderr
    assert sh(project, "git log --format=%s").splitlines()[:3] == [
        "Round: PROMOTE",
        "Promote version 2",
        "Other parameters",
    ]
    assert (here.state().candidate, here.state().live, here.state().outcome) == (3, 2, None)


def test_a_candidate_that_has_to_be_judged_again_holds_up_no_round(project, monkeypatch):
    monkeypatch.chdir(project)
    change_params(project, rounds={"promote": "auto", "min_conversations": 1})
    say(project)
    assert "no Ollama answers" in type_command(project, "round").stderr
    tried = settings(promote="auto", min_conversations=20, hours="0-0")
    assert "it failed: no Ollama answers" in rounds.step(project, tried)[0]
    change_params(project, trial={"verdict": "HOLD"})
    monkeypatch.setattr(round_policy, "FIRST_PAUSE", 0.0)
    assert rounds.step(project, tried)[0].startswith("0 of 20 new conversations")


def test_a_candidate_that_did_harm_is_not_tried_again(project, ollama):
    change_params(project, rounds={"promote": "auto"})
    assert type_command(project, "round").returncode == 0
    assert ollama.digest("trial:live") == ollama.digest("trial:1")
    change_params(project, train={"seed": 5}, rounds={"promote": "canary"})
    assert type_command(project, "round").returncode == 0
    Canary(project).stop("by hand")
    done = type_command(project, "round")
    assert done.returncode == 0, done.stderr
    assert Canary(project).state().outcome == canary_module.STOPPED
    assert read_json(project / "models/champion.json")["version"] == 1


def test_watching_runs_what_is_due_once_and_ends_when_asked(project):
    (project / "data/clean/rejected.jsonl").unlink()  # what is sealed stays new: no reason for a round after a round
    change_params(project, rounds={"min_conversations": 1, "commit": False})
    say(project)
    program = (
        "from fine_tuning.commands import rounds\nrounds.LOOK_SECONDS = 0.5\n"
        f"rounds.own_command = lambda *words: {[INTERPRETER, '-c', RUN]!r} + [*words]\n{RUN}"
    )
    output = open(project / "said", "w+")  # noqa: SIM115
    watcher = subprocess.Popen([INTERPRETER, "-c", program, "rounds", "--watch"], cwd=project, env=environment(),
                               stdout=output, stderr=output, start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "waits: 0 of 1 new conversations" not in (said := (project / "said").read_text()):
            assert watcher.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.4)
        assert "another `rounds --watch` runs" in type_command(project, "rounds", "--watch").stderr
        assert said.count("a round begins") == 1 and "Verdict: PROMOTE, not committed" in said
        assert "the next round waits:\n0 of 1 new" in type_command(project, "rounds").stdout
        assert not sh(project, "git log --format=%s").startswith("Round:")
    finally:
        watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(30) == 130
    output.close()


def test_what_is_followed_is_imported_once_an_hour_and_by_each_round(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    source = tmp_path / "chats.jsonl"

    def chats(count: int) -> None:
        lines = [{"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "It."}]}
                 for n in range(count)]  # fmt: skip
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    chats(2)
    following = settings(hours="0-0", follow=[str(source)])
    assert "2 of 20 new conversations" in rounds.step(project, following)[0]
    chats(3)
    assert "2 of 20 new conversations" in rounds.step(project, following)[0], "an hour has not passed"
    os.utime(project / "inbox/followed.json", (0, 0))
    assert "3 of 20 new conversations" in rounds.step(project, following)[0]
    chats(4)
    change_params(project, rounds={"follow": [str(source)]})
    done = type_command(project, "round")
    assert done.returncode == 0, done.stderr
    assert "4 conversations" in sh(project, "git log -1 --format=%B")
    os.utime(project / "inbox/followed.json", (0, 0))
    gone = following.model_copy(update={"follow": [str(tmp_path / "gone")], "min_conversations": 1})
    assert f"{tmp_path / 'gone'} of rounds.follow is missing: correct its path" in waits_for(project, gone)
    (why,) = rounds.step(project, gone)
    assert "not a file" in why
    assert "not a file" in round_policy.last_failure(project)


def test_what_holds_a_gpus_memory_is_unloaded_and_named(tiny_base):
    with FakeOllama() as server, OllamaClient(server.host) as client:
        server.manifests = {"a:latest": {}, "b:latest": {}}
        server.on_gpu = {"a:latest": 4 << 30, "b:latest": 0}
        assert client.unload_from_gpu() == ["a:latest"]
        assert server.on_gpu == {"b:latest": 0}, "what is in main memory is in nobody's way"


def test_the_service_is_one_that_systemd_takes(project, tmp_path, monkeypatch):
    odd = tmp_path / 'a "b" 100% $HOME'
    shutil.copytree(project, odd, symlinks=True)
    done = type_command(odd, "rounds", "--install", XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert done.returncode == 0, done.stderr
    (unit,) = (tmp_path / "config/systemd/user").iterdir()
    assert str(unit) in done.stdout and "systemctl --user" in done.stdout
    assert shutil.which("systemd-analyze") is None or verified(unit) == ""
    command = ["/usr/bin/env", "A=1", "x y"]
    plist = plistlib.loads(rounds.launchd_unit("whetstone", command, odd, "/bin").encode())
    assert plist["ProgramArguments"] == command and plist["WorkingDirectory"] == str(odd)


def verified(unit: Path) -> str:
    done = subprocess.run(["systemd-analyze", "verify", "--user", str(unit)], capture_output=True, text=True)
    return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if unit.name in line)
