"""From the inbox to the manifest, on real git and DVC: nothing lost, nothing twice, nothing during a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fine_tuning.commands import command_line
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, read_jsonl
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage import shard_index
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.data_collection.storage.shard_index import ShardIndex, scan_shard
from fine_tuning.data_collection.storage.shards import next_stamp, shard_paths
from fine_tuning.data_collection.storage.tombstones import Tombstones, id_hash
from fine_tuning.schema.conversation import fold, version_hash
from stages import intake
from tests.project import ROOT, Project, new_project
from tests.test_other_chats import insert, jan_message, said, webui_database


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A checkout with DVC and no conversations, whose base is never needed."""
    folder = tmp_path_factory.mktemp("template")
    project = new_project(folder, folder / "base")
    if not (folder / ".dvc").exists():
        project.run("dvc", "init", "-q")
    return folder


@pytest.fixture
def project(template, tmp_path):
    shutil.copytree(template, tmp_path / "checkout", symlinks=True)
    return Project(tmp_path / "checkout")


def log(project):
    return ConversationLogger(project.folder / "inbox/conversations.jsonl")


def shards(project):
    return shard_paths(project.folder / "data/conversations", project.folder / "data/manifest.json")


def versions(project, *ids):
    return ShardIndex.read(shards(project)).newest(set(ids))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command of this room in this process: what it prints, or its one-line error."""

    def run(project, *arguments):
        monkeypatch.chdir(project.folder)
        try:
            command_line.run(command_line.parse([str(word) for word in arguments]))
        except UserError as error:
            return f"error: {error}"
        return capsys.readouterr().out

    return run


@pytest.fixture
def intake_stage(monkeypatch):
    """Run the stage in this process: None, or its one-line error."""

    def run(project):
        monkeypatch.chdir(project.folder)
        try:
            intake.main()
        except UserError as error:
            return str(error)

    return run


def test_seal_makes_an_immutable_shard_and_tracks_it(project, command):
    identity = log(project).log_conversation("What is a lake?", "Water that stays.", {"session_id": "s"})
    log(project).log_feedback(identity, 1)
    command(project, "seal")
    (path,) = shards(project)
    assert path.stat().st_mode & 0o222 == 0
    assert not (project.folder / "inbox/conversations.jsonl").exists()
    assert list((project.folder / "inbox/closed").iterdir()) == []
    assert versions(project, "s")["s"]["feedback"] == [{"message_id": identity, "rating": 1}]
    assert "path: conversations" in (project.folder / "data/conversations.dvc").read_text()
    assert "nothing to seal" in command(project, "seal")


def test_what_is_logged_later_changes_the_newest_version(project, command):
    first = log(project).log_conversation("one", "ONE", {"session_id": "s"})
    command(project, "seal")
    log(project).log_conversation("two", "TWO", {"session_id": "s"})
    log(project).log_edit(first, "Uno")
    log(project).log_conversation("other", "OTHER", id="gone")
    command(project, "seal")
    log(project).log_delete(conversation_id="gone")
    log(project).log_feedback("nobody knows this", 1)
    output = command(project, "seal")
    found = versions(project, "s", "gone")
    assert [m["content"] for m in found["s"]["messages"]] == ["one", "ONE", "two", "TWO"]
    assert found["s"]["feedback"] == [{"message_id": first, "rating": None, "edited": "Uno"}]
    assert found["gone"]["deleted"] and found["gone"]["messages"] == []
    assert "1 unmatched" in output
    assert len(shards(project)) == 3


@pytest.mark.parametrize("step", ["write_shard", "track", "unlink"])
def test_a_seal_that_is_killed_converges_when_it_runs_again(project, step, command):
    for number in range(20):
        log(project).log_conversation(f"q{number}", f"a{number}", id=f"e{number}")
    patched = {
        "write_shard": "import fine_tuning.data_collection.storage.sealing as m; m.write_shard = kill",
        "track": "import fine_tuning.commands.conversations as m; m.track = kill",
        "unlink": "import pathlib; old = pathlib.Path.unlink\n"
        "pathlib.Path.unlink = lambda p, **k: kill() if 'closed' in str(p) else old(p, **k)",
    }[step]
    script = (
        "import os, signal\n"
        "def kill(*a): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{patched}\nimport fine_tuning.commands.conversations as c\nc.seal(None)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project.folder, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    log(project).log_conversation("later", "LATER", id="later")
    command(project, "seal")
    lines = [record["id"] for path in shards(project) for record in read_jsonl(path)]
    assert sorted(lines) == sorted([f"e{n}" for n in range(20)] + ["later"])
    assert "up to date" in project.run("dvc", "status", "data/conversations.dvc")


def test_a_restored_conversation_is_sealed_once_more_and_stays_restored(project, command):
    log(project).log_conversation("Hi", "{{ name }}", {"session_id": "s1"})
    command(project, "seal")
    log(project).log_restore("s1")
    command(project, "seal")
    assert versions(project, "s1")["s1"]["restored"] is True
    log(project).log_feedback(versions(project, "s1")["s1"]["messages"][1]["id"], 1)
    log(project).log_restore("s1")
    command(project, "seal")
    assert len(shards(project)) == 3
    assert versions(project, "s1")["s1"]["restored"] is True, "later versions keep it"
    log(project).log_delete("s1")
    log(project).log_restore("s1")
    command(project, "seal")
    assert versions(project, "s1")["s1"].get("restored") is None, "what was deleted stays deleted"


def test_seal_refuses_while_the_pipeline_runs(project, command):
    log(project).log_conversation("q", "a")
    command(project, "seal")
    stage = project.folder / "stages/intake.py"
    stage.write_text(
        "import pathlib, time\npathlib.Path('running').touch()\n"
        "while pathlib.Path('running').exists(): time.sleep(0.05)\n"
        "pathlib.Path('data/manifest.json').write_text('{\"shards\": []}')\n"
    )
    running = subprocess.Popen(["dvc", "repro", "-q", "intake"], cwd=project.folder, env=os.environ | {"PATH": _path()})
    try:
        while not (project.folder / "running").exists():
            assert running.poll() is None
            time.sleep(0.05)
        log(project).log_conversation("during", "the run")
        before = shards(project)
        output = command(project, "seal")
        assert "a pipeline run is using the conversations" in output and "Traceback" not in output
        assert shards(project) == before
    finally:
        (project.folder / "running").unlink()
        running.wait()
    command(project, "seal")
    assert len(shards(project)) == 2


def test_tombstones_that_come_alone_with_a_merge_are_looked_at(project, command):
    log(project).log_conversation("q", "a", {"session_id": "s1"})
    command(project, "seal")
    assert "is empty" not in project.run("dvc", "repro", "intake")  # the warning of DVC
    project.commit("Before")
    project.run("git", "checkout", "-qb", "other")
    (project.folder / "data/forgotten.jsonl").write_text(f'{{"id": "{id_hash("elsewhere")}", "contents": []}}\n')
    project.commit("Forgotten elsewhere")
    project.run("git", "checkout", "-q", "main")
    (project.folder / "data/forgotten.jsonl").write_text(f'{{"id": "{id_hash("s1")}", "contents": []}}\n')
    project.commit("Forgotten here")
    project.run("git", "merge", "-q", "other", "-m", "Merge")
    assert len(Tombstones(project.folder / "data/forgotten.jsonl")) == 2
    output = project.run("dvc", "repro", "intake", check=False)
    assert "a forgotten conversation came back with a shard: `python -m fine_tuning forget --again`" in output


@pytest.mark.parametrize(
    "line",
    [
        '{"id":"other","messages":[],"id":"gone"}',
        '{"id":"other","messages":[{"id":"m","role":"user","content":"q"}], "i\\u0064" : "gone"}',
        '{"id":5,"messages":[]}',
        '{"id":"other","conversation_id":"gone","user_message":"q","assistant_response":"a"}',
    ],
)
def test_intake_refuses_what_cleaning_would_take_for_a_forgotten_conversation(project, intake_stage, line):
    tombstones = "".join(f'{{"id": "{id_hash(identity)}", "contents": []}}\n' for identity in ("gone", "5"))
    (project.folder / "data/forgotten.jsonl").write_text(tombstones)
    (project.folder / "data/conversations").mkdir()
    shard = project.folder / "data/conversations/20260101T000000000-import-x.jsonl"
    shard.write_text('{"id":"gone","messages":[torn\n{"id":"kept","messages":[]}\n')
    assert intake_stage(project) is None
    shard.with_name("20260102T000000000-import-y.jsonl").write_text(f"{line}\n")
    assert "a forgotten conversation came back with a shard" in intake_stage(project)


def _path():
    return f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"


def test_logging_while_sealing_loses_nothing(project, command):
    script = (
        "from fine_tuning.data_collection.conversation_logger import ConversationLogger\n"
        "import itertools, pathlib\n"
        "logger = ConversationLogger('inbox/conversations.jsonl', durable=False)\n"
        "for n in itertools.count():\n"
        "    logger.log_conversation(f'q{n}', 'a', id=f'e{n}')\n"
        "    pathlib.Path('logged').write_text(str(n))\n"
        "    if pathlib.Path('stop').exists(): break\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=project.folder, env={**os.environ, "PYTHONPATH": "."})
    try:
        for _ in range(3):
            time.sleep(0.3)
            command(project, "seal")
    finally:
        (project.folder / "stop").touch()
        writer.wait()
    command(project, "seal")
    count = int((project.folder / "logged").read_text()) + 1
    lines = [record["id"] for path in shards(project) for record in read_jsonl(path)]
    assert sorted(lines) == sorted(f"e{n}" for n in range(count))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["say", "say", "say", "again", "judge", "edit", "prefer", "delete", "seal", "seal twice"]),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
@example([("say", 0, 0), ("say", 1, 0), ("seal", 0, 0), ("judge", 0, 0), ("prefer", 0, 1)])
@example([("say", 0, 0), ("say", 1, 0), ("delete", 1, 0), ("seal twice", 0, 0)])
@example([("say", 0, 0), ("prefer", 0, 1), ("say", 1, 0), ("seal twice", 0, 0)])
@example([("say", 0, 0), ("seal", 0, 0), ("say", 1, 3), ("delete", 1, 0), ("seal", 0, 0), ("again", 1, 0)])
def test_wherever_a_log_is_sealed_and_however_often_the_conversation_is_the_same(steps):
    """Even numbers regenerate an earlier reply. A log that is sealed twice is one whose seal was killed at its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logger, shards = ConversationLogger(folder / "inbox/log.jsonl", durable=False), folder / "conversations"
        shards.mkdir()
        events, said = [], []

        def seal(times):
            for log in close_log(logger.path, shards):
                events.extend(ConversationLogger(log).read_events())
                for _ in range(times):
                    seal_log(log, shards, folder / "manifest.json", None, folder / "memo")
                log.unlink()

        for kind, one, two in steps:
            if kind.startswith("seal"):
                seal(2 if "twice" in kind else 1)
            elif kind == "say":
                identity = f"e{len(said)}"
                other = {"replaces": said[two % len(said)]} if said and two % 2 == 0 else {}
                said.append(
                    logger.log_conversation(f"q {identity}", identity, {"session_id": "s"} | other, id=identity)
                )
            elif said:
                first, second = said[one % len(said)], said[two % len(said)]
                if kind == "again":
                    logger.log_conversation(f"q {first}", first, {"session_id": "s"}, id=first)
                elif kind == "judge":
                    logger.log_feedback(first, (1, -1, None)[two % 3])
                elif kind == "edit":
                    logger.log_edit(first, f"better {two}")
                elif kind == "prefer":
                    logger.log_preference(first, [second])
                else:
                    logger.log_delete(message_id=first)
        seal(1)
        whole = {}
        fold(events, whole)
        newest = ShardIndex.read(shard_paths(shards)).newest({"s"})
        assert {i: version_hash(c) for i, c in newest.items()} == {i: version_hash(c) for i, c in whole.items()}


def test_sealing_a_long_log_takes_no_more_memory_than_a_short_one(tmp_path):
    peaks, forever = [], "It goes on. " * 40
    for number, exchanges in enumerate((500, 5_000)):
        logger, shards = ConversationLogger(tmp_path / f"{number}/log.jsonl", durable=False), tmp_path / f"{number}/all"
        for exchange in range(exchanges):
            logger.log_conversation("And then?", forever, {"session_id": f"s{exchange // 3}"})
        (log,) = close_log(logger.path, shards)
        tracemalloc.start()
        assert seal_log(log, shards, tmp_path / "manifest.json")["events"] == exchanges
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] < log.stat().st_size, peaks


def test_with_a_reply_go_the_others_to_its_question_and_one_of_those_can_go_alone(tmp_path):
    logger = ConversationLogger(tmp_path / "log.jsonl")
    for number in range(3):
        replaced = {"replaces": f"e{number - 1}"} if number else {}
        logger.log_conversation("q", f"reply {number}", {"session_id": "s"} | replaced, id=f"e{number}")
    logger.log_delete(message_id="e0")
    (talk,) = logger.read_conversations()
    assert "reply 0" not in json.dumps(talk) and "reply 1" in json.dumps(talk)
    logger.log_delete(message_id="e2")
    logger.log_edit("e1", "words about what is gone")
    assert logger.read_conversations() == []
    conversations = {}
    fold(logger.read_events(), conversations)
    fold(logger.read_events(), conversations)
    assert "reply" not in json.dumps(conversations) and "words" not in json.dumps(conversations)


def test_of_two_preferences_of_one_person_the_later_holds(tmp_path):
    logger = ConversationLogger(tmp_path / "log.jsonl")
    for number in range(2):
        replaced = {"replaces": "e0"} if number else {}
        logger.log_conversation("q", f"reply {number}", {"session_id": "s"} | replaced, id=f"e{number}")
    for first, second in (("e0", "e1"), ("e1", "e0"), ("e0", "e1")):
        logger.log_preference(first, [second], by="ann")
        (talk,) = logger.read_conversations()
        assert talk["messages"][1]["id"] == first
        assert [entry["message_id"] for entry in talk["feedback"] if entry.get("over")] == [first]


def test_a_clock_that_goes_back_makes_no_old_shard(tmp_path):
    (tmp_path / "29990101T000000000-chat-x.jsonl").touch()
    assert next_stamp(tmp_path) == "29990101T000000001"


# -----------------------------------------------------------------------------
# import


def test_import_says_what_it_took_and_twice_adds_nothing(project, tmp_path, command):
    file = tmp_path / "foreign.jsonl"
    row = {"prompt": "What is a lake?", "completion": "Water."}
    file.write_text(f"{json.dumps(row)}\nbroken\n{json.dumps(row)}\n")
    output = command(project, "import", str(file))
    assert "recognised prompt-completion (2)" in output
    assert "2 taken, 0 skipped (there already), 1 quarantined" in output
    assert "line 2: not JSON" in output
    assert len(shards(project)) == 1
    output = command(project, "import", str(file))
    assert "0 taken, 2 skipped (there already)" in output
    assert len(shards(project)) == 1
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    assert "1 taken, 2 skipped" in command(project, "import", str(file))


def test_import_says_whose_it_takes_replies_for_and_is_told_the_model(project, tmp_path, command):
    file = tmp_path / "foreign.jsonl"
    turns = [{"role": "user", "content": "What is a lake?"}, {"role": "assistant", "content": "Water."}]
    file.write_text(json.dumps({"messages": [*turns, *turns]}) + "\n")
    said = "2 replies name no model and count as a person's; if a model wrote them: --model NAME"
    assert said in command(project, "import", str(file))
    output = command(project, "import", str(file), "--model", "llama3:8b")
    assert said not in output and "1 taken" in output, "it is a new version of the same conversation"
    assert '"model":"llama3:8b"' in shards(project)[-1].read_text()


def test_of_several_files_with_one_that_cannot_be_read_none_is_taken_and_the_line_says_so(
    project, tmp_path, command, capsys
):
    file = tmp_path / "good.jsonl"
    file.write_text('{"prompt": "What is a lake?", "completion": "Water."}\n')
    output = command(project, "import", str(file), str(tmp_path / "nope"))
    assert output == f"error: none of the 2 files was taken: {tmp_path / 'nope'} is not a file: check its path"
    assert capsys.readouterr().out == "", "nothing is called taken that was not"
    assert shards(project) == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("broken.jsonl", '{"kingfisher\n{"x": "kingfisher"}\n', "broken.jsonl: not JSON): correct the file, or export"),
        ("empty.json", "[]", "empty.json holds no records: check the export"),
        ("header.csv", "prompt,completion\n", "header.csv holds no records: check the export"),
    ],
)
def test_an_import_that_takes_nothing_is_an_error(project, tmp_path, command, name, text, line):
    (tmp_path / name).write_text(text)
    output = command(project, "import", str(tmp_path / name))
    assert output.startswith("error: ") and line in output
    assert "\n" not in output and "kingfisher" not in output
    assert shards(project) == []


@pytest.mark.parametrize("odd", [{"over": -1}, {"over": "kingfisher"}, {"rating": "kingfisher"}, {"message_id": []}])
def test_a_record_whose_feedback_cannot_be_read_is_quarantined(project, tmp_path, command, odd):
    log(project).log_conversation("q", "a", id="x")
    (record,) = log(project).read_conversations()
    lines = [record, record | {"id": "odd", "feedback": [{"message_id": "x", "rating": None} | odd]}]
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    output = command(project, "import", str(tmp_path / "own.jsonl"))
    assert "1 taken, 0 skipped (there already), 1 quarantined" in output
    assert "line 2: whetstone: `feedback` has" in output and "kingfisher" not in output


def write_lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def only_version(project):
    newest = {record["id"]: record for path in shards(project) for record in read_jsonl(path)}
    (record,) = newest.values()
    return record


QUESTION, REPLY = "What is a lake?", "Water that stays."
JUDGED_ROWS = {
    "preference": {"prompt": QUESTION, "chosen": REPLY, "rejected": "A car."},
    "label": {"prompt": QUESTION, "completion": REPLY, "label": False},
}


@pytest.mark.parametrize("name", JUDGED_ROWS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("judged_first", [True, False])
def test_the_same_words_without_their_feedback_take_none_away(project, tmp_path, command, name, together, judged_first):
    rows = {"judged": JUDGED_ROWS[name], "plain": {"prompt": QUESTION, "completion": REPLY}}
    files = [write_lines(tmp_path / f"{kind}.jsonl", row) for kind, row in rows.items()]
    files = files if judged_first else files[::-1]
    for call in [files] if together else [[file] for file in files]:
        command(project, "import", *call)
    record = only_version(project)
    (entry,) = record["feedback"]
    reply = record["messages"][1]
    assert entry["message_id"] == reply["id"]
    if name == "label":
        assert entry["rating"] == -1
    else:
        assert entry["over"] == [reply["alternatives"][0]["id"]] and reply["alternatives"][0]["content"] == "A car."
    before = len(shards(project))
    assert "0 taken, 1 skipped" in command(project, "import", files[0])
    assert len(shards(project)) == before


def test_of_one_person_s_judgements_the_newest_counts_and_those_of_others_stay(project, tmp_path, command):
    talk = {"id": "c", "source": "chat", "started_at": None, "metadata": {}, "restored": True}
    talk["messages"] = [
        {"id": "q", "role": "user", "content": QUESTION},
        {"id": "a", "role": "assistant", "content": REPLY},
    ]
    first = [
        {"message_id": "a", "rating": 1, "by": "ann", "comment": "yes"},
        {"message_id": "a", "rating": None, "by": "ann", "edited": "Still water."},
        {"message_id": "a", "rating": 1, "by": "bob"},
        {"message_id": "q", "rating": None, "comment": "fine"},
    ]
    command(project, "import", write_lines(tmp_path / "1.jsonl", talk | {"feedback": first[:1] + first[2:]}))
    command(project, "import", write_lines(tmp_path / "2.jsonl", talk | {"feedback": first[1:2]}))
    del talk["restored"]
    later = [{"message_id": "a", "rating": -1, "by": "ann"}]
    command(project, "import", write_lines(tmp_path / "3.jsonl", talk | {"feedback": later}))
    record = only_version(project)
    by = {(entry["message_id"], entry.get("by")): entry for entry in record["feedback"]}
    assert len(by) == len(record["feedback"]) == 3 and record["restored"]
    assert by["a", "ann"] == {"message_id": "a", "rating": -1, "by": "ann", "comment": "yes", "edited": "Still water."}
    assert by["a", "bob"]["rating"] == 1 and by["q", None]["comment"] == "fine"
    changed = talk | {"messages": [talk["messages"][0], {"id": "a", "role": "assistant", "content": "Other words."}]}
    command(project, "import", write_lines(tmp_path / "4.jsonl", changed | {"feedback": []}))
    assert only_version(project)["feedback"] == [by["q", None]], "what was said of other words is not said of these"


def test_preferences_over_different_replies_are_joined_and_the_other_way_round_takes_back(project, tmp_path, command):
    rows = [{"prompt": QUESTION, "chosen": REPLY, "rejected": text} for text in ("A car.", "A shoe.")]
    for row in rows:
        command(project, "import", write_lines(tmp_path / "f.jsonl", row))
    record = only_version(project)
    reply = record["messages"][1]
    assert [other["content"] for other in reply["alternatives"]] == ["A shoe.", "A car."]
    assert len({other["id"] for other in reply["alternatives"]}) == 2
    (entry,) = record["feedback"]
    assert set(entry["over"]) == {other["id"] for other in reply["alternatives"]}
    shoe = reply["alternatives"][0]["id"]
    changed = record | {"feedback": [{"message_id": shoe, "rating": None, "over": [reply["id"]]}]}
    command(project, "import", write_lines(tmp_path / "f.jsonl", changed))
    over = {entry["message_id"]: entry.get("over") for entry in only_version(project)["feedback"]}
    assert over == {reply["id"]: None, shoe: [reply["id"]]}


WEBUI = Path(__file__).parent / "open_webui"


def test_open_webui_s_feedback_is_added_to_the_chat_that_is_known(project, command):
    command(project, "import", str(WEBUI / "chats_all.ndjson"))
    output = command(project, "import", str(WEBUI / "feedbacks_export.json"))
    assert "3 taken, 0 skipped (there already), 1 quarantined" in output
    name = "open-webui-11111111-0000-4000-8000-00000000000a"
    lakes = versions(project, name)[name]
    assert [m["content"] for m in lakes["messages"]] == [QUESTION, REPLY, "Thanks!"], "the chat stays whole"
    ratings = [entry["rating"] for entry in lakes["feedback"] if entry["message_id"] == lakes["messages"][1]["id"]]
    assert ratings == [-1], "the same person's newest"
    assert "0 taken, 3 skipped" in command(project, "import", str(WEBUI / "feedbacks_export.json"))
    command(project, "import", str(WEBUI / "chats_all.ndjson"))
    assert len(versions(project, name)[name]["feedback"]) == 2


def test_feedback_on_another_branch_replaces_no_words(project, tmp_path, command):
    (row, *_) = json.loads((WEBUI / "feedbacks_export.json").read_text())
    command(project, "import", str(WEBUI / "chats_all.ndjson"))
    nodes = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    nodes |= {
        "q2": {"parentId": None, "role": "user", "content": "What is a pond?"},
        "a2": {"parentId": "q2", "role": "assistant", "content": "A small lake."},
    }
    row["meta"]["message_id"] = "a2"
    command(project, "import", write_lines(tmp_path / "f.json", [row]))
    whole, branch = (
        "open-webui-11111111-0000-4000-8000-00000000000a",
        "open-webui-11111111-0000-4000-8000-00000000000a-a2",
    )
    found = versions(project, whole, branch)
    assert [len(found[name]["messages"]) for name in (whole, branch)] == [3, 2]
    assert [entry["rating"] for entry in found[branch]["feedback"]] == [-1]


# -----------------------------------------------------------------------------
# following


def chat(number, *texts):
    nodes = {
        f"m{i}": {"parentId": f"m{i - 1}" if i else None, "role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(texts)
    }
    tree = {"history": {"messages": nodes, "currentId": f"m{len(texts) - 1}"}}
    return {"id": f"c{number}", "user_id": "ann", "chat": tree, "created_at": 1_700_000_000}


def test_following_a_live_database_takes_what_is_new_each_time(project, tmp_path, command):
    path, follow = tmp_path / "webui.db", ("import", "--follow", str(tmp_path / "webui.db"))
    with webui_database(path, [chat(1, "q", "a"), chat(2, "r", "b")]) as db:
        assert "2 taken" in command(project, *follow)
        assert "taken" not in command(project, *follow) and len(shards(project)) == 1
        insert(db, "chat", **chat(3, "s", "c"), updated_at=1_800_090_000)
        insert(db, "chat", **chat(1, "q", "a", "more", "d"), updated_at=1_800_090_001)
        assert "2 taken, 1 skipped" in command(project, *follow), "an hour before the last change is read again"
        vote = {"data": {"rating": -1}, "meta": {"chat_id": "c3", "message_id": "m1"}, "user_id": "bob"}
        insert(db, "feedback", id="f", updated_at=1_800_090_002, **vote)
        command(project, *follow)
        found = versions(project, *(f"open-webui-c{n}" for n in (1, 2, 3)))
        assert [len(found[name]["messages"]) for name in sorted(found)] == [4, 2, 2]
        assert found["open-webui-c3"]["feedback"] == [{"message_id": "m1", "rating": -1, "by": "bob"}]
        before = shards(project)
        command(project, *follow)
        assert shards(project) == before
        db.execute("UPDATE chat SET updated_at = updated_at - 1000000")
        db.execute("UPDATE feedback SET updated_at = updated_at - 1000000")
        insert(db, "chat", **chat(4, "t", "e"), updated_at=1_799_000_000)
        assert "1 taken" in command(project, *follow), "an older copy is at its place"


def test_following_a_folder_reads_only_the_files_that_changed(project, tmp_path, command):
    folder = tmp_path / "threads"
    for number in (1, 2):
        (folder / f"t{number}").mkdir(parents=True)
        (folder / f"t{number}/thread.json").write_text("{}")
        text = jan_message(1, "user", said("q"), thread_id=f"t{number}")
        write_lines(
            folder / f"t{number}/messages.jsonl", text, jan_message(2, "assistant", said("a"), thread_id=f"t{number}")
        )
    follow = ("import", "--follow", str(folder))
    assert "2 files read, 0 unchanged" in command(project, *follow)
    assert "0 files read, 2 unchanged" in command(project, *follow)
    with open(folder / "t2/messages.jsonl", "a") as file:
        file.write(json.dumps(jan_message(3, "user", said("more"), thread_id="t2")) + "\n")
    assert "1 file read, 1 unchanged" in command(project, *follow)
    assert [len(c["messages"]) for c in versions(project, "jan-t1", "jan-t2").values()] == [2, 3]


def test_what_was_deleted_here_does_not_come_back_by_following(project, tmp_path, command):
    with webui_database(tmp_path / "webui.db", [chat(1, "q", "a")]) as db:
        command(project, "import", "--follow", str(tmp_path / "webui.db"))
        log(project).log_delete("open-webui-c1")
        command(project, "seal")
        insert(db, "chat", **chat(1, "q", "a", "more", "d"), updated_at=1_800_090_000)
        command(project, "import", "--follow", str(tmp_path / "webui.db"))
        assert versions(project, "open-webui-c1")["open-webui-c1"]["deleted"]
        command(project, "import", str(tmp_path / "webui.db"))
        assert len(versions(project, "open-webui-c1")["open-webui-c1"]["messages"]) == 4, "an import that is asked for"


def type_follow(*paths):
    """`python -m fine_tuning import --follow PATH…`."""
    command_line.run(command_line.parse(["import", "--follow", *paths]))


@pytest.mark.end_to_end
def test_a_follow_that_is_killed_at_any_write_loses_nothing_and_doubles_nothing(project, tmp_path, monkeypatch):
    file = write_lines(
        tmp_path / "f.jsonl", *({"prompt": f"What is {n}?", "completion": "A number."} for n in range(5))
    )
    monkeypatch.chdir(project.folder)
    with webui_database(tmp_path / "webui.db", [chat(n, "q", "a") for n in range(5)]):
        target = f"tests.test_seal_intake:type_follow:{tmp_path / 'webui.db'},{file}"
        words = [sys.executable, "-m", "tests.strike", "kill", target, "5"]
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["kills"] > 3 and told["status"] == 0, done.stderr
        found = [record["id"] for path in shards(project) for record in read_jsonl(path)]
        assert len(found) == len(set(found)) == 10
        type_follow(str(tmp_path / "webui.db"), file)
        assert len([record for path in shards(project) for record in read_jsonl(path)]) == 10


def test_an_import_counts_what_it_could_not_keep_by_reason(project, tmp_path, command):
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    rows = [{"messages": [*said, picture, said[1]]}] * 3 + [{"messages": [picture, said[1]]}] * 12 + [{"a": 1}] * 2
    output = command(project, "import", write_lines(tmp_path / "f.jsonl", *rows))
    assert "3 taken, 0 skipped (there already), 14 quarantined" in output
    assert "  3 times the conversation ends before an image, which is not text" in output
    assert "  and 4 more:" in output
    assert "  2 times messages: a question has an image, which is not text" in output
    assert "  2 times none of the known forms" in output


def test_one_of_a_kind_is_told_in_the_singular(project, tmp_path, command, intake_stage, capsys):
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    output = command(project, "import", write_lines(tmp_path / "f.jsonl", {"messages": [*said, picture, said[1]]}))
    assert "  1 time the conversation ends before an image" in output
    assert "\n1 conversation in data/conversations/" in output
    assert intake_stage(project) is None
    assert "1 shard, 1 of them new, 1 conversation\n" in capsys.readouterr().out


def test_a_preference_that_is_no_list_in_a_shard_stops_no_import_and_no_seal(project, command):
    log(project).log_conversation("q", "a", {"session_id": "s"}, id="x")
    log(project).log_conversation("q", "b", {"session_id": "s", "replaces": "x"}, id="y")
    (record,) = log(project).read_conversations()
    log(project).path.unlink()
    odd = record | {"feedback": [{"message_id": "x", "rating": None, "over": -1, "by": "ann"}]}
    shard = project.folder / "data/conversations/20260101T000000000-chat-x.jsonl"
    shard.parent.mkdir(parents=True, exist_ok=True)
    shard.write_text(f"{json.dumps(odd)}\n")
    log(project).log_preference("y", ["x"], by="ann")
    assert "1 event sealed, 1 conversation new or changed" in command(project, "seal")


def test_the_logger_s_own_file_can_be_imported(project, tmp_path, command):
    ConversationLogger(tmp_path / "other.jsonl").log_conversation("q", "a")
    assert "recognised exchange (1)" in command(project, "import", str(tmp_path / "other.jsonl"))


# -----------------------------------------------------------------------------
# intake


def sealed(command, project, *texts):
    for text in texts:
        log(project).log_conversation(text, text.upper(), id=text)
        command(project, "seal")


def test_intake_lists_shards_in_the_order_of_their_arrival(project, command, intake_stage):
    sealed(command, project, "b", "a")
    assert intake_stage(project) is None
    before = [shard["name"] for shard in read_json(project.folder / "data/manifest.json")["shards"]]
    sealed(command, project, "c")
    assert intake_stage(project) is None
    manifest = read_json(project.folder / "data/manifest.json")
    names = [shard["name"] for shard in manifest["shards"]]
    assert names[:2] == before and len(names) == 3
    assert manifest["total_conversations"] == 3
    assert {shard["source"] for shard in manifest["shards"]} == {"chat"}


def test_a_vanished_shard_is_one_line_with_the_command_that_mends_it(project, command, intake_stage):
    sealed(command, project, "a", "b")
    assert intake_stage(project) is None
    shards(project)[0].unlink()
    output = intake_stage(project)
    assert "is gone: bring it back with `rm -f" in output and "\n" not in output
    assert len(read_json(project.folder / "data/manifest.json")["shards"]) == 2


@pytest.mark.end_to_end
@pytest.mark.parametrize("rewritten", [True, False])
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_the_commands_that_intake_names_bring_the_shard_back(project, command, intake_stage, damage, rewritten):
    sealed(command, project, "a", "b")
    assert intake_stage(project) is None
    project.commit("Two shards")
    sealed(command, project, "newer")
    whole = {path.name: path.read_bytes() for path in shards(project)}
    for number, kept in enumerate([3, 2]):
        path = shards(project)[0]
        path.chmod(0o644)
        path.unlink() if damage == "gone" else path.write_text("{}\n")
        if rewritten:  # what `dvc repro` does before it runs the stage
            project.run("dvc", "add", "-q", "data/conversations")
        told = intake_stage(project)
        assert damage in told
        mend = re.findall("`(.*?)`", told)[number]
        project.run("sh", "-c", f"{mend} --force" if "checkout" in mend else mend)  # it would ask
        assert {p.name: p.read_bytes() for p in shards(project)} == dict(list(whole.items())[:kept])
        assert intake_stage(project) is None or kept == 2  # the newest is gone
        assert {path.stat().st_nlink for path in shards(project)} == {1}, "the cache would be damaged with the shard"


def test_a_changed_shard_is_refused(project, command, intake_stage):
    sealed(command, project, "a")
    assert intake_stage(project) is None
    (path,) = shards(project)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"A", b"B"))
    assert "was changed, and shards never change" in intake_stage(project)


def test_a_link_to_a_shard_that_is_gone_is_one_line(project, command, intake_stage):
    sealed(command, project, "a")
    assert intake_stage(project) is None
    (path,) = shards(project)
    path.unlink()
    path.symlink_to(project.folder / "nowhere")
    output = intake_stage(project)
    assert "is gone: bring it back with `rm -f" in output and "\n" not in output


def test_another_shard_in_the_place_of_one_is_refused_whatever_its_time(project, command, intake_stage):
    sealed(command, project, "a")
    assert intake_stage(project) is None
    (path,) = shards(project)
    before, other = path.stat(), path.with_suffix(".other")
    other.write_bytes(path.read_bytes().replace(b"A", b"B"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert "was changed, and shards never change" in intake_stage(project)


def test_intake_reads_only_shards_that_are_new(project, command, intake_stage, monkeypatch):
    sealed(command, project, "a", "b")
    assert intake_stage(project) is None
    sealed(command, project, "c")
    read = []
    monkeypatch.setattr(shard_index, "scan_shard", lambda path, *others: read.append(path) or scan_shard(path, *others))
    assert intake_stage(project) is None
    assert [project.folder / path for path in read] == shards(project)[2:]
    assert read_json(project.folder / "data/manifest.json")["total_conversations"] == 3


def test_seal_and_import_read_only_shards_that_are_new(project, tmp_path, command, intake_stage, monkeypatch):
    sealed(command, project, "a", "b")
    assert intake_stage(project) is None
    sealed(command, project, "c")
    (tmp_path / "more.jsonl").write_text('{"prompt": "A new one?", "completion": "Yes."}\n')
    read = []
    monkeypatch.setattr(shard_index, "scan_shard", lambda path, *others: read.append(path) or scan_shard(path, *others))
    assert "1 taken" in command(project, "import", str(tmp_path / "more.jsonl"))
    log(project).log_feedback("b", 1, conversation_id="b")
    command(project, "seal")
    assert [project.folder / path for path in read] == shards(project)[2:4]


def test_stats_count_where_the_index_cannot_be_kept(project, command):
    sealed(command, project, "a", "b")
    shutil.rmtree(project.folder / ".whetstone/memo")
    (project.folder / ".whetstone/memo").symlink_to("/nowhere/memo")  # of a disk that is not there
    assert json.loads(command(project, "stats", "--all"))["total_conversations"] == 2


def test_a_shard_that_arrives_meanwhile_asks_for_another_run(project, monkeypatch, command):
    sealed(command, project, "a")
    monkeypatch.chdir(project.folder)

    def arrives(*_):
        (project.folder / "data/conversations/29990101T000000000-chat-x.jsonl").write_text("{}\n")
        return []

    monkeypatch.setattr(intake, "check_append_only", arrives)
    with pytest.raises(UserError, match="run `dvc repro` again"):
        intake.main()
    assert not (project.folder / "data/manifest.json").exists()


def test_no_conversations_is_one_clear_line(project, intake_stage):
    (project.folder / "data/conversations").mkdir(parents=True)
    assert "there are no conversations" in intake_stage(project)


# -----------------------------------------------------------------------------
# the sample


def test_the_sample_is_brought_in_once_and_a_clone_regenerates_it(project, tmp_path, command, intake_stage):
    project.set_params(intake={"sample": True})
    assert "2,026 sample conversations" in command(project, "sample")
    tracked = (project.folder / "data/conversations.dvc").read_text()
    assert "is complete" in command(project, "sample")
    assert intake_stage(project) is None
    project.commit("Sample")
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    clone.run("dvc", "config", "--local", "cache.dir", str(tmp_path / "empty-cache"))
    assert "2,026 sample conversations" in command(clone, "sample")
    assert (clone.folder / "data/conversations.dvc").read_text() == tracked
    assert clone.run("git", "status", "--porcelain").strip() == ""


def test_without_the_sample_nothing_is_brought_in_and_nothing_of_it_is_used(project, command, intake_stage):
    assert "left out" in command(project, "sample")
    project.set_params(intake={"sample": True})
    command(project, "sample")
    sealed(command, project, "mine")
    project.set_params(intake={"sample": False})
    assert intake_stage(project) is None
    assert [s["source"] for s in read_json(project.folder / "data/manifest.json")["shards"]] == ["chat"]


def test_the_sample_never_stands_in_for_shards_that_a_clone_lacks(project, tmp_path, command, intake_stage):
    project.set_params(intake={"sample": True})
    command(project, "sample")
    sealed(command, project, "mine")
    assert intake_stage(project) is None
    project.commit("Own data")
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    output = command(clone, "sample")
    assert "dvc pull data/conversations.dvc" in output and "Traceback" not in output
    assert "nfiles: 2" in (clone.folder / "data/conversations.dvc").read_text()
