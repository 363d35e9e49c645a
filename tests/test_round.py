"""One command from what was said to a commit with a verdict, and back: real git, DVC and inbox."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from fine_tuning.common.records import read_json, write_json
from fine_tuning.common.stage_times import FAILED
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.integration import round_policy
from tests import registered
from tests.forked import INTERPRETER
from tests.registered import environment, sh, type_command

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def project(candidate) -> Path:
    """A project with a candidate whose verdict is PROMOTE, all of it committed, without the sample."""
    change_params(candidate, intake={"sample": False})
    return candidate


def change_params(folder: Path, **changes: dict) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params))
    sh(folder, "git commit -qam 'Other parameters'")


def say(folder: Path, text: str = "How do I restart my lamp?") -> None:
    ConversationLogger(folder / "inbox/conversations.jsonl").log_conversation(text, "Press the button.")


def results(folder: Path) -> dict[str, bytes]:
    """Everything that a round may change, but for conversations."""
    files = [folder / "dvc.lock", *folder.glob("metrics/**/*"), *folder.glob("models/**/*"), *folder.glob("data/**/*")]
    files = [file for file in files if file.is_file() and "conversations" not in str(file.relative_to(folder))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def refused(folder: Path, *words: str) -> str:
    """The one line that says why a round is refused; nothing changed, nothing was sealed."""
    before, head = results(folder), sh(folder, "git rev-parse HEAD")
    done = type_command(folder, "round", *words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert (results(folder), sh(folder, "git rev-parse HEAD")) == (before, head)
    return done.stderr


def test_a_round_seals_trains_judges_and_commits_with_the_verdict(project):
    say(project)
    done = type_command(project, "round")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Verdict: PROMOTE, committed as ")
    message = sh(project, "git log -1 --format=%B")
    assert message.startswith("Round: PROMOTE\n") and message.rstrip().endswith("Verdict: PROMOTE")
    assert f"- {read_json(project / 'metrics/comparison.json')['reasons'][0]}" in message
    assert "lamp" not in message
    assert "data/conversations.dvc" in sh(project, "git show --name-only --format=")
    assert sh(project, "git status --porcelain") == "" and sh(project, "dvc status -q") == ""
    assert not (project / ".whetstone/round").exists()
    (look,) = (project / "data/looks.jsonl").read_text().splitlines()
    assert read_json(project / "metrics/comparison.json")["adapter_sha256"] in look
    assert "as before: nothing is new" in type_command(project, "round").stdout


def test_a_round_leaves_a_checkout_alone_that_somebody_works_in(project):
    say(project)
    (project / "make.py").write_text((project / "make.py").read_text() + "# mine\n")
    assert "1 file changed and not committed (the first is make.py)" in refused(project)
    sh(project, "git add make.py")
    assert "make.py" in refused(project), "what is staged is somebody's own as well"
    sh(project, "git reset -q --hard")
    (project / "stages").mkdir()
    (project / "stages/mine.py").touch()
    assert "stages/mine.py" in refused(project), "code that git does not have"
    (project / "stages/mine.py").unlink()
    (project / "notes.txt").write_text("Milk")
    assert type_command(project, "round").returncode == 0, "a note is no code"
    assert "notes.txt" in sh(project, "git status --porcelain")


def test_a_round_is_refused_while_something_else_runs_or_without_an_author(project):
    say(project)
    (project / ".whetstone").mkdir(exist_ok=True)
    with FileLock(project / ".whetstone/round.lock"):
        assert "another round is running" in refused(project)
    with FileLock(project / ".dvc/tmp/lock"):
        assert "a pipeline run is using the conversations" in refused(project)
    for name in ("user.name", "user.email"):
        sh(project, f"git config {name} ''")
    assert "git knows no author" in refused(project)
    assert (project / "inbox/conversations.jsonl").is_file()


def test_a_round_that_fails_leaves_everything_as_it_was_and_keeps_what_was_said(project):
    (project / "measure.py").write_text("raise SystemExit('the disk is full')\n")
    change_params(project, train={"seed": 5})
    say(project)
    before = results(project)
    done = type_command(project, "round")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the round failed in `dvc repro`: its output says why; results and models are as they were"
    )
    assert results(project) == before
    assert not (project / ".whetstone/round").exists()
    assert round_policy.last_failure(project).startswith("the last round failed (the round failed in `dvc repro`")
    shards = sorted((project / "data/conversations").glob("*-chat-*.jsonl"))
    assert len(shards) == 1 and "lamp" in shards[0].read_text()
    sh(project, "git checkout -q HEAD~1 -- measure.py && git commit -qm Mended measure.py")
    assert type_command(project, "round").returncode == 0, "the next one goes on"
    assert round_policy.last_failure(project) is None
    assert "data/conversations.dvc" in sh(project, "git log --name-only --format= -2"), "with what was sealed"
    assert sh(project, "git status --porcelain") == ""


def test_the_reason_is_the_one_of_the_stage_that_failed(project):
    measure = (
        "import sys\nsys.argv[0] = 'evaluate.py'\nsys.path.insert(0, 'ROOT')\n"
        "from fine_tuning.common.errors import UserError\nfrom fine_tuning.common.stage_times import run_stage\n"
        "def main():\n    raise UserError('no conversation is left: add some')\nrun_stage(main)\n"
    )
    (project / "measure.py").write_text(measure.replace("ROOT", str(registered.ROOT)))
    sh(project, "git commit -qam 'Fails'")
    error = type_command(project, "round").stderr.splitlines()[-1]
    assert error.startswith("error: the round failed in the stage evaluate: no conversation is left: add some; ")
    assert read_json(project / FAILED)["stage"] == "evaluate"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_round_that_is_ended_is_undone_at_once_or_by_going_back(project, sign):
    (project / "measure.py").write_text("import time\nopen('measuring', 'w').close()\ntime.sleep(600)\n")
    change_params(project, train={"seed": 5})
    before = results(project)
    program = "from tests.registered import run_words; run_words()"
    round_ = subprocess.Popen([INTERPRETER, "-c", program, "round"], cwd=project, env=environment(),
                              start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (project / "measuring").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert results(project) != before, "the adapter is another one already"
    if sign == signal.SIGTERM:
        round_.send_signal(sign)
        assert round_.wait(60) == 130
    else:
        started = psutil.Process(round_.pid).children(recursive=True)
        os.killpg(round_.pid, sign)
        round_.wait(60)
        psutil.wait_procs(started, 60)
        assert "is undone" in type_command(project, "round", "--back").stdout
    assert results(project) == before
    assert not (project / ".whetstone/round").exists()


def test_back_to_the_last_good_state_and_nothing_is_lost(project):
    good = results(project)
    change_params(project, train={"seed": 5}, trial={"verdict": "HOLD"})
    say(project)
    assert type_command(project, "round").returncode == 0
    bad, adapter = sh(project, "git rev-parse HEAD"), "models/adapter/adapter_model.safetensors"
    write_json(project / "metrics/summary.json", {"note": "not committed"})
    done = type_command(project, "round", "--back")
    assert done.returncode == 0, done.stderr
    now = results(project)
    assert {name: now[name] for name in good} == good
    (shard,) = (project / "data/conversations").glob("*-chat-*.jsonl")
    assert "lamp" in shard.read_text()
    assert yaml.safe_load((project / "params.yaml").read_text())["train"]["seed"] == 5
    assert sh(project, "git status --porcelain") == ""
    assert sh(project, "git log -1 --format=%B").rstrip().endswith("Verdict: PROMOTE")
    assert json.loads(sh(project, "git show HEAD~1:metrics/summary.json")) == {"note": "not committed"}
    sh(project, f"git checkout -q {bad.strip()} -- dvc.lock metrics && dvc checkout -f dvc.yaml")
    assert (project / adapter).read_bytes() != good[adapter], "the bad one is still to be had"


def test_going_back_needs_a_good_state_that_is_still_there(project):
    assert "no earlier commit has a candidate whose verdict was PROMOTE" in refused(project, "--back")
    change_params(project, train={"seed": 5}, trial={"verdict": "HOLD"})
    assert type_command(project, "round").returncode == 0
    shutil.rmtree(project / ".dvc/cache/files/md5")
    assert "are not here any more" in refused(project, "--back")
