"""What a run says of how far it is, and what statistics count."""

import subprocess
import sys

import pytest

from fine_tuning.common.records import read_json, write_json
from fine_tuning.common.stage_times import SAMPLE, TIMES, about, expected_seconds, seconds_left
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import write_shard
from tests.project import ROOT

STAGE = """
from pathlib import Path
from fine_tuning.common.stage_times import run_stage
if __name__ == "__main__":
    run_stage(lambda: print("working"))
"""


def test_the_time_left_is_the_samples_until_stages_have_run_here(tmp_path):
    assert expected_seconds(tmp_path) == SAMPLE
    write_json(tmp_path / TIMES, {"base": 2 * SAMPLE["base"], "train": 2 * SAMPLE["train"], "other": 1, "clean": "x"})
    expected = expected_seconds(tmp_path)
    assert expected == pytest.approx({stage: 2 * seconds for stage, seconds in SAMPLE.items()}), (
        "a machine half as fast"
    )
    assert seconds_left(tmp_path, "evaluate") == pytest.approx(expected["evaluate"] + expected["compare"])
    assert (about(0.2), about(40), about(320)) == ("about 1 s", "about 40 s", "about 5 min")


def test_a_stage_says_how_far_the_run_is_and_keeps_its_time(tmp_path):
    (tmp_path / "package.py").write_text(STAGE)
    done = subprocess.run(
        [sys.executable, "package.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "stage 7 of 9, package: about 4 min to the verdict\nworking\n", done.stderr
    assert list(read_json(tmp_path / TIMES)) == ["package"]


def test_statistics_say_where_the_conversations_are_and_leave_out_the_deleted(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    messages = [{"id": "u", "role": "user", "content": "Hi"}, {"id": "a", "role": "assistant", "content": "Hello."}]
    talks = [{"id": name, "messages": messages, "feedback": [], "metadata": {}} for name in ("one", "two")]
    write_shard(tmp_path / "data/conversations", "20260101T000000000-import", talks)

    def stats(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fine_tuning", "stats", *words]
        return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    done = stats()
    assert '"total_conversations": 0' in done.stdout
    assert done.stderr == "nothing was logged since the last seal; --all counts the 2 sealed ones\n"
    assert '"total_conversations": 2' in stats("--all").stdout
    ConversationLogger(tmp_path / "inbox/conversations.jsonl").log_delete("one")
    assert '"total_conversations": 1' in stats("--all").stdout
